"""The runs that stages have of their own, side by side with the cluster's.

Each has a sink of its own and ends for itself: when all clients that wrote to it were closed, as
crashed when one of their processes was killed, and with the cluster's run at the latest.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from raywb.errors import SettingsConflict
from raywb.groups import Group
from raywb.reports import FinishReport, RunInfo, StageRunRequest, StageRunStatus
from raywb.service.delivery import Delivery
from raywb.service.report import state_of
from raywb.service.run_settings import describe_run, new_run_id, settings_of
from raywb.service.stage_runs import FIRST_STAGE_RUN
from raywb.service.state import RunState, ServiceState, save_state
from raywb.settings import DEFAULT_PROJECT, Settings

if TYPE_CHECKING:
    from raywb.service.runs import Runs

__all__ = ["Stages"]

#: The stage that watches over the others; its run's job type is W&B's word for that.
MONITOR, MONITOR_JOB_TYPE = "monitor", "orchestrator"


class Stages:
    """Every run of a stage in one service directory.

    Args:
        directory: the service's directory.
        state: what is written down of the runs; changed and saved here.
        delivery: where their rows are.
        runs: has the sinks.
    """

    def __init__(
        self, directory: Path, state: ServiceState, delivery: Delivery, runs: Runs
    ) -> None:
        self._directory = directory
        self._state = state
        self._delivery = delivery
        self._runs = runs
        self._merged = delivery.merge.stages

    def open(
        self,
        request: StageRunRequest,
        origin: tuple[Settings, Group],
    ) -> tuple[RunInfo, int]:
        """Open a stage's own run, or join the one of this id, opening it again if it had ended.

        Args:
            request: what the client asks for.
            origin: settings and group of the cluster's run.

        Returns:
            The run, and how often it was opened.

        Raises:
            SettingsConflict: the id is that of a run of the cluster, or the run has other
                settings, or the cluster's run is finished.
            OSError: it cannot be written down.
        """
        run_id = request.run_id
        for run in self._state.stage_runs:
            if request.nonce in run.writers:
                return run.info, run.session
        if self._runs.last is not None and self._runs.last.exit_code is not None:
            raise SettingsConflict(
                f"run {self._runs.last.info.name} is finished: call raywb.start() before a stage "
                "opens a run of its own"
            )
        if any(run.info.id == run_id for run in self._state.runs):
            raise SettingsConflict(
                f"run_id={run_id!r} is the id of the cluster's own run: give the stage's run "
                "another one, or attach() without own_run"
            )
        for run in self._state.stage_runs:
            if run.info.id == run_id:
                _check_same(run, request.explicit)
                self._attach(run, request.nonce)
                return run.info, run.session
        run = self._describe(request, origin)
        self._state.stage_runs.append(run)
        try:
            save_state(self._directory, self._state)
        except OSError:
            self._state.stage_runs.pop()
            raise
        self._merged.known.add(run.number)
        self._runs.begin_sink(run)
        return run.info, run.session

    def _describe(
        self,
        request: StageRunRequest,
        origin: tuple[Settings, Group],
    ) -> RunState:
        settings, group = origin
        stage, explicit = request.stage, request.explicit
        now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        project = explicit.get("project") or settings.project or DEFAULT_PROJECT
        of_stage = {
            "name": f"{project}-{stage}-{now}",
            "run_id": None,
            "job_type": MONITOR_JOB_TYPE if stage == MONITOR else stage,
        }
        if explicit.get("group") is not None:
            group = Group(explicit["group"] or None, "the stage's settings")
        own = msgspec.structs.replace(settings, **{**of_stage, **explicit})
        number = FIRST_STAGE_RUN + len(self._state.stage_runs)
        info = describe_run(
            own,
            group,
            run_id=request.run_id or new_run_id(),
            mode=self._runs.mode_of(own),
            directory=str(self._directory),
            epoch=number,
            provisional=False,
        )
        parent = self._state.runs[-1].number if self._state.runs else 1
        return RunState(
            number=number,
            info=info,
            settings=own.explicit(),
            session=1,
            writers=[request.nonce],
            parent=parent,
        )

    def _attach(self, run: RunState, nonce: str) -> None:
        """One more client writes to a run; one that had ended is opened again."""
        before = msgspec.structs.asdict(run)
        ended = run.exit_code is not None
        if ended:
            run.session += 1
            run.exit_code, run.crashed, run.report, run.writers = None, False, None, []
            run.parent = self._state.runs[-1].number if self._state.runs else run.parent
        run.writers = [*run.writers, nonce]
        try:
            save_state(self._directory, self._state)
        except OSError:
            for name, value in before.items():
                setattr(run, name, value)
            raise
        if ended and run.info.mode != "disabled":
            self._runs.begin_sink(run)

    def settle(self) -> None:
        """End what has ended, and go on with what got rows after its end.

        Raises:
            OSError: it cannot be written down; the next call tries again.
        """
        for run in self._state.stage_runs:
            if run.exit_code is None:
                verdict = self._merged.verdict(run.number, run.session, len(run.writers))
                # Its rows that wait for a rank which never came are released in a while.
                if verdict is not None and not self._delivery.merge.is_waiting(run.number):
                    self._end(run, verdict.exit_code, crashed=verdict.crashed)
            elif run.report is not None and self._runs.rows_of(run) > (run.closed_rows or 0):
                self._end(run, run.exit_code, crashed=run.crashed)

    def end_all(self, exit_code: int, *, crashed: bool = False) -> None:
        """The cluster's run ends: those that are still open end with it.

        Raises:
            OSError: it cannot be written down.
        """
        self.settle()
        lost = self._delivery.liveness.unconfirmed
        for run in self._state.stage_runs:
            if run.exit_code is None:
                found = self._merged.so_far(run.number, run.session, lost)
                worst = max(exit_code, found.exit_code, key=abs)
                self._end(run, worst, crashed=crashed or found.crashed)
            elif run.report is not None and not run.report.complete:
                self._end(run, run.exit_code, crashed=run.crashed)

    def _end(self, run: RunState, exit_code: int, *, crashed: bool) -> None:
        before = run.exit_code, run.crashed
        run.exit_code, run.crashed = exit_code, crashed
        run.received_rows = self._merged.rows[run.number]
        try:
            save_state(self._directory, self._state)
        except OSError:
            run.exit_code, run.crashed = before
            raise
        if run.info.mode == "disabled":
            self._runs.report(run, closed=True)
        else:
            self._runs.end_in_wandb(run)

    def of(self, parent: RunState) -> list[RunState]:
        """The runs that were opened during one of the cluster's."""
        return [run for run in self._state.stage_runs if run.parent == parent.number]

    async def done(self, parent: RunState) -> None:
        """Wait until W&B has closed all of them."""
        for run in self.of(parent):
            sink = self._runs.sink_of(run)
            if sink is not None and run.report is None:
                await sink.done.wait()

    def reports(self, parent: RunState) -> list[FinishReport]:
        """How they ended, or how far they are."""
        return [
            run.report or self._runs.report(run, closed=self._is_closed(run))
            for run in self.of(parent)
            if run.exit_code is not None
        ]

    def _is_closed(self, run: RunState) -> bool:
        sink = self._runs.sink_of(run)
        return sink is None or sink.done.is_set()

    def status(self) -> list[StageRunStatus]:
        """Each of them at this moment."""
        return [
            StageRunStatus(
                run=run.info,
                state="running" if run.exit_code is None else state_of(run),
                received_rows=self._merged.rows[run.number],
                backlog_rows=self._runs.backlog(run),
                sink=self._runs.sink_status(run),
            )
            for run in self._state.stage_runs
        ]

    def origin_of(self, run: RunState) -> tuple[Settings, Group]:
        """What a stage's run takes over from the cluster's."""
        settings = settings_of(run)
        settings = msgspec.structs.replace(
            settings, project=run.info.project, entity=run.info.entity
        )
        return settings, Group(run.info.group, run.info.group_source or "the cluster's run")


def _check_same(run: RunState, explicit: dict[str, Any]) -> None:
    """Make sure that a client who joins a run asks for nothing that it is not.

    Raises:
        SettingsConflict: with each setting that differs.
    """
    has = {name: getattr(run.info, name) for name in ("project", "entity", "mode")}
    differing = sorted(name for name in has.keys() & explicit.keys() if has[name] != explicit[name])
    if differing:
        pairs = ", ".join(f"{name} is {has[name]!r}, not {explicit[name]!r}" for name in differing)
        raise SettingsConflict(
            f"run {run.info.name!r} has the id {run.info.id!r} already, with other settings: "
            f"{pairs}. Leave them out to join it, or give this run another id"
        )
