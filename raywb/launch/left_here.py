"""Which runs lie in directories on this machine, and whether W&B has them; no cluster is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from raywb.service.left import load_left_state
from raywb.service.state import FILE_NAME, RunState
from raywb.service.uploads import Uploads

__all__ = ["LeftRun", "directories_here", "has_unopened_rows", "runs_in"]


class LeftRun(NamedTuple):
    """One run of a service's directory.

    Attributes:
        rows: rows that were received for it by its end; 0 where it was not ended.
        is_complete: it was ended, and W&B's server, or W&B's files where it is offline, have all
            of it.
        message: what its report says is missing.
        is_offline: it has not been uploaded: it lies in W&B's files, on this machine.
    """

    name: str
    rows: int
    is_complete: bool
    is_offline: bool
    message: str | None = None


def directories_here(environment: Mapping[str, str]) -> list[Path]:
    """Services' directories in the places where a service on this machine works by default.

    These are ``RAYWB_DIR`` and ``~/raywb/<project>/<run id>``; one that was named otherwise in
    ``raywb.start(dir=…)`` is found only while its service runs.
    """
    named = environment.get("RAYWB_DIR")
    homes = (Path.home() / "raywb").glob(f"*/*/{FILE_NAME}")
    found = [*([Path(named).absolute()] if named else []), *(path.parent for path in homes)]
    return [one for one in dict.fromkeys(found) if (one / FILE_NAME).exists()]


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
    ledger = (directory / "ledger").glob("*")
    return not load_left_state(directory).runs and any(path.stat().st_size for path in ledger)


def _describe(run: RunState, *, uploaded: bool) -> LeftRun:
    is_complete = run.report is not None and run.report.complete
    return LeftRun(
        run.info.name,
        run.received_rows,
        is_complete,
        is_offline=run.info.mode == "offline" and not uploaded and run.received_rows > 0,
        message=run.report.message if run.report is not None else None,
    )
