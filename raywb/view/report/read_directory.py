"""What a directory holds, read to its end in this process: no service, no Ray, no server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from raywb.errors import DirectoryError
from raywb.service.live_rows import LiveRows
from raywb.view.history.answers import answer_points, answer_series
from raywb.view.history.directory import LeftRuns
from raywb.view.history.outbox_reader import OutboxReader
from raywb.view.history.requests import PointsRequest, SeriesRequest

__all__ = ["ReadDirectory"]


class ReadDirectory:
    """Answers about the runs of a service's directory, as it was when this was made.

    Args:
        directory: the service's. Nothing in it is changed, so a service may be at work in it.

    Raises:
        DirectoryError: it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        live_rows = LiveRows()
        self._reader = OutboxReader(directory / "outbox", on_item=live_rows.take)
        left = LeftRuns(directory, self._reader, live_rows)
        try:
            while self._reader.read_some():
                pass
            self._overview: dict[str, Any] = _plain(left.describe())
        except OSError as error:
            raise DirectoryError(f"{directory} cannot be read: {error}") from error

    def overview(self) -> dict[str, Any]:
        """Return what ``api/overview`` answers."""
        return self._overview

    def series(self, run: int) -> dict[str, Any]:
        """Return what ``api/series`` answers."""
        answer: dict[str, Any] = _plain(answer_series(self._reader, SeriesRequest(run)))
        return answer

    def points(self, run: int, keys: Sequence[str], points: int) -> dict[str, Any]:
        """Return what ``api/points`` answers."""
        request = PointsRequest(run, list(keys), points)
        answer: dict[str, Any] = _plain(answer_points(self._reader, request))
        return answer

    def notes(self) -> list[str]:
        """Return what whoever reads the report must know, each in one sentence."""
        overview = self._overview
        found = []
        if overview["live"]:
            found.append("A service was at work: everything is as it was when this was written.")
        elif open_runs := [run["name"] for run in overview["runs"] if run["state"] == "unfinished"]:
            found.append(
                f"Nobody finished {_listed(open_runs)}: the last rows may not have reached this "
                "directory. `raywb recover` brings home what journals still hold."
            )
        if not overview["runs"]:
            found.append("No run was begun here.")
        elif not any(run["rows"] for run in overview["runs"]):
            found.append("There are no rows yet.")
        if damaged := self._reader.damaged:
            found.append(
                f"{damaged:,} {'stretch' if damaged == 1 else 'stretches'} of the outbox cannot be "
                "read: rows in there are missing here, and the others are all there."
            )
        return found


def _listed(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _plain(answer: Any) -> Any:
    """As the API's JSON has it: structs are objects, and what is not finite is null."""
    return msgspec.json.decode(msgspec.json.encode(answer))
