"""Stages, pipelines and monitors for the tests of the xenna hook: xenna's own classes throughout.

`real_pipeline` is a specification for `run_pipeline`, which needs a cluster. `Monitored` is a real
`PipelineMonitor` with real actor pools that needs none: its pools have no actors, and tasks are
finished by hand, as `ActorPool._process_completed_task` does it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cosmos_xenna.pipelines.v1 as pipelines_v1
import pytest
from cosmos_xenna.pipelines.private import monitoring, monitoring_types, resources
from cosmos_xenna.ray_utils import actor_pool, stage, stage_worker

from raywb.xenna import XennaObservabilityConfig, XennaWandbStatsHook

Samples = list[Any]

#: xenna's own method, before any hook.
ORIGINAL = monitoring.PipelineMonitor._make_stats


class PlanStage(pipelines_v1.Stage[Any, Any]):
    """Passes on what its function makes of a batch."""

    def __init__(self, function: Callable[[Samples], Samples | None], batch_size: int = 1) -> None:
        self._function = function
        self._batch_size = batch_size

    @property
    def stage_batch_size(self) -> int:
        """Samples per task."""
        return self._batch_size

    @property
    def required_resources(self) -> pipelines_v1.Resources:
        """Half a CPU, so that many stages fit."""
        return pipelines_v1.Resources(cpus=0.5)

    def process_data(self, in_data: Samples) -> Samples | None:
        """Call the function."""
        return self._function(in_data)


class DownloadStage(PlanStage):
    """The same under another name."""


class BinIdxTokenizationStage(PlanStage):
    """The same under the name of a recipe's stage."""


class UnsetStage(PlanStage):
    """A stage whose actors cannot be set up."""

    def setup(self, worker_metadata: pipelines_v1.WorkerMetadata) -> None:
        """Fail."""
        raise OSError("no weights here")


def keep(samples: Samples) -> Samples:
    """Pass everything on."""
    return samples


def triple(samples: Samples) -> Samples:
    """Make three of each."""
    return [3 * sample + part for sample in samples for part in range(3)]


def drop_odd(samples: Samples) -> Samples:
    """Pass even numbers on: an empty list is how a xenna stage drops a sample."""
    return [sample for sample in samples if sample % 2 == 0]


def pack(samples: Samples) -> Samples:
    """Make one of all."""
    return [samples]


def fail_on_three(samples: Samples) -> Samples:
    """Raise for the sample 3."""
    if 3 in samples:
        raise ValueError("three is bad")
    return samples


def die(samples: Samples) -> Samples:
    """End the actor's process."""
    os._exit(3)


def work_slowly(samples: Samples) -> Samples:
    """Take a while over each batch."""
    time.sleep(0.2)
    return samples


def real_pipeline(
    *stages: PlanStage, num_inputs: int, interval_s: float = 1, **config: Any
) -> pipelines_v1.PipelineSpec:
    """Return a pipeline of one worker per stage over the numbers from 0."""
    return pipelines_v1.PipelineSpec(
        list(range(num_inputs)),
        [pipelines_v1.StageSpec(stage_, num_workers=1) for stage_ in stages],
        pipelines_v1.PipelineConfig(logging_interval_s=interval_s, **config),
    )


class Monitored:
    """A pipeline whose stages are real pools without actors, and its real monitor."""

    def __init__(
        self,
        *names: str,
        num_inputs: int,
        batch_sizes: Sequence[int] = (),
        interval_s: float = 30,
    ) -> None:
        sizes = batch_sizes or [1] * len(names)
        self.pools = [
            _make_pool(f"Stage {index:02d} - {name}", size)
            for index, (name, size) in enumerate(zip(names, sizes, strict=True))
        ]
        self.num_inputs = num_inputs
        self.queues = [0] * len(names)
        self.monitor = monitoring.PipelineMonitor(interval_s, num_inputs, self.pools)
        self.monitor.open()

    def finish_tasks(
        self, index: int, count: int, *, returns: int = 1, is_none: bool = False, busy_s: float = 1
    ) -> None:
        """Let a stage finish tasks, each of which returns so many samples."""
        pool = self.pools[index]
        timing = stage_worker.TimingInfo(process_start_time_s=1.0, process_end_time_s=1.0 + busy_s)
        for _ in range(count):
            pool._task_result_metadatas.append(
                stage_worker.TaskResultMetadata(
                    timing,
                    stage_worker.FailureInfo(
                        should_process_further=not is_none, should_restart_worker=False
                    ),
                    stage_worker.TaskDataInfo(8),
                    returns,
                )
            )
            pool._num_completed_tasks += 1
            pool._num_null_tasks += int(is_none)
            pool._num_dynamically_spawned_tasks += max(0, returns - pool._params.stage_batch_size)

    def queue_tasks(self, index: int, *sizes: int) -> None:
        """Let a task of each of these sizes wait in a stage."""
        queue = self.pools[index]._task_queue
        queue.extend(actor_pool.Task([None] * size, None) for size in sizes)

    def stop(self) -> None:
        """Stop the pools, which forget what is queued in them."""
        for pool in self.pools:
            pool.stop()

    def snapshot(self, left: int) -> monitoring_types.PipelineStats:
        """Let xenna take a snapshot while so many inputs are left."""
        records = []
        for pool in self.pools:
            records.append(list(pool.task_extra_data))
            pool.task_extra_data.clear()
        return self.monitor._make_stats(left, list(self.queues), records)


def _make_pool(name: str, batch_size: int) -> actor_pool.ActorPool[Any, Any]:
    shape = resources.Resources(cpus=1.0).to_worker_shape(resources.ClusterResources({}))
    params = stage.Params(shape=shape, stage_batch_size=batch_size, name=name)
    ports = actor_pool.ClusterPortRegistry()
    return actor_pool.ActorPool(None, ports, None, params, name)


class _NoNodes:
    """Stands for the actors that watch the nodes of a cluster."""

    def update(self) -> dict[str, Any]:
        return {}

    def stop(self) -> None:
        return


@contextmanager
def no_cluster() -> Iterator[None]:
    """Let monitors take snapshots without a cluster: its resources are two CPUs, one in use."""
    total = monitoring_types.Resources(2.0, 0.0, 8e9, 1e9)
    available = monitoring_types.Resources(1.0, 0.0, 6e9, 1e9)
    cluster = monitoring_types.RayClusterInfo(total, available, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitoring, "RayResourceMonitor", _NoNodes)
        patch.setattr(monitoring, "make_ray_cluster_info", lambda: cluster)
        patch.setattr(monitoring, "get_ray_actors", list)
        yield


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def final_metrics(path: Path) -> dict[str, Any]:
    """Return the metrics of the only final record."""
    (final,) = [record for record in read_records(path) if record.get("final")]
    metrics: dict[str, Any] = final["metrics"]
    return metrics


def make_hook(path: Path | None = None, **options: Any) -> XennaWandbStatsHook:
    """Return a hook that writes JSONL only, unless told otherwise."""
    config = XennaObservabilityConfig(
        wandb_log_pipeline_stats=options.pop("wandb", False),
        pipeline_logging_interval_s=options.pop("interval_s", 30),
        pipeline_stats_jsonl_path=str(path) if path else None,
    )
    kind = options.pop("pipeline_kind", "pretrain")
    return XennaWandbStatsHook(observability=config, pipeline_kind=kind, **options)


def run_to_the_end(pipeline: Monitored) -> None:
    """Take the first snapshot, as xenna does, then do all the work in one-to-one tasks."""
    pipeline.snapshot(pipeline.num_inputs)
    for index in range(len(pipeline.pools)):
        pipeline.finish_tasks(index, pipeline.num_inputs)
    pipeline.stop()
