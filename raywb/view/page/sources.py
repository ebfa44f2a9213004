"""Where the page's answers come from: a live service, or the files of directories."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any, Protocol

import msgspec

from raywb.errors import DirectoryError, ServiceUnavailable
from raywb.service.state import FILE_NAME, ServiceState, load_left_state
from raywb.view.history.directory import is_worked_in, runs_of
from raywb.view.history.history_process import HistoryProcess
from raywb.view.history.requests import (
    DirectoryRequest,
    PointsRequest,
    Progress,
    ProgressRequest,
    Seen,
    SeriesRequest,
)

__all__ = ["DirectorySource", "PageSource", "UnknownRun", "find_directories"]

#: Runs of the second directory are numbered from here, those of the third from twice that …:
#: every service numbers its own from 1.
NUMBERS_OF_A_DIRECTORY = 100_000_000


#: Longest that an overview waits for another directory's process, in seconds.
PROGRESS_S = 0.3


class UnknownRun(Exception):
    """There is no run with this number."""


class PageSource(Protocol):
    """Answers what the page asks.

    Whoever answers a request raises :class:`UnknownRun`, or
    :class:`raywb.errors.RaywbError` when there is no answer now.
    """

    async def overview(self) -> dict[str, Any]:
        """The overview, less the present time."""
        ...

    async def series(self, request: SeriesRequest) -> bytes:
        """JSON of a run's series."""
        ...

    async def points(self, request: PointsRequest) -> bytes:
        """JSON of some series' values."""
        ...

    async def close(self) -> None:
        """End what it started."""
        ...


def find_directories(directory: Path) -> list[Path]:
    """The services' directories in a directory, or itself; newest first.

    Raises:
        DirectoryError: there is none.
    """
    if (directory / FILE_NAME).is_file():
        return [directory]
    files = [*directory.glob(f"*/{FILE_NAME}"), *directory.glob(f"*/*/{FILE_NAME}")]
    if not files:
        load_left_state(directory)  # says best what is wrong
        raise DirectoryError(f"there is no run in {directory}")
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.parent for file in files]


class DirectorySource:
    """The runs of directories, from their files.

    Args:
        directories: the services', those that are to be shown first first.
    """

    def __init__(self, directories: list[Path]) -> None:
        self._directories = directories
        self._processes: dict[int, HistoryProcess] = {}
        #: What was read of other directories, by directory and run.
        self._seen: dict[int, dict[int, Seen]] = {}
        #: What other directories' services wrote down last, and when.
        self._elsewhere: dict[int, tuple[int, ServiceState]] = {}

    async def begin(self) -> None:
        """Begin to read the first directory, before anybody asks."""
        await self._process(0).start()

    def _process(self, number: int) -> HistoryProcess:
        if number not in self._processes:
            self._processes[number] = HistoryProcess(self._directories[number])
        return self._processes[number]

    def _place(self, run: int) -> tuple[HistoryProcess, int]:
        directory, number = divmod(run, NUMBERS_OF_A_DIRECTORY)
        if not 0 <= directory < len(self._directories):
            raise UnknownRun
        return self._process(directory), number

    async def overview(self) -> dict[str, Any]:
        """The overview of the first directory, with the runs of all of them."""
        answer: dict[str, Any] = await self._process(0).tell(DirectoryRequest())
        for at in range(1, len(self._directories)):
            answer["runs"] += await self._runs_elsewhere(at)
        return answer

    async def _runs_elsewhere(self, at: int) -> list[dict[str, Any]]:
        directory = self._directories[at]
        try:
            written = (directory / FILE_NAME).stat().st_mtime_ns
            if at not in self._elsewhere or self._elsewhere[at][0] != written:
                self._elsewhere[at] = written, load_left_state(directory)
        except (OSError, DirectoryError):
            return []  # removed since, or damaged: shown when it is opened by itself
        seen = await self._seen_elsewhere(at)
        runs = runs_of(self._elsewhere[at][1], seen, live=is_worked_in(directory))
        offset = at * NUMBERS_OF_A_DIRECTORY
        return [{**run, "number": run["number"] + offset} for run in runs]

    async def _seen_elsewhere(self, at: int) -> dict[int, Seen]:
        """What the directory's process has read; none is started for this."""
        process = self._processes.get(at)
        if process is not None and process.pid is not None:
            # The first directory's page waits for no other; who asks for a series is told why.
            with contextlib.suppress(ServiceUnavailable, TimeoutError):
                async with asyncio.timeout(PROGRESS_S):
                    answer = await process.ask(ProgressRequest(0), idle=True)
                self._seen[at] = msgspec.json.decode(answer, type=Progress).runs
        return self._seen.get(at, {})

    async def series(self, request: SeriesRequest) -> bytes:
        """JSON of a run's series."""
        process, number = self._place(request.run)
        return _renumbered(await process.ask(SeriesRequest(number)), number, request.run)

    async def points(self, request: PointsRequest) -> bytes:
        """JSON of some series' values."""
        process, number = self._place(request.run)
        request_there = msgspec.structs.replace(request, run=number)
        return _renumbered(await process.ask(request_there), number, request.run)

    async def close(self) -> None:
        """End the processes."""
        for process in self._processes.values():
            await process.close()


def _renumbered(answer: bytes, number: int, run: int) -> bytes:
    """The answer begins with the run's number, which is another one for the page."""
    begin = b'{"run":%d,' % number
    if number == run or not answer.startswith(begin):
        return answer
    return b'{"run":%d,' % run + answer[len(begin) :]
