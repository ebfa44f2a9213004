"""The listener inside the actor: takes journal bytes over HTTP, and tells the pace.

    POST /v1/frames?source=<32 hex>&offset=<n>[&gap=1]      body: whole frames, may be empty
    → 200 {"end": <n>, "durable": <n>, "pace_s": <seconds>}

    PUT /v1/blobs/<sha-256 in hex>?offset=<n>&size=<n>      body: a piece, may be empty
    → 200 {"end": <n>, "whole": <bool>}

both with ``Authorization: Bearer <token>``, ``X-Raywb-Cluster`` and ``X-Raywb-Protocol``. ``end``
is where this source's journal ends here after the request, whether the body was taken or not: a
client whose offset was another one goes there. What lies before ``durable`` has been forced to
the disk as far as the settings ask for it, and may be deleted at the source. An empty body asks
without giving. Blobs are the contents of artifacts: they come in pieces on a lane of their own,
so that they delay no rows.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import logging
import math
import re
import socket
import time
from collections.abc import Callable

from aiohttp import web

from raywb.errors import FrameError
from raywb.rows import MAX_ARTIFACT_BYTES, PROTOCOL, is_digest
from raywb.service.blobs import BlobStore
from raywb.service.ledger import Ledger

__all__ = ["MAX_BODY_BYTES", "Ingest"]

_log = logging.getLogger(__name__)

#: Largest body that is read; the client sends about a quarter of it.
MAX_BODY_BYTES = 8 * 1024 * 1024

#: Bodies that are in memory at the same time; after an outage everybody comes at once.
BODIES_AT_ONCE = 32

#: Pieces of blobs that are in memory at the same time. Who finds no place is told to come again.
PIECES_AT_ONCE = 8

#: Requests a second that all sources together are asked to keep to.
REQUESTS_PER_S = 400.0

#: Shortest and longest time between two requests of one source that is asked for, in seconds.
PACE_RANGE_S = (0.25, 60.0)

#: How often the pace is worked out, in seconds.
PACE_EVERY_S = 1.0

#: A source that was silent for longer no longer counts for the pace.
LIVE_S = 60.0

_SOURCE_ID = re.compile(r"[0-9a-f]{32}")


class Ingest:
    """HTTP front of the ledger.

    Args:
        ledger: where accepted bytes go.
        blobs: where the contents of artifacts go.
        token: what a client has to show.
        cluster_id: requests from any other cluster are refused.
        fsync: see :class:`raywb.Settings`.
        on_append: called after each append.
        has_ended: says of a source whether it ended in good order.
    """

    def __init__(
        self,
        ledger: Ledger,
        blobs: BlobStore,
        token: str,
        cluster_id: str,
        fsync: str,
        *,
        on_append: Callable[[], None],
        has_ended: Callable[[str], bool],
    ) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._pieces = 0
        self._fsync = fsync
        self._token = token
        self._cluster_id = cluster_id
        self._on_append = on_append
        self._has_ended = has_ended
        self._pace_s = PACE_RANGE_S[0]
        self._paced_at = -math.inf
        self._runner: web.AppRunner | None = None
        self._reading = asyncio.Semaphore(BODIES_AT_ONCE)
        #: When each source was last heard, on the monotonic clock.
        self.heard: dict[str, float] = {}
        #: Requests that were refused, by reason.
        self.refused: dict[str, int] = {}
        #: Why the ledger takes nothing at present, if it does not.
        self.ledger_error: str | None = None

    async def listen(self, host: str, port: int | None) -> int:
        """Begin to listen; returns the port.

        Args:
            host: address of this machine.
            port: the port to take, or None for any free one.

        Raises:
            OSError: the port is taken.
        """
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/v1/frames", self._frames)
        app.router.add_put("/v1/blobs/{digest}", self._piece)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port or 0))
        except OSError:
            listener.close()
            await self._runner.cleanup()
            raise
        await web.SockSite(self._runner, listener).start()
        return int(listener.getsockname()[1])

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    def _pace(self) -> float:
        """Seconds between two requests of one source, so that all stay within the bound.

        Sources come and go slowly, and there may be very many: they are counted once a second,
        and those that ended are forgotten then.
        """
        now = time.monotonic()
        if now - self._paced_at > PACE_EVERY_S:
            self._paced_at = now
            self.heard = {
                source_id: heard
                for source_id, heard in self.heard.items()
                if not self._has_ended(source_id)
            }
            live = sum(now - heard < LIVE_S for heard in self.heard.values())
            shortest, longest = PACE_RANGE_S
            self._pace_s = min(max(live / REQUESTS_PER_S, shortest), longest)
        return self._pace_s

    def _refuse(self, reason: str, status: int) -> web.Response:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        return web.json_response({"error": reason}, status=status)

    def _check(self, request: web.Request) -> web.Response | None:
        shown = request.headers.get("Authorization", "")
        if not hmac.compare_digest(shown.encode(), f"Bearer {self._token}".encode()):
            return self._refuse("wrong token", 401)
        if request.headers.get("X-Raywb-Cluster") != self._cluster_id:
            return self._refuse("another cluster", 403)
        if request.headers.get("X-Raywb-Protocol") != str(PROTOCOL):
            return self._refuse(f"the service speaks protocol {PROTOCOL}", 426)
        return None

    async def _frames(self, request: web.Request) -> web.Response:
        if refusal := self._check(request):
            return refusal
        source_id = request.query.get("source", "")
        offset_text = request.query.get("offset", "")
        if not _SOURCE_ID.fullmatch(source_id) or not offset_text.isdigit():
            return self._refuse("a malformed source or offset", 400)
        offset = int(offset_text)
        if offset >= 1 << 63:
            return self._refuse("a malformed source or offset", 400)
        async with self._reading:
            data = await request.read()
        self.heard[source_id] = time.monotonic()
        try:
            # Check and append in one step: nothing is awaited between the two.
            end = self._ledger.append(
                source_id, offset, data, after_gap=request.query.get("gap") == "1"
            )
            if self._fsync == "each":
                self._ledger.sync()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.ledger_error = f"the ledger takes nothing: {error}"
            return self._refuse("the ledger's disk is full" if full else str(error), 507)
        self.ledger_error = None
        if data:
            self._on_append()
        durable = end if self._fsync == "off" else self._ledger.durable_end_of(source_id)
        return web.json_response({"end": end, "durable": durable, "pace_s": self._pace()})

    async def _piece(self, request: web.Request) -> web.Response:
        if refusal := self._check(request):
            return refusal
        digest = request.match_info["digest"]
        numbers = [request.query.get(name, "") for name in ("offset", "size")]
        if not is_digest(digest) or not all(text.isdigit() and len(text) < 19 for text in numbers):
            return self._refuse("a malformed blob, offset or size", 400)
        offset, size = map(int, numbers)
        if size > MAX_ARTIFACT_BYTES or offset > size:
            return self._refuse("a blob that is too large", 413)
        if self._pieces >= PIECES_AT_ONCE:
            end = self._blobs.end_of(digest)
            return web.json_response({"end": end, "whole": self._blobs.has(digest)})
        self._pieces += 1
        try:
            end, whole = await self._blobs.offer(digest, offset, size, await request.read())
        except FrameError as error:
            return self._refuse(str(error), 409)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return self._refuse("the disk for blobs is full" if full else str(error), 507)
        finally:
            self._pieces -= 1
        return web.json_response({"end": end, "whole": whole})
