"""``python -m tests.bench [PART …] [--quick]``: measure raywb against its peers, print a table.

Parts: log, ingest, sink, latency, sources, import, memory, probes, training, views; all by default.
Every part starts what it needs (service processes, W&B's real client, a real Ray cluster) and ends
it. Timings on a busy machine are a busy machine's: the table says what the load was.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def _prepare(home: Path) -> None:
    """An environment that says nothing, and in which children find what we find."""
    foreign = ("WANDB_", "RAYWB_", "RAY_")
    for name in [name for name in os.environ if name.startswith(foreign)]:
        del os.environ[name]
    os.environ |= {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "RAYWB_JOURNAL_DIR": str(home / "journals"),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    sys.path.insert(1, str(TESTS))


def main() -> int:
    """Measure; 1 when a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    names = (
        "log",
        "ingest",
        "sink",
        "latency",
        "sources",
        "import",
        "memory",
        "probes",
        "training",
        "views",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="fewer rows and shorter times")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    with tempfile.TemporaryDirectory(prefix="raywb-bench-") as temporary:
        directory = Path(temporary)
        _prepare(directory)
        from tests.bench import (
            hot_path,
            latency,
            memory,
            probes,
            sources,
            start_up,
            throughput,
            training,
            views,
        )
        from tests.bench.table import Line, machine, show

        quick: bool = arguments.quick
        parts: dict[str, Callable[[], list[Line]]] = {
            "log": lambda: hot_path.measure(directory / "log", quick=quick),
            "ingest": lambda: throughput.measure_ingest(directory / "ingest", quick=quick),
            "sink": lambda: throughput.measure_sink(directory / "sink", quick=quick),
            "latency": lambda: latency.measure(directory / "latency", quick=quick),
            "sources": lambda: sources.measure(directory / "sources", quick=quick),
            "import": lambda: start_up.measure(quick=quick),
            "memory": lambda: memory.measure(quick=quick),
            "probes": lambda: probes.measure(quick=quick),
            "training": lambda: training.measure(directory / "training", quick=quick),
            "views": lambda: views.measure(directory / "views", quick=quick),
        }
        before = machine()
        lines: list[Line] = []
        for name in arguments.parts or names:
            (directory / name).mkdir(exist_ok=True)
            began = time.monotonic()
            lines += parts[name]()
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        show(lines, before=before)
    return int(any(line.met is False for line in lines))


if __name__ == "__main__":
    sys.exit(main())
