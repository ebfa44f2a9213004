"""The page's answers from a live service: its status, and the history from a process beside it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from raywb import __version__
from raywb.errors import ServiceUnavailable
from raywb.reports import SourceStatus, Status
from raywb.service.runs import Runs
from raywb.service.state import ServiceState
from raywb.view.history.directory import runs_of
from raywb.view.history.history_process import HistoryProcess
from raywb.view.history.requests import (
    PointsRequest,
    Progress,
    ProgressRequest,
    Seen,
    SeriesRequest,
)
from raywb.view.page.sources import UnknownRun

__all__ = ["ServiceSource", "view_token"]


#: Sources that the page is told of; of the others it is told how many they are.
MAX_SOURCES = 200


def view_token(token: str) -> str:
    """What a viewer shows. It follows from the sources' token, and does not lead back to it."""
    return hmac.new(token.encode(), b"raywb view", hashlib.sha256).hexdigest()


class ServiceSource:
    """Answers for the page in the service's loop; nothing here reads history.

    Args:
        directory: the service's directory.
        state: what the service writes down of itself.
        runs: its runs.
        status: makes the status.
        dashboard: address of Ray's dashboard.
    """

    def __init__(
        self,
        directory: Path,
        state: ServiceState,
        runs: Runs,
        status: Callable[[], Awaitable[Status]],
        dashboard: str | None,
    ) -> None:
        self._state = state
        self._runs = runs
        self._status = status
        self._dashboard = dashboard
        self._process = HistoryProcess(directory, background=True)
        self._progress: Progress | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that reads history; None while there is none."""
        return self._process.pid

    async def overview(self) -> dict[str, Any]:
        """The overview, less the present time."""
        status = await self._status()
        states = Counter(_state_of(source, status.silence_s) for source in status.sources)
        last = self._runs.last
        number = last.number if last is not None else 0
        self._ask_for_progress(number)
        progress = self._progress
        runs = runs_of(self._state, self._seen(), live=True)
        rows = self._runs.rows_of(last) if last is not None else 0
        reading = {"rows_read": 0, "rows_thinned": 0}
        if progress is not None and self._process.pid is not None:
            reading = progress.reading
        return {
            "live": True,
            "runs": runs,
            "run": number,
            "status": msgspec.structs.replace(status, sources=_first(status)),
            "sources": states,
            "reading": {**reading, "rows_total": max(rows, reading["rows_read"])},
            "ray_dashboard": self._dashboard,
            "version": __version__,
        }

    def _seen(self) -> dict[int, Seen]:
        """Rows as the service counts them, times as far as the history's process has come."""
        known = self._progress.runs if self._progress is not None else {}
        found = {}
        for run in self._state.all_runs:
            times = known.get(run.number, Seen(0, 0, None, None))
            found[run.number] = msgspec.structs.replace(times, rows=self._runs.rows_of(run))
        return found

    def _ask_for_progress(self, number: int) -> None:
        """Have the next overview know how far the process is; it is not started for that."""
        if self._process.pid is None or (self._asking is not None and not self._asking.done()):
            return
        self._asking = asyncio.get_running_loop().create_task(self._update(number))

    async def _update(self, number: int) -> None:
        # Without an answer the overview goes on with what it knew.
        with contextlib.suppress(ServiceUnavailable):
            answer = await self._process.ask(ProgressRequest(number), idle=True)
            self._progress = msgspec.json.decode(answer, type=Progress)

    async def series(self, request: SeriesRequest) -> bytes:
        """JSON of a run's series."""
        self._check(request.run)
        return await self._process.ask(request)

    async def points(self, request: PointsRequest) -> bytes:
        """JSON of some series' values."""
        self._check(request.run)
        return await self._process.ask(request)

    def _check(self, number: int) -> None:
        if all(run.number != number for run in self._state.all_runs):
            raise UnknownRun

    async def close(self) -> None:
        """End the process."""
        if self._asking is not None:
            self._asking.cancel()
        await self._process.close()


def _state_of(source: SourceStatus, silence_s: float) -> str:
    if source.ended:
        return "killed" if source.killed else "ended"
    heard = source.heard_ago_s is not None and source.heard_ago_s <= silence_s
    return "live" if heard else "silent"


def _first(status: Status) -> list[SourceStatus]:
    """Those sources that matter most: silent ones, then live ones, then those that ended."""
    order = ["silent", "live", "killed", "ended"]
    return sorted(
        status.sources, key=lambda source: order.index(_state_of(source, status.silence_s))
    )[:MAX_SOURCES]
