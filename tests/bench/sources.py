"""What many sources cost the service: real ones up to a thousand, the pace of more."""

from __future__ import annotations

import heapq
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from raywb.service import ingest
from raywb.service.ingest import REQUESTS_PER_S, Ingest
from raywb.service.liveness import Liveness
from raywb.shipping import FIRST_PACE_S, Endpoint, spread
from tests.bench.processes import at, flat_rows, in_processes, open_client, service_process
from tests.bench.table import Line

PROCESSES = 4

#: Namespaces that the sources share.
STAGES = 8


def _log_once_a_second(
    number: int, endpoint: Endpoint, sources: int, begin_s: float, end_s: float
) -> int:
    """Be some of the sources, each of which logs a row a second; returns the rows logged."""
    threading.stack_size(256 * 1024)
    mine = range(number, sources, PROCESSES)
    clients = [open_client(endpoint, f"stage_{n % STAGES}") for n in mine]
    rows = flat_rows()
    at(begin_s)
    due = [(begin_s + random.random(), n) for n in range(len(clients))]
    heapq.heapify(due)
    logged = 0
    while due and due[0][0] < end_s:
        when, n = due[0]
        at(when)
        clients[n].log(rows[logged % 100], step=logged)
        logged += 1
        heapq.heapreplace(due, (when + 1.0, n))
    for client in clients:
        if client._connection.shipper is not None:
            client._connection.shipper.stop()
    return logged


def _run(directory: Path, sources: int, *, settle_s: float, measure_s: float) -> Line:
    """Let this many sources log; what the service takes once they keep to its pace."""
    with service_process(directory) as service:
        begin_s = time.time() + 3.0 + sources / 200
        end_s = begin_s + settle_s + measure_s + 2.0
        found: dict[str, Any] = {}

        def look() -> None:
            at(begin_s + settle_s)
            found["before"] = service.figures()
            at(begin_s + settle_s + measure_s)
            found["after"] = service.figures()

        looker = threading.Thread(target=look)
        looker.start()
        in_processes(PROCESSES, _log_once_a_second, service.endpoint, sources, begin_s, end_s)
        looker.join()
    before, after = found["before"], found["after"]
    passed_s = after["time_s"] - before["time_s"]
    cpu = (after["cpu_s"] - before["cpu_s"]) / passed_s
    requests = (after["requests"] - before["requests"]) / passed_s
    rows = (after["received_rows"] - before["received_rows"]) / passed_s
    rss_mb = after["rss_bytes"] / 1e6
    wanted = min(sources / ingest.PACE_RANGE_S[0], REQUESTS_PER_S)
    target = f"wanted: requests within the pace's {wanted:,.0f}/s"
    if sources == 1000:
        target += ", at most 50% of a core, at most 500 MB"
    return Line(
        f"{sources:,} sources at 1 row/s each",
        f"{cpu:.0%} of a core, {rss_mb:.0f} MB, {requests:.0f} requests/s, {rows:.0f} rows/s",
        target,
        f"the service's process for {measure_s:.0f} s, its sink's not counted; {PROCESSES} "
        "processes with a journal, a thread and a connection for each source; W&B offline",
        # A request that was due at the beginning of the time may come in it.
        requests <= wanted * 1.05
        and rows >= sources * 0.9
        and (sources < 1000 or (cpu <= 0.5 and rss_mb <= 500)),
    )


def simulate(sources: int, seconds: int) -> list[int]:
    """Requests in each second when all sources come up at once, by the service's own pacing."""
    clock = SimpleNamespace(monotonic=lambda: now)
    now = 0.0
    listener = Ingest(
        None,  # type: ignore[arg-type]
        "",
        "",
        "off",
        on_append=lambda: None,
        liveness=Liveness(lambda: now),
        silent_after_s=30.0,
        run_closed=lambda: False,
    )
    due = [(random.random() * FIRST_PACE_S, f"{n:032x}") for n in range(sources)]
    heapq.heapify(due)
    requests = [0] * seconds
    with mock.patch.object(ingest, "time", clock):
        while due[0][0] < seconds:
            now, source_id = due[0]
            requests[int(now)] += 1
            listener.heard[source_id] = listener._gave[source_id] = now
            heapq.heapreplace(due, (now + spread(listener._pace()), source_id))
    return requests


def measure(directory: Path, *, quick: bool) -> list[Line]:
    """Lines on 10 to 10,000 sources."""
    settle_s, measure_s = (8.0, 10.0) if quick else (15.0, 40.0)
    lines = [
        _run(directory / str(sources), sources, settle_s=settle_s, measure_s=measure_s)
        for sources in (10, 100, 1000)
    ]
    sources = 10_000
    requests = simulate(sources, 600)
    steady, busiest = sum(requests[-100:]) / 100, max(requests[-100:])
    lines.append(
        Line(
            f"{sources:,} sources, the pace simulated",
            f"{steady:.0f} requests/s, {busiest} in the busiest of 100 seconds",
            f"wanted: {REQUESTS_PER_S:.0f}/s",
            "all come up within a quarter of a second; ten minutes on a simulated clock, of which "
            f"the last 100 s count; {requests[0]:,} requests in the first second",
            steady <= REQUESTS_PER_S * 1.05,
        )
    )
    return lines
