"""How long a row takes from ``log()`` to W&B's client."""

from __future__ import annotations

import time
from pathlib import Path

from raywb.shipping import Endpoint
from tests.bench.processes import (
    close_client,
    flat_rows,
    in_processes,
    open_client,
    service_process,
)
from tests.bench.table import Line

ROWS_PER_S = 100


def _log_steadily(_: int, endpoint: Endpoint, rows: int) -> list[float]:
    """Log at a steady rate; returns when each row was logged."""
    client = open_client(endpoint, "train")
    flat = flat_rows()
    logged = []
    begin = time.time()
    for step in range(rows):
        time.sleep(max(begin + step / ROWS_PER_S - time.time(), 0.0))
        logged.append(time.time())
        client.log(flat[step % 100], step=step)
    close_client(client)
    return logged


def measure(directory: Path, *, quick: bool) -> list[Line]:
    """One line on the way of a row through everything."""
    rows = ROWS_PER_S * (10 if quick else 60)
    with service_process(directory, looking=True) as service:
        (logged,) = in_processes(1, _log_steadily, service.endpoint, rows)
        seen = service.wait_for(lambda found: found["delivered_rows"] >= rows)["deliveries"]
    delays = []
    arrivals = iter(seen)
    moment, delivered = next(arrivals)
    for number, when in enumerate(logged):
        while delivered <= number:
            moment, delivered = next(arrivals)
        delays.append(moment - when)
    delays.sort()
    median_s, p99_s = delays[len(delays) // 2], delays[len(delays) * 99 // 100]
    return [
        Line(
            f"from log() to W&B's client, {ROWS_PER_S} rows/s",
            f"median {median_s:.2f} s, p99 {p99_s:.2f} s, longest {delays[-1]:.2f} s",
            "wanted: median at most 0.7 s, p99 at most 2 s",
            f"offline, {rows:,} rows of ten floats at a steady rate",
            median_s <= 0.7 and p99_s <= 2.0,
        )
    ]
