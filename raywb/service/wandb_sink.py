"""The only writer to W&B: a child process of the service, one per W&B run.

A stopped ``wandb-core`` blocks every ``run.log`` of its process for ever, and a killed one makes
``wandb.init`` fail for good there; so the client lives in a process that can be thrown away.
Each request has a deadline at the service, which then kills this process and starts another;
the new one finds out which row W&B has last, and goes on behind it.

Run as ``python -m raywb.service.wandb_sink``: requests on stdin, replies on what was stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from math import isfinite
from pathlib import Path
from typing import IO, Any

import msgspec

from raywb.errors import RaywbError, SinkError
from raywb.service.confirm import RunAtServer, Shown, Watch, ask_run
from raywb.service.offline_files import set_aside
from raywb.service.sink_messages import (
    LEAVE_S,
    LENGTH,
    Applied,
    Apply,
    AskUpdates,
    Confirm,
    Confirmed,
    Definition,
    Failed,
    Finish,
    Finished,
    LogArtifact,
    LogTable,
    Open,
    Opened,
    Reply,
    Request,
    SendAlert,
    Updated,
    pack,
)
from raywb.service.wandb_updates import WandbUpdates
from raywb.settings import DEFAULT_BASE_URL

__all__ = ["WandbSink", "main"]

#: How long W&B is given to show all of a finished run, in seconds; less under a short deadline.
CONFIRM_S = 20.0

#: W&B's client sends rows to the server this often, in seconds, unless its settings say otherwise
#: (``WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL``); asking more often would show nothing new.
TRANSMIT_INTERVAL_S = 15.0

#: Two times of one row differ by less, in seconds: it was written as text in between.
SAME_TIME_S = 0.001

#: W&B's client keeps rows in memory until a block is full or this time has passed.
FLUSH_INTERVAL_S = 1.0


class WandbSink:
    """One W&B run, fed with numbered rows.

    Raises:
        SinkError: W&B's side does not fit what the service knows of the run.
    """

    def __init__(self) -> None:
        self._request: Open | None = None
        self._run: Any = None
        self._base = 0
        self._next_row = 0
        self._entity: str | None = None
        self._watch: Watch | None = None
        self._updates: WandbUpdates | None = None
        self._alerts = 0

    def open(self, request: Open) -> Opened:
        """Start the run, or resume it behind the last row that W&B has."""
        end_leftover_core(self._core_record(request))
        import wandb

        next_row = self._offline_rows(request) if request.mode == "offline" else 0
        settings: dict[str, Any] = {
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "silent": True,
            "init_timeout": request.deadline_s,
            # The head's own CPU and memory would stand for the whole cluster's.
            "x_disable_stats": True,
            "x_transaction_log_flush_interval": FLUSH_INTERVAL_S,
        }
        if request.api_key:
            settings["api_key"] = request.api_key
        if request.base_url:
            settings["base_url"] = request.base_url
        self._run = wandb.init(
            project=request.project,
            entity=request.entity,
            id=request.run_id,
            name=request.name,
            group=request.group,
            job_type=request.job_type,
            tags=list(request.tags) or None,
            notes=request.notes,
            dir=request.dir,
            mode="offline" if request.mode == "offline" else "online",
            resume="allow" if request.mode == "online" else None,
            settings=wandb.Settings(**settings),
        )
        self._request = request
        self._entity = self._run.entity or None
        self._record_core()
        interval_s = None
        if request.mode == "online":
            next_row = self._online_rows(request)
            interval_s = self._begin_watch(request, self._base + next_row)
        self._next_row = next_row
        segments = (lambda: self._segments(request)) if request.mode == "offline" else None
        self._updates = WandbUpdates(self._run, self._base, segments, self._alerts)
        self._take(request.config, {}, request.defines)
        return Opened(
            next_row=next_row,
            base=self._base,
            url=self._run.url if request.mode == "online" else None,
            entity=self._entity,
            confirm_interval_s=interval_s,
            alerts=self._alerts if request.mode == "offline" else None,
        )

    @staticmethod
    def _segments(request: Open) -> list[Path]:
        from raywb.service.transaction_log import find_segments

        return find_segments(Path(request.dir) / "wandb", request.run_id)

    @property
    def updates(self) -> WandbUpdates:
        """What goes to the run besides plain rows."""
        if self._updates is None:
            raise SinkError("a table, artifact or alert came before open")
        return self._updates

    def _offline_rows(self, request: Open) -> int:
        from raywb.service.transaction_log import read_segment

        segments = [read_segment(path) for path in self._segments(request)]
        step = max((segment.next_row for segment in segments), default=0)
        self._alerts = sum(segment.alerts for segment in segments)
        self._base = step if request.base is None else request.base
        return step - self._base

    def _online_rows(self, request: Open) -> int:
        """How many of our rows the server has, from the step at which it resumes."""
        step = int(self._run.starting_step)
        self._base = step if request.base is None else request.base
        if request.began_offline:
            files = set_aside(Path(request.dir), request.run_id)
            if request.base is None and step and self._is_uploaded(request, files):
                # What the server has are our own first rows, which somebody uploaded.
                self._base = 0
        if step < self._base:
            raise SinkError(
                f"run {request.run_id} resumed at step {step}, before the step {self._base} at "
                "which it was first opened: it was deleted or rewound; start a new run"
            )
        return step - self._base

    def _is_uploaded(self, request: Open, files: list[Path]) -> bool:
        """Whether the server's last row is one of these files: its time tells."""
        from raywb.service.transaction_log import read_row_time

        found = self._ask_run(request)
        stamp = found.last_row.get("_timestamp") if found and found.last_row else None
        if found is None or not isinstance(stamp, (int, float)):
            return False
        times = [read_row_time(path, found.next_step - 1) for path in files]
        return any(time_s is not None and abs(time_s - stamp) < SAME_TIME_S for time_s in times)

    def _begin_watch(self, request: Open, next_step: int) -> float:
        """Ask the server for its step from now on; returns how often, in seconds."""
        asked_for_s = self._run.settings.x_file_stream_transmit_interval or 0.0
        # wandb-core counts in whole seconds, and takes its default for less than one.
        interval_s = float(int(asked_for_s)) or TRANSMIT_INTERVAL_S
        self._watch = Watch(
            lambda: self._ask_server(request),
            lambda shown: shown < self._base + self._next_row,
            next_step,
            interval_s,
        )
        self._watch.start()
        return interval_s

    def confirm(self) -> Confirmed:
        """What the server has shown so far; nothing is waited for."""
        watch = self._watch
        if watch is None:
            raise SinkError("an offline run has no server that could confirm it")
        return Confirmed(watch.next_step - self._base, watch.answers, watch.error)

    def _take(
        self,
        config: dict[str, Any],
        summary: dict[str, Any],
        defines: list[Definition],
    ) -> None:
        import wandb

        for name, step_metric, summary_kind, step_sync in defines:
            try:
                self._run.define_metric(
                    name, step_metric=step_metric, step_sync=step_sync, summary=summary_kind
                )
            except wandb.Error as error:
                # It would be refused by every sink to come: the metric goes without, the rows
                # do not.
                sys.stderr.write(f"define_metric({name!r}) was refused by W&B: {error}\n")
        if config:
            self._run.config.update(config, allow_val_change=True)
        if summary:
            self._run.summary.update(summary)

    def apply(self, request: Apply) -> Applied:
        """Log what is new in the request."""
        self._take(request.config, {}, request.defines)
        tables = {table.row: table for table in request.tables}
        logged = []
        counts_on = False
        for number, time_s, metrics in request.rows:
            if number < self._next_row:
                continue
            row: dict[str, Any] = {**metrics, "_timestamp": time_s}
            if table := tables.get(number):
                row[table.key], of_summary = self.updates.value(table)
                logged.append(of_summary)
            # The step is W&B's own row counter, which belongs to this sink alone: told once, it
            # counts on by itself, and to tell it for every row would cost a sixth more. Without
            # commit=True a row with a step would wait for the next one and merge with it.
            step = None if counts_on and number == self._next_row else self._base + number
            self._run.log(row, step=step, commit=True)
            self._next_row = number + 1
            counts_on = True
        self._take({}, request.summary, [])
        return Applied(self._next_row, logged)

    def finish(self, request: Finish) -> Finished:
        """End the run, or leave it as it is; then look what is really there."""
        opened = self._request
        if opened is None:
            raise SinkError("finish came before open")
        if self._watch is not None:
            self._watch.end()
        # The config again: W&B's client does not say when the server refused it.
        self._take(request.config, request.summary, [])
        if request.exit_code is None:
            deadline = time.monotonic() + LEAVE_S
            rows = self._confirmed(opened, request, deadline)
            self._await_summary(opened, request.summary, deadline)
            return Finished(rows, self.updates.found_in_files(deadline))
        self._run.finish(exit_code=request.exit_code)
        deadline = time.monotonic() + min(CONFIRM_S, opened.deadline_s / 3)
        rows = self._confirmed(opened, request, deadline)
        return Finished(rows, self.updates.found_in_files(deadline))

    def _await_summary(self, opened: Open, summary: dict[str, Any], deadline: float) -> None:
        """Wait until W&B has the summary of a run that is left, since its client goes with us.

        Raises:
            SinkError: it has not in time; the next sink tries again.
        """
        there = self._summary_on_disk if opened.mode == "offline" else self._summary_at_server
        while summary and not there(opened, summary):
            if time.monotonic() > deadline:
                raise SinkError("W&B has all rows, but not the summary; it is sent again")
            time.sleep(0.2)

    def _confirmed(self, opened: Open, end: Finish, deadline: float) -> int:
        """How many rows W&B really has, asked until it has all of them, or it is ``deadline``.

        Only its own word counts: online the server's (a file stream that was refused once never
        recovers, and ``finish`` returns as if all were well; the run's end or its config may be
        what was refused), offline the files' (they are complete a moment after ``finish`` has
        returned).

        Raises:
            SinkError: W&B does not have all rows, or not the end; the next sink sends the rest.
        """
        pause_s = 0.05
        while True:
            if opened.mode == "offline":
                shown = self._on_disk(opened)
            else:
                shown = self._ask_server(opened, end=True)
            rows = shown.next_step - self._base
            config = shown.config_keys is None or end.config.keys() <= shown.config_keys
            if rows >= self._next_row and (shown.ended or end.exit_code is None) and config:
                return rows
            if time.monotonic() > deadline:
                raise SinkError(
                    f"W&B has {rows} of {self._next_row} rows after finish, the run is "
                    f"{shown.state or 'ended'} there, and its config "
                    f"{'complete' if config else 'incomplete'}; the rest is sent again"
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 1.0)

    def _on_disk(self, opened: Open) -> Shown:
        from raywb.service.transaction_log import find_segments, read_segment

        segments = find_segments(Path(opened.dir) / "wandb", opened.run_id)
        return Shown(sum(read_segment(path).rows for path in segments))

    def _ask_server(self, opened: Open, *, end: bool = False) -> Shown:
        run = self._ask_run(opened, end=end)
        return Shown(run.next_step, run.state, run.config_keys) if run else Shown(0)

    def _ask_run(self, opened: Open, *, end: bool = False) -> RunAtServer | None:
        return ask_run(
            opened.base_url or DEFAULT_BASE_URL,
            opened.api_key,
            entity=opened.entity or self._entity,
            project=opened.project,
            run_id=opened.run_id,
            end=end,
        )

    @staticmethod
    def _summary_on_disk(opened: Open, summary: dict[str, Any]) -> bool:
        from raywb.service.transaction_log import find_segments, read_segment

        last = find_segments(Path(opened.dir) / "wandb", opened.run_id)[-1]
        return summary.keys() <= read_segment(last).summary_keys

    def _summary_at_server(self, opened: Open, summary: dict[str, Any]) -> bool:
        found = self._ask_run(opened)
        return found is not None and all(
            key in found.summary and _is_shown(value, found.summary[key])
            for key, value in summary.items()
        )

    @staticmethod
    def _core_record(request: Open) -> Path:
        return Path(request.dir) / "logs" / f"wandb-core-{request.run_id}.json"

    def _record_core(self) -> None:
        """Write down which wandb-core is ours, for whoever comes after us."""
        import psutil

        if self._request is None:
            return
        cores = []
        for child in psutil.Process().children():
            # W&B's client starts other processes as well (git, say), which end as we look.
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name().startswith("wandb-core"):
                    cores.append({"pid": child.pid, "started_at": child.create_time()})
        path = self._core_record(self._request)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cores))


def _is_shown(value: Any, shown: Any) -> bool:
    """Whether W&B shows a summary value; what is no plain value it may write in its own way."""
    plain = isinstance(value, (bool, int, str)) or (isinstance(value, float) and isfinite(value))
    return not plain or bool(value == shown)


def end_leftover_core(record: Path) -> None:
    """Kill the wandb-core of an earlier sink of this run, and wait for its end.

    It runs in a session of its own and can outlive its parent by a moment; two of them writing
    to one run would overlap.
    """
    import psutil

    try:
        cores = json.loads(record.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return
    for core in cores:
        try:
            process = psutil.Process(core["pid"])
            if process.create_time() == core["started_at"]:
                process.kill()
                process.wait(timeout=10)
        except psutil.NoSuchProcess:
            continue


def _read_request(source: IO[bytes]) -> Request | None:
    header = source.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    body = source.read(LENGTH.unpack(header)[0])
    request: Request = msgspec.msgpack.decode(body, type=Request)
    return request


def _carry_out(sink: WandbSink, request: Request) -> Reply:
    match request:
        case Open():
            return sink.open(request)
        case Apply():
            return sink.apply(request)
        case Confirm():
            return sink.confirm()
        case LogTable():
            sink.updates.log_table(request)
        case LogArtifact():
            sink.updates.log_artifact(request)
        case SendAlert():
            sink.updates.alert(request)
        case AskUpdates():
            return Updated(sink.updates.outcomes())
        case Finish():
            return sink.finish(request)
    return Updated()


def main() -> None:
    """Serve requests until the pipe ends.

    When the service dies, the pipe ends and this process leaves at once, without W&B's own
    finish: the run is not over, and the next sink resumes it.
    """
    # A Ctrl-C in the terminal is for the driver; how the run ends is decided by the service.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    sink = WandbSink()
    while (request := _read_request(sys.stdin.buffer)) is not None:
        try:
            reply = _carry_out(sink, request)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises is told to the service
            name = "" if isinstance(error, RaywbError) else f"{type(error).__name__}: "
            reply = Failed(f"{name}{error}")
        try:
            replies.write(pack(reply))
        except BrokenPipeError:
            break  # the service is gone: leave without W&B's own finish
        if isinstance(reply, (Failed, Finished)):
            break
    os._exit(0)


if __name__ == "__main__":
    main()
