"""The service: one detached actor per cluster, on the head node, at no CPU.

The class is plain Python, so it is tested without Ray; ``raywb.cluster`` makes an actor of it.
Everything happens on one event loop in a thread of its own. The methods below are what callers
reach through Ray: they hand a coroutine to that loop and wait for it. Nothing here ever calls
Ray, but for the sweeps of silent nodes, the probes of new ones, and Ray's metrics, each in a
thread of its own.

``__init__`` cannot fail and waits for nothing: Ray would not restart an actor whose
``__init__`` raised once. A full disk or a taken port becomes a problem in the status, and is
tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from raywb import __version__
from raywb.errors import ServiceUnavailable, SettingsConflict
from raywb.groups import Group
from raywb.reports import (
    FinishReport,
    PageAddress,
    RunInfo,
    StageRunRequest,
    Status,
    SweepReport,
)
from raywb.rows import PROTOCOL
from raywb.service.background import Background
from raywb.service.cluster_nodes import ClusterNodes
from raywb.service.delivery import Delivery
from raywb.service.event_loop import RETRY_PAUSE_S, EventLoop
from raywb.service.ingest import Ingest
from raywb.service.inventory import NodeProbes
from raywb.service.owner import OwnerWatch
from raywb.service.page_source import ServiceSource, view_token
from raywb.service.ray_metrics_sink import Gauges, RayMetricsSink
from raywb.service.run_settings import describe_run, resolve_mode, settings_of
from raywb.service.runs import Runs
from raywb.service.shown_name import shown_name
from raywb.service.state import (
    Origin,
    RunState,
    ServiceState,
    load_state,
    lock_directory,
    save_state,
)
from raywb.service.status import make_status
from raywb.service.sweeps import Nodes, Sweeps
from raywb.settings import Settings
from raywb.view.page.application import Page

__all__ = ["Boot", "RaywbService"]

_log = logging.getLogger(__name__)

#: Who asks how a service is that does not work yet waits for it so long, in seconds.
START_WAIT_S = 3.0

#: The same port is asked for this often before another one is taken, once a second.
PORT_ATTEMPTS = 30


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """What the service is made with, and made again with by Ray after a crash.

    Attributes:
        directory: where ledger, outbox and W&B's files lie.
        run_id: id of the first run, unless the settings name one.
        settings: settings of whoever made the service.
        group: the group of the first run, and where its name came from.
        session_dir: Ray's session directory, when whoever made the service knew it.
        dashboard: address of Ray's dashboard, when whoever made the service knew it.
    """

    directory: str
    cluster_id: str
    run_id: str
    host: str
    settings: Settings
    group: Group
    session_dir: str | None = None
    dashboard: str | None = None


class RaywbService:
    """Holds the cluster's one W&B run and group.

    Args:
        boot: see :class:`Boot`.
        api_key: W&B's key, when only the driver has it; it stays in memory.
        nodes: the way to the journals of other nodes; without it nobody looks after silent ones
            before the run's end.
        gauges: makes Ray's metrics; without it there are none.
    """

    def __init__(
        self,
        boot: Boot,
        api_key: str | None = None,
        nodes: Nodes | None = None,
        gauges: Gauges | None = None,
    ) -> None:
        self._boot = boot
        self._metrics = RayMetricsSink(gauges) if gauges is not None else None
        self._nodes = nodes
        self._sweeps: Sweeps | None = None
        self._cluster_nodes: ClusterNodes | None = None
        #: Sources that announced themselves before the ledger was open, and their nodes.
        self._announced: dict[str, str] = {}
        self._api_key = api_key
        self._directory = Path(boot.directory)
        self._state: ServiceState | None = None
        self._delivery: Delivery | None = None
        self._lock_fd: int | None = None
        self._parts: _Parts | None = None
        self._problems: dict[str, str] = {"service": "it is starting; ask again in a moment"}
        self._up = asyncio.Event()
        self._new_entries = asyncio.Event()
        self._loop = EventLoop(self._problems)
        self._loop.begin("the start", self._bring_up)

    def __repr__(self) -> str:
        # Ray asks for it, too, when it tells that __init__ could not even be called.
        boot: Boot | None = getattr(self, "_boot", None)
        if boot is None:
            return "raywb"
        return shown_name(Path(boot.directory), boot.settings, boot.run_id)

    # -- what callers reach ---------------------------------------------------------------------

    def join(
        self, protocol: int, timeout_s: float = 5.0, announced: tuple[str, str] | None = None
    ) -> dict[str, Any]:
        """What a client needs to send: address, token, incarnation; and the run it writes to.

        ``address`` is None while the service does not listen yet.

        Args:
            protocol: what the client speaks.
            timeout_s: longest that it may take, in seconds.
            announced: the source that the client is about to write as, and its node.
        """
        if protocol != PROTOCOL:
            return {"protocol": PROTOCOL, "version": __version__}
        return self._loop.call(self._join(announced, timeout_s), timeout_s + 5)

    def outstanding(self, timeout_s: float = 10.0) -> list[str] | None:
        """Nodes with sources that have not ended; None when there may be others.

        A source that was killed before any of its bytes came is known from its announcement only,
        and a restart of the service forgets those.
        """
        return self._loop.call(self._outstanding(), timeout_s)

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
        return self._loop.call(self._start(settings, explicit, group, api_key), timeout_s)

    def open_stage_run(
        self,
        request: StageRunRequest,
        api_key: str | None,
        timeout_s: float = 60.0,
    ) -> tuple[RunInfo, int]:
        """Open a stage's own run beside the cluster's, or join the one of this id.

        Returns:
            The run, and how often it was opened.

        Raises:
            SettingsConflict: the id is that of a run of the cluster, or the run has other
                settings, or the cluster's run is finished.
        """
        return self._loop.call(self._open_stage_run(request, api_key), timeout_s)

    def status(self, timeout_s: float = 10.0) -> Status:
        """The service at this moment."""
        return self._loop.call(self._status(), timeout_s)

    def page_address(self, timeout_s: float = 10.0) -> PageAddress:
        """Where the page is, with what a viewer has to show."""
        return self._loop.call(self._page_address(), timeout_s)

    def finish(
        self, timeout_s: float, exit_code: int, swept: SweepReport | None = None
    ) -> FinishReport:
        """End the present run with what has been received; bounded by ``timeout_s``.

        Again after a report that was not complete, it takes in what has come since and tries
        again; the exit code is that of the first call.

        Args:
            timeout_s: longest that it may take, in seconds.
            exit_code: 0 for success; anything else marks the run as failed.
            swept: what a sweep of the outstanding nodes found just before.
        """
        return self._loop.call(self._finish(timeout_s, exit_code, swept), timeout_s + 10)

    def close(self) -> None:
        """Stop everything and leave the run open on disk; for tests without Ray."""
        self._loop.call(self._close(), 30)
        self._loop.close()

    # -- the loop -------------------------------------------------------------------------------

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
        if self._lock_fd is None:
            self._lock_fd = lock_directory(self._directory)
        if self._state is None:
            state = load_state(self._directory)
            if state is None:
                token = secrets.token_urlsafe(32)
                state = ServiceState(cluster_id=self._boot.cluster_id, token=token)
            state.incarnation += 1
            # A directory that is used again on another cluster takes that one's rows from now on.
            state.cluster_id = self._boot.cluster_id
            state.origin = Origin(
                settings=self._boot.settings.explicit(),
                group=self._boot.group,
                run_id=self._boot.run_id,
                session_dir=self._boot.session_dir,
            )
            self._state = state
        state = self._state
        if self._delivery is None:
            stage_runs = [run.number for run in state.stage_runs]
            self._delivery = Delivery(self._directory, stage_runs)
        delivery = self._delivery
        ingest = Ingest(
            delivery.ledger,
            state.token,
            state.cluster_id,
            self._last_settings(state).fsync,
            on_append=self._new_entries.set,
            liveness=delivery.liveness,
            silent_after_s=self._boot.settings.silent_after_s,
            run_closed=self._run_closed,
        )
        runs = Runs(self._directory, state, delivery, self._loop.keep_running, self._api_key)
        source = ServiceSource(self._directory, state, runs, self._status, self._boot.dashboard)
        page = Page(
            source,
            mode=lambda: self._last_settings(state).ui,
            token=view_token(state.token),
            on_entitled=ingest.know_page,
        )
        port = state.port if attempt <= PORT_ATTEMPTS else None
        state.port = await ingest.listen(self._boot.host, port, delivery.blobs, page)
        try:
            save_state(self._directory, state)
        except OSError:
            await ingest.close()  # the next attempt wants the port
            raise
        delivery.blobs.on_home = runs.wake
        self._parts = _Parts(state, delivery, ingest, runs, source)
        for source_id, node_id in self._announced.items():
            delivery.liveness.announce(source_id, node_id)
        probes: object = self._nodes
        if isinstance(probes, NodeProbes):
            self._cluster_nodes = ClusterNodes(
                self._directory, state.cluster_id, probes, delivery, runs
            )
            self._cluster_nodes.keep_running(self._loop.keep_running)
        runs.resume()
        if runs.last is None:
            self._loop.keep_running("the first run's opening", lambda: self._open_provisional(runs))
        self._begin_background(delivery, ingest, runs, state)
        self._up.set()

    def _begin_background(
        self, delivery: Delivery, ingest: Ingest, runs: Runs, state: ServiceState
    ) -> None:
        background = Background(delivery, ingest, runs, self._problems, self._new_entries)
        self._loop.keep_running("the merge", background.merge)
        if self._nodes is not None:
            self._sweeps = Sweeps(
                delivery.liveness,
                self._nodes,
                lambda: ingest.silence_s,
                lambda: (self._address, state.token),
            )
            self._loop.keep_running("the look for silent sources", self._sweeps.serve)
        watch = OwnerWatch(runs, delivery, state.cluster_id)
        self._loop.keep_running(
            "the look at the run's driver", lambda: background.watch_owner(watch)
        )
        self._loop.keep_running("the sync", background.sync)
        self._loop.keep_running("the look for a key", background.look_for_key)
        if (metrics := self._metrics) is not None:
            self._loop.keep_running(
                "what Ray's metrics say", lambda: metrics.serve(self._status, self._changes)
            )

    def _last_settings(self, state: ServiceState) -> Settings:
        """The last run's; before the first one, those of whoever made the service."""
        return settings_of(state.runs[-1]) if state.runs else self._boot.settings

    def _run_closed(self) -> bool:
        runs = self._parts.runs if self._parts is not None else None
        last = runs.last if runs is not None else None
        if runs is None or last is None or last.report is None:
            return False
        return all(run.report is not None for run in runs.stages.of(last))

    def _ready(self) -> _Parts:
        if self._parts is None or not self._up.is_set():
            raise ServiceUnavailable(
                f"the raywb service is not ready: {self._problems.get('service')}"
            )
        return self._parts

    async def _ready_soon(self) -> _Parts:
        """The same; one that is about to work is waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_WAIT_S):
                await self._up.wait()
        return self._ready()

    # -- background -----------------------------------------------------------------------------

    async def _open_provisional(self, runs: Runs) -> None:
        """Nobody brought settings: after a short while the run opens with the defaults."""
        await asyncio.sleep(self._boot.settings.provisional_wait_s)
        while runs.last is None:
            try:
                self._begin_run(self._boot.settings, self._boot.group, provisional=True)
            except OSError as error:
                self._problems["run"] = f"the run cannot be opened: {error}"
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            self._problems.pop("run", None)
            _log.warning(
                "raywb: no start() came within %g s; the run opened with the defaults",
                self._boot.settings.provisional_wait_s,
            )

    def _begin_run(self, settings: Settings, group: Group, *, provisional: bool) -> RunState:
        parts = self._ready()
        run = parts.runs.begin(settings, group, self._boot.run_id, provisional=provisional)
        parts.ingest.fsync = self._last_settings(parts.state).fsync
        self._new_entries.set()
        return run

    # -- answers --------------------------------------------------------------------------------

    async def _join(self, announced: tuple[str, str] | None, timeout_s: float) -> dict[str, Any]:
        answer = {"protocol": PROTOCOL, "version": __version__}
        if announced is not None and self._parts is not None:
            self._parts.delivery.liveness.announce(*announced)
        elif announced is not None:
            self._announced.update([announced])
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            run = self._unopened()
            return {**answer, "address": None, "epoch": 0, "finished": False, "run": run}
        parts = self._ready()
        last = parts.runs.last
        return {
            **answer,
            "address": self._address,
            "token": parts.state.token,
            "incarnation": parts.state.incarnation,
            "epoch": len(parts.state.runs),
            "finished": last is not None and last.exit_code is not None,
            "complete": last is not None and last.report is not None and last.report.complete,
            "run": last.info if last else self._unopened(),
        }

    @property
    def _address(self) -> str:
        return f"{self._boot.host}:{self._ready().state.port}"

    def _unopened(self) -> RunInfo:
        """What the first run will be like if nobody brings settings."""
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
        runs = self._ready().runs
        if api_key:
            runs.take_key(api_key)
        if settings.dir and settings.dir != str(self._directory):
            raise SettingsConflict(
                f"dir={settings.dir!r} conflicts with the running service, which keeps its files "
                f"in {str(self._directory)!r}: leave dir out, or start() before the first attach()"
            )
        if runs.open is None:
            return self._begin_run(settings, group, provisional=False).info, False
        return runs.join(runs.open, explicit), True

    async def _open_stage_run(
        self, request: StageRunRequest, api_key: str | None
    ) -> tuple[RunInfo, int]:
        await self._up.wait()
        runs = self._ready().runs
        if api_key:
            runs.take_key(api_key)
            runs.go_online()
        origin = self._boot.settings, self._boot.group
        if runs.last is not None:
            origin = runs.stages.origin_of(runs.last)
        return runs.stages.open(request, origin)

    async def _status(self) -> Status:
        parts = await self._ready_soon()
        status = make_status(
            parts.delivery,
            parts.ingest,
            parts.runs,
            info=parts.runs.last.info if parts.runs.last else self._unopened(),
            address=self._address,
            incarnation=parts.state.incarnation,
            restored=parts.state.restored,
            problems=self._problems | self._sweep_problem(),
        )
        if self._cluster_nodes is not None:
            status = self._cluster_nodes.add_to(status)
        if self._metrics is not None and (missing := self._metrics.warnings):
            warnings = [*status.warnings, *missing]
            status = msgspec.structs.replace(status, warnings=warnings)
        return status

    def _changes(self) -> tuple[int, int, int, bool]:
        """Another value whenever rows came, or a run began or ended."""
        parts = self._ready()
        delivery, last = parts.delivery, parts.runs.last
        ended = last is not None and last.report is not None
        return delivery.ledger.end, delivery.outbox.end, last.number if last else 0, ended

    def _sweep_problem(self) -> dict[str, str]:
        problem = self._sweeps.problem if self._sweeps else None
        return {"sweeps": problem} if problem else {}

    async def _page_address(self) -> PageAddress:
        parts = await self._ready_soon()
        mode = self._last_settings(parts.state).ui
        return PageAddress(
            mode=mode,
            hostname=socket.gethostname(),
            loopback_port=parts.ingest.loopback_port,
            address=self._address,
            token=view_token(parts.state.token) if mode == "network" else None,
        )

    async def _outstanding(self) -> list[str] | None:
        await self._up.wait()
        parts = self._ready()
        if parts.state.incarnation > 1:
            return None
        return sorted(parts.delivery.liveness.outstanding)

    async def _finish(
        self, timeout_s: float, exit_code: int, swept: SweepReport | None
    ) -> FinishReport:
        deadline = time.monotonic() + timeout_s
        await self._up.wait()
        while True:
            try:
                return await self._end_run(deadline, exit_code, swept)
            except OSError as error:
                if time.monotonic() + RETRY_PAUSE_S > deadline:
                    raise ServiceUnavailable(
                        f"the run cannot be ended: {error}. What was received is safe in "
                        f"{self._directory}; make room there, and call raywb.finish() again"
                    ) from error
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _end_run(
        self, deadline: float, exit_code: int, swept: SweepReport | None
    ) -> FinishReport:
        runs = self._ready().runs
        run = runs.last or self._begin_run(self._boot.settings, self._boot.group, provisional=True)
        if run.report is not None and run.report.complete:
            return run.report
        if swept is not None:
            self._judge(swept)
        runs.end(run, exit_code, swept)
        sink = runs.sink_of(run)
        closed = True
        try:
            async with asyncio.timeout_at(deadline):
                if sink is not None:
                    await sink.done.wait()
                await runs.stages.done(run)
        except TimeoutError:
            closed = sink is None or sink.done.is_set()
        return runs.report(run, closed=closed)

    def _judge(self, swept: SweepReport) -> None:
        """A sweep of all that was outstanding tells of each source whether it can be had."""
        parts = self._ready()
        liveness = parts.delivery.liveness
        # Rows of the last moments count here, so only who spoke in them is taken for alive.
        since = time.monotonic() - 2 * parts.ingest.pace_s - 1.0
        liveness.judge(list(liveness.open), swept, since)

    async def _close(self) -> None:
        await self._loop.end_parts()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
        if self._parts is not None:
            await self._parts.ingest.close()
            await self._parts.page_source.close()
        if self._delivery is not None:
            self._delivery.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)


class _Parts(NamedTuple):
    """What the service is made of once it is up."""

    state: ServiceState
    delivery: Delivery
    ingest: Ingest
    runs: Runs
    page_source: ServiceSource
