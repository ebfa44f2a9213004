"""What a service's directory says of its runs, without a service: state, rows, losses."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raywb import __version__
from raywb.errors import DirectoryError
from raywb.reports import SinkStatus, StageRunStatus, Status
from raywb.service.live_rows import LiveRows
from raywb.service.state import FILE_NAME, RunState, ServiceState, load_left_state
from raywb.view.history.requests import Seen

if TYPE_CHECKING:
    from raywb.view.history.outbox_reader import OutboxReader

__all__ = ["LeftRuns", "is_worked_in", "runs_of"]

#: The kernel's list of locks, less those of other PID namespaces.
LOCKS = Path("/proc/locks")

_LOST = "raywb/lost/"

_NOTHING = Seen(0, 0, None, None)


def is_worked_in(directory: Path) -> bool:
    """Whether a service works in a directory: it holds its lock.

    Where the kernel's list does not show the lock, since it is another container's or the file
    system numbers its devices otherwise, it is tried, shared, and let go at once; a service
    that begins in that instant tries again.
    """
    lock = directory / "lock"
    try:
        if _is_listed(os.stat(lock)):
            return True
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no locks on this file system: no service works there either
    finally:
        os.close(fd)
    return False


def _is_listed(lock: os.stat_result) -> bool:
    try:
        locks = LOCKS.read_text()
    except OSError:
        return False
    place = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
    return any(
        fields[1] == "FLOCK" and place in fields
        for line in locks.splitlines()
        if len(fields := line.split()) > 5
    )


def runs_of(state: ServiceState, seen: Mapping[int, Seen], *, live: bool) -> list[dict[str, Any]]:
    """The runs of one directory in the shape of the page's API.

    Args:
        state: what the service wrote down.
        seen: what was read of the outbox, by run, as far as anything was; the rows of others are
            None, unless a report counts them.
        live: whether a service works in the directory.
    """
    cluster_runs = {run.number for run in state.runs}
    found = []
    for run in state.all_runs:
        history = seen.get(run.number, _NOTHING)
        report = run.report
        rows = history.rows if run.number in seen else None
        if report is not None:
            rows = max(history.rows, report.delivered_rows + report.undelivered_rows)
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
                "started_s": history.first_time_s,
                "ended_s": history.last_time_s if report is not None else None,
                "rows": rows,
            }
        )
    return found


class LeftRuns:
    """The overview of one directory, made of its files alone.

    Args:
        directory: the service's.
        reader: reads its outbox.
        live_rows: is fed by the reader.
    """

    def __init__(self, directory: Path, reader: OutboxReader, live_rows: LiveRows) -> None:
        self._directory = directory
        self._reader = reader
        self._live_rows = live_rows
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

    def describe(self, trouble: str | None = None) -> dict[str, Any]:
        """The overview in the shape of the page's API, less the present time.

        Args:
            trouble: why the outbox cannot be read, if it cannot: a problem of the run.

        Raises:
            DirectoryError: the service's state cannot be read, or the outbox, and there is no
                run whose problem that would be.
        """
        state, live = self.state, is_worked_in(self._directory)
        last = state.runs[-1] if state.runs else None
        number = last.number if last is not None else 0
        status = None
        if last is not None:
            status = self._status(state, last, trouble, live=live)
        elif trouble is not None:
            raise DirectoryError(trouble)
        return {
            "live": live,
            "runs": runs_of(state, self._seen(state), live=live),
            "run": number,
            "status": status,
            "reading": self._reader.reading(number),
            "ray_dashboard": None,
            "version": __version__,
        }

    def _status(
        self, state: ServiceState, run: RunState, trouble: str | None, *, live: bool
    ) -> Status:
        seen = self._reader.seen()
        history = seen.get(run.number, _NOTHING)
        report = run.report
        problems = [] if trouble is None else [trouble]
        if report is None and not live:
            problems.append(
                "nobody ended this run, and no service works in its directory on this machine: "
                "what W&B has of it is not known here, and `raywb recover` brings it home"
            )
        elif report is not None and report.message:
            problems.append(report.message)
        stage_runs = [one for one in state.stage_runs if one.parent in (0, run.number)]
        return Status(
            version=__version__,
            run=run.info,
            finished=report is not None,
            address=None,
            incarnation=state.incarnation,
            received_rows=max(
                report.received_rows if report else run.received_rows, history.logged
            ),
            outbox_rows=history.rows,
            backlog_rows=_backlog(run, history),
            lost=(report.lost if report else run.lost) or self._losses(run.number),
            rejected=report.rejected if report else run.rejected,
            after_finish_rows=0,
            sink=_sink(run, live=live),
            sources=[],
            problems=problems,
            unconfirmed=run.unconfirmed,
            undelivered_updates=report.undelivered_updates if report else [],
            stage_runs=[
                StageRunStatus(
                    run=one.info,
                    state=_state_of(one, live=live),
                    received_rows=seen.get(one.number, _NOTHING).logged,
                    backlog_rows=_backlog(one, seen.get(one.number, _NOTHING)),
                    sink=_sink(one, live=live),
                )
                for one in stage_runs
            ],
            live=self._live_rows.live([run.number, *(one.number for one in stage_runs)]),
        )

    def _seen(self, state: ServiceState) -> dict[int, Seen]:
        """What was read of each run; a run of which nothing is to be read has no rows."""
        seen = self._reader.seen()
        if self._reader.position < self._reader.end:
            return seen
        return {**{run.number: _NOTHING for run in state.all_runs}, **seen}

    def _losses(self, number: int) -> dict[str, int]:
        """What the service has logged of losses into a run; it does so every few seconds."""
        history = self._reader.runs.get(number)
        keys = [key for key in history.keys if key.startswith(_LOST)] if history else []
        found = {key.removeprefix(_LOST): history.last(key) for key in keys} if history else {}
        return {reason: int(count) for reason, count in found.items() if count > 0}


def _state_of(run: RunState, *, live: bool) -> str:
    """How a run stands: as its report says, else as far as the directory tells."""
    if run.report is not None:
        return run.report.state
    return "running" if live else "unfinished"


def _backlog(run: RunState, seen: Seen) -> int:
    if run.info.mode == "disabled":
        return 0
    if run.report is not None:
        return run.report.undelivered_rows
    return max(seen.rows - (run.closed_rows or 0), 0)


def _sink(run: RunState, *, live: bool) -> SinkStatus:
    """How W&B's side stood; ``left`` is a run that nobody delivers."""
    report = run.report
    rows = report.delivered_rows if report is not None else run.closed_rows or 0
    state = "finished" if report is not None and report.complete else "running" if live else "left"
    if run.info.mode == "disabled":
        state = "disabled"
    return SinkStatus(state=state, applied_rows=rows, restarts=0, confirmed_rows=rows)
