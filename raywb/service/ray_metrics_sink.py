"""The status as metrics of Ray's: for its dashboard, Prometheus and Grafana.

What Ray 2.60 does with a gauge, as seen and as its source has it: a worker exports what was set
since the last export, every ``metrics_report_interval_ms`` (10 s), and forgets it; the agent on
the node shows a value for two intervals after its last export. So a value that stays the same has
to be set again and again, and a series that nobody sets any more ends by itself after 20 s. NaN
is not shown at all, and takes the series' last value with it at the next export: that is how a
series ends here. An older Ray keeps what was set once for as long as the worker lives; there
the series goes on as NaN instead of freezing at its last value.

The calls are local and cost some microseconds each. They are made in a thread of their own, which
works from a status that it was given: neither the service's loop nor any caller waits for it, and
nothing here is a task that would keep a node from being idle.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable
from typing import Protocol

from raywb.reports import Status
from raywb.service.series_names import METRICS
from raywb.service.status_samples import NodeReadings, Sample, Subject, is_over, subjects_of

__all__ = ["MAX_SERIES", "Gauge", "Gauges", "RayGauges", "RayMetricsSink", "clean_label"]

_log = logging.getLogger(__name__)

#: Series that Ray is given at a time. Of more, values that stages log are left out first, and
#: what Ray has already stays.
MAX_SERIES = 2_000

#: Characters of a label's value.
MAX_LABEL_CHARS = 200

#: What has ended is shown for so many export intervals more, so that Prometheus sees how.
LAST_EXPORTS = 3

#: Bounds of the time between two rounds, in seconds; between them it is half an export interval.
SHORTEST_ROUND_S = 0.5
LONGEST_ROUND_S = 5.0

#: A status is asked for at least this often while a run is open, in seconds: times pass, and
#: sources fall silent, though nothing arrives.
RENEW_S = 10.0

#: The part of the loop's time that making statuses may take.
LOOP_SHARE = 0.01

#: The name that is left out first when there are too many series.
_FIRST_TO_GO = "raywb_stage_value"


class Gauge(Protocol):
    """A name of series, as ``ray.util.metrics.Gauge`` is one."""

    def set(self, value: float, tags: dict[str, str]) -> None:
        """Set the value of one series."""


class Gauges(Protocol):
    """Makes gauges.

    Attributes:
        export_interval_s: how often their values are exported, in seconds.
    """

    @property
    def export_interval_s(self) -> float: ...

    def gauge(self, name: str, description: str, labels: tuple[str, ...]) -> Gauge:
        """Make the gauge of this name."""


class RayGauges:
    """Ray's own; the actor is made with it, so it is only imported where Ray is."""

    @property
    def export_interval_s(self) -> float:
        import ray

        return max(float(ray._config.metrics_report_interval_ms()) / 1e3, 1.0)

    def gauge(self, name: str, description: str, labels: tuple[str, ...]) -> Gauge:
        """Make the gauge of this name."""
        from ray.util import metrics

        gauge: Gauge = metrics.Gauge(name, description=description, tag_keys=labels)
        return gauge


@functools.lru_cache(maxsize=2 * MAX_SERIES)
def clean_label(text: str) -> str:
    """A label's value of what a user wrote: printable ASCII, and no longer than it may be.

    Ray takes nothing else. Two texts that would become the same stay apart: what was changed has
    a sum of the original at its end.
    """
    if text.isascii() and text.isprintable() and len(text) <= MAX_LABEL_CHARS:
        return text
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(
        letter if letter.isascii() and letter.isprintable() else "?"
        for letter in letters
        if not unicodedata.combining(letter)
    )
    mark = f"~{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"
    return plain[: MAX_LABEL_CHARS - len(mark)] + mark


class RayMetricsSink:
    """Keeps Ray's metrics at what the last status says.

    Args:
        gauges: makes the gauges.
        clock: monotonic, in seconds.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        gauges: Gauges,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._gauges = gauges
        self._clock = clock
        self._wall_clock = wall_clock
        self._made: dict[str, Gauge] = {}
        self._readings = NodeReadings()
        #: Whether there is nothing that Ray has or is to have.
        self._at_rest = True
        #: What it has.
        self._published: set[tuple[str, tuple[str, ...]]] = set()
        self._shown: set[tuple[str, ...]] = set()
        self._ended_at: dict[tuple[str, ...], float] = {}
        #: By name; replaced as a whole, since others read it while the thread works.
        self._dropped: Counter[str] = Counter()
        self._failures = 0
        self._reason = ""
        self._given: Status | None = None
        self._closed = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def warnings(self) -> list[str]:
        """What is not in Ray's metrics, in a sentence each."""
        found = []
        if dropped := self._dropped:
            count, name = dropped.total(), max(dropped, key=dropped.__getitem__)
            found.append(
                f"{count} series are beyond the {MAX_SERIES} that Ray's metrics are given, "
                f"most of them of {name}; W&B has them"
            )
        if self._failures:
            found.append(
                f"values of Ray's metrics could not be set {self._failures} times; the last "
                f"reason: {self._reason}"
            )
        return found

    # -- in the service's loop ------------------------------------------------------------------

    async def serve(
        self, status: Callable[[], Awaitable[Status]], changes: Callable[[], Hashable]
    ) -> None:
        """Ask for the status now and then, while there is something new, and show it.

        Args:
            status: makes the status.
            changes: is another value whenever something has come; costs nothing.
        """
        seen: Hashable = None
        shown_at, at_rest = -math.inf, False
        pause_s = round_s = self.round_s
        while True:
            await asyncio.sleep(pause_s)
            present = changes()
            if present == seen and (at_rest or self._clock() - shown_at < RENEW_S):
                continue
            began = time.perf_counter()
            found = await status()
            pause_s = max(round_s, (time.perf_counter() - began) / LOOP_SHARE)
            seen, shown_at = present, self._clock()
            at_rest = is_over(found)
            self.show(found)

    @property
    def round_s(self) -> float:
        """Time between two rounds, in seconds."""
        half_s = self._gauges.export_interval_s / 2
        return min(max(half_s, SHORTEST_ROUND_S), LONGEST_ROUND_S)

    def show(self, status: Status) -> None:
        """Show this status from now on; returns at once."""
        self._given = status
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="raywb-ray-metrics", daemon=True)
            self._thread.start()
        self._wake.set()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    # -- in the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._wake.clear()
            # Looked at after that: close() may have come just before, and nobody wakes this again.
            if self._closed:
                return
            began_s = self._clock()
            if self._given is not None:
                self.publish(self._given)
            # What Ray is given it forgets, so that everything is set again in each round; once
            # all has ended, there is nothing to do until somebody comes. Ray's call gives Python's
            # lock away each time, so that beside a busy loop, on a busy machine, 2,000 of them
            # take seconds instead of 30 ms: the next round is due from this one's beginning, or
            # series would end in between.
            if not self._at_rest:
                time_s = began_s + self.round_s
                while not self._closed and (left_s := time_s - self._clock()) > 0:
                    self._wake.wait(left_s)
                    self._wake.clear()
            else:
                self._wake.wait()

    def publish(self, status: Status) -> None:
        """Set all series once; end those that are no more."""
        now_s = self._wall_clock()
        try:
            self._readings.take(status.live, now_s)
            self._publish(subjects_of(status, now_s, self._readings))
        except Exception as error:  # noqa: BLE001 - whatever is wrong, the service goes on
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._reason = repr(error)
        if self._failures == 1:
            _log.warning("raywb: Ray's metrics cannot be set", exc_info=error)

    def _publish(self, subjects: list[Subject]) -> None:
        samples = self._within_the_limit(
            [
                Sample(sample.name, tuple(map(clean_label, sample.labels)), sample.value)
                for subject in self._to_be_shown(subjects)
                for sample in subject.samples
            ]
        )
        if samples:
            samples.append(Sample("raywb_series_exported", (), len(samples) + 2))
            samples.append(Sample("raywb_series_dropped", (), self._dropped.total()))
        wanted = {(sample.name, sample.labels) for sample in samples}
        # One that Ray would not end is tried again; one that it would not take it does not have.
        for name, labels in self._published - wanted:
            if self._set(name, labels, math.nan):
                self._published.discard((name, labels))
        for name, labels, value in samples:
            if self._set(name, labels, value):
                self._published.add((name, labels))
        self._at_rest = not samples and not self._published

    def _to_be_shown(self, subjects: list[Subject]) -> list[Subject]:
        """Those that are at work, and for a while those that have ended."""
        now, now_s = self._clock(), self._wall_clock()
        last_s = LAST_EXPORTS * self._gauges.export_interval_s
        ended_at: dict[tuple[str, ...], float] = {}
        shown = []
        for subject in subjects:
            if subject.ended:
                # After a restart, what ended long ago is not shown again.
                is_old = subject.key not in self._shown and now_s - subject.time_s > last_s
                ended_at[subject.key] = self._ended_at.get(
                    subject.key, -math.inf if is_old else now
                )
                if now - ended_at[subject.key] > last_s:
                    continue
            shown.append(subject)
        self._ended_at = ended_at
        self._shown = {subject.key for subject in shown}
        return shown

    def _within_the_limit(self, samples: list[Sample]) -> list[Sample]:
        """As many as Ray is given: the values of stages go first, and new ones before old ones."""
        if len(samples) + 2 <= MAX_SERIES:
            self._dropped = Counter()
            return samples

        def place(sample: Sample) -> tuple[bool, bool]:
            known = (sample.name, sample.labels) in self._published
            return sample.name == _FIRST_TO_GO, not known

        samples = sorted(samples, key=place)
        kept, dropped = samples[: MAX_SERIES - 2], samples[MAX_SERIES - 2 :]
        self._dropped = Counter(sample.name for sample in dropped)
        return kept

    def _set(self, name: str, labels: tuple[str, ...], value: float) -> bool:
        """Whether Ray took it; one series that it refuses must not keep the others from it."""
        metric = METRICS[name]
        try:
            gauge = self._made.get(name)
            if gauge is None:
                gauge = self._gauges.gauge(name, metric.description, metric.labels)
                self._made[name] = gauge
            gauge.set(value, dict(zip(metric.labels, labels, strict=True)))
        except Exception as error:  # noqa: BLE001 - whatever Ray raises
            self._failed(error)
            return False
        return True
