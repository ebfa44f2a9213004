"""The runs of a service: which one is open, its sink, what was lost in it, and how it ended."""

from __future__ import annotations

import datetime
import secrets
import string
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec

from raywb.errors import SettingsConflict
from raywb.groups import Group
from raywb.reports import FinishReport, RunInfo, SinkStatus
from raywb.rows import Scalar
from raywb.service.delivery import Delivery
from raywb.service.fold import Fold
from raywb.service.outbox import OutRow, OutSummary
from raywb.service.report import make_report
from raywb.service.sink_messages import Open, Opened
from raywb.service.sink_process import SinkProcess, definitions
from raywb.service.state import RunState, ServiceState, save_state
from raywb.settings import DEFAULT_PROJECT, Settings, find_api_key

__all__ = [
    "Runs",
    "check_settings",
    "describe_run",
    "make_open_request",
    "new_run_id",
    "resolve_mode",
]

_ALPHABET = string.ascii_lowercase + string.digits


def new_run_id() -> str:
    """Eight letters and digits, as W&B makes them."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(8))


def resolve_mode(settings: Settings, api_key: str | None) -> str:
    """The explicit mode, else online where a key is to be had, else offline."""
    if settings.mode is not None:
        return settings.mode
    return "online" if api_key or find_api_key(settings) else "offline"


def describe_run(
    settings: Settings,
    group: Group,
    *,
    run_id: str,
    mode: str,
    directory: str,
    epoch: int,
    provisional: bool,
) -> RunInfo:
    """Everything that is known of a run before W&B has seen it."""
    project = settings.project or DEFAULT_PROJECT
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return RunInfo(
        project=project,
        id=settings.run_id or run_id,
        name=settings.name or f"{project}-{settings.job_type}-{now}",
        mode=mode,
        dir=directory,
        entity=settings.entity,
        group=group.name,
        group_source=group.source,
        job_type=settings.job_type,
        epoch=epoch,
        provisional=provisional,
    )


#: Settings that belong to the service or to the caller, not to the run.
_NOT_OF_A_RUN = ("dir", "local_cluster", "listen_host")


def check_settings(run: RunState, explicit: dict[str, Any]) -> None:
    """Make sure that a caller who joins a run asks for nothing that it is not.

    Raises:
        SettingsConflict: with each setting that differs, and both values.
    """
    has = msgspec.structs.asdict(msgspec.convert(run.settings, Settings))
    has |= {"project": run.info.project, "group": run.info.group or "", "mode": run.info.mode}
    has |= {"name": run.info.name, "run_id": run.info.id, "entity": run.info.entity}
    asked = {key: value for key, value in explicit.items() if key not in _NOT_OF_A_RUN}
    differing = sorted(key for key, value in asked.items() if has[key] != value)
    if differing:
        pairs = ", ".join(f"{key} is {has[key]!r}, not {asked[key]!r}" for key in differing)
        raise SettingsConflict(
            f"the raywb run {run.info.name!r} is open with other settings: {pairs}. "
            "Leave them out to join it, or end it first with `raywb finish`"
        )


def make_open_request(
    run: RunState, settings: Settings, fold: Fold, directory: str, api_key: str | None
) -> Open:
    """The first message to a sink that is to write this run."""
    return Open(
        project=run.info.project,
        run_id=run.info.id,
        name=run.info.name,
        mode=run.info.mode,
        dir=directory,
        entity=run.info.entity,
        group=run.info.group,
        job_type=run.info.job_type,
        tags=settings.tags,
        notes=settings.notes,
        base_url=settings.base_url,
        api_key=api_key,
        base=run.base,
        config=fold.config,
        defines=definitions(fold),
        deadline_s=settings.sink_deadline_s,
    )


class Runs:
    """Every run of one service directory, the last of which may be open.

    Args:
        directory: the service's directory.
        state: what is written down of the runs; changed and saved here.
        delivery: where their rows are.
        spawn: runs a coroutine in the service's loop.
        api_key: W&B's key when a driver handed it over; it stays in memory.
    """

    def __init__(
        self,
        directory: Path,
        state: ServiceState,
        delivery: Delivery,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        api_key: str | None,
    ) -> None:
        self.api_key = api_key
        self._directory = directory
        self._state = state
        self._delivery = delivery
        self._spawn = spawn
        self._sinks: dict[int, SinkProcess] = {}

    @property
    def last(self) -> RunState | None:
        """The last run; None while none was ever opened."""
        return self._state.runs[-1] if self._state.runs else None

    @property
    def open(self) -> RunState | None:
        """The run that rows belong to now."""
        run = self.last
        return run if run is not None and run.exit_code is None else None

    def resume(self, *, ended_only: bool = False) -> None:
        """Go on with the runs that an earlier incarnation left: rows first, then the sinks.

        Args:
            ended_only: only with those that ``finish()`` was called for.
        """
        if self.last is not None:
            self._delivery.open_run(self.last.number)
        for run in self._state.runs:
            if run.report is None and (run.exit_code is not None or not ended_only):
                self._begin_sink(run)

    def begin(
        self, settings: Settings, group: Group, run_id: str, *, provisional: bool
    ) -> RunState:
        """Open a run: rows that belong to none yet, and all that come, belong to it."""
        number = len(self._state.runs) + 1
        info = describe_run(
            settings,
            group,
            run_id=run_id if number == 1 else new_run_id(),
            mode=resolve_mode(settings, self.api_key),
            directory=str(self._directory),
            epoch=number,
            provisional=provisional,
        )
        run = RunState(number=number, info=info, settings=settings.explicit())
        self._state.runs.append(run)
        try:
            save_state(self._directory, self._state)
        except OSError:
            self._state.runs.pop()
            raise
        self._delivery.open_run(number)
        self._begin_sink(run)
        return run

    def _begin_sink(self, run: RunState) -> None:
        if run.info.mode == "disabled":
            return
        settings = msgspec.convert(run.settings, Settings)
        fold = self._delivery.folds.setdefault(run.number, Fold())

        def open_request() -> Open:
            return make_open_request(
                run, settings, fold, str(self._directory), self.api_key or find_api_key(settings)
            )

        sink = SinkProcess(
            run.info,
            run.number,
            self._delivery.outbox,
            fold,
            open_request,
            on_opened=lambda opened: self._note_opened(run, opened),
            deadline_s=settings.sink_deadline_s,
            stderr=self._directory / "logs" / f"sink-{run.info.id}.log",
        )
        self._sinks[run.number] = sink
        if run.exit_code is not None:
            sink.finish(None if run.crashed else run.exit_code)
        self._spawn(self._serve(run, sink))

    async def _serve(self, run: RunState, sink: SinkProcess) -> None:
        """Deliver to the end, and write down how the run ended, whoever waits for it or not."""
        await sink.serve()
        if sink.done.is_set():
            self.report(run, closed=True)

    def _note_opened(self, run: RunState, opened: Opened) -> None:
        """Remember what only W&B could tell: the page's address, and its step of our first row."""
        run.base = opened.base
        run.info = msgspec.structs.replace(
            run.info, url=opened.url, entity=opened.entity or run.info.entity
        )
        save_state(self._directory, self._state)

    def advance(self) -> bool:
        """Make rows of the ledger as far as it belongs to the last run, and wake the sinks.

        Raises:
            OSError: the outbox takes nothing.
        """
        if self.last is None or not self._delivery.advance(self.last.cut):
            return False
        for sink in self._sinks.values():
            sink.wake()
        return True

    def sink_of(self, run: RunState) -> SinkProcess | None:
        """The sink that works for this run; None when it is disabled, or ended before a restart."""
        return self._sinks.get(run.number)

    def rest(self, run: RunState, resting: bool) -> None:
        """Leave W&B alone while nobody has the run, or go on with it."""
        sink = self.sink_of(run)
        if sink is not None:
            sink.rest(resting)

    def sink_status(self, run: RunState | None) -> SinkStatus:
        """How W&B's side of a run keeps up."""
        if run is None:
            return SinkStatus(state="waiting", applied_rows=0, restarts=0)
        sink = self.sink_of(run)
        if sink is not None:
            return sink.status
        state = "disabled" if run.info.mode == "disabled" else "finished"
        applied = run.report.delivered_rows if run.report else 0
        return SinkStatus(state=state, applied_rows=applied, restarts=0)

    def rows_of(self, run: RunState) -> int:
        """Finished rows of a run."""
        return self._delivery.outbox.rows_of(run.number)

    def backlog(self, run: RunState) -> int:
        """Finished rows that W&B's client has not taken."""
        sink = self.sink_of(run)
        return max(self.rows_of(run) - sink.delivered_rows, 0) if sink else 0

    def lost(self) -> dict[str, int]:
        """What could not be kept since the run began, by reason."""
        lost = self._delivery.merge.lost
        if missing := sum(self._delivery.ledger.missing_bytes.values()):
            lost["ledger_lost_bytes"] = missing
        return lost

    def losses(self) -> dict[str, int]:
        """Losses since the run began, by the names that they have in the run."""
        losses = {f"raywb/lost/{reason}": count for reason, count in sorted(self.lost().items())}
        if rejected := self._delivery.merge.rejected:
            losses["raywb/rejected"] = rejected
        return losses

    def log_losses(self, losses: dict[str, int]) -> None:
        """Write losses into the open run, as a row of its own."""
        run = self.open
        if run is not None and losses:
            self._log_losses(run, losses)

    def _log_losses(self, run: RunState, losses: dict[str, int]) -> None:
        row: dict[str, Scalar] = {**losses, "raywb/backlog_rows": self.backlog(run)}
        self._delivery.add([OutRow(run.number, time.time(), row)])

    def end(
        self,
        run: RunState,
        exit_code: int,
        *,
        crashed: bool = False,
        outstanding: Sequence[str] = (),
    ) -> None:
        """Take the cut: what the ledger has now belongs to the run, what comes later does not.

        A second call takes a later cut: what has come since, for instance from a node that did
        not answer before, belongs to the run too. The state is that of the first call.

        Args:
            run: the last run.
            exit_code: 0 for success; anything else is a failure.
            crashed: leave the run without W&B's own finish.
            outstanding: what could not be taken in, each in one sentence.

        Raises:
            OSError: the outbox takes nothing, or the state cannot be written down.
        """
        before = msgspec.structs.asdict(run)
        run.outstanding = list(outstanding)
        try:
            if run.cut is None or self._delivery.ledger.end > run.cut:
                run.cut = None
                self.advance()
                self._write_end(run)
                run.cut = self._delivery.ledger.end
            if run.exit_code is None:
                run.exit_code, run.crashed = exit_code, crashed
            save_state(self._directory, self._state)
        except OSError:
            for name, value in before.items():
                setattr(run, name, value)
            raise
        self._end_in_wandb(run)

    def _write_end(self, run: RunState) -> None:
        """The last thing in the run is what was lost in it, if only that nothing was."""
        losses = self.losses()
        merge = self._delivery.merge
        if losses and (self.lost(), merge.rejected) != (run.lost, run.rejected):
            self._log_losses(run, losses)
        values = {"raywb/rejected": 0, "raywb/backlog_rows": 0, **losses}
        self._delivery.add([OutSummary(run.number, values)])
        run.received_rows, run.rejected, run.lost = merge.rows, merge.rejected, self.lost()

    def _end_in_wandb(self, run: RunState) -> None:
        """Have the run's sink end it, or a new one when more came after the end."""
        if run.info.mode == "disabled":
            return
        sink = self.sink_of(run)
        closed = run.closed_rows is not None and (sink is None or sink.done.is_set())
        if closed and self.rows_of(run) > (run.closed_rows or 0):
            run.report = None
            self._begin_sink(run)
        elif sink is not None:
            sink.finish(None if run.crashed else run.exit_code)

    def report(self, run: RunState, *, closed: bool) -> FinishReport:
        """How a run ended, in numbers.

        Args:
            run: a run whose cut was taken.
            closed: W&B has closed it, or it is disabled; the report is then kept.
        """
        sink = self.sink_of(run)
        # While W&B has not closed the run, only what it once showed to have counts.
        delivered = run.closed_rows or 0
        if sink is not None:
            delivered = sink.delivered_rows if closed else sink.confirmed_rows
        if run.info.mode == "disabled":
            delivered = 0
        report = make_report(
            run,
            rows=0 if run.info.mode == "disabled" else self.rows_of(run),
            delivered=delivered,
            own_rows=self._delivery.own_rows[run.number],
            closed=closed,
            error=sink.status.last_error if sink else None,
        )
        if closed:
            run.report = report
            run.closed_rows = delivered
            save_state(self._directory, self._state)
        return report
