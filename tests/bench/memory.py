"""What an outage does to a client's memory."""

from __future__ import annotations

import gc
import time

import psutil

from raywb.shipping import BATCH_BYTES, Endpoint
from tests.bench.processes import flat_rows, in_processes, open_client
from tests.bench.table import Line

ROWS_PER_S = 100
OUTAGE_S = 3600


def _log_through_an_outage(_: int, rows: int) -> tuple[int, int, int, float]:
    """Log with nobody there: memory before and after, bytes on disk, and the time taken."""
    nobody = Endpoint(address="127.0.0.1:9", token="", cluster_id="c" * 56)
    client = open_client(nobody, "train")
    flat = flat_rows()
    # What a full batch takes, once, is no growth.
    step = 0
    while client.stats.failed_requests < 3 or client.stats.backlog_bytes < 2 * BATCH_BYTES:
        client.log(flat[step % 100], step=step)
        step += 1
    gc.collect()
    before = psutil.Process().memory_info().rss
    began = time.monotonic()
    for step in range(rows):
        client.log(flat[step % 100], step=step)
    passed_s = time.monotonic() - began
    gc.collect()
    after = psutil.Process().memory_info().rss
    backlog = client.stats.backlog_bytes
    if client._connection.shipper is not None:
        client._connection.shipper.stop()
    return before, after, backlog, passed_s


def measure(*, quick: bool) -> list[Line]:
    """One line on a client that nobody answers."""
    rows = ROWS_PER_S * OUTAGE_S // (10 if quick else 1)
    ((before, after, backlog, passed_s),) = in_processes(1, _log_through_an_outage, rows)
    grown = (after - before) / 1e6
    return [
        Line(
            "a client's memory over an outage",
            f"{grown:+.1f} MB at {before / 1e6:.0f} MB",
            "wanted: flat, that is at most 2 MB",
            f"{rows:,} rows of ten floats, an hour's worth at {ROWS_PER_S} rows/s, in "
            f"{passed_s:.1f} s; {backlog / 1e6:.0f} MB wait on disk",
            grown <= 2.0,
        )
    ]
