"""What it costs a training that its workers log every step through raywb."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray_cluster import RayCluster
from training_case import settings, write_tokenizer

from recipes.stages.layout import OutputLayout
from recipes.training.batches import Batch
from tests.bench.table import Line

#: What a training with raywb attached is to have of the steps of one without.
WANTED = 0.99

VOCABULARY = 4000
CONTEXT = 96
#: Steps of a round that are not counted: the first ones are slow.
WARM_UP = 5

_ROUND = """
from pathlib import Path
from ray_cluster import report, without_service
from tests.bench.training import train_once
report(train_once(Path({directory!r}), {steps}, attached={attached}))
if {attached}:
    without_service()
"""


@dataclass(frozen=True)
class TimedNoise:
    """Random samples; rank 0 writes down when each step asked for its own."""

    path: Path
    last_place: int

    def open(self, seed: int) -> tuple[_Noise, _Noise]:
        return _Noise(self, 1_000_000), _Noise(self, 0)


class _Noise:
    def __init__(self, source: TimedNoise, size: int) -> None:
        self.size = size
        self._source = source
        self._asked_s: list[float] = []

    def batch(self, places: Sequence[int]) -> Batch:
        self._asked_s.append(time.perf_counter())
        if places[0] == self._source.last_place:
            self._source.path.write_text(json.dumps(self._asked_s))
        ids = np.random.default_rng(places[0]).integers(0, VOCABULARY, (len(places), CONTEXT + 1))
        return Batch(ids[:, :-1], ids[:, 1:], tokens=len(places) * CONTEXT)


def train_once(directory: Path, steps: int, *, attached: bool) -> list[float]:
    """In a driver: one training of the recipes' own kind; returns the time of each of its steps."""
    import ray
    from rich.console import Console

    import raywb
    from recipes.terminal import Terminal
    from recipes.tracking import TrackedRun
    from recipes.training.launch import train_on_cluster

    ray.init(log_to_driver=False)
    layout = OutputLayout(directory)
    layout.create()
    write_tokenizer(layout.tokenizer, VOCABULARY)
    wanted = dataclasses.replace(
        settings(
            steps=steps,
            batch_size=16,
            model={"layers": 2, "hidden_size": 128, "heads": 4},
            validation={"every_steps": None},
            checkpoints={"every_steps": steps, "artifacts": "none"},
        ),
        resume=False,
    )
    source = TimedNoise(directory / "asked.json", (steps - 1) * wanted.batch_size)
    quiet = Terminal(Console().file, Console(stderr=True).file)
    info = raywb.start(project="bench", mode="offline") if attached else None
    run = TrackedRun(None, info, print)
    train_on_cluster("bench", wanted, source, {}, layout=layout, run=run, terminal=quiet)
    if attached:
        report = raywb.finish()
        assert report.received_rows == 2 * steps, report
    asked_s: list[float] = json.loads(source.path.read_text())
    return [after - before for before, after in itertools.pairwise(asked_s)][WARM_UP:]


def measure(directory: Path, *, quick: bool) -> list[Line]:
    """One line: steps per second with raywb attached, against without, in rounds by turns."""
    pairs, steps = (1, 60) if quick else (4, 160)
    rates: dict[bool, list[float]] = {True: [], False: []}
    medians: dict[bool, list[float]] = {True: [], False: []}
    with RayCluster.start(num_cpus=4) as cluster:
        for pair in range(pairs):
            for attached in (pair % 2 == 0, pair % 2 == 1):
                script = _ROUND.format(directory=str(directory), steps=steps, attached=attached)
                times_s: list[Any] = cluster.run_driver(script)
                rates[attached].append(len(times_s) / sum(times_s))
                medians[attached].append(statistics.median(times_s))
    ratios = [one / other for one, other in zip(rates[True], rates[False], strict=True)]
    ratio = sum(rates[True]) / sum(rates[False])
    of_medians = sum(medians[False]) / sum(medians[True])
    return [
        Line(
            "training with raywb attached",
            f"{statistics.mean(rates[True]):.2f} steps/s, without: "
            f"{statistics.mean(rates[False]):.2f}; ratio {ratio:.3f} (pairs: {min(ratios):.3f} to "
            f"{max(ratios):.3f}), of the steps' medians {of_medians:.3f}",
            f"wanted: at least {WANTED:g}",
            f"2 workers on {os.cpu_count()} cores, {pairs} pairs of rounds, {steps} steps of "
            f"{statistics.mean(medians[False]) * 1000:.0f} ms each; service and W&B's client on "
            "the same cores",
            ratio >= WANTED,
        )
    ]
