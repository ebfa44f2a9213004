"""``raywb sync``: send to W&B's server, later, what an offline run or a short finish left.

Rows come from the outbox and go through the same sink as ever. The server is asked first and its
step is the cursor, so what it has is not sent again: not after a second call, not after
``wandb sync`` of the run's own files.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import os
import time
from pathlib import Path

import msgspec

from raywb.errors import DirectoryError, DirectoryInUse, SinkError
from raywb.reports import SyncedRun, SyncReport
from raywb.service.blobs import BlobStore
from raywb.service.confirm import RunAtServer, ask_run
from raywb.service.fold import Fold
from raywb.service.left import LeftDirectory, Step, Tell, load_left_state, watch_sink
from raywb.service.outbox import Outbox, OutRow
from raywb.service.recover import check_api_key
from raywb.service.report import state_of
from raywb.service.runs import make_open_request
from raywb.service.sink_messages import Open, Opened
from raywb.service.sink_process import SinkProcess
from raywb.service.state import RunState, lock_directory
from raywb.service.updates import Updates
from raywb.service.uploads import Target, Upload, Uploads
from raywb.settings import DEFAULT_BASE_URL, Settings, find_api_key, resolve

__all__ = ["sync"]

#: Two rows whose times are no further apart than this are one, in seconds.
SAME_TIME_S = 0.001


def sync(
    directory: Path,
    *,
    project: str | None = None,
    entity: str | None = None,
    base_url: str | None = None,
    timeout_s: float = 600.0,
    tell: Tell,
) -> SyncReport:
    """Bring every finished run of a directory to W&B's server, each row once.

    Args:
        directory: the service's directory; a service may be at work in it.
        project: W&B project, if not the run's own.
        entity: W&B team or user, if not the run's own.
        base_url: W&B's server, if not the run's own.
        timeout_s: longest that all of it may take.
        tell: is told how far it is.

    Raises:
        DirectoryInUse: another sync works in the directory.
        DirectoryError: it is not a service's, or cannot be worked in.
        SettingsError: there is no key for the server, or a name cannot be used.
    """
    wanted = Settings(project=project, entity=entity, base_url=base_url)
    return asyncio.run(_sync(directory, wanted, time.monotonic() + timeout_s, tell))


async def _sync(directory: Path, wanted: Settings, deadline: float, tell: Tell) -> SyncReport:
    runs = [run for run in load_left_state(directory).all_runs if run.info.mode != "disabled"]
    if not runs:
        return SyncReport(directory=str(directory), runs=[])
    for run in runs:
        check_api_key(run.info.name, _settings_of(run, wanted))
    try:
        lock_fd = lock_directory(directory, "sync.lock")
    except BlockingIOError as error:
        raise DirectoryInUse(f"another `raywb sync` works in {directory}") from error
    except OSError as error:
        raise DirectoryError(f"{directory} cannot be worked in: {error}") from error
    try:
        cut_short = await _deliver_cut_short(directory, deadline, tell)
        synced = _Sync(directory, wanted, deadline, tell)
        runs = [run for run in load_left_state(directory).all_runs if run.info.mode != "disabled"]
        reports = [await synced.bring(run, cut_short) for run in runs]
    except OSError as error:
        raise DirectoryError(f"{directory} cannot be worked in: {error}") from error
    finally:
        os.close(lock_fd)
    return SyncReport(directory=str(directory), runs=reports)


def _settings_of(run: RunState, wanted: Settings) -> Settings:
    """The run's settings, with the server that is asked for."""
    settings = msgspec.convert(run.settings, Settings)
    base_url = wanted.base_url or settings.base_url or resolve().base_url
    return msgspec.structs.replace(settings, base_url=base_url)


async def _deliver_cut_short(
    directory: Path, deadline: float, tell: Tell
) -> dict[int, int | None] | None:
    """Go on with runs whose ``finish()`` came to its limit.

    Returns:
        The rows that W&B had of each before, by run number; None when a service is at work there.
    """
    try:
        left = LeftDirectory(directory)
    except DirectoryInUse:
        return None
    try:
        left.runs.resume(ended_only=True)
        left.runs.advance()
        cut_short = [
            run for run in left.state.all_runs if run.report is None and run.exit_code is not None
        ]
        await left.deliver(cut_short, deadline, tell)
        sinks = {run.number: left.runs.sink_of(run) for run in cut_short}
    finally:
        await left.close()
    return {number: sink.found_rows for number, sink in sinks.items() if sink is not None}


@dataclasses.dataclass
class _Numbers:
    """Rows that a run has, that the server had, and that were sent."""

    rows: int
    before: int = 0
    sent: int = 0


class _Sync:
    """One call: what is in the outbox, what was sent where, and what the server says."""

    def __init__(self, directory: Path, wanted: Settings, deadline: float, tell: Tell) -> None:
        self._directory = directory
        self._wanted = wanted
        self._deadline = deadline
        self._tell = tell
        self._uploads = Uploads(directory)
        self._outbox = Outbox(directory / "outbox", read_only=True)
        self._blobs = BlobStore(directory / "blobs")
        self._folds: dict[int, Fold] = {}
        for batch in self._outbox.recover():
            for item in batch.items:
                self._folds.setdefault(item.run, Fold()).apply(item)

    async def bring(self, run: RunState, cut_short: dict[int, int | None] | None) -> SyncedRun:
        """Bring one run to the server.

        Args:
            run: the run.
            cut_short: rows that W&B had of runs before they were gone on with just now; None when
                a service is at work in the directory.
        """
        target = Target(
            _settings_of(run, self._wanted).base_url or DEFAULT_BASE_URL,
            self._wanted.entity or run.info.entity,
            self._wanted.project or run.info.project,
        )
        upload = self._uploads.of(run.number, target)
        numbers = _Numbers(self._outbox.rows_of(run.number))
        error: str | None = None
        try:
            if run.report is not None:
                await self._bring(run, target, upload, numbers)
                if cut_short and self._is_own(run) and run.number in cut_short:
                    numbers.before = cut_short[run.number] or 0
                    numbers.sent = numbers.rows - numbers.before
            else:
                error = _why_not(run, self._directory, at_work=cut_short is None)
        except SinkError as failure:
            error = str(failure)
        return SyncedRun(
            run=msgspec.structs.replace(
                run.info,
                mode="online",
                project=target.project,
                entity=upload.opened_entity or target.entity,
                url=upload.url,
            ),
            rows=numbers.rows,
            rows_before=numbers.before,
            rows_sent=numbers.sent,
            state=state_of(run) if upload.closed else "running",
            error=error,
        )

    async def _bring(
        self, run: RunState, target: Target, upload: Upload, numbers: _Numbers
    ) -> None:
        """Ask, and send what is missing.

        Raises:
            SinkError: the server cannot be asked, has another run of this id, is too slow, or
                does not have all tables, artifacts and alerts.
        """
        found = await self._ask(run, target, upload)
        uploaded_by_us = upload.base is not None or self._is_own(run)
        self._find_base(run, upload, found)
        there = 0
        if found is not None and upload.base is not None:
            there = found.next_step - upload.base
        # A run that was ended may have been gone on with under its id: that is not ours to judge.
        numbers.before = min(there, numbers.rows)
        if there < 0 or (there > numbers.rows and not upload.closed):
            raise SinkError(
                f"the server has {there} rows behind the first of this run, which has "
                f"{numbers.rows}: somebody else writes to it, or it was rewound"
            )
        updates = self._updates_of(run, upload)
        if found is not None and found.rows and not uploaded_by_us:
            # `wandb sync` sends the alerts of the files as well, and none is sent twice.
            updates.note_alerts_sent()
        if there < numbers.rows or not upload.closed or not updates.settled:
            await self._send(run, target, upload, updates)
        if left := updates.undelivered(closed=True):
            raise SinkError(f"the server does not have {'; '.join(left)}")
        numbers.sent = numbers.rows - numbers.before

    async def _ask(self, run: RunState, target: Target, upload: Upload) -> RunAtServer | None:
        self._tell(Step(f"Asking {target.base_url} for {run.info.name}"))
        return await asyncio.to_thread(
            ask_run,
            target.base_url,
            find_api_key(_settings_of(run, self._wanted)),
            entity=target.entity or upload.opened_entity,
            project=target.project,
            run_id=run.info.id,
        )

    def _find_base(self, run: RunState, upload: Upload, found: RunAtServer | None) -> None:
        """At which of W&B's steps the run begins, where that is not known yet.

        Raises:
            SinkError: the server's run of this id is not this one.
        """
        if upload.base is None and self._is_own(run) and run.base is not None:
            # It was delivered there by its own sink.
            upload.base, upload.closed, upload.url = run.base, True, run.info.url
            upload.updates = copy.deepcopy(run.updates)
        if upload.base is not None or found is None or found.last_row is None:
            return
        # Not sent by us: by `wandb sync`, which keeps the steps of the run's files; or it is
        # somebody else's, or an earlier one of ours with this id.
        base = run.base or 0
        number = found.next_step - 1 - base
        if number < 0:
            return  # an earlier run of ours with this id: this one begins behind it
        row = self._row(run.number, number)
        stamp = found.last_row.get("_timestamp")
        if row is None or not isinstance(stamp, float) or abs(stamp - row.time_s) > SAME_TIME_S:
            raise SinkError(
                f"the server has another run with the id {run.info.id} and {found.rows} rows, "
                "none of them ours: send this one to another --project, or delete that one"
            )
        upload.base = base

    def _is_own(self, run: RunState) -> bool:
        """It goes where its own sink brought it."""
        return run.info.mode == "online" and self._wanted == Settings()

    def _row(self, run: int, number: int) -> OutRow | None:
        cursor = self._outbox.cursor(run, number)
        while items := self._outbox.read(cursor, 1):
            for found, item in items:
                if found == number and isinstance(item, OutRow):
                    return item
        return None

    def _updates_of(self, run: RunState, upload: Upload) -> Updates:
        return Updates(
            run.number,
            self._outbox,
            self._blobs,
            upload.updates,
            save=self._uploads.save,
            on_done=lambda: None,
        )

    async def _send(self, run: RunState, target: Target, upload: Upload, updates: Updates) -> None:
        """Send what is missing and end the run there.

        Raises:
            SinkError: it was not done in time.
        """
        settings = _settings_of(run, self._wanted)
        fold = self._folds.setdefault(run.number, Fold())

        def open_request() -> Open:
            request = make_open_request(
                run, settings, fold, str(self._directory), find_api_key(settings)
            )
            return msgspec.structs.replace(
                request,
                mode="online",
                entity=target.entity,
                project=target.project,
                base=upload.base,
            )

        def note(opened: Opened) -> None:
            upload.base, upload.url, upload.opened_entity = (
                opened.base,
                opened.url,
                opened.entity,
            )
            # Before the first row is sent: who comes after a crash must know where they began.
            self._uploads.save()

        sink = SinkProcess(
            run.info,
            self._outbox,
            fold,
            updates,
            open_request,
            on_opened=note,
            deadline_s=settings.sink_deadline_s,
            stderr=self._directory / "logs" / f"sync-{run.info.id}.log",
        )
        sink.finish(None if run.crashed else run.exit_code)
        task = asyncio.create_task(sink.serve())
        await watch_sink(sink, f"Sending {run.info.name}", self._deadline, self._tell)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if not sink.done.is_set():
            raise SinkError(f"not sent in time: {sink.status.last_error or 'W&B is slow'}")
        upload.closed = True
        self._uploads.save()


def _why_not(run: RunState, directory: Path, *, at_work: bool) -> str:
    """Why a run that is not ended is not sent."""
    if at_work:
        return "a raywb service is at work on it; `raywb finish` ends it"
    if run.exit_code is None:
        return f"it was never finished: `raywb recover {directory}` brings it to its end"
    return "its own W&B could not be reached in time"
