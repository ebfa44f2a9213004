"""The page over HTTP: its API and its files, read-only, for whoever is entitled.

    GET /              the page
    GET /static/FILE   its files
    GET /api/overview  the runs, and the status of the present one
    GET /api/series    ?run=N
    GET /api/points    ?run=N&key=K[&key=…][&points=600][&from=X][&to=X][&x=axis|time|row]
    GET /api/events    server-sent events: the overview, at once and whenever it changed

Who may ask is in ``entitled``. No answer holds a token or a key.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, cast

import msgspec
from aiohttp import web

from raywb.errors import RaywbError
from raywb.view.history.requests import PointsRequest, SeriesRequest
from raywb.view.page.entitled import Entitled, Refused
from raywb.view.page.events import Events, Overviews
from raywb.view.page.sources import PageSource, UnknownRun

__all__ = ["Page", "page_application"]

STATIC = Path(__file__).parent / "static"

#: Most series of one request, most buckets of each and of all of them, and the longest key.
MAX_KEYS = 64
MAX_POINTS = 5_000
MAX_VALUES = 100_000
MAX_KEY_CHARACTERS = 1_024

_NUMBER = re.compile(r"[0-9]{1,18}")
_IMPORT_MAP = re.compile(r"<script type=\"importmap\">(.*?)</script>", re.DOTALL)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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
        self._entitled = Entitled(mode, token)
        self._on_entitled = on_entitled
        self._overviews = Overviews(source)
        self._events = Events(self._overviews)
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
            "/api/events": self._events.answer,
        }
        for path, handler in routes.items():
            app.router.add_get(path, self._guarded(handler))
        app.on_response_prepare.append(self._harden)
        app.on_shutdown.append(self._events.close)

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

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self._entitled.check(request)
                if self._on_entitled is not None:
                    self._on_entitled(request)
                return await handler(request)
            except Refused as error:
                return _json({"error": str(error)}, error.status)
            except UnknownRun:
                return _json({"error": "there is no run with this number"}, 404)
            except RaywbError as error:
                return _json({"error": str(error)}, 503)

        return guarded

    async def _index(self, request: web.Request) -> web.StreamResponse:
        if "index.html" not in self._files:
            raise Refused(404, "the page's files are not installed; its api is there")
        if "token" not in request.query:
            return web.FileResponse(self._files["index.html"])
        # The token leaves the address bar, and whatever remembers addresses.
        response = web.Response(status=303, headers={"Location": "./"})
        self._entitled.remember(request, response)
        return response

    async def _static(self, request: web.Request) -> web.StreamResponse:
        file = self._files.get(request.match_info["file"])
        if file is None:
            raise Refused(404, "the page has no such file")
        return web.FileResponse(file)

    async def _get_overview(self, _: web.Request) -> web.StreamResponse:
        return _json_bytes((await self._overviews.latest()).body)

    async def _get_series(self, request: web.Request) -> web.StreamResponse:
        asked = SeriesRequest(_whole_number(request, "run"))
        return _json_bytes(await self._source.series(asked))

    async def _get_points(self, request: web.Request) -> web.StreamResponse:
        keys = request.query.getall("key", [])
        if not 0 < len(keys) <= MAX_KEYS or max(map(len, keys)) > MAX_KEY_CHARACTERS:
            raise Refused(
                400, f"key names 1 to {MAX_KEYS} series of at most {MAX_KEY_CHARACTERS} characters"
            )
        points = _whole_number(request, "points", "600")
        if not 1 <= points <= MAX_POINTS or points * len(keys) > MAX_VALUES:
            raise Refused(
                400,
                f"points is a number from 1 to {MAX_POINTS}, and of all series together at most "
                f"{MAX_VALUES}",
            )
        x = request.query.get("x", "axis")
        if x not in ("axis", "time", "row"):
            raise Refused(400, "x is axis, time or row")
        asked = PointsRequest(
            run=_whole_number(request, "run"),
            keys=keys,
            points=points,
            begin=_bound(request, "from"),
            end=_bound(request, "to"),
            x=cast(Literal["axis", "time", "row"], x),
        )
        return _json_bytes(await self._source.points(asked))


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


def _whole_number(request: web.Request, name: str, default: str = "") -> int:
    text = request.query.get(name, default)
    if not _NUMBER.fullmatch(text):
        raise Refused(400, f"{name} is a whole number")
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
        raise Refused(400, f"{name} is a number")
    return value


def _json(value: dict[str, str], status: int = 200) -> web.Response:
    return _json_bytes(msgspec.json.encode(value), status)


def _json_bytes(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json", charset="utf-8")
