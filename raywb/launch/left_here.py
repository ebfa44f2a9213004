"""Which runs lie in directories on this machine, and whether W&B has them; no cluster is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from raywb.reports import FinishReport
from raywb.service.left import load_left_state
from raywb.service.state import FILE_NAME, RunState, ServiceState
from raywb.service.uploads import Uploads
from raywb.settings import journal_bases

__all__ = [
    "LeftRun",
    "directories_here",
    "has_unopened_rows",
    "is_directory_of_a_service",
    "is_of_here",
    "is_settled",
    "lacks_updates_only",
    "runs_in",
]


class LeftRun(NamedTuple):
    """One run of a service's directory.

    Attributes:
        number: its number in the directory.
        rows: rows that were received for it by its end; 0 where it was not ended.
        is_complete: it was ended, and W&B's server, or W&B's files where it is offline, have all
            of it.
        is_judged: its end is written down; what was missing then does not come any more by itself.
        lacks_updates_only: all its rows are with W&B; tables, artifacts or alerts are not.
        message: what its report says is missing.
        is_offline: it has not been uploaded: it lies in W&B's files, on this machine.
    """

    number: int
    name: str
    rows: int
    is_complete: bool
    is_offline: bool
    is_judged: bool = False
    lacks_updates_only: bool = False
    message: str | None = None


def directories_here(environment: Mapping[str, str]) -> list[Path]:
    """Services' directories in the places where a service on this machine works by default.

    These are ``RAYWB_DIR`` and ``~/raywb/<project>/<run id>``; one that was named otherwise in
    ``raywb.start(dir=…)`` is found only while its service runs.
    """
    named = environment.get("RAYWB_DIR")
    homes = (Path.home() / "raywb").glob(f"*/*/{FILE_NAME}")
    found = [*([Path(named).absolute()] if named else []), *(path.parent for path in homes)]
    return [one for one in dict.fromkeys(found) if is_directory_of_a_service(one)]


def is_directory_of_a_service(directory: Path) -> bool:
    """Whether a service works there, or did."""
    return (directory / FILE_NAME).exists()


def runs_in(directory: Path) -> list[LeftRun]:
    """The runs of a directory, as its service last wrote them down; those with W&B off left out.

    Raises:
        DirectoryError: it is no service's directory, or cannot be read.
    """
    state = load_left_state(directory)
    uploads = Uploads(directory)
    return [
        _describe(run, uploaded=uploads.has(run.number))
        for run in state.all_runs
        if run.info.mode != "disabled"
    ]


def has_unopened_rows(directory: Path) -> bool:
    """Whether something was received there before any run was opened, and lies there still.

    Raises:
        DirectoryError: it is no service's directory, or cannot be read.
    """
    return not load_left_state(directory).runs and _ledger_end(directory) > 0


def is_settled(directory: Path, environment: Mapping[str, str]) -> bool:
    """Whether W&B has every run, nothing was received after the last one, and no journal is here.

    Raises:
        DirectoryError: it is no service's directory, or cannot be read.
        OSError: the same, of its ledger or the journals.
    """
    state = load_left_state(directory)
    cut = max((run.cut or 0 for run in state.runs), default=0)
    return (
        all(run.is_complete for run in runs_in(directory))
        and _ledger_end(directory) <= cut
        and not _has_journals(state, environment)
    )


def is_of_here(directory: Path, environment: Mapping[str, str]) -> bool:
    """Whether its cluster left something on this machine, or the environment names it.

    A directory on a shared disk may belong to a job on other machines, which brings home its own.

    Raises:
        DirectoryError: it is no service's directory, or cannot be read.
        OSError: the journals cannot be looked for.
    """
    named = environment.get("RAYWB_DIR")
    if named and Path(named).absolute() == directory:
        return True
    state = load_left_state(directory)
    session_dir = state.origin.session_dir if state.origin else None
    return _has_journals(state, environment) or (
        session_dir is not None and Path(session_dir).exists()
    )


def _has_journals(state: ServiceState, environment: Mapping[str, str]) -> bool:
    session_dir = state.origin.session_dir if state.origin else None
    bases = journal_bases(session_dir, state.cluster_id, environment)
    return any(base.is_dir() and any(base.glob("*/lock")) for base in bases)


def _ledger_end(directory: Path) -> int:
    """Position behind the last byte that was received, see :mod:`raywb.service.append_log`."""
    files = sorted((directory / "ledger").glob("*.log"))
    return int(files[-1].stem) + files[-1].stat().st_size if files else 0


def _describe(run: RunState, *, uploaded: bool) -> LeftRun:
    report = run.report
    return LeftRun(
        run.number,
        run.info.name,
        run.received_rows,
        is_complete=report is not None and report.complete,
        is_offline=run.info.mode == "offline" and not uploaded and run.received_rows > 0,
        is_judged=report is not None,
        lacks_updates_only=report is not None and lacks_updates_only(report),
        message=report.message if report is not None else None,
    )


def lacks_updates_only(report: FinishReport) -> bool:
    """Whether all rows are with W&B, and tables, artifacts or alerts are not."""
    reports = [report, *report.stage_runs]
    return any(one.undelivered_updates for one in reports) and not any(
        one.undelivered_rows or one.state == "running" or one.unconfirmed for one in reports
    )
