"""A raywb service in a process of its own, without Ray, that says how it fares when asked.

Run as ``python -m tests.bench.service_process DIRECTORY MODE``: first it prints where it listens;
then, for every line on stdin, its figures as one line of JSON. It leaves when stdin ends.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import psutil

from raywb.groups import Group
from raywb.rows import PROTOCOL
from raywb.service import ingest
from raywb.service.actor import Boot, RaywbService
from raywb.settings import Settings
from tests.local_service import CLUSTER

#: How often the sink's progress is looked at, in seconds.
LOOK_EVERY_S = 0.005


class _Requests:
    """Counts the requests that were taken: each is told the pace once."""

    def __init__(self) -> None:
        self.count = 0
        pace = ingest.Ingest._pace

        def counted(listener: ingest.Ingest) -> float:
            self.count += 1
            return pace(listener)

        ingest.Ingest._pace = counted  # type: ignore[method-assign]


class _Deliveries:
    """When W&B's client had taken how many rows, looked at all the time."""

    def __init__(self, service: RaywbService) -> None:
        self.seen: list[tuple[float, int]] = []
        self._service = service
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        last = 0
        while True:
            time.sleep(LOOK_EVERY_S)
            rows = delivered_rows(self._service)
            if rows != last:
                last = rows
                self.seen.append((time.time(), rows))


def delivered_rows(service: RaywbService) -> int:
    """Rows that W&B's client has taken."""
    assert service._parts is not None
    runs = service._parts.runs
    sink = runs.sink_of(runs.open) if runs.open else None
    return sink.delivered_rows if sink else 0


def figures(service: RaywbService, requests: _Requests) -> dict[str, Any]:
    """What the service has done so far, and what it took."""
    status = service.status(60.0)
    me = psutil.Process()
    times = me.cpu_times()
    return {
        "time_s": time.time(),
        "cpu_s": times.user + times.system,
        "rss_bytes": me.memory_info().rss,
        "requests": requests.count,
        "received_rows": status.received_rows,
        "outbox_rows": status.outbox_rows,
        "backlog_rows": status.backlog_rows,
        "delivered_rows": delivered_rows(service),
        "state": status.sink.state,
        "lost": status.lost,
        "problems": status.problems,
    }


def main() -> None:
    """Serve until stdin ends."""
    directory, mode, looking = sys.argv[1:]
    requests = _Requests()
    settings = Settings(mode=mode)  # type: ignore[arg-type]
    boot = Boot(
        directory=directory,
        cluster_id=CLUSTER.cluster_id,
        run_id="bench001",
        host="127.0.0.1",
        settings=settings,
        group=Group("bench", "the benchmark"),
    )
    service = RaywbService(boot)
    joined = service.join(PROTOCOL, 60.0)
    service.start(settings, {}, boot.group, None)
    deliveries = _Deliveries(service) if looking == "looking" else None
    print(json.dumps({"address": joined["address"], "token": joined["token"]}), flush=True)
    for _ in sys.stdin:
        answer = figures(service, requests)
        answer["deliveries"] = deliveries.seen if deliveries else []
        print(json.dumps(answer), flush=True)
    service.close()


if __name__ == "__main__":
    main()
