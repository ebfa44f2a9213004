"""How many rows a second the service takes, and how many of them reach W&B."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from wandb_client import start_client

from raywb.shipping import Endpoint
from tests.bench.processes import (
    PATIENCE_S,
    ServiceProcess,
    at,
    close_client,
    flat_rows,
    in_processes,
    open_client,
    service_process,
)
from tests.bench.table import Line

RANKS = 8

#: How often each peer has its turn: what else the machine does must not decide.
ROUNDS = 8


def _log_and_flush(number: int, endpoint: Endpoint, rows: int, begin_s: float) -> tuple[float, ...]:
    """Log rows as fast as it goes.

    Returns:
        When this began, when all were logged, when acknowledged; and the CPU time that it took.
    """
    client = open_client(endpoint, f"worker_{number}")
    flat = flat_rows()
    at(begin_s)
    began, cpu_s = time.time(), time.process_time()
    for step in range(rows):
        client.log(flat[step % 100], step=step)
    logged = time.time()
    if not client.flush(PATIENCE_S):
        raise TimeoutError(f"not acknowledged: {client.stats}")
    flushed = time.time()
    cpu_s = time.process_time() - cpu_s
    close_client(client)
    return began, logged, flushed, cpu_s


def measure_ingest(directory: Path, *, quick: bool) -> list[Line]:
    """Lines on what four processes together bring to the ledger."""
    workers, rows = 4, 50_000 if quick else 250_000
    total = workers * rows
    lines = []
    for mode in ("disabled", "offline"):
        with service_process(directory / mode, mode=mode) as service:
            before = service.figures()
            times = in_processes(workers, _log_and_flush, service.endpoint, rows, time.time() + 3.0)
            acknowledged = service.figures()
            merged = service.wait_for(lambda found: found["received_rows"] == total)
        clients_us = sum(t[3] for t in times) / total * 1e6
        acks_us = (acknowledged["cpu_s"] - before["cpu_s"]) / total * 1e6
        merge_us = (merged["cpu_s"] - before["cpu_s"]) / total * 1e6
        began, flushed = min(t[0] for t in times), max(t[2] for t in times)
        rate = total / (flushed - began)
        logged = total / (max(t[1] for t in times) - began)
        lines.append(
            Line(
                f"ingest, W&B {mode}",
                f"{rate:,.0f} rows/s acknowledged",
                "wanted: at least 100,000",
                f"{workers} processes, {total:,} rows of ten floats as fast as log() goes "
                f"({logged:,.0f}/s), HTTP, fsync every second; all merged "
                f"{merged['time_s'] - flushed:.1f} s later. CPU a row: clients {clients_us:.1f} "
                f"µs, service {acks_us:.1f} µs until then, {merge_us:.1f} µs in all",
                rate >= 100_000,
            )
        )
    return lines


_ALONE = """
import random, sys, time
import wandb
rows = [{f"train/metric_{n}": random.random() for n in range(10)} for _ in range(100)]
run = wandb.init(project="bench")
run.define_metric("train/step")
run.define_metric("train/*", step_metric="train/step")
step = 0
for line in sys.stdin:
    count = int(line)
    began = time.time()
    for number in range(step, step + count):
        run.log({**rows[number % 100], "train/step": number})
    print(count / (time.time() - began), flush=True)
    step += count
run.finish()
"""


class _WandbAlone:
    """``wandb.log`` in a process of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._process = start_client(_ALONE, directory)

    def rate(self, rows: int) -> float:
        """Log this many more rows; returns how many it took a second."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{rows}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"wandb.log could not be timed: {self._process.communicate()[1]}")
        return float(answer)

    def close(self) -> None:
        """End the run."""
        self._process.communicate(timeout=PATIENCE_S)


def _sink_rate(service: ServiceProcess, rows: int, log: Callable[[], object]) -> float:
    """Rows a second that W&B's client takes from the sink, from its first of these to its last.

    Args:
        service: the service that gets the rows.
        rows: how many more rows W&B's client is to take.
        log: logs them.
    """
    before = service.figures()["delivered_rows"]
    seen: list[tuple[float, int]] = []

    def is_through(found: dict[str, Any]) -> bool:
        seen.append((found["time_s"], found["delivered_rows"] - before))
        return seen[-1][1] >= rows

    with ThreadPoolExecutor(1) as pool:
        logging = pool.submit(log)
        service.wait_for(is_through, every_s=0.1)
        logging.result()
    first_s, first = next(one for one in seen if one[1] > 0)
    last_s, last = seen[-1]
    return (last - first) / (last_s - first_s)


class _Ranks:
    """All ranks of a stage, in one process that does nothing else."""

    def __init__(self, service: ServiceProcess, ranks: int | None) -> None:
        fresh = multiprocessing.get_context("spawn")
        self._here, there = fresh.Pipe()
        self._process = fresh.Process(target=_log_ranks, args=(there, service.endpoint, ranks))
        self._process.start()
        self._here.recv()

    def log(self, steps: int) -> None:
        """Log so many more steps, and wait until the service has them."""
        self._here.send(steps)
        self._here.recv()

    def close(self) -> None:
        """End it."""
        self._here.send(0)
        self._process.join(PATIENCE_S)


def _log_ranks(orders: Connection, endpoint: Endpoint, ranks: int | None) -> None:
    """Log as many steps as is asked for, of all ranks or of a process without one."""
    numbers = range(ranks) if ranks else [None]
    clients = [open_client(endpoint, "train", rank=n, world_size=ranks) for n in numbers]
    flat, step = flat_rows(), 0
    orders.send(0)
    while steps := orders.recv():
        for _ in range(steps):
            for client in clients:
                client.log(flat[step % 100], step=step)
            step += 1
        for client in clients:
            if not client.flush(PATIENCE_S):
                raise TimeoutError(f"not acknowledged: {client.stats}")
        orders.send(steps)
    for client in clients:
        close_client(client)


def measure_sink(directory: Path, *, quick: bool) -> list[Line]:
    """Lines on what reaches W&B's client.

    All peers are up all the time, and take turns every few seconds: what else the machine does
    changes by half within a minute.
    """
    rounds, rows = (3, 5_000) if quick else (ROUNDS, 20_000)
    alone = _WandbAlone(directory / "alone")
    alones, ones, manys = [], [], []
    with (
        service_process(directory / "one") as one_service,
        service_process(directory / "ranks") as rank_service,
    ):
        one, ranks = _Ranks(one_service, None), _Ranks(rank_service, RANKS)
        for _ in range(rounds):
            alones.append(alone.rate(rows))
            ones.append(_sink_rate(one_service, rows, lambda: one.log(rows)))
            manys.append(_sink_rate(rank_service, rows, lambda: ranks.log(rows)))
        one.close()
        ranks.close()
    alone.close()
    shares = [mine / peer for mine, peer in zip(ones, alones, strict=True)]
    factors = [RANKS * mine / peer for mine, peer in zip(manys, alones, strict=True)]
    share, factor = statistics.median(shares), statistics.median(factors)
    conditions = (
        f"offline, rows of ten floats and their step, which is their axis; {rounds} rounds of "
        f"{rows:,} rows each in turns, from the first row that W&B's client takes to the last"
    )
    return [
        Line(
            "rows into W&B",
            f"{statistics.median(ones):,.0f} rows/s",
            f"wandb.log alone: {statistics.median(alones):,.0f} rows/s; {share:.2f} "
            f"({min(shares):.2f} to {max(shares):.2f}), wanted: at least 0.9",
            f"{conditions}; median of the rounds' ratios",
            share >= 0.9,
        ),
        Line(
            f"values of {RANKS} ranks into W&B, merged",
            f"{statistics.median(manys) * RANKS * 10:,.0f} values/s",
            f"wandb.log alone: {statistics.median(alones) * 10:,.0f} values/s; {factor:.1f}x "
            f"({min(factors):.1f} to {max(factors):.1f}), wanted: at least 6x",
            f"the same rounds; {RANKS} ranks in one process, {rows:,} steps each a round became "
            "as many rows; the step is not counted among a row's values",
            factor >= 6,
        ),
    ]
