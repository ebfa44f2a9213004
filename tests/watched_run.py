"""A run worth looking at: a pipeline, two trainings with ranks, eight nodes, logged for real.

Everything goes the way of a cluster's rows: clients, journals, the service, its ledger, merge and
outbox. Only the values are made up, and the rows' times, which lie within the past hour.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from local_service import LocalService

from raywb.reports import RunInfo
from raywb.service.outbox import Batch, Outbox, OutDefine, OutRow
from raywb.service.state import FILE_NAME, RunState, ServiceState, save_state

#: A name that a browser would run if the page took it for markup.
HOSTILE = "<img src=x onerror=window.hacked=1>"

TRAININGS = ("training/pretrain", "training/sft")
RANKS = 4
STEPS = 400
PIPELINE_STAGES = ("plan_stage", "download_stage", "bin_idx_tokenization_stage", "write_stage")
BOTTLENECK = 2
INPUTS = 6000
NODES = tuple(f"gpu-node-{number}" for number in range(8))
HOUR_S = 3600.0

#: More nodes than the heat map has lines.
MANY_NODES = 180


def log_run(service: LocalService, seed: int = 7) -> None:
    """Log everything into the open run, and wait until it lies in the outbox."""
    print(f"seed {seed}")
    source = random.Random(seed)
    began_s = time.time() - HOUR_S
    clients = []
    rows = 0
    for stage in TRAININGS:
        ranks = [service.client(stage, rank=rank, world_size=RANKS) for rank in range(RANKS)]
        clients += ranks
        ranks[0].define_metric("step_time_s", across_ranks="per_rank")
        for step in range(STEPS):
            at_s = began_s + HOUR_S * step / STEPS
            for rank, client in enumerate(ranks):
                client.log(_training_row(source, step, rank, at_s), step=10 * step)
        rows += STEPS
    alone = service.client()
    clients.append(alone)
    alone.log({HOSTILE: 1.0, f"{HOSTILE}/loss": 2.0, "_timestamp": began_s})
    rows += 1
    pipeline = alone.open_series("xenna", label="pretrain", axis="pipeline_duration_s")
    for row in _pipeline_rows(source, began_s):
        pipeline.log(row)
        rows += 1
    alone.define_metric("nodes/time_s")
    alone.define_metric("nodes/*", step_metric="nodes/time_s")
    for row in _node_rows(source, began_s):
        alone.log(row)
        rows += 1
    for client in clients:
        assert client.flush(30.0)
    service.wait_for(lambda status: status.outbox_rows >= rows)


def _training_row(source: random.Random, step: int, rank: int, at_s: float) -> dict[str, Any]:
    share = step / STEPS
    row = {
        "loss": 2.2 + 6.5 * math.exp(-5 * share) + source.gauss(0, 0.06),
        "grad_norm": 1 + abs(source.gauss(0, 0.4)) + (9 if source.random() < 0.004 else 0),
        "learning_rate": 3e-4 * min(1, 12 * share) * (0.55 + 0.45 * math.cos(math.pi * share)),
        "tokens_per_s": 120_000 + source.gauss(0, 2500),
        "step_time_s": 0.8 + 0.03 * rank + source.gauss(0, 0.01),
        "_timestamp": at_s + 0.01 * rank,
    }
    if step == STEPS // 2:
        row["loss"] = math.nan
    return row


def _pipeline_rows(source: random.Random, began_s: float) -> Iterator[dict[str, Any]]:
    snapshots = 80
    for number in range(snapshots):
        share = 0.62 * (number + 1) / snapshots
        done = [min(INPUTS, int(INPUTS * share * factor)) for factor in (1.6, 1.3, 1.0, 0.98)]
        row: dict[str, Any] = {
            "_timestamp": began_s + 30.0 * number,
            "pipeline_duration_s": 30.0 * number,
            "main_loop_rate_hz": 9.5,
            "progress": round(100 * share, 3),
            "num_input_remaining": INPUTS - done[0],
            "num_outputs": done[-1],
            "inputs_processed_per_s": 2.1 + source.gauss(0, 0.15),
            "outputs_per_s": 1.3 + source.gauss(0, 0.1),
            "bottleneck_stage_index": BOTTLENECK,
            "cluster/total_cpus": 768,
            "cluster/avail_cpus": 96 + source.randrange(24),
        }
        for index, name in enumerate(PIPELINE_STAGES):
            slots = (4, 16, 32, 8)[index]
            used = slots if index == BOTTLENECK else max(1, int(slots * (0.3 + 0.4 * share)))
            waiting = done[index - 1] - done[index] if index else INPUTS - done[0]
            row |= {
                f"stage/{name}/{key}": value
                for key, value in {
                    "actors_target": slots // 2,
                    "actors_ready": slots // 2,
                    "actors_running": used // 2,
                    "actors_idle": (slots - used) // 2,
                    "actors_pending": 2 if index == BOTTLENECK else 0,
                    "tasks_completed": done[index],
                    "tasks_returned_none": 0,
                    "queue_in": waiting // 3,
                    "queue_out": source.randrange(20),
                    "slots_used": used,
                    "slots_empty": slots - used,
                    "speed_tasks_per_s": (2.4, 0.9, 0.18, 1.5)[index] + source.gauss(0, 0.01),
                    "resource/cpu_util_pct": (12, 240, 1580, 60)[index] + source.gauss(0, 6),
                    "resource/mem_gb": (0.4, 8.2, 61.4, 2.2)[index] * (0.6 + 0.4 * share),
                    "resource/actor_count": slots // 2,
                }.items()
            }
        yield row


def _node_rows(source: random.Random, began_s: float) -> Iterator[dict[str, Any]]:
    for number in range(int(HOUR_S / 15)):
        row: dict[str, Any] = {
            "_timestamp": began_s + 15.0 * number,
            "nodes/time_s": 15.0 * number,
            "nodes/alive": len(NODES),
            "nodes/answered": len(NODES),
        }
        sums: dict[str, float] = {}
        for at, node in enumerate(NODES):
            busy = 0.5 + 0.5 * math.sin(number / 22 + at)
            idle = at == 5 and 90 < number < 130
            values = {
                "cpu_percent": 28 + 30 * busy + source.gauss(0, 2),
                "memory_percent": 58 + 6 * busy,
                "gpu_percent": 2.0 if idle else min(100, 74 + 22 * busy + source.gauss(0, 3)),
                "gpu_memory_percent": 86 + 4 * busy,
                "network_sent_mb_per_s": 900 * busy + source.random() * 50,
            }
            for key, value in values.items():
                row[f"nodes/{node}/{key}"] = round(value, 3)
                sums[key] = sums.get(key, 0.0) + value
        row |= {f"nodes/mean/{key}": round(one / len(NODES), 3) for key, one in sums.items()}
        yield row


def log_two_directories(root: Path, *, rows: int) -> None:
    """Two directories, written as a service leaves them; the second one takes a while to read.

    Their runs have the same id, as those of two clusters may that were told one.
    """
    for name, count in (("old", rows), ("new", 50)):
        directory = root / name
        outbox = Outbox(directory / "outbox")
        for begin in range(0, count, 500):
            found = range(begin, min(count, begin + 500))
            items = [
                OutRow(1, 1.7e9 + n, {f"t/v{k}": float(n) for k in range(4)} | {"t/loss": n})
                for n in found
            ]
            outbox.append(Batch(1, begin, [], items))
        outbox.append(Batch(1, count, [], [OutDefine(1, "nodes/*", "nodes/time_s", None)]))
        for n in range(3):
            usage = {f"nodes/n{k}/cpu_percent": k / 2 for k in range(MANY_NODES)}
            row = OutRow(1, 1.7e9 + n, {"nodes/time_s": float(n)} | usage)
            outbox.append(Batch(1, count + n, [], [row]))
        outbox.close()
        info = RunInfo(project="p", id="same0001", name=name, mode="offline", dir=str(directory))
        run = RunState(number=1, info=info, settings={})
        save_state(directory, ServiceState(cluster_id="c" * 56, token="t", runs=[run]))
        written_s = time.time() - (60 if name == "old" else 0)
        os.utime(directory / FILE_NAME, (written_s, written_s))
