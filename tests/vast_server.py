"""A loopback server that answers like Vast's API to the real ``vastai`` client, and checks it.

    with VastServer() as vast:
        environment = {"VAST_URL": vast.url, "VAST_API_KEY": vast.api_key}
        ...
        assert vast.unexpected == []

It knows the requests of vastai 1.9.1: search ``POST /api/v0/bundles/``, create ``PUT
/api/v0/asks/ID/``, list ``GET /api/v1/instances/``, show ``GET /api/v0/instances/ID/?owner=me``,
start, stop and label ``PUT /api/v0/instances/ID/``, destroy ``DELETE /api/v0/instances/ID/``, logs
``PUT /api/v0/instances/request_logs/ID/`` and the address that this names. An instance is
*loading*, then *running*, then gone. Whoever asks has the account's key, or the key of one
instance, which opens that instance alone and dies with it.

``misbehave`` makes one kind of request go wrong, with a status or in a way of its own:

    vast.misbehave("destroy", 500)          # also 401, 403, 404, 429, ...
    vast.misbehave("destroy", "hang")       # never answers
    vast.misbehave("destroy", "hang up")    # closes the connection without an answer
    vast.misbehave("destroy", "refuse")     # 200, and success is false
    vast.misbehave("destroy", "pretend")    # says success, and keeps the instance
    vast.misbehave("destroy", "nonsense")   # 200, and no JSON
    vast.misbehave("destroy", None)         # well again
    vast.misbehave("destroy", 500, times=2) # well again after two such requests
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from loopback import LoopbackServer
from vast_schema import matches, wrong_creation, wrong_search

__all__ = ["Request", "VastInstance", "VastServer", "offer"]

#: Instances on one page of a list.
PAGE = 25

_ROUTES = (
    ("search", "POST", r"/api/v0/bundles/"),
    ("create", "PUT", r"/api/v0/asks/(\d+)/"),
    ("list", "GET", r"/api/v1/instances/"),
    ("show", "GET", r"/api/v0/instances/(\d+)/"),
    ("logs", "PUT", r"/api/v0/instances/request_logs/(\d+)/"),
    ("change", "PUT", r"/api/v0/instances/(\d+)/"),
    ("destroy", "DELETE", r"/api/v0/instances/(\d+)/"),
    ("result", "GET", r"/instance_logs/(\d+)\.log"),
    # The command line asks for these beside its work: whose account it is, and, without a key
    # when its modules are imported, for names.
    ("account", "GET", r"/api/v0/users/current/?"),
    ("gpu names", "GET", r"/api/v0/gpu_names/unique/"),
    ("gpu types", "GET", r"/api/v0/gpu_types/"),
)

#: Requests that need no key.
_OPEN = ("result", "gpu names", "gpu types")

_ERRORS = {401: "auth_error", 403: "not_authorized", 404: "no_such_instance", 429: "too_many"}


@dataclass
class Request:
    """A request as it came."""

    kind: str
    method: str
    path: str
    query: dict[str, str]
    key: str | None
    body: Any
    agent: str


@dataclass
class VastInstance:
    """An instance as the service knows it."""

    id: int
    offer: dict[str, Any]
    #: The request that made it.
    body: dict[str, Any]
    #: Key that its own processes have as ``CONTAINER_API_KEY``.
    key: str
    status: str = "loading"
    label: str | None = None
    #: What ``logs`` shows.
    log: str = ""
    started_s: float = field(default_factory=time.time)

    @property
    def environment(self) -> dict[str, str]:
        """What its processes find in their environment: the variables asked for, and Vast's."""
        asked = {name: text for name, text in self.body["env"].items() if name[:1] != "-"}
        own = {"CONTAINER_ID": str(self.id), "CONTAINER_API_KEY": self.key}
        return asked | own | {"VAST_CONTAINERLABEL": f"C.{self.id}"}

    def row(self) -> dict[str, Any]:
        names = ("gpu_name", "num_gpus", "machine_id", "geolocation", "dph_total", "disk_space")
        return {
            **{name: self.offer[name] for name in names},
            **{"id": self.id, "label": self.label, "image_uuid": self.body["image"]},
            **{"actual_status": self.status, "cur_state": self.status, "status_msg": ""},
            **{"intended_status": "running", "onstart": self.body["onstart"]},
            "start_date": self.started_s,
            "extra_env": [list(pair) for pair in self.body["env"].items()],
            **{"ssh_host": "ssh1.vast.example", "ssh_port": 10_000 + self.id % 1000},
        }


def offer(number: int, **differences: Any) -> dict[str, Any]:
    """An offer of one RTX 4090, or of what differs."""
    return {
        **{"id": number, "ask_contract_id": number, "machine_id": 100 + number, "host_id": 7},
        **{"gpu_name": "RTX 4090", "num_gpus": 1, "gpu_ram": 24_564, "gpu_arch": "nvidia"},
        **{"cuda_max_good": 12.8, "cpu_arch": "amd64", "cpu_cores_effective": 16.0},
        **{"cpu_ram": 64_000, "disk_space": 500.0, "dph_total": 0.40, "reliability": 0.995},
        **{"inet_down": 900.0, "inet_up": 900.0, "inet_down_cost": 0.002, "inet_up_cost": 0.002},
        **{"geolocation": "Sweden, SE", "direct_port_count": 20, "duration": 2_000_000.0},
        **{"verified": True, "external": False, "rentable": True, "rented": False},
        "hosting_type": 1,
        **differences,
    }


class VastServer(LoopbackServer):
    """The server, in threads of its own; its state may be looked at and changed at any time."""

    def __init__(self, api_key: str = "vast-account-key-of-a-test") -> None:
        super().__init__()
        self.api_key = api_key
        self.offers = [offer(11), offer(12, dph_total=0.55), offer(13, gpu_name="H100 SXM")]
        #: Living instances by number.
        self.instances: dict[int, VastInstance] = {}
        #: Numbers of instances that were destroyed.
        self.destroyed: list[int] = []
        self.requests: list[Request] = []
        #: Requests that the real service would not know, or not accept.
        self.unexpected: list[str] = []
        #: So often an instance is seen *loading* before it runs.
        self.loads = 0
        #: So often an instance is still seen after it was destroyed, and its key still opens it.
        self.lingers = 0
        #: So often the address of a log says 404 before the log is there.
        self.log_waits = 0
        #: Make an instance, and close the connection without a word on it.
        self.drops_after_creation = False
        self._faults: dict[str, int | str] = {}
        self._times_left: dict[str, int] = {}
        self._seen: dict[tuple[str, int], int] = {}
        self._logs_asked_for: dict[int, str] = {}
        self._lock = threading.RLock()
        self._next_id = 40_001
        self._listen(_handler(self))

    def misbehave(self, kind: str, fault: int | str | None, times: int | None = None) -> None:
        """Let requests of one kind go wrong, or well again; the module says how."""
        self._times_left.pop(kind, None)
        if times is not None:
            self._times_left[kind] = times
        assert any(kind == name for name, *_ in _ROUTES), kind
        if fault is None:
            self._faults.pop(kind, None)
        else:
            self._faults[kind] = fault

    def launch(self, status: str = "running", **body: Any) -> VastInstance:
        """An instance that is there already, as if somebody had launched it."""
        asked = {"image": "debian", "env": {}, "onstart": None, **body}
        with self._lock:
            return self._launch(self.offers[0], asked, status)

    def of_kind(self, kind: str) -> list[Request]:
        """The requests of one kind that came so far."""
        return [request for request in self.requests if request.kind == kind]

    def _launch(self, taken: dict[str, Any], body: dict[str, Any], status: str) -> VastInstance:
        number, self._next_id = self._next_id, self._next_id + 1
        instance = VastInstance(number, taken, body, f"instance-key-{number}", status)
        instance.label = body.get("label")
        self.instances[number] = instance
        return instance

    def _times(self, what: str, number: int) -> int:
        """How often this was asked before."""
        count = self._seen.get((what, number), 0)
        self._seen[what, number] = count + 1
        return count

    def _count_fault(self, kind: str) -> None:
        left = self._times_left.get(kind)
        if left == 0:
            self.misbehave(kind, None)
        elif left is not None:
            self._times_left[kind] = left - 1

    def _answer(self, request: Request) -> tuple[int, Any]:
        """A status and a body; None for no answer at all."""
        found = re.search(r"(\d+)(?:/|\.log)?$", request.path)
        number = int(found[1]) if found else 0
        fault = self._faults.get(request.kind)
        if isinstance(fault, int):
            return _error(fault, f"error {fault}: as the test wants it")
        if fault == "refuse":
            return 200, {"success": False, "error": "invalid_args", "msg": "as the test wants it"}
        if fault == "nonsense":
            return 200, "<html>maintenance</html>"
        if request.kind not in _OPEN and not self._may(request, number):
            return _error(401, "Invalid user key" if request.key else "Please log in or sign up")
        answers: dict[str, Callable[[Request, int], tuple[int, Any]]] = {
            **{"search": self._search, "create": self._create, "list": self._list},
            **{"show": self._show, "change": self._change, "destroy": self._destroy},
            **{"logs": self._logs, "result": self._result},
            "account": lambda *_: (200, {"id": 7, "host_agreement_accepted": False}),
            "gpu names": lambda *_: (200, {"gpu_names": sorted(self._gpu_names())}),
            "gpu types": lambda *_: (200, {"gpu_types": []}),
        }
        return answers[request.kind](request, number)

    def _gpu_names(self) -> set[str]:
        return {one["gpu_name"] for one in self.offers}

    def _may(self, request: Request, number: int) -> bool:
        if request.key == self.api_key:
            return True
        instance = self.instances.get(number)
        return (
            instance is not None
            and request.key == instance.key
            and request.kind in ("show", "change", "destroy", "logs")
        )

    def _search(self, request: Request, _: int) -> tuple[int, Any]:
        if wrong := wrong_search(request.body):
            return self._refuse(request, wrong)
        found = [dict(one) for one in self.offers if matches(one, request.body)]
        for name, direction in reversed(request.body.get("order", [])):
            found.sort(key=lambda one: one.get(name, 0), reverse=direction == "desc")
        return 200, {"offers": found[: request.body.get("limit", 64)]}

    def _create(self, request: Request, number: int) -> tuple[int, Any]:
        if wrong := wrong_creation(request.body):
            return self._refuse(request, wrong)
        taken = next((one for one in self.offers if one["id"] == number), None)
        if taken is None or not taken["rentable"]:
            text = f"error 404/3603: no_such_ask Instance type by id {number} is not available."
            return 404, {"success": False, "error": "invalid_args", "msg": text, "ask_id": number}
        if self._faults.get("create") == "pretend":
            return 200, {"success": True, "new_contract": self._next_id}
        taken["rentable"] = False
        new = self._launch(taken, request.body, "loading")
        return 200, {"success": True, "new_contract": new.id, "instance_api_key": new.key}

    def _list(self, request: Request, _: int) -> tuple[int, Any]:
        after = int(request.query.get("after_token", "0"))
        later = [one for one in sorted(self.instances) if one > after]
        page = later[:PAGE]
        return 200, {
            "instances": [self._row(self.instances[one]) for one in page],
            "next_token": str(page[-1]) if len(later) > PAGE else None,
            "total_instances": len(self.instances),
        }

    def _show(self, request: Request, number: int) -> tuple[int, Any]:
        if request.query.get("owner") != "me":
            return self._refuse(request, "owner is not me")
        instance = self.instances.get(number)
        dying = instance is not None and number in self.destroyed
        if dying and self._times("linger", number) >= self.lingers:
            instance = None
            del self.instances[number]
        return 200, {"instances": None if instance is None else self._row(instance)}

    def _row(self, instance: VastInstance) -> dict[str, Any]:
        if instance.status == "loading" and self._times("load", instance.id) >= self.loads:
            instance.status = "running"
        return instance.row()

    def _change(self, request: Request, number: int) -> tuple[int, Any]:
        if number not in self.instances:
            return _error(404, f"no such instance {number}")
        if "label" in request.body:
            self.instances[number].label = request.body["label"]
        elif request.body.get("state") in ("running", "stopped"):
            self.instances[number].status = request.body["state"]
        else:
            return self._refuse(request, f"cannot change {request.body!r}")
        return 200, {"success": True}

    def _destroy(self, request: Request, number: int) -> tuple[int, Any]:
        if request.body != {}:
            return self._refuse(request, f"body is {request.body!r}")
        if number not in self.instances or number in self.destroyed:
            return _error(404, f"error 404: no_such_instance Instance {number} not found.")
        if self._faults.get("destroy") != "pretend":
            self.destroyed.append(number)
            if not self.lingers:
                del self.instances[number]
        return 200, {"success": True, "msg": f"Instance {number} will be destroyed."}

    def _logs(self, request: Request, number: int) -> tuple[int, Any]:
        if not request.body.keys() <= {"tail", "filter", "daemon_logs"}:
            return self._refuse(request, f"body is {request.body!r}")
        if number not in self.instances:
            return _error(404, f"error 404: no_such_instance Instance {number} not found.")
        self._seen.pop(("log", number), None)
        lines = self.instances[number].log.splitlines(keepends=True)
        tail = int(request.body.get("tail", 1000))
        self._logs_asked_for[number] = "".join(lines[-tail:])
        return 200, {"success": True, "result_url": f"{self.url}/instance_logs/{number}.log"}

    def _result(self, _: Request, number: int) -> tuple[int, Any]:
        if self._times("log", number) < self.log_waits or number not in self._logs_asked_for:
            return 404, "<Error><Code>NoSuchKey</Code></Error>"
        return 200, self._logs_asked_for[number]

    def _refuse(self, request: Request, wrong: str) -> tuple[int, Any]:
        self.unexpected.append(f"{request.method} {request.path}: {wrong}")
        return _error(400, f"error 400: invalid_args {wrong}")


def _error(status: int, text: str) -> tuple[int, Any]:
    return status, {"success": False, "error": _ERRORS.get(status, "error"), "msg": text}


def _handler(vast: VastServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _handle(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            kind = next(
                (
                    name
                    for name, method, path in _ROUTES
                    if method == self.command and re.fullmatch(path, parts.path)
                ),
                "unknown",
            )
            key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            body = json.loads(text) if text else None
            agent = self.headers.get("User-Agent") or ""
            with vast._lock:
                vast.requests.append(
                    Request(kind, self.command, parts.path, query, key or None, body, agent)
                )
                vast._count_fault(kind)
                fault = vast._faults.get(kind)
                known = agent.startswith("vastai-") or (
                    # The on-start script's, where it can have nothing better.
                    agent.startswith("curl/") and kind in ("destroy", "show")
                )
                if kind == "unknown" or (kind not in _OPEN and not known):
                    vast.unexpected.append(f"{self.command} {self.path} from {agent!r}")
                    status, answer = 404, {"success": False, "msg": "no such page"}
                elif fault not in ("hang", "hang up"):
                    status, answer = vast._answer(vast.requests[-1])
            if kind == "create" and vast.drops_after_creation and status == 200:
                fault = "hang up"
            if fault in ("hang", "hang up"):
                if fault == "hang":
                    vast._ended.wait()
                self.close_connection = True
                return
            self._send(status, answer)

        def _send(self, status: int, answer: Any) -> None:
            plain = isinstance(answer, str)
            text = (answer if plain else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if plain else "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_DELETE = _handle

    return Handler
