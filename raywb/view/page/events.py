"""The overview, made once for all who ask, and told to whoever listens when it has changed."""

from __future__ import annotations

import asyncio
import math
import re
import time
from typing import NamedTuple

import msgspec
from aiohttp import web

from raywb.errors import RaywbError
from raywb.view.page.entitled import Refused
from raywb.view.page.sources import PageSource

__all__ = ["Events", "Overview", "Overviews"]

#: Who listens to events at the same time.
MAX_LISTENERS = 100

#: Shortest time between two overviews, and longest without a word to a listener, in seconds; so
#: often it is also told how old everything is.
OVERVIEW_S = 1.0
KEEP_ALIVE_S = 15.0

#: Ages in an overview: they grow by themselves, and to a page that is no news.
_AGES = re.compile(rb'"(?:heard_ago_s|silent_s|last_row_s)":[0-9.e+-]+')


class Overview(NamedTuple):
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


class Overviews:
    """The overview of this second, asked of the source once for all."""

    def __init__(self, source: PageSource) -> None:
        self._source = source
        self._made: tuple[float, Overview | RaywbError | None] = (-math.inf, None)
        self._asking = asyncio.Lock()

    async def latest(self) -> Overview:
        """The overview of this second; who asks within it is also told alike why there is none."""
        async with self._asking:
            made_at, overview = self._made
            if overview is None or time.monotonic() - made_at > OVERVIEW_S / 2:
                try:
                    overview = _encoded(msgspec.json.encode(await self._source.overview()))
                except RaywbError as error:
                    overview = error
                self._made = (time.monotonic(), overview)
            if isinstance(overview, RaywbError):
                raise overview
            return overview


class Events:
    """Server-sent events: the overview, at once and whenever it changed.

    Ages alone are no change: a page is told of them as often as it would otherwise only be told
    that somebody is still there.
    """

    def __init__(self, overviews: Overviews) -> None:
        self._overviews = overviews
        self._listeners = 0
        self._closing = asyncio.Event()

    async def close(self, _: web.Application) -> None:
        """Let all listeners go."""
        self._closing.set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Tell one listener, until it goes or takes nothing any more.

        Raises:
            Refused: too many listen already.
        """
        if self._listeners >= MAX_LISTENERS:
            raise Refused(503, f"{MAX_LISTENERS} pages listen already")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self._listeners += 1
        try:
            await response.prepare(request)
            if request.method != "HEAD":
                await self._send(response)
        except ConnectionError:
            pass  # the page was closed; it comes again by itself
        except TimeoutError:
            # It takes nothing any more. What waits for it would else wait for ever.
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._listeners -= 1
        return response

    async def _send(self, response: web.StreamResponse) -> None:
        sent: Overview | None = None
        sent_at = time.monotonic()
        while not self._closing.is_set():
            event = b""
            waited = time.monotonic() - sent_at > KEEP_ALIVE_S
            try:
                overview = await self._overviews.latest()
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


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(2 * KEEP_ALIVE_S):
        await response.write(data)


def _encoded(overview: bytes) -> Overview:
    body = b'{"now_s":%.3f,' % time.time() + overview[1:]
    event = b"event: overview\ndata: " + body + b"\n\n"
    return Overview(body, event, overview, _AGES.sub(b"", overview))
