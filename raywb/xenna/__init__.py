"""Metrics of cosmos-xenna pipelines: a hook around `run_pipeline`.

hook = make_xenna_wandb_stats_hook(
    observability=XennaObservabilityConfig(pipeline_stats_jsonl_path="stats.jsonl"),
    pipeline_kind="pretrain",
)
with hook or contextlib.nullcontext():
    pipelines_v1.run_pipeline(spec)

hook.py       the hook, and the one guarded patch on cosmos-xenna
stats.py      a snapshot as plain values: names, progress, bottleneck; pure
pipeline.py   what a pipeline carries from one snapshot to the next
intake.py     how many inputs remain;  tally.py  what stages hand on
watch.py      which hook sees which pipeline
outlets.py    where rows go: the service, a wandb.run, JSONL
"""

from raywb.xenna.hook import (
    StageProgress,
    XennaObservabilityConfig,
    XennaWandbStatsHook,
    make_xenna_wandb_stats_hook,
)

__all__ = [
    "StageProgress",
    "XennaObservabilityConfig",
    "XennaWandbStatsHook",
    "make_xenna_wandb_stats_hook",
]
