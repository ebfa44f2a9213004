"""How many rows a second the service takes, and how many of them reach W&B."""

from __future__ import annotations

import time
from pathlib import Path

from wandb_client import run_client

from raywb.shipping import Endpoint
from tests.bench.processes import (
    PATIENCE_S,
    at,
    close_client,
    flat_rows,
    in_processes,
    open_client,
    service_process,
)
from tests.bench.table import Line

RANKS = 8

#: How often each of two peers runs, in turns: what else the machine does must not decide.
ROUNDS = 3


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
count = int(sys.argv[1])
began = time.time()
for number in range(count):
    run.log({**rows[number % 100], "train/step": number})
print("rate", count / (time.time() - began))
run.finish()
"""


def _wandb_alone(directory: Path, rows: int) -> float:
    """Rows a second that ``wandb.log`` takes in a process of its own."""
    directory.mkdir()
    done = run_client(_ALONE, directory, None, str(rows), timeout_s=PATIENCE_S)
    if done.returncode:
        raise RuntimeError(f"wandb.log could not be timed: {done.stderr}")
    return float(done.stdout.split("rate")[1])


def _log_ranks(number: int, endpoint: Endpoint, ranks: int, rows: int, begin_s: float) -> float:
    """Log the rows of some of the ranks, step by step; returns when this began."""
    clients = [
        open_client(endpoint, "train", rank=number * ranks + n, world_size=RANKS)
        for n in range(ranks)
    ]
    flat = flat_rows()
    at(begin_s)
    began = time.time()
    for step in range(rows):
        for client in clients:
            client.log(flat[step % 100], step=step)
    for client in clients:
        close_client(client)
    return began


def measure_sink(directory: Path, *, quick: bool) -> list[Line]:
    """Lines on what reaches W&B's client."""
    # Long enough that the second until the first row is there weighs little.
    rows, steps = (10_000, 10_000) if quick else (100_000, 40_000)
    alones, ours = [], []
    for n in range(ROUNDS):
        alones.append(_wandb_alone(directory / f"alone_{n}", rows))
        with service_process(directory / f"one_{n}") as service:
            ((began, *_),) = in_processes(
                1, _log_and_flush, service.endpoint, rows, time.time() + 2.0
            )
            done = service.wait_for(lambda found: found["delivered_rows"] >= rows)
            ours.append(rows / (done["time_s"] - began))
    alone, one = max(alones), max(ours)
    with service_process(directory / "ranks") as service:
        begin_s = time.time() + 3.0
        began = min(in_processes(2, _log_ranks, service.endpoint, RANKS // 2, steps, begin_s))
        total = RANKS * steps
        done = service.wait_for(
            lambda found: (
                found["received_rows"] == total and found["delivered_rows"] == found["outbox_rows"]
            )
        )
    # Of a row's values the step is not counted, here and above.
    values = total * 10 / (done["time_s"] - began)
    conditions = (
        f"offline, rows of ten floats and their step, which is their axis; best of {ROUNDS} runs "
        "each, in turns"
    )
    return [
        Line(
            "rows into W&B",
            f"{one:,.0f} rows/s",
            f"wandb.log alone: {alone:,.0f} rows/s; {one / alone:.2f}, wanted: at least 0.9",
            f"{conditions}; from the first log() until W&B's client has taken all {rows:,}",
            one >= 0.9 * alone,
        ),
        Line(
            f"values of {RANKS} ranks into W&B, merged",
            f"{values:,.0f} values/s",
            f"wandb.log alone: {alone * 10:,.0f} values/s; {values / alone / 10:.1f}x, "
            "wanted: at least 6x",
            f"{RANKS} ranks of {steps:,} steps became {done['outbox_rows']:,} rows, until W&B's "
            "client had taken them",
            values >= 6 * alone * 10,
        ),
    ]
