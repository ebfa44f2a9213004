"""The service: one detached actor per cluster, on the head node, at no CPU.

The class is plain Python, so it is tested without Ray; ``raywb.cluster`` makes an actor of it.
Everything happens on one event loop in a thread of its own. The methods below are what callers
reach through Ray: they hand a coroutine to that loop and wait for it. Nothing here ever calls
Ray.

``__init__`` cannot fail and waits for nothing: Ray would not restart an actor whose
``__init__`` raised once. A full disk or a taken port becomes a problem in the status, and is
tried again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from raywb import __version__
from raywb.errors import ServiceUnavailable, SettingsConflict
from raywb.groups import Group
from raywb.reports import FinishReport, RunInfo, SinkStatus, SourceStatus, Status
from raywb.rows import PROTOCOL, Scalar
from raywb.service.append_log import sync_and_close
from raywb.service.delivery import Delivery
from raywb.service.fold import Fold
from raywb.service.ingest import Ingest
from raywb.service.outbox import Item, OutRow, OutSummary
from raywb.service.runs import describe_run, new_run_id, resolve_mode
from raywb.service.sink_messages import Open, Opened
from raywb.service.sink_process import SinkProcess
from raywb.service.state import RunState, ServiceState, load_state, save_state
from raywb.settings import Settings, find_api_key

__all__ = ["Boot", "RaywbService"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Pause before something that failed in the background is tried again, in seconds.
RETRY_PAUSE_S = 1.0

#: The same port is asked for this often before another one is taken, once a second.
PORT_ATTEMPTS = 30

#: How often losses that grew are written into the run, in seconds.
LOSS_INTERVAL_S = 10.0


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """What the service is made with, and made again with by Ray after a crash.

    Attributes:
        directory: where ledger, outbox and W&B's files lie.
        run_id: id of the first run, unless the settings name one.
        settings: settings of whoever made the service.
        group: the group of the first run, and where its name came from.
        provisional: made by an ``attach()``; a ``start()`` may still bring settings.
    """

    directory: str
    cluster_id: str
    run_id: str
    host: str
    settings: Settings
    group: Group
    provisional: bool


class RaywbService:
    """Holds the cluster's one W&B run and group.

    Args:
        boot: see :class:`Boot`.
        api_key: W&B's key, when only the driver has it; it stays in memory.
    """

    def __init__(self, boot: Boot, api_key: str | None = None) -> None:
        self._boot = boot
        self._api_key = api_key
        self._directory = Path(boot.directory)
        self._state: ServiceState | None = None
        self._delivery: Delivery | None = None
        self._ingest: Ingest | None = None
        self._sinks: dict[int, SinkProcess] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._problems: dict[str, str] = {"service": "starting"}
        self._loop = asyncio.new_event_loop()
        self._up = asyncio.Event()
        self._new_entries = asyncio.Event()
        self._thread = threading.Thread(target=self._run_loop, name="raywb-service", daemon=True)
        self._thread.start()

    # -- what callers reach ---------------------------------------------------------------------

    def join(self, protocol: int, timeout_s: float = 5.0) -> dict[str, Any]:
        """What a client needs to send: address, token, incarnation; and the run it writes to.

        ``address`` is None while the service does not listen yet.
        """
        if protocol != PROTOCOL:
            return {"protocol": PROTOCOL, "version": __version__}
        return self._call(self._join(timeout_s), timeout_s + 5)

    def start(
        self,
        settings: Settings,
        explicit: dict[str, Any],
        group: Group,
        api_key: str | None,
        timeout_s: float = 60.0,
    ) -> tuple[RunInfo, bool]:
        """Open a run with these settings, or join the one that is open.

        Returns:
            The run, and whether it was open before.

        Raises:
            SettingsConflict: the open run has other settings than ``explicit`` asks for.
        """
        return self._call(self._start(settings, explicit, group, api_key), timeout_s)

    def status(self, timeout_s: float = 10.0) -> Status:
        """The service at this moment."""
        return self._call(self._status(), timeout_s)

    def finish(self, timeout_s: float, exit_code: int) -> FinishReport:
        """End the present run with what has been received; bounded by ``timeout_s``."""
        return self._call(self._finish(timeout_s, exit_code), timeout_s + 10)

    def close(self) -> None:
        """Stop everything and leave the run open on disk; for tests without Ray."""
        self._call(self._close(), 30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- the loop -------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._spawn(self._bring_up())
        self._loop.run_forever()

    def _call(self, coroutine: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:
            future.cancel()
            raise ServiceUnavailable(
                f"the raywb service did not answer within {timeout_s:g} s"
            ) from None

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bring_up(self) -> None:
        """Open the directory and the port, then serve; try again until it works."""
        attempt = 0
        while not self._up.is_set():
            attempt += 1
            try:
                await self._open(attempt)
            except (OSError, msgspec.DecodeError) as error:
                self._problems["service"] = f"cannot work in {self._directory}: {error}"
                _log.warning("raywb service: %s", self._problems["service"])
                await asyncio.sleep(RETRY_PAUSE_S)
        self._problems.pop("service", None)

    async def _open(self, attempt: int) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = self._state or load_state(self._directory) or self._first_state()
        if self._state is None:
            state.incarnation += 1
            self._state = state
        if self._delivery is None:
            self._delivery = Delivery(self._directory)
            if state.runs:
                self._delivery.open_run(state.runs[-1].number)
        ingest = Ingest(
            self._delivery.ledger,
            state.token,
            state.cluster_id,
            self._boot.settings.fsync,
            self._on_append,
        )
        port = state.port if attempt <= PORT_ATTEMPTS else None
        state.port = await ingest.listen(self._boot.host, port)
        self._ingest = ingest
        save_state(self._directory, state)
        self._up.set()
        for run in state.runs:
            if run.report is None:
                self._begin_sink(run)
        if not state.runs:
            self._spawn(self._open_provisional())
        self._new_entries.set()
        self._spawn(self._merge())
        self._spawn(self._sync())

    def _first_state(self) -> ServiceState:
        return ServiceState(cluster_id=self._boot.cluster_id, token=secrets.token_urlsafe(32))

    def _on_append(self) -> None:
        self._new_entries.set()

    # -- runs -----------------------------------------------------------------------------------

    @property
    def _present(self) -> RunState | None:
        """The last run; None while none was ever opened."""
        return self._state.runs[-1] if self._state and self._state.runs else None

    @property
    def _open_run(self) -> RunState | None:
        """The run that rows belong to now."""
        run = self._present
        return run if run is not None and run.exit_code is None else None

    async def _open_provisional(self) -> None:
        """Nobody brought settings: after a short while the run opens with the defaults."""
        await asyncio.sleep(self._boot.settings.provisional_wait_s)
        if self._present is None:
            self._begin_run(self._boot.settings, self._boot.group, provisional=True)
            _log.warning(
                "raywb: no start() came within %g s; the run opened with the defaults",
                self._boot.settings.provisional_wait_s,
            )

    def _begin_run(self, settings: Settings, group: Group, *, provisional: bool) -> RunState:
        state, delivery = self._ready()
        number = len(state.runs) + 1
        info = describe_run(
            settings,
            group,
            run_id=self._boot.run_id if number == 1 else new_run_id(),
            mode=resolve_mode(settings, self._api_key),
            directory=str(self._directory),
            epoch=number,
            provisional=provisional,
        )
        run = RunState(number=number, info=info, settings=settings.explicit())
        state.runs.append(run)
        save_state(self._directory, state)
        delivery.open_run(number)
        self._begin_sink(run)
        self._new_entries.set()
        return run

    def _ready(self) -> tuple[ServiceState, Delivery]:
        if self._state is None or self._delivery is None or not self._up.is_set():
            raise ServiceUnavailable(
                f"the raywb service is not ready: {self._problems.get('service')}"
            )
        return self._state, self._delivery

    def _begin_sink(self, run: RunState) -> None:
        _, delivery = self._ready()
        if run.info.mode == "disabled":
            return
        settings = msgspec.convert(run.settings, Settings)
        fold = delivery.folds.setdefault(run.number, Fold())

        def open_request(base: int | None) -> Open:
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
                api_key=self._api_key or find_api_key(settings),
                base=run.base if base is None else base,
                config=fold.config,
                defines=[(d.name, d.step_metric, d.summary) for d in fold.defines.values()],
                reopened=run.opened,
                deadline_s=settings.sink_deadline_s,
            )

        sink = SinkProcess(
            run.info,
            run.number,
            delivery.outbox,
            fold,
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
        state, _ = self._ready()
        run.opened = True
        run.base = opened.base
        run.info = msgspec.structs.replace(
            run.info, url=opened.url, entity=opened.entity or run.info.entity
        )
        save_state(self._directory, state)

    # -- background -----------------------------------------------------------------------------

    async def _merge(self) -> None:
        """Turn what arrives into finished rows, and wake the sinks."""
        written: dict[str, int] = {}
        written_at = time.monotonic()
        while True:
            await self._new_entries.wait()
            self._new_entries.clear()
            try:
                self._advance()
                losses = self._losses()
                if losses != written and time.monotonic() - written_at > LOSS_INTERVAL_S:
                    written, written_at = losses, time.monotonic()
                    self._log_losses(losses)
                self._problems.pop("outbox", None)
            except OSError as error:
                self._problems["outbox"] = f"the outbox takes nothing: {error}"
                self._new_entries.set()
                await asyncio.sleep(RETRY_PAUSE_S)
            # A breath, so that many small arrivals become one step.
            await asyncio.sleep(0.02)

    def _advance(self) -> None:
        """Consume the ledger as far as it belongs to the run that is open or just ending."""
        _, delivery = self._ready()
        run = self._present
        if run is None:
            return
        if delivery.advance(run.cut):
            for sink in self._sinks.values():
                sink.wake()
            for source_id, source in delivery.merge.sources.items():
                if source.ended and self._ingest is not None:
                    self._ingest.forget_ended(source_id)

    async def _sync(self) -> None:
        """Force ledger and outbox to the disk every second, off the loop."""
        if self._boot.settings.fsync == "off":
            return
        while True:
            await asyncio.sleep(1.0)
            _, delivery = self._ready()
            sync = delivery.ledger.begin_sync()
            fds = [fd for fd in (sync.fd, delivery.outbox.unsynced()) if fd is not None]
            try:
                for fd in fds:
                    await asyncio.to_thread(sync_and_close, fd)
                delivery.ledger.end_sync(sync)
                self._problems.pop("sync", None)
            except OSError as error:
                self._problems["sync"] = f"the disk refuses to sync: {error}"

    def _losses(self) -> dict[str, int]:
        """Losses since the run began, by the names that they have in the run."""
        _, delivery = self._ready()
        losses = {
            f"raywb/lost/{reason}": count for reason, count in sorted(delivery.merge.lost.items())
        }
        if delivery.merge.rejected:
            losses["raywb/rejected"] = delivery.merge.rejected
        return losses

    def _log_losses(self, losses: dict[str, int]) -> None:
        run = self._open_run
        if run is None or not losses:
            return
        _, delivery = self._ready()
        row: dict[str, Scalar] = {**losses, "raywb/backlog_rows": self._backlog(run)}
        delivery.add([OutRow(run.number, time.time(), row)])

    def _backlog(self, run: RunState) -> int:
        _, delivery = self._ready()
        sink = self._sinks.get(run.number)
        return max(delivery.outbox.rows_of(run.number) - sink.delivered_rows, 0) if sink else 0

    # -- answers --------------------------------------------------------------------------------

    async def _join(self, timeout_s: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            return {
                "protocol": PROTOCOL,
                "version": __version__,
                "address": None,
                "epoch": 0,
                "finished": False,
                "run": self._unopened(),
            }
        state, _ = self._ready()
        run = self._present
        return {
            "protocol": PROTOCOL,
            "version": __version__,
            "address": f"{self._boot.host}:{state.port}",
            "token": state.token,
            "incarnation": state.incarnation,
            "epoch": len(state.runs),
            "finished": run is not None and run.exit_code is not None,
            "run": run.info if run else self._unopened(),
        }

    def _unopened(self) -> RunInfo:
        return describe_run(
            self._boot.settings,
            self._boot.group,
            run_id=self._boot.run_id,
            mode=resolve_mode(self._boot.settings, self._api_key),
            directory=str(self._directory),
            epoch=0,
            provisional=True,
        )

    async def _start(
        self, settings: Settings, explicit: dict[str, Any], group: Group, api_key: str | None
    ) -> tuple[RunInfo, bool]:
        await self._up.wait()
        self._api_key = api_key or self._api_key
        if settings.dir and settings.dir != str(self._directory):
            raise SettingsConflict(
                f"dir={settings.dir!r} conflicts with the running service, which keeps its files "
                f"in {str(self._directory)!r}: leave dir out, or start() before the first attach()"
            )
        run = self._open_run
        if run is None:
            return self._begin_run(settings, group, provisional=False).info, False
        has = {**msgspec.structs.asdict(msgspec.convert(run.settings, Settings))}
        has |= {"project": run.info.project, "group": run.info.group or "", "mode": run.info.mode}
        has |= {"name": run.info.name, "run_id": run.info.id, "entity": run.info.entity}
        differing = sorted(
            key
            for key, value in explicit.items()
            if key not in ("dir", "local_cluster", "listen_host") and has[key] != value
        )
        if differing:
            pairs = ", ".join(f"{key} is {has[key]!r}, not {explicit[key]!r}" for key in differing)
            raise SettingsConflict(
                f"the raywb run {run.info.name!r} is open with other settings: {pairs}. "
                "Leave them out to join it, or end it first with `raywb finish`"
            )
        return run.info, True

    async def _status(self) -> Status:
        state, delivery = self._ready()
        run = self._present
        merge = delivery.merge
        now = time.monotonic()
        heard = self._ingest.heard if self._ingest else {}
        sources = [
            SourceStatus(
                source_id=source_id,
                hostname=source.hello.hostname,
                node_id=source.hello.node_id,
                pid=source.hello.pid,
                stages=sorted({c.stage for c in source.channels.values() if c.stage}),
                received_bytes=delivery.ledger.end_of(source_id),
                received_rows=source.rows,
                heard_ago_s=round(now - heard[source_id], 3) if source_id in heard else -1.0,
                ended=source.ended,
            )
            for source_id, source in merge.sources.items()
            if source.hello is not None
        ]
        problems = dict(self._problems)
        if self._ingest and self._ingest.ledger_error:
            problems["ledger"] = self._ingest.ledger_error
        for reason, count in (self._ingest.refused if self._ingest else {}).items():
            problems[f"refused {reason}"] = f"{count} requests refused: {reason}"
        lost = dict(merge.lost)
        if missing := sum(delivery.ledger.missing_bytes.values()):
            lost["ledger_lost_bytes"] = missing
        return Status(
            version=__version__,
            run=run.info if run else self._unopened(),
            finished=run is not None and run.report is not None,
            address=f"{self._boot.host}:{state.port}",
            incarnation=state.incarnation,
            received_rows=merge.rows,
            outbox_rows=delivery.outbox.rows_of(run.number) if run else 0,
            backlog_rows=self._backlog(run) if run else 0,
            lost=lost,
            rejected=merge.rejected,
            after_finish_rows=delivery.waiting_rows() if self._open_run is None else 0,
            sink=self._sink_status(run),
            sources=sources,
            problems=list(problems.values()),
        )

    def _sink_status(self, run: RunState | None) -> SinkStatus:
        if run is None:
            return SinkStatus(state="waiting", applied_rows=0, restarts=0)
        sink = self._sinks.get(run.number)
        if sink is not None:
            return sink.status
        state = "disabled" if run.info.mode == "disabled" else "finished"
        applied = run.report.delivered_rows if run.report else 0
        return SinkStatus(state=state, applied_rows=applied, restarts=0)

    async def _finish(self, timeout_s: float, exit_code: int) -> FinishReport:
        deadline = self._loop.time() + timeout_s
        await self._up.wait()
        run = self._present or self._begin_run(
            self._boot.settings, self._boot.group, provisional=True
        )
        if run.report is not None:
            return run.report
        state, delivery = self._ready()
        if run.exit_code is None:
            self._advance()
            self._end_rows(run)
            run.cut = delivery.ledger.end
            run.exit_code = exit_code
            save_state(self._directory, state)
        self._advance()
        sink = self._sinks.get(run.number)
        if sink is not None:
            sink.finish(run.exit_code)
            try:
                async with asyncio.timeout_at(deadline):
                    await sink.done.wait()
            except TimeoutError:
                return self._report(run, complete=False)
        report = self._report(run, complete=True)
        run.report = report
        save_state(self._directory, state)
        return report

    def _end_rows(self, run: RunState) -> None:
        """The last things that raywb itself has to say in the run: what was lost, if anything."""
        _, delivery = self._ready()
        self._log_losses(self._losses())
        values: dict[str, Any] = {"raywb/rejected": 0, "raywb/backlog_rows": 0, **self._losses()}
        items: list[Item] = [OutSummary(run.number, values)]
        delivery.add(items)

    def _report(self, run: RunState, *, complete: bool) -> FinishReport:
        _, delivery = self._ready()
        sink = self._sinks.get(run.number)
        emitted = delivery.outbox.rows_of(run.number)
        delivered = sink.delivered_rows if sink else 0
        undelivered = max(emitted - delivered, 0) if sink else 0
        message = None
        if undelivered or not complete:
            why = f" ({sink.status.last_error})" if sink and sink.status.last_error else ""
            message = (
                f"{undelivered} rows are not with W&B yet{why}. They are safe in "
                f"{self._directory}, and delivery goes on as long as the service runs"
            )
        return FinishReport(
            run=run.info,
            exit_code=run.exit_code or 0,
            received_rows=delivery.merge.rows,
            delivered_rows=delivered,
            undelivered_rows=undelivered,
            lost=delivery.merge.lost,
            rejected=delivery.merge.rejected,
            complete=complete and not undelivered,
            message=message,
        )

    async def _close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._ingest is not None:
            await self._ingest.close()
        if self._delivery is not None:
            self._delivery.close()
