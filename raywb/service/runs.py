"""The runs of a service: which one is open, its sink, what was lost in it, and how it ended."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from raywb.errors import SettingsConflict
from raywb.groups import Group
from raywb.reports import (
    FinishReport,
    RunInfo,
    SinkStatus,
    SweepReport,
    UnconfirmedSource,
)
from raywb.rows import Scalar
from raywb.service.delivery import Delivery
from raywb.service.fold import Fold
from raywb.service.offline_files import SUPERSEDED
from raywb.service.outbox import OutRow, OutSummary
from raywb.service.ranks import Waiting
from raywb.service.report import make_report, missing_rows
from raywb.service.run_settings import (
    check_settings,
    describe_run,
    find_key,
    lacks_only_a_key,
    new_run_id,
    resolve_mode,
    settings_of,
)
from raywb.service.sink_messages import Open, Opened
from raywb.service.sink_process import SinkProcess, definitions
from raywb.service.stages import Stages
from raywb.service.state import RunState, ServiceState, UpdateMarks, save_state
from raywb.service.updates import Updates
from raywb.settings import Settings

__all__ = ["Runs", "make_open_request"]

#: A step waits this long, and this many paces, for ranks that have gone on to later ones; for
#: silent ones it is a setting, and at least this many paces.
PASSED_WAIT_S = 2.0
PASSED_WAIT_PACES = 2
SILENT_WAIT_PACES = 3

_log = logging.getLogger(__name__)


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
        began_offline=run.info.began_offline,
    )


def _nothing(run: RunState) -> None:
    """Nobody wants to be told."""


class Runs:
    """Every run of one service directory, the last of which may be open.

    Args:
        directory: the service's directory.
        state: what is written down of the runs; changed and saved here.
        delivery: where their rows are.
        keep_running: runs a part of the service in its loop, under a name, and starts it again
            when it fails.
        api_key: W&B's key when a driver handed it over; it stays in memory.
    """

    def __init__(
        self,
        directory: Path,
        state: ServiceState,
        delivery: Delivery,
        keep_running: Callable[[str, Callable[[], Coroutine[Any, Any, None]]], None],
        api_key: str | None,
    ) -> None:
        self._api_key = api_key
        self._directory = directory
        self._state = state
        self._delivery = delivery
        self._keep_running = keep_running
        self._sinks: dict[int, SinkProcess] = {}
        #: One process at a time writes a run.
        self._turns: dict[int, asyncio.Lock] = {}
        delivery.ledger.skip_to(max((run.cut or 0 for run in state.runs), default=0))
        self._updates: dict[int, Updates] = {}
        #: The runs that stages have of their own.
        self.stages = Stages(directory, state, delivery, self)
        #: Told of each run that begins, and that is about to end, to add what belongs into it.
        self.on_begin: Callable[[RunState], None] = _nothing
        self.on_end: Callable[[RunState], None] = _nothing

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
        for run in self._state.all_runs:
            self._settle(run)
            if run.report is None and (run.exit_code is not None or not ended_only):
                self.begin_sink(run)

    def begin(
        self, settings: Settings, group: Group, run_id: str, *, provisional: bool
    ) -> RunState:
        """Open a run: rows that belong to none yet, and all that come, belong to it."""
        number = len(self._state.runs) + 1
        info = describe_run(
            settings,
            group,
            run_id=run_id if number == 1 else new_run_id(),
            mode=resolve_mode(settings, self._api_key),
            directory=str(self._directory),
            epoch=number,
            provisional=provisional,
        )
        if any(info.id == stage.info.id for stage in self._state.stage_runs):
            raise SettingsConflict(
                f"run_id={info.id!r} is the id of a stage's own run: give the cluster's run another"
            )
        run = RunState(number=number, info=info, settings=settings.explicit())
        self._state.runs.append(run)
        try:
            save_state(self._directory, self._state)
        except OSError:
            self._state.runs.pop()
            raise
        self._delivery.open_run(number)
        self.on_begin(run)
        self.begin_sink(run)
        return run

    def take_key(self, api_key: str) -> None:
        """A driver has brought W&B's key: sinks that wait for one, or were refused, try again."""
        self._api_key = api_key
        for sink in self._sinks.values():
            sink.retry_now()

    def go_online(self) -> None:
        """Let open runs go online that are offline only for want of a key, if one has come.

        The server gets all of its rows, from the outbox; the files of its time offline are set
        aside once the run is open there.

        Raises:
            OSError: it cannot be written down; the run stays offline.
        """
        for run in self._state.all_runs:
            lacks_key = run.exit_code is None and lacks_only_a_key(run)
            if lacks_key and find_key(run, self._api_key) is not None:
                self._go_online(run)

    def _go_online(self, run: RunState) -> None:
        before = run.info, run.base, run.updates
        run.info = msgspec.structs.replace(run.info, mode="online", began_offline=True)
        run.base = None
        # What its offline files have is not with the server.
        run.updates = UpdateMarks()
        try:
            save_state(self._directory, self._state)
        except OSError:
            run.info, run.base, run.updates = before
            raise
        self._updates.pop(run.number, None)
        _log.warning(
            "raywb: a key of W&B's has come: run %s goes online with all of its rows; its offline "
            "files are set aside in %s, and need not be uploaded",
            run.info.name,
            self._directory / SUPERSEDED,
        )
        offline = self._sinks.pop(run.number)
        offline.stop()
        self.begin_sink(run)

    def join(self, run: RunState, explicit: dict[str, Any]) -> RunInfo:
        """What somebody gets who calls ``start()`` while this run is open.

        Raises:
            SettingsConflict: it has other settings than ``explicit`` asks for.
            OSError: what changes by it cannot be written down.
        """
        self.go_online()
        check_settings(run, explicit)
        if "mode" in explicit and "mode" not in run.settings:
            # Asked for by name from now on: a key that comes later changes nothing.
            run.settings["mode"] = explicit["mode"]
            save_state(self._directory, self._state)
        return run.info

    def mode_of(self, settings: Settings) -> str:
        """The mode of a run that has these settings."""
        return resolve_mode(settings, self._api_key)

    def begin_sink(self, run: RunState) -> None:
        """Have a process deliver a run to W&B, as soon as an earlier one of it is gone."""
        if run.info.mode == "disabled":
            return
        settings = settings_of(run)
        fold = self._delivery.folds.setdefault(run.number, Fold())

        def open_request() -> Open:
            return make_open_request(
                run, settings, fold, str(self._directory), find_key(run, self._api_key)
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
            sink.finish(None if run.crashed else run.exit_code)
        name = f"the sink of run {run.info.id}"
        self._keep_running(name, lambda: self._serve(run, sink))

    async def _serve(self, run: RunState, sink: SinkProcess) -> None:
        """Deliver to the end, and write down how the run ended, whoever waits for it or not."""
        async with self._turns.setdefault(run.number, asyncio.Lock()):
            # Another one may have taken its place while it waited for its turn.
            if sink is not self._sinks.get(run.number):
                return
            await sink.serve()
            if sink.done.is_set() and sink is self._sinks.get(run.number):
                self.report(run, closed=True)
        # Rows that came in the last moment go behind the end.
        self.stages.settle()

    def _note_opened(self, run: RunState, opened: Opened) -> None:
        """Remember what only W&B could tell: the page's address, and its step of our first row."""
        run.base = opened.base
        run.info = msgspec.structs.replace(
            run.info, url=opened.url, entity=opened.entity or run.info.entity
        )
        save_state(self._directory, self._state)

    def advance(self, budget_s: float = math.inf, *, pace_s: float = 0.0) -> bool:
        """Make rows of the ledger as far as it belongs to the last run, and wake the sinks.

        Args:
            budget_s: see :meth:`Delivery.advance`.
            pace_s: how often sources come; ranks are waited for accordingly.

        Raises:
            OSError: the outbox takes nothing.
        """
        run = self.last
        if run is None:
            return False
        advanced = self._delivery.advance(run.cut, budget_s)
        if self._delivery.merge.waiting_rows:
            # Behind the cut of a finish nothing comes that could be waited for.
            is_over = run.cut is not None and self._delivery.position >= run.cut
            waiting = None if is_over else self._waiting(run, pace_s)
            advanced = self._delivery.release(waiting) or advanced
        if advanced:
            self.wake()
        # Also where nothing is new: what could not be written down before is tried again.
        self.stages.settle()
        return advanced

    @staticmethod
    def _waiting(run: RunState, pace_s: float) -> Waiting:
        rank_wait_s = settings_of(run).rank_wait_s
        return Waiting(
            passed_s=max(PASSED_WAIT_S, PASSED_WAIT_PACES * pace_s),
            silent_s=max(rank_wait_s, SILENT_WAIT_PACES * pace_s),
        )

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
        modes = {run.info.mode for run in self._state.all_runs}
        if modes == {"online"} and self._delivery.position >= self._delivery.ledger.end:
            try:
                needed = [self.updates_of(run).needed_blobs() for run in self._state.all_runs]
            except OSError as error:
                _log.warning("raywb: no blob is deleted: %s", error)
                return
            self._delivery.blobs.delete_all_but(set().union(*needed))

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
        """Finished rows that W&B does not have: its server (online), or its client (offline)."""
        sink = self.sink_of(run)
        if sink is None:
            return 0
        has = sink.confirmed_rows if run.info.mode == "online" else sink.delivered_rows
        return max(self.rows_of(run) - has, 0)

    def lost(self) -> dict[str, int]:
        """What could not be kept since the run began, by reason."""
        lost = self._delivery.merge.lost
        if self.last is not None and (alerts := self.updates_of(self.last).unconfirmed_alerts):
            lost["alert_unconfirmed"] = alerts
        ledger = self._delivery.ledger
        of_all_runs = {
            "ledger_lost_bytes": sum(ledger.missing_bytes.values()),
            "ledger_damaged": ledger.unreadable,
            "outbox_damaged": self._delivery.outbox.lost_rows.total(),
        }
        for reason, count in of_all_runs.items():
            before = sum(run.lost.get(reason, 0) for run in self._state.runs[:-1])
            if count > before:
                lost[reason] = count - before
        return lost

    def losses(self) -> dict[str, int]:
        """Losses since the run began, by the names that they have in the run."""
        losses = {f"raywb/lost/{reason}": count for reason, count in sorted(self.lost().items())}
        if rejected := self._delivery.merge.rejected:
            losses["raywb/rejected"] = rejected
        if late := self._delivery.merge.late:
            losses["raywb/late_rows"] = late
        if unconfirmed := [one for one in self._delivery.unconfirmed() if not one.quiet]:
            losses["raywb/unconfirmed_sources"] = len(unconfirmed)
            losses["raywb/unconfirmed_rows"] = missing_rows(unconfirmed)
        return losses

    def log_losses(self, losses: dict[str, int]) -> None:
        """Write losses into the open run, as a row of its own."""
        run = self.open
        if run is not None and losses:
            self._log_losses(run, losses)

    def _log_losses(self, run: RunState, losses: dict[str, int]) -> None:
        row: dict[str, Scalar] = {**losses, "raywb/backlog_rows": self.backlog(run)}
        self._delivery.add([OutRow(run.number, time.time(), row, logged=0)])

    def end(
        self,
        run: RunState,
        exit_code: int,
        swept: SweepReport | None = None,
        *,
        crashed: bool = False,
    ) -> None:
        """Take the cut: what the ledger has now belongs to the run, what comes later does not.

        A second call takes a later cut: what has come since, for instance from a node that did
        not answer before, belongs to the run too. The state is that of the first call.

        Args:
            run: the last run.
            exit_code: 0 for success; anything else is a failure.
            crashed: leave the run without W&B's own finish.
            swept: what the sweep of the nodes found that came before, where there was one.

        Raises:
            OSError: the outbox takes nothing, or the state cannot be written down.
        """
        before = msgspec.structs.asdict(run)
        try:
            self._note_unconfirmed(run, swept)
            if run.cut is None or self._delivery.ledger.end > run.cut:
                run.cut = None
                self.advance()
                self._delivery.release(None)
                self._write_end(run)
                run.cut = self._delivery.ledger.end
            self.stages.end_all(exit_code, crashed=crashed)
            if run.exit_code is None:
                run.exit_code, run.crashed = exit_code, crashed
            if self.rows_of(run) > (run.closed_rows or 0):
                run.report = None
            save_state(self._directory, self._state)
        except OSError:
            for name, value in before.items():
                setattr(run, name, value)
            raise
        self._settle(run)
        self.end_in_wandb(run)

    def _note_unconfirmed(self, run: RunState, swept: SweepReport | None) -> None:
        """Which sources' last rows may be missing: still those of an earlier call, and new ones."""
        liveness = self._delivery.liveness
        known = {source.source_id: source for source in run.unconfirmed}
        known |= {source.source_id: source for source in self._delivery.unconfirmed()}
        if swept is not None:
            run.unreached = swept.unreached
            known |= {source.source_id: source for source in self._never_heard_of(swept)}
        run.unconfirmed = [
            source for source_id, source in known.items() if not liveness.has_ended(source_id)
        ]

    def _write_end(self, run: RunState) -> None:
        """The last thing in the run is what was lost in it, if only that nothing was."""
        self.on_end(run)
        losses = self.losses()
        merge = self._delivery.merge
        if losses and (self.lost(), merge.rejected) != (run.lost, run.rejected):
            self._log_losses(run, losses)
        names = ("rejected", "backlog_rows", "unconfirmed_sources")
        values = {**{f"raywb/{name}": 0 for name in names}, **losses}
        self._delivery.add([OutSummary(run.number, values)])
        run.received_rows, run.rejected, run.lost = merge.rows, merge.rejected, self.lost()

    def end_in_wandb(self, run: RunState) -> None:
        """Have the run's sink end it, or a new one when more came, or may come, after the end."""
        if run.info.mode == "disabled":
            return
        sink = self.sink_of(run)
        closed = run.closed_rows is not None and (sink is None or sink.done.is_set())
        if closed:
            self.updates_of(run).try_again()
        if closed and (
            self.rows_of(run) > (run.closed_rows or 0) or not self.updates_of(run).settled
        ):
            run.report = None
            self.begin_sink(run)
        elif sink is not None:
            sink.finish(None if run.crashed else run.exit_code)
        elif run.report is None:
            self.begin_sink(run)

    def _settle(self, run: RunState) -> None:
        self._delivery.liveness.settle(source.source_id for source in run.unconfirmed)

    def _never_heard_of(self, swept: SweepReport) -> list[UnconfirmedSource]:
        """Journals that a sweep found and could not bring home, of sources unknown until then."""
        known = self._delivery.liveness
        return [
            UnconfirmedSource(source_id=source_id, node_id="", reason=reason)
            for source_id, reason in swept.failed.items()
            if source_id not in known.open and not known.has_ended(source_id)
        ]

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
        rows = self.rows_of(run)
        updates: list[str] = []
        if run.info.mode == "disabled":
            delivered = rows = 0
        else:
            updates = self.updates_of(run).undelivered(closed=closed)
            if alerts := self.updates_of(run).unconfirmed_alerts:
                run.lost = {**run.lost, "alert_unconfirmed": alerts}
        outbox = self._delivery.outbox
        report = make_report(
            run,
            outstanding=max(rows - delivered, 0),
            updates=updates,
            logged=outbox.logged_rows(run.number, rows),
            delivered=outbox.logged_rows(run.number, delivered),
            closed=closed,
            error=sink.status.last_error if sink else None,
            stage_runs=self.stages.reports(run),
        )
        if closed:
            run.report = report
            run.closed_rows = self.rows_of(run) if run.info.mode == "disabled" else delivered
            save_state(self._directory, self._state)
        return report
