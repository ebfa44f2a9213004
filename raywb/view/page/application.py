"""The page over HTTP: its API and its files, read-only, for whoever is entitled.

    GET /              the page
    GET /static/FILE   its files
    GET /api/overview  the runs, and the status of the present one
    GET /api/series    ?run=N
    GET /api/points    ?run=N&key=K[&key=…][&points=600][&from=X][&to=X][&x=axis|time|row]
    GET /api/events    server-sent events: the overview, at once and whenever it changed

Who comes through a loopback socket needs no token, but has to call it by a loopback name: another
site's page, which a browser on this machine shows, cannot (DNS rebinding). Who comes by another
address shows the view token, once in the address and then as a cookie, or as a bearer token. It
is not the token that sources send with. No answer holds a token or a key.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import math
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, NamedTuple, cast

import msgspec
from aiohttp import web

from raywb.errors import RaywbError
from raywb.view.history.requests import PointsRequest, SeriesRequest
from raywb.view.page.sources import PageSource, UnknownRun

__all__ = ["Page", "is_loopback_address", "page_application"]

STATIC = Path(__file__).parent / "static"

#: Most series of one request, most buckets of each and of all of them, and the longest key.
MAX_KEYS = 64
MAX_POINTS = 5_000
MAX_VALUES = 100_000
MAX_KEY_CHARACTERS = 1_024

#: Who listens to events at the same time.
MAX_LISTENERS = 100

#: Shortest time between two overviews, and longest without a word to a listener, in seconds; so
#: often it is also told how old everything is.
OVERVIEW_S = 1.0
KEEP_ALIVE_S = 15.0

#: Ages in an overview: they grow by themselves, and to a page that is no news.
_AGES = re.compile(rb'"(?:heard_ago_s|silent_s|last_row_s)":[0-9.e+-]+')

_NUMBER = re.compile(r"[0-9]{1,18}")
_IMPORT_MAP = re.compile(r"<script type=\"importmap\">(.*?)</script>", re.DOTALL)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Refused(Exception):
    """The request is answered with an error, in one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Overview(NamedTuple):
    """An overview, encoded once for all who ask.

    Attributes:
        body: what is answered, with the time at which it was so.
        event: the same as an event.
        less_time: without the time.
        less_ages: without that and without ages.
    """

    body: bytes
    event: bytes
    less_time: bytes
    less_ages: bytes


class Page:
    """The page's routes.

    Args:
        source: where its answers come from.
        mode: who is let in at present: ``loopback``, ``network`` (with the token) or ``off``.
        token: the view token; None lets nobody in by another address than loopback.
        on_entitled: is told of every request that is answered.
        static: directory of the page's files.
    """

    def __init__(
        self,
        source: PageSource,
        *,
        mode: Callable[[], str] = lambda: "loopback",
        token: str | None = None,
        on_entitled: Callable[[web.Request], None] | None = None,
        static: Path = STATIC,
    ) -> None:
        self._source = source
        self._mode = mode
        self._token = token
        self._on_entitled = on_entitled
        self._listeners = 0
        self._closing = asyncio.Event()
        self._overview: tuple[float, _Overview | RaywbError | None] = (-math.inf, None)
        self._asking = asyncio.Lock()
        # Only what lies there now is served, under exactly these names.
        self._files = {
            file.relative_to(static).as_posix(): file
            for file in static.rglob("*")
            if file.is_file() and not file.is_symlink()
        }
        index = self._files.get("index.html")
        # A service whose page is missing goes on without it.
        self._policy = _policy(index.read_text() if index is not None else "")

    def add_to(self, app: web.Application) -> None:
        """Add the routes to an application."""
        routes: dict[str, Handler] = {
            "/": self._index,
            "/static/{file:.+}": self._static,
            "/api/overview": self._get_overview,
            "/api/series": self._get_series,
            "/api/points": self._get_points,
            "/api/events": self._events,
        }
        for path, handler in routes.items():
            app.router.add_get(path, self._guarded(handler))
        app.on_response_prepare.append(self._harden)
        app.on_shutdown.append(self._end_events)

    async def _end_events(self, _: web.Application) -> None:
        self._closing.set()

    async def _harden(self, request: web.Request, response: web.StreamResponse) -> None:
        if request.path.startswith("/v1/"):
            return  # a source's, which is no browser
        headers = response.headers
        headers["Content-Security-Policy"] = self._policy
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
        headers["Cross-Origin-Resource-Policy"] = "same-origin"
        headers["Cross-Origin-Opener-Policy"] = "same-origin"
        static = request.path.startswith("/static/")
        headers["Cache-Control"] = "no-cache" if static else "no-store"

    # -- who may ask ----------------------------------------------------------------------------

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self._check(request)
                if self._on_entitled is not None:
                    self._on_entitled(request)
                return await handler(request)
            except _Refused as error:
                return _json({"error": str(error)}, error.status)
            except UnknownRun:
                return _json({"error": "there is no run with this number"}, 404)
            except RaywbError as error:
                return _json({"error": str(error)}, 503)

        return guarded

    def _check(self, request: web.Request) -> None:
        """Raises :class:`_Refused` for whoever is not entitled."""
        mode = self._mode()
        if mode == "off":
            raise _Refused(404, "the page is switched off (setting ui)")
        if self._shows_token(request) and (mode == "network" or _is_local(request)):
            return
        if _is_local(request):
            if _is_loopback_name(request.host):
                return
            raise _Refused(
                403, "on this machine the page answers to the names localhost and 127.0.0.1 only"
            )
        if mode == "network":
            raise _Refused(401, "open the address that `raywb ui` prints: it holds a token")
        raise _Refused(
            403,
            "the page answers on the head node only: forward its port, or set ui=network",
        )

    def _shows_token(self, request: web.Request) -> bool:
        if self._token is None:
            return False
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        shown = [bearer, request.query.get("token", ""), request.cookies.get(_cookie(request), "")]
        token = self._token.encode()
        return any(
            hmac.compare_digest(one.encode("utf-8", "surrogateescape"), token) for one in shown
        )

    # -- answers --------------------------------------------------------------------------------

    async def _index(self, request: web.Request) -> web.StreamResponse:
        if "index.html" not in self._files:
            raise _Refused(404, "the page's files are not installed; its api is there")
        if "token" not in request.query:
            return web.FileResponse(self._files["index.html"])
        # The token leaves the address bar, and whatever remembers addresses.
        response = web.Response(status=303, headers={"Location": "./"})
        if self._token is not None and self._shows_token(request):
            response.set_cookie(
                _cookie(request), self._token, httponly=True, samesite="Lax", path="/"
            )
        return response

    async def _static(self, request: web.Request) -> web.StreamResponse:
        file = self._files.get(request.match_info["file"])
        if file is None:
            raise _Refused(404, "the page has no such file")
        return web.FileResponse(file)

    async def _get_overview(self, _: web.Request) -> web.StreamResponse:
        return _json_bytes((await self._latest_overview()).body)

    async def _latest_overview(self) -> _Overview:
        """The overview of this second; who asks within it is also told alike why there is none."""
        async with self._asking:
            made_at, overview = self._overview
            if overview is None or time.monotonic() - made_at > OVERVIEW_S / 2:
                try:
                    overview = _encoded(msgspec.json.encode(await self._source.overview()))
                except RaywbError as error:
                    overview = error
                self._overview = (time.monotonic(), overview)
            if isinstance(overview, RaywbError):
                raise overview
            return overview

    async def _get_series(self, request: web.Request) -> web.StreamResponse:
        asked = SeriesRequest(_whole_number(request, "run"))
        return _json_bytes(await self._source.series(asked))

    async def _get_points(self, request: web.Request) -> web.StreamResponse:
        keys = request.query.getall("key", [])
        if not 0 < len(keys) <= MAX_KEYS or max(map(len, keys)) > MAX_KEY_CHARACTERS:
            raise _Refused(
                400, f"key names 1 to {MAX_KEYS} series of at most {MAX_KEY_CHARACTERS} characters"
            )
        points = _whole_number(request, "points", "600")
        if not 1 <= points <= MAX_POINTS or points * len(keys) > MAX_VALUES:
            raise _Refused(
                400,
                f"points is a number from 1 to {MAX_POINTS}, and of all series together at most "
                f"{MAX_VALUES}",
            )
        x = request.query.get("x", "axis")
        if x not in ("axis", "time", "row"):
            raise _Refused(400, "x is axis, time or row")
        asked = PointsRequest(
            run=_whole_number(request, "run"),
            keys=keys,
            points=points,
            begin=_bound(request, "from"),
            end=_bound(request, "to"),
            x=cast(Literal["axis", "time", "row"], x),
        )
        return _json_bytes(await self._source.points(asked))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._listeners >= MAX_LISTENERS:
            raise _Refused(503, f"{MAX_LISTENERS} pages listen already")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self._listeners += 1
        try:
            await response.prepare(request)
            if request.method != "HEAD":
                await self._send_events(response)
        except ConnectionError:
            pass  # the page was closed; it comes again by itself
        except TimeoutError:
            # It takes nothing any more. What waits for it would else wait for ever.
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._listeners -= 1
        return response

    async def _send_events(self, response: web.StreamResponse) -> None:
        sent: _Overview | None = None
        sent_at = time.monotonic()
        while not self._closing.is_set():
            event = b""
            waited = time.monotonic() - sent_at > KEEP_ALIVE_S
            try:
                overview = await self._latest_overview()
            except RaywbError as error:
                sent = None
                text = msgspec.json.encode({"error": str(error)})
                event = b"event: trouble\ndata: " + text + b"\n\n"
            else:
                aged = waited and sent is not None and overview.less_time != sent.less_time
                if sent is None or overview.less_ages != sent.less_ages or aged:
                    sent, event = overview, overview.event
                elif waited:
                    event = b": still here\n\n"
            if event:
                await _write(response, event)
                sent_at = time.monotonic()
            try:
                async with asyncio.timeout(OVERVIEW_S):
                    await self._closing.wait()
            except TimeoutError:
                continue


def page_application(page: Page) -> web.Application:
    """An application that is nothing but the page."""

    @web.middleware
    async def in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            response = _json({"error": error.reason}, error.status)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
            return response

    app = web.Application(middlewares=[in_json], client_max_size=1024)
    page.add_to(app)
    return app


def _policy(index: str) -> str:
    """What the page may load: its own scripts and styles, and the import map that stands in it."""
    digests = [hashlib.sha256(text.encode()).digest() for text in _IMPORT_MAP.findall(index)]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    return "; ".join(
        [
            "default-src 'none'",
            " ".join(["script-src 'self'", *hashes]),
            "style-src 'self'",
            "img-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _is_local(request: web.Request) -> bool:
    """Whether the connection came through a loopback socket."""
    name = request.get_extra_info("sockname")
    return bool(name) and is_loopback_address(str(name[0]))


def is_loopback_address(host: str) -> bool:
    """Whether this is an address of the machine's loopback, also one inside of IPv6."""
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _is_loopback_name(host: str) -> bool:
    """Whether a Host header names this machine's loopback, with any port or none."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\[\]]+)(:[0-9]{1,5})?", host)
    if match is None:
        return False
    name = match[1].strip("[]").lower()
    return name == "localhost" or is_loopback_address(name)


def _cookie(request: web.Request) -> str:
    """The cookie's name; cookies of all ports of a host lie together."""
    name = request.get_extra_info("sockname")
    return f"raywb_view_{name[1] if name else 0}"


def _whole_number(request: web.Request, name: str, default: str = "") -> int:
    text = request.query.get(name, default)
    if not _NUMBER.fullmatch(text):
        raise _Refused(400, f"{name} is a whole number")
    return int(text)


def _bound(request: web.Request, name: str) -> float | None:
    text = request.query.get(name)
    if text is None:
        return None
    try:
        value = float(text) if len(text) < 40 else float("nan")
    except ValueError:
        value = float("nan")
    if math.isnan(value):
        raise _Refused(400, f"{name} is a number")
    return value


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(2 * KEEP_ALIVE_S):
        await response.write(data)


def _encoded(overview: bytes) -> _Overview:
    body = b'{"now_s":%.3f,' % time.time() + overview[1:]
    event = b"event: overview\ndata: " + body + b"\n\n"
    return _Overview(body, event, overview, _AGES.sub(b"", overview))


def _json(value: dict[str, str], status: int = 200) -> web.Response:
    return _json_bytes(msgspec.json.encode(value), status)


def _json_bytes(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json", charset="utf-8")
