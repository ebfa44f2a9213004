"""What ``log()`` costs its caller, and what else one could call."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy
from ray_cluster import RayCluster
from wandb_client import run_client
from wandb_server import WandbServer

from raywb.shipping import Endpoint
from tests.bench.processes import flat_rows, in_processes, open_client, service_process
from tests.bench.table import Line

#: Calls in one round. Each kind of call is timed in rounds, in turn with the others, and the best
#: round's median counts: what other processes do to a round is not the call's.
CALLS = 4000


class Cost(NamedTuple):
    """What one call costs, in microseconds; the mean is what a loop loses to it for each row."""

    median_us: float
    p99_us: float
    mean_us: float

    def __str__(self) -> str:
        return f"{self.median_us:.2f} µs (p99 {self.p99_us:.1f})"


def _cost(times_ns: list[int]) -> Cost:
    times_us = sorted(time_ns / 1e3 for time_ns in times_ns)
    count = len(times_us)
    return Cost(times_us[count // 2], times_us[count * 99 // 100], sum(times_us) / count)


def _time_floor(fd: int, rows: list[dict[str, float]]) -> Cost:
    clock, write, encode = time.perf_counter_ns, os.write, msgspec.msgpack.Encoder().encode
    times = []
    for number in range(CALLS):
        row = rows[number % len(rows)]
        began = clock()
        write(fd, encode(row))
        times.append(clock() - began)
    return _cost(times)


def _time_log(log: Callable[..., None], rows: list[dict[str, Any]]) -> Cost:
    clock = time.perf_counter_ns
    times = []
    for number in range(CALLS):
        row = rows[number % len(rows)]
        began = clock()
        log(row, step=number)
        times.append(clock() - began)
    return _cost(times)


def _best(rounds: list[Cost]) -> Cost:
    """The best round's median, and of p99 and mean what half of the rounds kept to."""
    medians_us, p99s_us, means_us = zip(*rounds, strict=True)
    return Cost(min(medians_us), statistics.median(p99s_us), statistics.median(means_us))


def _time_raywb(_: int, endpoint: Endpoint, service_pid: int, rounds: int) -> dict[str, Cost]:
    """The floor and ``log()`` in one process, with a service that lives and then is killed."""
    client = open_client(endpoint, "train")
    flat = flat_rows()
    kinds: dict[str, list[dict[str, Any]]] = {
        "flat": flat,
        "with ints": [{**row, "epoch": n, "tokens": n * 9999} for n, row in enumerate(flat)],
        "with a string": [{**row, "phase": "warm-up"} for row in flat],
        "nested": [{"a": dict([*row.items()][:5]), "b": dict([*row.items()][5:])} for row in flat],
        "numpy": [{key: numpy.float32(value) for key, value in row.items()} for row in flat],
    }
    journal = client._connection.journal
    assert journal is not None
    path = journal.directory.parent / "floor"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    found: dict[str, list[Cost]] = {}

    def play(names: list[str], suffix: str = "") -> None:
        for _ in range(rounds):
            found.setdefault("floor" + suffix, []).append(_time_floor(fd, flat))
            for name in names:
                found.setdefault(name + suffix, []).append(_time_log(client.log, kinds[name]))

    play(list(kinds))
    os.kill(service_pid, signal.SIGKILL)
    play(["flat"], ", dead")
    os.close(fd)
    path.unlink()
    if client._connection.shipper is not None:
        client._connection.shipper.stop()
    return {name: _best(costs) for name, costs in found.items()}


#: Times `call(row)` as the others are timed: best round's median, and the mean that half of the
#: rounds kept to; in microseconds.
_TIMED = """
import random, sys, time
rows = [{f"metric_{n}": random.random() for n in range(10)} for _ in range(100)]

def timed(call, calls, rounds=10):
    medians, means = [], []
    for _ in range(rounds):
        times = []
        for number in range(calls // rounds):
            row = rows[number % 100]
            began = time.perf_counter_ns()
            call(row)
            times.append((time.perf_counter_ns() - began) / 1e3)
        medians.append(sorted(times)[len(times) // 2])
        means.append(sum(times) / len(times))
    return [min(medians), sorted(means)[rounds // 2]]
"""

_WANDB = """
import wandb
shared = sys.argv[2] == "shared"
run = wandb.init(project="bench", settings=wandb.Settings(mode="shared") if shared else None)
print("timed", *timed(run.log, int(sys.argv[1])))
run.finish()
"""

_RAY = """
import ray
from ray_cluster import report, told
from ray.util.queue import Queue

@ray.remote(num_cpus=0)
class Sink:
    def __init__(self):
        self.rows = 0
    def log(self, row):
        self.rows += 1
    def count(self):
        return self.rows

ray.init(log_to_driver=False)
calls = told()
sink = Sink.remote()
ray.get(sink.count.remote())
actor = timed(sink.log.remote, calls)
assert ray.get(sink.count.remote()) == calls
queue = Queue()
queue.put(rows[0])
report([actor, timed(queue.put, calls // 5)])
"""


#: Median and mean of a peer's call, in microseconds.
Peer = tuple[float, float]


def _time_wandb(directory: Path, calls: int, kind: str, base_url: str | None = None) -> Peer:
    home = directory / f"wandb-{kind}"
    home.mkdir()
    done = run_client(_TIMED + _WANDB, home, base_url, str(calls), kind, timeout_s=300.0)
    if done.returncode:
        raise RuntimeError(f"wandb.log could not be timed: {done.stderr}")
    median_us, mean_us = map(float, done.stdout.split("timed")[1].split()[:2])
    return median_us, mean_us


def measure(directory: Path, *, quick: bool) -> list[Line]:
    """Lines on what one call costs."""
    with service_process(directory, mode="disabled") as service:
        (ours,) = in_processes(1, _time_raywb, service.endpoint, service.pid, 5 if quick else 15)
    calls = 1000 if quick else 20_000
    alone = _time_wandb(directory, calls, "alone")
    with WandbServer() as server:
        shared = _time_wandb(directory, calls, "shared", server.url)
    with RayCluster.start(num_cpus=2) as cluster:
        driver = cluster.driver(_TIMED + _RAY)
        driver.tell(calls)
        actor, queue = driver.next_report()
    peers = {
        "wandb.log": (alone, 80, "offline, in one process"),
        "wandb.log, shared mode": (shared, None, "a loopback server"),
        "an actor call per row": (actor, 60, "log.remote(row), not waited for, one caller"),
        "ray.util.queue.Queue.put": (queue, None, "one caller"),
    }
    flat = ours["flat"]
    return [
        *_lines_of_log(ours),
        *(_line_of_peer(flat, name, *peer) for name, peer in peers.items()),
    ]


def _lines_of_log(ours: dict[str, Cost]) -> list[Line]:
    lines = []
    for suffix, what in (("", "log(), ten floats"), (", dead", "log(), the service killed")):
        cost, floor = ours["flat" + suffix], ours["floor" + suffix]
        ratio = cost.median_us / floor.median_us
        lines += [
            Line(
                what,
                str(cost),
                f"floor {floor}; {ratio:.2f}x, wanted: at most 2x, p99 at most 20 µs",
                "the floor: encode the same dict with msgspec and os.write() it, in the same "
                f"process, rounds of {CALLS} calls in turn; best round's median, median p99",
                ratio <= 2.0 and cost.p99_us <= 20.0,
            )
        ]
    flat = ours["flat"].median_us
    for name in ("with ints", "with a string", "nested", "numpy"):
        cost = ours[name]
        against = f"{cost.median_us - flat:+.2f} µs to ten floats"
        conditions = {
            "with ints": "ten floats and two ints of several lengths",
            "with a string": "ten floats and a string: each key and value is looked at",
            "nested": "two dicts of five floats each, joined with a slash",
            "numpy": "ten numpy.float32, made Python's",
        }[name]
        lines.append(Line(f"log(), {name}", str(cost), against, conditions))
    return lines


def _line_of_peer(ours: Cost, name: str, peer: Peer, wanted: int | None, how: str) -> Line:
    median_us, mean_us = peer
    ratio = mean_us / ours.mean_us
    return Line(
        f"log() against {name}",
        f"mean {ours.mean_us:.2f} µs, {ratio:.0f}x cheaper "
        f"(medians: {median_us / ours.median_us:.0f}x)",
        f"mean {mean_us:.0f} µs, median {median_us:.0f} µs"
        + (f"; wanted: at least {wanted}x" if wanted else ""),
        f"ten floats, {how}; what a row costs the caller's loop, median of the rounds' means",
        ratio >= wanted if wanted else None,
    )
