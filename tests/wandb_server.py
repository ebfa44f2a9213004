"""A loopback server that speaks W&B's protocol to the real client, and misbehaves when told to.

    with WandbServer() as server:
        # a client with WANDB_BASE_URL=server.url and WANDB_API_KEY=<40 hexadecimal characters>
        server.wait_until(lambda: server.runs["tester/project/run-id"].state == "finished")
        server.misbehave("file_stream", status=403, for_s=25)

It takes what `wandb.init`, `log`, `finish`, `Artifact`, `alert`, `wandb sync` and `wandb.Api` send
(0.31): GraphQL (`wandb_schema`), the file stream, and uploads to addresses that it hands out. What
it holds is in `wandb_store`. Alone, `python tests/wandb_server.py [PORT]` serves until it is ended.

**Which step has the server?** `CONFIRM_QUERY` below: a part of what wandb-core 0.31 asks at a
resume, so the service must answer it (not tried there: no network here). POST to
`<base url>/graphql`, JSON `{"query": CONFIRM_QUERY, "variables": {"entity": …, "project": …,
"run": …}}`, over HTTP basic authentication: user `api`, password the API key. `model` is null where
there is no such project, `bucket` where there is no such run. `historyLineCount` is the number of
rows. `historyTail` is the JSON of a list of JSON texts, the last of which is the last row, with its
`_step`; wandb-core computes `starting_step` from these two. Here a row counts from the moment in
which its file stream request is answered with 200. (`summaryMetrics` and `historyKeys`, with its
`lastStep`, are answered as well.)
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import unquote

from aiohttp import web
from wandb_graphql import QueryError, execute, parse
from wandb_schema import Schema, plain
from wandb_store import CRASHED_AFTER_S, ServerArtifact, ServerRun, Store

CONFIRM_QUERY = """
query RaywbConfirm($entity: String, $project: String, $run: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $run, missingOk: true) { historyLineCount historyTail }
  }
}
"""

#: What can be told to misbehave, one by one or together.
KINDS = ("graphql", "file_stream", "files")

#: Pause between two bytes of an answer that trickles, in seconds.
TRICKLE_PAUSE_S = 0.25

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class _Fault:
    """Answers of one kind that are errors, until a time or for a number of requests."""

    status: int
    until: float | None
    times: int | None
    headers: dict[str, str]

    def strikes(self) -> bool:
        """Whether the next request is to fail; counts it."""
        if self.until is not None and time.monotonic() >= self.until:
            return False
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


class WandbServer:
    """The server, in a thread of its own; every method may be called from any thread.

    Args:
        entity: The entity of a client that names none.
        api_key: The only key to be let in; any where it is None.
        crashed_after_s: How long after its last heartbeat a run is crashed.
        port: Where to listen; 0 takes a free port, which it then keeps.
    """

    def __init__(
        self,
        *,
        entity: str = "tester",
        api_key: str | None = None,
        crashed_after_s: float = CRASHED_AFTER_S,
        port: int = 0,
    ) -> None:
        self.store = Store(entity, crashed_after_s)
        self.api_key = api_key
        self.port = port
        #: Requests that came, by kind, and by operation (`graphql:UpsertBucket`).
        self.requests: Counter[str] = Counter()
        #: Requests that were answered with an error on purpose, or left hanging, by kind.
        self.disturbed: Counter[str] = Counter()
        #: Keys that clients showed.
        self.api_keys: set[str] = set()
        #: What clients asked and this server could not answer: a gap in it, or in the query.
        self.errors: list[str] = []
        self._faults: dict[str, _Fault] = {}
        self._hanging: dict[str, asyncio.Event] = {}
        self._trickling: set[str] = set()
        self._schema = Schema(self.store, lambda: self.url)
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wandb-server")
        self._runner: web.AppRunner | None = None

    # -- the handle ------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen; returns when clients may come."""
        self._thread.start()
        self.listen_again()
        return self

    def stop(self) -> None:
        """End every request and the thread."""
        self.behave()
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What goes into WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def runs(self) -> dict[str, ServerRun]:
        """Runs by `entity/project/run_id`."""
        with self.store.changed:
            return dict(self.store.runs)

    @property
    def artifacts(self) -> list[ServerArtifact]:
        """Artifact versions, in the order in which they came."""
        with self.store.changed:
            return list(self.store.artifacts)

    @property
    def listens(self) -> bool:
        """Whether it can be reached at all."""
        return self._runner is not None

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait for something to become true, looking after each request that was taken in.

        Raises:
            TimeoutError: It did not in that time.
        """
        with self.store.changed:
            # A crash is the absence of requests: so look now and then without one, too.
            deadline = time.monotonic() + timeout_s
            while not holds():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"not within {timeout_s} s; requests: {dict(self.requests)}")
                self.store.changed.wait(min(left_s, 0.25))

    # -- misbehaviour ----------------------------------------------------------------------------

    def misbehave(
        self,
        kind: str = "all",
        *,
        status: int,
        for_s: float | None = None,
        times: int | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Answer requests with an error, until `behave`, for a time, or so many times.

        Args:
            kind: One of `KINDS`, or "all".
            status: The HTTP status to answer with.
            for_s: For how long.
            times: For how many requests of each kind.
            retry_after_s: What to put into the Retry-After header, if anything.
        """
        until = None if for_s is None else time.monotonic() + for_s
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        with self._lock:
            for one in _kinds(kind):
                self._faults[one] = _Fault(status, until, times, headers)

    def hang(self, kind: str = "all") -> None:
        """Accept requests and leave them unanswered until `behave`, which lets them go on."""
        with self._lock:
            for one in _kinds(kind):
                self._hanging.setdefault(one, asyncio.Event())

    def trickle(self, kind: str = "all") -> None:
        """Answer requests byte by byte, so slowly that no answer is ever whole, until `behave`."""
        with self._lock:
            self._trickling.update(_kinds(kind))

    def behave(self, kind: str = "all") -> None:
        """End errors, hanging and trickling."""
        with self._lock:
            for one in _kinds(kind):
                self._faults.pop(one, None)
                self._trickling.discard(one)
                event = self._hanging.pop(one, None)
                if event is not None:
                    self._loop.call_soon_threadsafe(event.set)

    def refuse(self) -> None:
        """Stop listening, and cut the connections there are."""
        runner, self._runner = self._runner, None
        if runner is not None:
            self._do(runner.cleanup())

    def listen_again(self) -> None:
        """Listen (again), on the same port."""
        if self._runner is None:
            self._do(self._listen())

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    # -- HTTP ------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._gate])
        app.router.add_post("/graphql", self._graphql)
        app.router.add_post("/files/{entity}/{project}/{run}/file_stream", self._file_stream)
        app.router.add_put("/storage/{path:.+}", self._put)
        app.router.add_get("/storage/{path:.+}", self._get)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        self.port = runner.addresses[0][1]
        self._runner = runner

    @web.middleware
    async def _gate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count, hang, fail or check the key; then let the request through."""
        kind = _kind(request.path)
        with self._lock:
            self.requests[kind] += 1
            hanging = self._hanging.get(kind)
            fault = self._faults.get(kind)
            strikes = hanging is None and fault is not None and fault.strikes()
            self.disturbed[kind] += hanging is not None or strikes
        if hanging is not None:
            await hanging.wait()
        elif strikes and fault is not None:
            text = f"{fault.status}, as the test asked"
            return web.json_response({"error": text}, status=fault.status, headers=fault.headers)
        if kind != "files" and not self._admits(request):
            return web.json_response({"error": "user is not logged in"}, status=401)
        response = await handler(request)
        with self.store.changed:
            self.store.changed.notify_all()
        if kind in self._trickling and isinstance(response, web.Response):
            return await self._slowly(request, response, kind)
        return response

    async def _slowly(
        self, request: web.Request, whole: web.Response, kind: str
    ) -> web.StreamResponse:
        """The same answer, a byte at a time: no pause is long enough to look like an end."""
        body = whole.body if isinstance(whole.body, bytes) else b""
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(body)
        await response.prepare(request)
        for index in range(len(body)):
            await response.write(body[index : index + 1])
            if kind in self._trickling:
                await asyncio.sleep(TRICKLE_PAUSE_S)
        return response

    def _admits(self, request: web.Request) -> bool:
        """Note the key of HTTP basic authentication, and say whether it is let in."""
        scheme, _, coded = request.headers.get("Authorization", "").partition(" ")
        try:
            key = base64.b64decode(coded).decode().partition(":")[2] if scheme == "Basic" else ""
        except (binascii.Error, UnicodeDecodeError):
            key = ""
        if key:
            self.api_keys.add(key)
        return bool(key) if self.api_key is None else key == self.api_key

    async def _graphql(self, request: web.Request) -> web.Response:
        asked = json.loads(await request.read())
        try:
            document = parse(asked["query"])
            with self._lock:
                self.requests[f"graphql:{document.name}"] += 1
            with self.store.changed:
                root = self._schema.roots(document.kind)
                data = execute(document, asked.get("variables"), root)
        except QueryError as error:
            with self._lock:
                self.errors.append(str(error))
            return web.json_response(
                {"data": None, "errors": [{"message": str(error)}]}, status=400
            )
        return web.json_response({"data": plain(data)})

    async def _file_stream(self, request: web.Request) -> web.Response:
        payload = json.loads(await request.read())
        path = "/".join(request.match_info[name] for name in ("entity", "project", "run"))
        with self.store.changed:
            run = self.store.runs.get(path)
            if run is None:
                return web.json_response({"error": f"run {path} not found"}, status=404)
            run.stream(payload)
        return web.json_response({"exitcode": None, "limits": {}})

    async def _put(self, request: web.Request) -> web.Response:
        path = unquote(request.match_info["path"])
        known = self.store.put_file(path, await request.read())
        return web.Response(status=200 if known else 404)

    async def _get(self, request: web.Request) -> web.Response:
        body = self.store.get_file(unquote(request.match_info["path"]))
        return web.Response(status=404) if body is None else web.Response(body=body)


def _kind(path: str) -> str:
    if path == "/graphql":
        return "graphql"
    return "file_stream" if path.endswith("/file_stream") else "files"


def _kinds(kind: str) -> tuple[str, ...]:
    if kind != "all" and kind not in KINDS:
        raise ValueError(f"{kind!r} is not one of {', '.join(KINDS)}, all")
    return KINDS if kind == "all" else (kind,)


if __name__ == "__main__":
    with WandbServer(port=int(sys.argv[1]) if len(sys.argv) > 1 else 0) as alone:
        print(alone.url, flush=True)
        threading.Event().wait()
