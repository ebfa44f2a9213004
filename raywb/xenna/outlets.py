"""Where a hook's rows go: through the raywb service, or to a W&B run of this process, and to JSONL.

The way through the service is direct, as its client's `log` only appends to a journal. A file and a
W&B run may take their time: they are written on a thread of the hook, never inside xenna's loop.
"""

from __future__ import annotations

import functools
import json
import math
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from raywb.xenna.stats import Failure, Metrics

#: Namespace of the metrics.
NAMESPACE = "xenna/"
#: The metric that every row carries as its x-axis.
AXIS = "pipeline_duration_s"
#: Jobs that may wait for the thread; with one row per interval, days of a hung disk.
MAX_WAITING_JOBS = 10_000
#: Seconds without a job after which the thread ends.
IDLE_S = 2.0
#: Seconds that the end of a hook waits for rows on their way to a file or a W&B run.
DRAIN_TIMEOUT_S = 10.0

Report = Callable[[str, Exception], None]


class Series(Protocol):
    """Takes the rows of one pipeline, with keys that have no prefix."""

    def log(self, metrics: Metrics) -> None:
        """Take one row."""

    def set_summary(self, values: Metrics) -> None:
        """Set values of the run's summary."""


@dataclass(frozen=True, slots=True)
class Outlet:
    """A pipeline's series, and whether writing to it may block."""

    series: Series
    may_block: bool


OpenOutlet = Callable[[], Outlet]


@dataclass(slots=True)
class SharedSeries:
    """A pipeline's series as the hooks around it share it: each of its rows is written once.

    Attributes:
        outlet: Opened by the hook that writes the first row.
        written: Number of the newest row that was written.
        bottleneck: The bottleneck that stands in the summary.
    """

    outlet: Outlet | None = None
    written: int = 0
    bottleneck: str | None = None


class Contained:
    """A block of ours inside somebody else's call: its exceptions are reported and end here.

    Only `Exception` is held back: an interrupt belongs to the caller.
    """

    def __init__(self, doing: str, report: Report) -> None:
        self._doing = doing
        self._report = report

    def __enter__(self) -> Contained:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._report(self._doing, error)
        return True


class OutletThread:
    """A daemon thread that does jobs one after the other; it is there while there are any."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.Queue[tuple[str, Callable[[], object], Report]] = queue.Queue(
            MAX_WAITING_JOBS
        )
        # Re-entrant, because a signal handler may submit in the middle of a submission.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None

    def submit(self, doing: str, job: Callable[[], object], report: Report) -> None:
        """Queue a job and return at once; one that finds no room is dropped and reported."""
        with Contained(doing, report), self._lock:
            self._jobs.put_nowait((doing, job, report))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()

    def flush(self, timeout_s: float, report: Report) -> None:
        """Wait until what was submitted is done; what takes longer is reported and goes on."""
        done = threading.Event()
        self.submit("waiting for the last rows", done.set, report)
        with Contained("writing the last rows", report):
            if not done.wait(timeout_s):
                raise TimeoutError(f"rows were not written within {timeout_s:.3g} s")

    def _work(self) -> None:
        while True:
            try:
                doing, job, report = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._jobs.empty():
                        self._thread = None
                        return
                continue
            with Contained(doing, report):
                job()


class JsonlFile:
    """A file of JSON records, one a line; made with its directories when the first one comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record and flush it. JSON has no NaN and no infinity: they become null."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; it is opened again if another record comes."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value


_pipelines_lock = threading.Lock()
_pipelines_by_run: Counter[str] = Counter()
#: Writes all rows that go to a W&B run: nested hooks take turns, and the order must stay.
_wandb_thread = OutletThread("raywb-xenna-wandb")


class WandbRunSeries:
    """A pipeline's rows in a W&B run of this process, where no raywb service runs.

    The first pipeline of a run logs under `xenna/`, further ones under `xenna/<label>_<n>/`.
    """

    def __init__(self, run: Any, label: str) -> None:
        self._run = run
        with _pipelines_lock:
            _pipelines_by_run[run.id] += 1
            number = _pipelines_by_run[run.id]
        self.prefix = NAMESPACE if number == 1 else f"{NAMESPACE}{label}_{number}/"
        self._is_first = number == 1
        self._defined: set[str] = set()

    def log(self, metrics: Metrics) -> None:
        """Log one row; its keys get the prefix, and the pipeline's own x-axis."""
        self._define(metrics)
        self._run.log({self.prefix + key: value for key, value in metrics.items()})

    def set_summary(self, values: Metrics) -> None:
        """Set values of the run's summary."""
        self._run.summary.update({self.prefix + key: value for key, value in values.items()})

    def _define(self, metrics: Metrics) -> None:
        axis = self.prefix + AXIS
        if not self._defined:
            self._run.define_metric(axis)
            self._run.define_metric(f"{self.prefix}*", step_metric=axis)
            self._defined.add(AXIS)
        if self._is_first:
            return
        # `xenna/*` matches these keys, too, and W&B does not say which pattern wins; a metric
        # that is defined by its full name needs none.
        for key in metrics.keys() - self._defined:
            self._run.define_metric(self.prefix + key, step_metric=axis)
        self._defined |= metrics.keys()


class Delivery:
    """One hook's way out for rows. `log` and `write` return at once.

    Attributes:
        open_outlet: Opens a pipeline's series in W&B; None where nothing goes there.
    """

    def __init__(
        self,
        pipeline_kind: str,
        run_hash: str,
        identity: Metrics,
        jsonl: Path | None,
        report: Report,
    ) -> None:
        self._pipeline_kind = pipeline_kind
        self._run_hash = run_hash
        self._identity = identity
        self._jsonl = JsonlFile(jsonl) if jsonl is not None else None
        self._report = report
        self._jsonl_thread = OutletThread("raywb-xenna-jsonl")
        self._logged_to_run = False
        self.open_outlet: OpenOutlet | None = None

    def find_wandb(self) -> OpenOutlet | None:
        """Return what opens series in W&B: in the service, else in a run of this process."""
        with Contained("looking for the raywb service", self._report):
            # Not at the top: a hook that only writes JSONL needs neither a service nor Ray.
            from raywb.lifecycle import running_client

            client = running_client()
            if client is not None:
                return lambda: Outlet(
                    client.open_series("xenna", label=self._pipeline_kind, axis=AXIS),
                    may_block=False,
                )
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is None:
            return None
        return lambda: Outlet(WandbRunSeries(run, self._pipeline_kind), may_block=True)

    def log(self, series: SharedSeries, number: int, metrics: Metrics) -> None:
        """Log row `number` of a pipeline to W&B, unless another hook has done so."""
        if self.open_outlet is None or series.written == number:
            return
        series.written = number
        summary: Metrics = {}
        if series.outlet is None:
            series.outlet = self.open_outlet()
            summary |= self._identity
        row = dict(metrics)
        bottleneck = row.pop("bottleneck_stage", None)
        if bottleneck is not None and bottleneck != series.bottleneck:
            series.bottleneck = str(bottleneck)
            summary["bottleneck_stage"] = bottleneck
        self._emit(series.outlet, row, summary)

    def write(
        self,
        metrics: Metrics,
        stages: Sequence[str],
        failure: Failure | None,
        *,
        is_final: bool,
    ) -> None:
        """Append a record to the JSONL file."""
        if self._jsonl is None:
            return
        record: dict[str, Any] = {
            "timestamp": time.time(),
            "pipeline_kind": self._pipeline_kind,
            "run_hash": self._run_hash,
            "metrics": metrics,
            "stages": list(stages),
        }
        if is_final:
            record["final"] = True
        if failure is not None:
            record["error"] = {
                "type": failure.type,
                "message": failure.message,
                "stage": failure.stage,
            }
        append = functools.partial(self._jsonl.append, record)
        self._jsonl_thread.submit(f"writing {self._jsonl.path}", append, self._report)

    def drain(self) -> None:
        """Wait, not for ever, until what was handed over is written."""
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        if self._logged_to_run:
            _wandb_thread.flush(DRAIN_TIMEOUT_S, self._report)
        if self._jsonl is not None:
            self._jsonl_thread.submit("closing the file", self._jsonl.close, self._report)
            self._jsonl_thread.flush(max(0.0, deadline - time.monotonic()), self._report)

    def _emit(self, outlet: Outlet, row: Metrics, summary: Metrics) -> None:
        def emit() -> None:
            outlet.series.log(row)
            if summary:
                outlet.series.set_summary(summary)

        if outlet.may_block:
            self._logged_to_run = True
            _wandb_thread.submit("logging to the W&B run", emit, self._report)
        else:
            emit()
