"""What a service's directory says of its runs, without a service: state, rows, losses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from raywb import __version__
from raywb.live import Live
from raywb.reports import SinkStatus, StageRunStatus, Status
from raywb.service.left import load_left_state
from raywb.service.state import FILE_NAME, RunState, ServiceState
from raywb.view.history.answers import progress
from raywb.view.history.outbox_reader import OutboxReader

__all__ = ["DirectoryRequest", "LeftRuns", "is_worked_in", "overview_of", "runs_of"]

_LOST = "raywb/lost/"


class DirectoryRequest(msgspec.Struct, frozen=True, tag="directory"):
    """What the directory says as a whole."""


def is_worked_in(directory: Path) -> bool:
    """Whether a service on this machine works in a directory: it holds its lock.

    The lock is not tried, since a service that begins just then would find it taken.
    """
    try:
        file = os.stat(directory / "lock")
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    return any(
        fields[1] == "FLOCK" and place in fields
        for line in locks.splitlines()
        if len(fields := line.split()) > 5
    )


def runs_of(
    state: ServiceState, reader: OutboxReader | None, *, live: bool, present: int | None = None
) -> list[dict[str, Any]]:
    """The runs of one directory in the shape of the page's API.

    Args:
        state: what the service wrote down.
        reader: what was read of the outbox, as far as anything was.
        live: whether a service works in the directory.
        present: number of the cluster's present run; by default the last one.
    """
    present = state.runs[-1].number if state.runs and present is None else present
    cluster_runs = {run.number for run in state.runs}
    found = []
    for run in state.all_runs:
        history = reader.runs.get(run.number) if reader is not None else None
        report = run.report
        rows = history.rows if history is not None else 0
        if report is not None:
            rows = max(rows, report.delivered_rows + report.undelivered_rows)
        found.append(
            {
                "number": run.number,
                "id": run.info.id,
                "name": run.info.name,
                "project": run.info.project,
                "entity": run.info.entity,
                "group": run.info.group,
                "mode": run.info.mode,
                "url": run.info.url,
                "state": _state_of(run, live=live),
                "dir": run.info.dir,
                "stage": None if run.number in cluster_runs else run.info.job_type,
                "started_s": history.first_time_s if history is not None else None,
                "ended_s": history.last_time_s if history is not None and report else None,
                "rows": rows,
            }
        )
    return found


def _state_of(run: RunState, *, live: bool) -> str:
    """How a run stands: as its report says, else as far as the directory tells."""
    if run.report is not None:
        return run.report.state
    return "running" if live else "unfinished"


class LeftRuns:
    """The overview of one directory, made of its files alone.

    Args:
        directory: the service's.
        reader: reads its outbox.
    """

    def __init__(self, directory: Path, reader: OutboxReader) -> None:
        self._directory = directory
        self._reader = reader
        self._state: ServiceState | None = None
        self._state_at = (0, 0)

    @property
    def state(self) -> ServiceState:
        """What the service wrote down last.

        Raises:
            DirectoryError: it cannot be read.
        """
        try:
            file = os.stat(self._directory / FILE_NAME)
            at = (file.st_mtime_ns, file.st_ino)
        except FileNotFoundError:
            at = (-1, 0)
        if self._state is None or at != self._state_at:
            self._state, self._state_at = load_left_state(self._directory), at
        return self._state

    def describe(self) -> dict[str, Any]:
        """The overview.

        Raises:
            DirectoryError: the service's state cannot be read.
        """
        live = is_worked_in(self._directory)
        return overview_of(self.state, self._reader, live=live, snapshot=self._live())

    def _live(self) -> Live:
        """What the newest rows say."""
        return Live()


def overview_of(
    state: ServiceState, reader: OutboxReader, *, live: bool, snapshot: Live
) -> dict[str, Any]:
    """The overview of one directory in the shape of the page's API."""
    last = state.runs[-1] if state.runs else None
    number = last.number if last is not None else 0
    return {
        "live": live,
        "runs": runs_of(state, reader, live=live),
        "run": number,
        "status": _status(state, last, reader, snapshot, live=live) if last is not None else None,
        "reading": progress(reader, number),
        "ray_dashboard": None,
        "version": __version__,
    }


def _status(
    state: ServiceState, run: RunState, reader: OutboxReader, snapshot: Live, *, live: bool
) -> Status:
    history = reader.runs.get(run.number)
    rows = history.rows if history is not None else 0
    logged = history.logged if history is not None else 0
    report = run.report
    delivered = report.delivered_rows if report is not None else run.closed_rows or 0
    problems = []
    if report is None and not live:
        problems.append(
            "nobody ended this run, and no service works in its directory on this machine: what "
            "W&B has of it is not known here; `raywb recover` brings it home"
        )
    elif report is not None and report.message:
        problems.append(report.message)
    return Status(
        version=__version__,
        run=run.info,
        finished=report is not None,
        address=None,
        incarnation=state.incarnation,
        received_rows=max(report.received_rows if report else run.received_rows, logged),
        outbox_rows=rows,
        backlog_rows=report.undelivered_rows if report else max(rows - delivered, 0),
        lost=(report.lost if report else run.lost) or _losses(reader, run.number),
        rejected=report.rejected if report else run.rejected,
        after_finish_rows=0,
        sink=_sink(run, live=live),
        sources=[],
        problems=problems,
        unconfirmed=run.unconfirmed,
        undelivered_updates=report.undelivered_updates if report else [],
        stage_runs=[_stage_run(one, reader, live=live) for one in state.stage_runs],
        live=snapshot,
    )


def _sink(run: RunState, *, live: bool) -> SinkStatus:
    report = run.report
    rows = report.delivered_rows if report is not None else run.closed_rows or 0
    state = "finished" if report is not None and report.complete else "running" if live else "left"
    if run.info.mode == "disabled":
        state = "disabled"
    return SinkStatus(state=state, applied_rows=rows, restarts=0, confirmed_rows=rows)


def _stage_run(run: RunState, reader: OutboxReader, *, live: bool) -> StageRunStatus:
    history = reader.runs.get(run.number)
    rows = history.rows if history is not None else 0
    report = run.report
    return StageRunStatus(
        run=run.info,
        state=_state_of(run, live=live),
        received_rows=report.received_rows if report else history.logged if history else 0,
        backlog_rows=report.undelivered_rows if report else max(rows - (run.closed_rows or 0), 0),
        sink=_sink(run, live=live),
    )


def _losses(reader: OutboxReader, number: int) -> dict[str, int]:
    """The losses that the service has logged into a run; they are written every few seconds."""
    history = reader.runs.get(number)
    if history is None:
        return {}
    keys = [key for key in history.keys if key.startswith(_LOST)]
    found = {key.removeprefix(_LOST): int(history.summary_of(key)["last"] or 0) for key in keys}
    return {reason: count for reason, count in found.items() if count}
