"""The runs of a service: which one is open, its sink, what was lost in it, and how it ended."""

from __future__ import annotations

import datetime
import secrets
import string
import time
from collections.abc import Callable, Coroutine
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
from raywb.service.sink_messages import Open, Opened
from raywb.service.sink_process import SinkProcess, definitions
from raywb.service.state import RunState, ServiceState, save_state
from raywb.service.updates import Updates
from raywb.settings import DEFAULT_PROJECT, Settings, find_api_key

__all__ = ["Runs", "check_settings", "describe_run", "new_run_id", "resolve_mode"]

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
        self._updates: dict[int, Updates] = {}

    @property
    def last(self) -> RunState | None:
        """The last run; None while none was ever opened."""
        return self._state.runs[-1] if self._state.runs else None

    @property
    def open(self) -> RunState | None:
        """The run that rows belong to now."""
        run = self.last
        return run if run is not None and run.exit_code is None else None

    def resume(self) -> None:
        """Go on with the runs that an earlier incarnation left: rows first, then the sinks."""
        if self.last is not None:
            self._delivery.open_run(self.last.number)
        for run in self._state.runs:
            if run.report is None:
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
            return Open(
                project=run.info.project,
                run_id=run.info.id,
                name=run.info.name,
                mode=run.info.mode,
                dir=str(self._directory),
                entity=run.info.entity,
                group=run.info.group,
                job_type=run.info.job_type,
                tags=settings.tags,
                notes=settings.notes,
                base_url=settings.base_url,
                api_key=self.api_key or find_api_key(settings),
                base=run.base,
                config=fold.config,
                defines=definitions(fold),
                deadline_s=settings.sink_deadline_s,
            )

        sink = SinkProcess(
            run.info,
            self._delivery.outbox,
            fold,
            self.updates_of(run),
            open_request,
            on_opened=lambda opened: self._note_opened(run, opened),
            deadline_s=settings.sink_deadline_s,
            stderr=self._directory / "logs" / f"sink-{run.info.id}.log",
        )
        self._sinks[run.number] = sink
        if run.exit_code is not None:
            sink.finish(run.exit_code)
        self._spawn(sink.serve())

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
        self.wake()
        return True

    def wake(self) -> None:
        """There is something new for the sinks."""
        for sink in self._sinks.values():
            sink.wake()

    def updates_of(self, run: RunState) -> Updates:
        """The tables, artifacts and alerts of a run."""
        if run.number not in self._updates:
            self._updates[run.number] = Updates(
                run.number,
                self._delivery.outbox,
                self._delivery.blobs,
                run.updates,
                save=lambda: save_state(self._directory, self._state),
                on_done=self._delete_blobs,
            )
        return self._updates[run.number]

    def undelivered_updates(self, run: RunState | None) -> list[str]:
        """Tables, artifacts and alerts that W&B does not have, each with the reason."""
        if run is None or run.info.mode == "disabled":
            return []
        return self.updates_of(run).undelivered(closed=run.report is not None)

    def _delete_blobs(self) -> None:
        """Delete the blobs that W&B's server has, and that nobody speaks of any more.

        W&B's offline files refer to blobs, and a journal that was not read to its end may.
        """
        modes = {run.info.mode for run in self._state.runs}
        if modes == {"online"} and self._delivery.position >= self._delivery.ledger.end:
            needed = [self.updates_of(run).needed_blobs() for run in self._state.runs]
            self._delivery.blobs.delete_all_but(set().union(*needed))

    def sink_of(self, run: RunState) -> SinkProcess | None:
        """The sink that works for this run; None when it is disabled, or ended before a restart."""
        return self._sinks.get(run.number)

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
        if self.last is not None and (alerts := self.updates_of(self.last).unconfirmed_alerts):
            lost["alert_unconfirmed"] = alerts
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
            row: dict[str, Scalar] = {**losses, "raywb/backlog_rows": self.backlog(run)}
            self._delivery.add([OutRow(run.number, time.time(), row)])

    def end(self, run: RunState, exit_code: int) -> None:
        """Take the cut: what the ledger has now belongs to the run, what comes later does not.

        The last thing in the run is what was lost in it, if only that nothing was.

        Raises:
            OSError: the outbox takes nothing.
        """
        if run.exit_code is None:
            self.advance()
            losses = self.losses()
            self.log_losses(losses)
            values = {"raywb/rejected": 0, "raywb/backlog_rows": 0, **losses}
            self._delivery.add([OutSummary(run.number, values)])
            merge = self._delivery.merge
            run.received_rows, run.rejected = merge.rows, merge.rejected
            run.lost = self.lost()
            run.cut = self._delivery.ledger.end
            run.exit_code = exit_code
            try:
                save_state(self._directory, self._state)
            except OSError:
                run.cut = run.exit_code = None
                raise
        self.advance()

    def report(self, run: RunState, *, closed: bool) -> FinishReport:
        """How a run ended, in numbers.

        Args:
            run: a run whose cut was taken.
            closed: W&B has closed it, or it is disabled; the report is then kept.
        """
        sink = self.sink_of(run)
        # While W&B has not closed the run, only what it once showed to have counts.
        delivered = (sink.delivered_rows if closed else sink.confirmed_rows) if sink else 0
        undelivered = max(self.rows_of(run) - delivered, 0) if sink else 0
        message = None
        updates = []
        if sink is not None:
            updates = self.updates_of(run).undelivered(closed=closed)
            if alerts := self.updates_of(run).unconfirmed_alerts:
                run.lost = {**run.lost, "alert_unconfirmed": alerts}
        if undelivered or not closed:
            why = f" ({sink.status.last_error})" if sink and sink.status.last_error else ""
            message = (
                f"{undelivered} rows are not with W&B yet{why}. They are safe in "
                f"{self._directory}, and delivery goes on as long as the service runs"
            )
        if updates:
            text = f"W&B does not have {'; '.join(updates)}. What came lies in {self._directory}"
            message = f"{message}. {text}" if message else text
        report = FinishReport(
            run=run.info,
            exit_code=run.exit_code or 0,
            received_rows=run.received_rows,
            # What raywb itself wrote into the run is no row that anybody logged.
            delivered_rows=max(delivered - self._delivery.own_rows[run.number], 0),
            undelivered_rows=undelivered,
            undelivered_updates=updates,
            lost=run.lost,
            rejected=run.rejected,
            complete=closed and not undelivered and not updates,
            message=message,
        )
        if closed:
            run.report = report
            save_state(self._directory, self._state)
        return report
