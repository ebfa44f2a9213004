"""The listener inside the actor: takes journal bytes over HTTP, and tells the pace.

    POST /v1/frames?source=<32 hex>&offset=<n>[&gap=1][&rows=<n>]      body: whole frames or none
    → 200 {"end": <n>, "durable": <n>, "pace_s": <seconds>, "keep_alive_s": <seconds>,
           "ended": <bool>, "home": <bool>, "run_closed": <bool>}

    PUT /v1/blobs/<sha-256 in hex>?offset=<n>&size=<n>      body: a piece, may be empty
    → 200 {"end": <n>, "whole": <bool>}

both with ``Authorization: Bearer <token>``, ``X-Raywb-Cluster`` and ``X-Raywb-Protocol``. ``end``
is where this source's journal ends here after the request, whether the body was taken or not: a
client whose offset was another one goes there. What lies before ``durable`` has been forced to
the disk as far as the settings ask for it, and may be deleted at the source. An empty body asks
without giving. ``rows`` is how many rows the source has logged, and makes the request its own word
that it lives; it gives one at least every ``keep_alive_s``. ``ended``: the last that is here of the
source is its end, which was written in its place when it is also ``home``. Blobs are the contents
of artifacts: they come in pieces on a lane of their own, so that they delay no rows.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hmac
import logging
import math
import re
import socket
import time
from collections import deque
from collections.abc import Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from raywb.errors import FrameError
from raywb.rows import MAX_ARTIFACT_BYTES, PROTOCOL, is_digest
from raywb.service.blobs import BlobStore
from raywb.service.ledger import Ledger
from raywb.service.liveness import Liveness
from raywb.view.page.application import Page
from raywb.view.page.entitled import is_loopback_address

__all__ = ["MAX_BODY_BYTES", "Ingest"]

_log = logging.getLogger(__name__)

#: Largest body that is read; the client sends about a quarter of it.
MAX_BODY_BYTES = 8 * 1024 * 1024

#: Bodies that are in memory at the same time; after an outage everybody comes at once.
BODIES_AT_ONCE = 16

#: Longest that a body may take to come, and longest that nothing may come of it, in seconds:
#: whoever is stopped in the middle of a request must not keep the others waiting.
BODY_TIMEOUT_S = 60.0
BODY_STALL_S = 5.0

#: Longest that a connection may stay which has not shown the token, in seconds, and how many of
#: these there may be.
STRANGER_S = 10.0
MAX_STRANGERS = 500

#: Connections of pages that may stay like those that have shown the token.
MAX_PAGES = 256

#: Pieces of blobs that are in memory at the same time. Who finds no place is told to come again.
PIECES_AT_ONCE = 8

#: Requests a second that all sources together are asked to keep to.
REQUESTS_PER_S = 400.0

#: Shortest and longest time between two requests of one source that is asked for, in seconds.
PACE_RANGE_S = (0.25, 60.0)

#: How often the pace is worked out, in seconds.
PACE_EVERY_S = 1.0

#: A source that sent nothing for longer counts as one that only says that it lives.
LIVE_S = 60.0

#: The part of the requests that may be used for saying so.
KEEP_ALIVE_SHARE = 0.25

_SOURCE_ID = re.compile(r"[0-9a-f]{32}")
_OFFSET = re.compile(r"[0-9]{1,19}")


def paces(live: int, quiet: int, silent_after_s: float) -> tuple[float, float]:
    """How often sources are asked to come, so that all together stay within the bound.

    Args:
        live: sources that have something to give.
        quiet: sources that only say that they live.
        silent_after_s: how soon their silence would be noticed, in seconds.

    Returns:
        Seconds between two requests of a live source, and of a quiet one.
    """
    shortest, longest = PACE_RANGE_S
    keep_alive_s = max(silent_after_s / 3, quiet / (KEEP_ALIVE_SHARE * REQUESTS_PER_S))
    left_per_s = REQUESTS_PER_S - quiet / keep_alive_s
    pace_s = min(max(live / left_per_s, shortest), longest)
    return pace_s, max(keep_alive_s, pace_s)


class KeepAlives:
    """Which times between two words sources were asked for; each keeps to what it was told last.

    Times are the caller's, in seconds.
    """

    def __init__(self) -> None:
        #: Until when one may keep to a time, and the time: each is shorter than the one before
        #: it, and is kept to for longer.
        self._asked: deque[tuple[float, float]] = deque()

    def note(self, keep_alive_s: float, now_s: float) -> None:
        """From now on this is asked for, until the pace is worked out again."""
        asked, until_s = self._asked, now_s + PACE_EVERY_S + keep_alive_s
        while asked and asked[-1][1] <= keep_alive_s:
            asked.pop()
        while asked and asked[0][0] < now_s:
            asked.popleft()
        if not asked or asked[-1][0] < until_s:
            asked.append((until_s, keep_alive_s))

    def longest(self, now_s: float) -> float | None:
        """The longest time that a source may still keep to; None when none was told any."""
        return next((asked_s for until_s, asked_s in self._asked if until_s >= now_s), None)


class Ingest:
    """HTTP front of the ledger.

    Args:
        ledger: where accepted bytes go.
        token: what a client has to show.
        cluster_id: requests from any other cluster are refused.
        fsync: see :class:`raywb.Settings`; it may change with the run.
        on_append: called after each append.
        liveness: which sources have not ended.
        silent_after_s: see :class:`raywb.Settings`.
        run_closed: whether the last run is finished, and W&B has closed it.
    """

    def __init__(
        self,
        ledger: Ledger,
        token: str,
        cluster_id: str,
        fsync: str,
        *,
        on_append: Callable[[], None],
        liveness: Liveness,
        silent_after_s: float,
        run_closed: Callable[[], bool],
    ) -> None:
        self._ledger = ledger
        self._pieces = 0
        self.fsync = fsync
        self._token = token
        self._cluster_id = cluster_id
        self._on_append = on_append
        self._liveness = liveness
        self._silent_after_s = silent_after_s
        self._run_closed = run_closed
        self._pace_s = PACE_RANGE_S[0]
        self._keep_alive_s = silent_after_s / 3
        self._asked = KeepAlives()
        self._paced_at = -math.inf
        self._runner: web.AppRunner | None = None
        self._reading = asyncio.Semaphore(BODIES_AT_ONCE)
        #: Connections that have shown the token.
        self._known: set[RequestHandler] = set()
        #: Connections on which a page was answered.
        self._pages: set[RequestHandler] = set()
        self._doorman: asyncio.Task[None] | None = None
        #: Port on which loopback answers; None where it could not be had.
        self.loopback_port: int | None = None
        #: When each source was last heard, on the monotonic clock.
        self.heard: dict[str, float] = {}
        #: When each source last had something to give.
        self._gave: dict[str, float] = {}
        #: Requests that were refused, by reason.
        self.refused: dict[str, int] = {}
        #: Why the ledger takes nothing at present, if it does not.
        self.ledger_error: str | None = None

    async def listen(
        self, host: str, port: int | None, blobs: BlobStore, page: Page | None = None
    ) -> int:
        """Begin to listen; returns the port.

        With a page it listens on loopback, too, on the same port if that is free there.

        Args:
            host: address of this machine.
            port: the port to take, or None for any free one.
            blobs: where the contents of artifacts go.
            page: the page, which is served beside the sources.

        Raises:
            OSError: the port is taken.
        """
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/v1/frames", self._frames)
        app.router.add_put("/v1/blobs/{digest}", functools.partial(self._piece, blobs))
        if page is not None:
            page.add_to(app)
        # What is compressed would be as large as it likes in memory; no client of ours does it.
        self._runner = web.AppRunner(
            app, access_log=None, auto_decompress=False, lingering_time=2.0
        )
        await self._runner.setup()
        try:
            bound = await _listen_on(self._runner, host, port or 0)
        except OSError:
            await self._runner.cleanup()
            raise
        if page is not None:
            self.loopback_port = await self._listen_on_loopback(self._runner, host, bound)
        self._doorman = asyncio.create_task(self._send_strangers_away(self._runner))
        return bound

    async def _listen_on_loopback(self, runner: web.AppRunner, host: str, port: int) -> int | None:
        if is_loopback_address(host) or host in ("localhost", "0.0.0.0", "::"):
            return port
        for wanted in (port, 0):
            try:
                return await _listen_on(runner, "127.0.0.1", wanted)
            except OSError as error:
                _log.info("raywb: the page cannot listen on 127.0.0.1:%d: %s", wanted, error)
        return None

    def know_page(self, request: web.Request) -> None:
        """A page was entitled to ask on this connection: it may stay, within a bound."""
        if len(self._pages) < MAX_PAGES:
            self._pages.add(request.protocol)

    async def close(self) -> None:
        """Stop listening."""
        if self._doorman is not None:
            self._doorman.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _send_strangers_away(self, runner: web.AppRunner) -> None:
        """Close connections that show no token in time, the oldest first if there are many."""
        since: dict[RequestHandler, float] = {}
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            present = set(runner.server.connections if runner.server else ())
            self._known &= present
            self._pages &= present
            strangers = present - self._known - self._pages
            since = {connection: since.get(connection, now) for connection in strangers}
            by_age = sorted(since, key=since.__getitem__)
            too_many = len(by_age) - MAX_STRANGERS
            for number, connection in enumerate(by_age):
                if number < too_many or now - since[connection] > STRANGER_S:
                    # On loopback these are connections that a browser opens in advance.
                    if not _is_on_loopback(connection):
                        self._count_refusal("no token in time")
                    connection.force_close()

    def _pace(self) -> float:
        """Seconds between two requests of one source, so that all stay within the bound.

        Sources come and go slowly, and there may be very many: they are counted once a second,
        and those that ended are forgotten then. Those that have nothing to give say every now and
        then that they live; the others share what that leaves.
        """
        now = time.monotonic()
        if now - self._paced_at > PACE_EVERY_S:
            self._paced_at = now
            self.heard = {
                source_id: heard
                for source_id, heard in self.heard.items()
                if not self._liveness.has_ended(source_id)
            }
            self._gave = {
                source_id: gave for source_id, gave in self._gave.items() if source_id in self.heard
            }
            # Whoever keeps to the pace is not to be taken for one that has nothing to give.
            live_s = max(LIVE_S, 3 * self._pace_s)
            live = sum(now - gave < live_s for gave in self._gave.values())
            silence_s = self.silence_s
            heard = sum(now - heard < silence_s for heard in self.heard.values())
            self._pace_s, self._keep_alive_s = paces(
                live, max(heard - live, 0), self._silent_after_s
            )
            self._asked.note(self._keep_alive_s, now)
        return self._pace_s

    @property
    def pace_s(self) -> float:
        """Seconds between two requests of a source that has something to give."""
        return self._pace_s

    @property
    def keep_alive_s(self) -> float:
        """Longest time, in seconds, without a word of a source that is well.

        It falls when the last source that was told a longer one had to come.
        """
        return self._asked.longest(time.monotonic()) or self._keep_alive_s

    @property
    def silence_s(self) -> float:
        """A source that was not heard for longer is silent."""
        return 3 * self.keep_alive_s

    def _count_refusal(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def _refuse(self, reason: str, status: int) -> web.Response:
        """Answer with one of a few reasons: none of them repeats what the client said."""
        self._count_refusal(reason)
        return web.json_response({"error": reason}, status=status)

    def _check(self, request: web.Request) -> web.Response | None:
        shown = request.headers.get("Authorization", "")
        # A header may hold any bytes at all.
        shown_bytes = shown.encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(shown_bytes, f"Bearer {self._token}".encode()):
            return self._refuse("wrong token", 401)
        if request.headers.get("X-Raywb-Cluster") != self._cluster_id:
            return self._refuse("another cluster", 403)
        if request.headers.get("X-Raywb-Protocol") != str(PROTOCOL):
            return self._refuse(f"the service speaks protocol {PROTOCOL}", 426)
        return None

    async def _frames(self, request: web.Request) -> web.Response:
        if refusal := self._check(request):
            return refusal
        self._known.add(request.protocol)
        source_id = request.query.get("source", "")
        offset_text = request.query.get("offset", "")
        if not _SOURCE_ID.fullmatch(source_id) or not _OFFSET.fullmatch(offset_text):
            return self._refuse("a malformed source or offset", 400)
        if (offset := int(offset_text)) >= 1 << 63:
            return self._refuse("a malformed source or offset", 400)
        async with self._reading:
            data = await self._body_of(request)
        if isinstance(data, web.Response):
            return data
        try:
            return self._take(request, source_id, offset, data)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.ledger_error = f"the ledger takes nothing: {error}"
            return self._refuse(f"the ledger's disk {'is full' if full else 'fails'}", 507)
        finally:
            rows = request.query.get("rows", "")
            if rows.isdigit() and len(rows) < 20:
                self._liveness.hear(source_id, int(rows), quiet=not data)

    async def _body_of(self, request: web.Request) -> bytes | web.Response:
        """The body, or why it is refused."""
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                data = await _read_body(request)
        except TimeoutError:
            return self._refuse("a body that did not come in time", 408)
        except ConnectionError:
            return self._refuse("a body that broke off", 400)
        if data is None:
            return self._refuse(f"a body of more than {MAX_BODY_BYTES} bytes", 413)
        return data

    def _take(self, request: web.Request, source_id: str, offset: int, data: bytes) -> web.Response:
        """Check and append in one step: nothing is awaited between the two."""
        self.heard[source_id] = time.monotonic()
        if data:
            self._gave[source_id] = self.heard[source_id]
        after_gap = request.query.get("gap") == "1"
        end = self._ledger.append(source_id, offset, data, after_gap=after_gap)
        if self.fsync == "each":
            self._ledger.sync()
        self.ledger_error = None
        if data:
            self._on_append()
        durable = end if self.fsync == "off" else self._ledger.durable_end_of(source_id)
        return web.json_response(
            {
                "end": end,
                "durable": durable,
                "pace_s": self._pace(),
                "keep_alive_s": self._keep_alive_s,
                "ended": self._liveness.has_ended(source_id),
                "home": source_id in self._liveness.killed,
                "run_closed": self._run_closed(),
            }
        )

    async def _piece(self, blobs: BlobStore, request: web.Request) -> web.Response:
        if refusal := self._check(request):
            return refusal
        self._known.add(request.protocol)
        digest = request.match_info["digest"]
        numbers = [request.query.get(name, "") for name in ("offset", "size")]
        if not is_digest(digest) or not all(text.isdigit() and len(text) < 19 for text in numbers):
            return self._refuse("a malformed blob, offset or size", 400)
        offset, size = map(int, numbers)
        if size > MAX_ARTIFACT_BYTES or offset > size:
            return self._refuse("a blob that is too large", 413)
        if self._pieces >= PIECES_AT_ONCE:
            end = blobs.end_of(digest)
            return web.json_response({"end": end, "whole": blobs.has(digest)})
        self._pieces += 1
        try:
            data = await self._body_of(request)
            if isinstance(data, web.Response):
                return data
            end, whole = await blobs.offer(digest, offset, size, data)
        except FrameError as error:
            return self._refuse(str(error), 409)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return self._refuse(f"the disk for blobs {'is full' if full else 'fails'}", 507)
        finally:
            self._pieces -= 1
        return web.json_response({"end": end, "whole": whole})


def _is_on_loopback(connection: RequestHandler) -> bool:
    transport = connection.transport
    name = transport.get_extra_info("sockname") if transport is not None else None
    return name is not None and is_loopback_address(str(name[0]))


async def _listen_on(runner: web.AppRunner, host: str, port: int) -> int:
    """Listen on an address, too; returns the port.

    Raises:
        OSError: the port is taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        await web.SockSite(runner, listener).start()
    except OSError:
        listener.close()
        raise
    return int(listener.getsockname()[1])


async def _read_body(request: web.Request) -> bytes | None:
    """The body; None when it is too large.

    Raises:
        TimeoutError: nothing came for a while.
        ConnectionError: the client is gone.
    """
    chunks: list[bytes] = []
    size = 0
    while max(size, request.content_length or 0) <= MAX_BODY_BYTES:
        async with asyncio.timeout(BODY_STALL_S):
            chunk = await request.content.readany()
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
        size += len(chunk)
    return None
