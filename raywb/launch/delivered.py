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

from raywb.errors import DirectoryError
from raywb.launch.brought_home import InUse, bring_home
from raywb.launch.finishing import Finished, finish_cluster
from raywb.launch.left_here import (
    LeftRun,
    directories_here,
    is_directory_of_a_service,
    is_of_here,
    lacks_updates_only,
    runs_in,
)

if TYPE_CHECKING:
    from raywb.reports import FinishReport

__all__ = ["Delivery", "Tell", "deliver"]

#: Is told what is going on, in a line without a full stop.
Tell = Callable[[str], None]

#: Calls a function and returns what that returns, in this thread or another one.
Aside = Callable[[Callable[[], Finished]], Finished]

#: Pause between two looks at what a live service has delivered, in seconds.
LOOK_PAUSE_S = 0.5


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


def deliver(  # noqa: PLR0913 - all but three by name
    address: str,
    environment: Mapping[str, str],
    tell: Tell,
    *,
    timeout_s: float,
    exit_code: int | None = None,
    here: bool = True,
    disk_stays: bool = False,
    though_others_log: bool = True,
    aside: Aside = lambda work: work(),
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
        though_others_log: the run is finished though other jobs are at work on the cluster.
        aside: calls what it is given, which calls Ray and may hang in it.
        on_connect: called when Ray is connected, which has set signal handlers of its own.
    """
    deadline = time.monotonic() + timeout_s
    finished, stopped = _asked(
        aside,
        lambda: finish_cluster(
            address,
            environment,
            exit_code or 0,
            deadline,
            tell,
            though_others_log=though_others_log,
            on_connect=on_connect,
        ),
    )
    report = finished.report
    live = Path(report.run.dir) if report is not None else None
    rows, uploads, offline = list(finished.still_logging), list[str](), list[str]()
    if finished.after_finish_rows and live is not None:
        rows.append(
            f"{finished.after_finish_rows} rows came after the run was finished, and belong to no "
            f"run; they are in {live}, and the next raywb.start() on this cluster takes them"
        )
    if report is not None and not report.complete:
        text = f"run {report.run.name}: {report.message or 'W&B has not closed it'}"
        (uploads if lacks_updates_only(report) else rows).append(text)
    if report is not None and live is not None and is_directory_of_a_service(live):
        try:
            for run in _earlier_runs(report, deadline, tell):
                text = f"run {run.name}, an earlier one: {run.message or 'W&B has not closed it'}"
                (uploads if run.lacks_updates_only else rows).append(text)
        except DirectoryError as error:
            rows.append(str(error))
    others = list[Path]()
    if here:
        others, unreadable = _left_behind(live, environment, of_here_only=disk_stays)
        others = list(dict.fromkeys([*stopped, *others]))
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


def _asked(aside: Aside, work: Callable[[], Finished]) -> tuple[Finished, list[Path]]:
    """What the cluster answered; whatever goes wrong in asking it is no answer."""
    try:
        finished = aside(work)
    except Exception as error:  # noqa: BLE001 - Ray's and the service's are many, and all are told
        finished = Finished(unanswered=f"the cluster could not be asked: {error!r}")
    stopped = [finished.stopped] if finished.stopped is not None else []
    return finished, [one for one in stopped if is_directory_of_a_service(one)]


def _earlier_runs(report: FinishReport, deadline: float, tell: Tell) -> list[LeftRun]:
    """Runs of a live service, but for the one that was finished, of which W&B lacks something.

    Delivery goes on by itself as long as the service runs: it is waited for.
    """
    live = Path(report.run.dir)
    said: list[str] = []
    while True:
        names = [] if report.complete else [one.run.name for one in report.stage_runs]
        missing = [
            run
            for run in runs_in(live)
            if not run.is_complete and run.number != report.run.epoch and run.name not in names
        ]
        waiting = [run.name for run in missing if not run.is_judged]
        if not waiting or time.monotonic() + LOOK_PAUSE_S > deadline:
            return missing
        if waiting != said:
            said = waiting
            tell(f"Not delivered yet: {', '.join(waiting)}")
        time.sleep(LOOK_PAUSE_S)


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
