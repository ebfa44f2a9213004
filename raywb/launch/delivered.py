"""Bring everything that raywb holds on this machine off it, and say what is left.

A cluster that answers is asked to finish its run. What clusters that are gone left in their
directories on this machine is brought home by ``raywb recover``. Nothing is slept for: the
service says what W&B's server has shown to have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from raywb.errors import DirectoryError, NoClusterError, RaywbError, ServiceUnavailable
from raywb.launch.brought_home import InUse, bring_home
from raywb.launch.left_here import directories_here, is_of_here, runs_in

if TYPE_CHECKING:
    from raywb.reports import FinishReport

__all__ = ["Delivery", "Tell", "deliver"]

#: Is told what is going on, in a line without a full stop.
Tell = Callable[[str], None]

#: Pause before a finish that was not complete is tried again, in seconds.
RETRY_PAUSE_S = 3.0


class Delivery(NamedTuple):
    """What is not off this machine, each a sentence for whoever has to do something about it.

    Attributes:
        rows: runs of which rows are missing at W&B.
        uploads: runs of which tables, artifacts or alerts alone are missing.
        offline: runs whose files lie on this machine only.
        unanswered: why a cluster or its service could not be asked.
        with_wandb: rows of the run that was finished now that W&B has; None without a cluster.
    """

    rows: tuple[str, ...] = ()
    uploads: tuple[str, ...] = ()
    offline: tuple[str, ...] = ()
    unanswered: str | None = None
    with_wandb: int | None = None

    @property
    def is_complete(self) -> bool:
        """Nothing is missing anywhere, offline files aside."""
        return not (self.rows or self.uploads or self.unanswered)


class _Finished(NamedTuple):
    """What came of asking the cluster."""

    report: FinishReport | None = None
    after_finish_rows: int = 0
    unanswered: str | None = None


def deliver(
    address: str,
    environment: Mapping[str, str],
    tell: Tell,
    *,
    timeout_s: float,
    exit_code: int | None = None,
    here: bool = True,
    disk_stays: bool = False,
    on_connect: Callable[[], None] = lambda: None,
) -> Delivery:
    """Finish the cluster's run, bring home what gone clusters left here, and say what is missing.

    Args:
        address: the Ray cluster, as for ``ray.init()``.
        environment: this process's.
        tell: is told what is going on.
        timeout_s: longest that all of it may take.
        exit_code: how the work ended; None where nobody knows, which counts as well for a cluster
            that answers, and as crashed for a run whose cluster is gone.
        here: look for directories of clusters that are gone, too.
        disk_stays: directories outlive this machine's end, and may be other jobs'; what lies on
            this machine alone, as journals do, is brought home all the same.
        on_connect: called when Ray is connected, which has set signal handlers of its own.
    """
    deadline = time.monotonic() + timeout_s
    finished = _finish(address, environment, exit_code or 0, deadline, tell, on_connect)
    report = finished.report
    live = Path(report.run.dir) if report is not None else None
    rows, uploads, offline = list[str](), list[str](), list[str]()
    if finished.after_finish_rows and live is not None:
        rows.append(
            f"{finished.after_finish_rows} rows came after the run was finished, and belong to no "
            f"run; they are in {live}, and the next raywb.start() on this cluster takes them"
        )
    if report is not None and not report.complete:
        text = f"run {report.run.name}: {report.message or 'W&B has not closed it'}"
        (uploads if _lacks_updates_only(report) else rows).append(text)
    others = list[Path]()
    if here:
        others, unreadable = _left_behind(live, environment, of_here_only=disk_stays)
        rows += unreadable
    for directory in others:
        rows += _brought_home(
            directory, environment, exit_code, deadline, tell, others_may_use=disk_stays
        )
    for directory in [*([live] if live is not None else []), *others]:
        offline += _offline(directory)
    return Delivery(
        rows=tuple(rows),
        uploads=tuple(uploads),
        offline=tuple(offline),
        unanswered=finished.unanswered,
        with_wandb=report.delivered_rows if report is not None else None,
    )


def _finish(
    address: str,
    environment: Mapping[str, str],
    exit_code: int,
    deadline: float,
    tell: Tell,
    on_connect: Callable[[], None],
) -> _Finished:
    """Ask the cluster to finish its run, again and again until that is complete."""
    import ray

    import raywb
    from raywb.cluster import find_service
    from raywb.launch.connecting import connect_if_alive

    try:
        connect_if_alive(address, environment)
    except NoClusterError as error:
        tell(f"Nothing to deliver from a cluster: {error}")
        return _Finished()
    except ServiceUnavailable as error:
        return _Finished(unanswered=str(error))
    on_connect()
    report = None
    try:
        if find_service() is None:
            tell("Nothing to deliver from the cluster: no raywb service runs on it")
            return _Finished()
        while True:
            remaining = max(deadline - time.monotonic(), 1.0)
            report = raywb.finish(timeout_s=remaining, exit_code=exit_code)
            if report.complete or time.monotonic() + RETRY_PAUSE_S > deadline:
                break
            tell(f"Not delivered yet: {report.message}")
            time.sleep(RETRY_PAUSE_S)
        return _Finished(report, raywb.status().after_finish_rows)
    except RaywbError as error:
        return _Finished(report, unanswered=str(error))
    finally:
        ray.shutdown()


def _lacks_updates_only(report: FinishReport) -> bool:
    """Whether all rows are with W&B, and tables, artifacts or alerts are not."""
    reports = [report, *report.stage_runs]
    return any(one.undelivered_updates for one in reports) and not any(
        one.undelivered_rows or one.state == "running" or one.unconfirmed for one in reports
    )


def _left_behind(
    live: Path | None, environment: Mapping[str, str], *, of_here_only: bool
) -> tuple[list[Path], list[str]]:
    """Directories of other clusters than the one that answered, and why one cannot be read."""
    found, unreadable = list[Path](), list[str]()
    for directory in directories_here(environment):
        try:
            if directory != live and (not of_here_only or is_of_here(directory, environment)):
                found.append(directory)
        except (DirectoryError, OSError) as error:
            unreadable.append(str(error))
    return found, unreadable


def _brought_home(
    directory: Path,
    environment: Mapping[str, str],
    exit_code: int | None,
    deadline: float,
    tell: Tell,
    *,
    others_may_use: bool,
) -> list[str]:
    """What is still missing of a directory when what can be brought home is.

    Where others may use it, a service at work there is another job's, which ends by itself.
    """
    try:
        return bring_home(directory, environment, exit_code, deadline, tell)
    except InUse as error:
        return [] if others_may_use else [f"{error}: it has to end first"]


def _offline(directory: Path) -> list[str]:
    try:
        runs = runs_in(directory)
    except DirectoryError as error:
        return [str(error)]
    return [
        f"run {run.name} is offline, and its {run.rows} rows lie in {directory} only: "
        f"`raywb sync {directory}` uploads them"
        for run in runs
        if run.is_offline
    ]
