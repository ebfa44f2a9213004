"""Real xenna pipelines on a real cluster, watched by the hook: both generations of xenna."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cosmos_xenna.pipelines.v1 as pipelines_v1
import psutil
import pytest
import ray
import xenna_cases
from cosmos_xenna.pipelines.private import monitoring
from spec_metrics import PIPELINE_METRICS, STAGE_METRICS
from wandb_file import read_run
from xenna_cases import (
    ORIGINAL,
    BinIdxTokenizationStage,
    DownloadStage,
    PlanStage,
    UnsetStage,
    die,
    drop_odd,
    fail_on_three,
    keep,
    make_hook,
    pack,
    read_records,
    real_pipeline,
    triple,
    work_slowly,
)

import raywb
from raywb.lifecycle import stop_service

pytestmark = [pytest.mark.ray, pytest.mark.xenna]

TESTS = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """Start a cluster for this module, with a home and a directory of its own."""
    home = Path(tempfile.mkdtemp(prefix="rw-", dir="/tmp"))  # short: Ray puts sockets below it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_MAX_LIMIT_FROM_API_SERVER", "40000")
        patch.setenv("RAY_MAX_LIMIT_FROM_DATA_SOURCE", "40000")
        patch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.cloudpickle.register_pickle_by_value(xenna_cases)
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=True,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(home / "ray"),
        )
        yield
        # Some actors of xenna's hold threads that never end, and outlive their cluster.
        processes = psutil.Process().children(recursive=True)
        ray.shutdown()
        for process in psutil.wait_procs(processes, timeout=3)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        ray.cloudpickle.unregister_pickle_by_value(xenna_cases)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(autouse=True)
def _leaves_xenna_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check after each test that nothing is patched any more."""
    # xenna lists actors through Ray's state API, which looks for clusters on the machine, and
    # refuses to choose between several.
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    yield
    assert monitoring.PipelineMonitor._make_stats is ORIGINAL


def metrics_of(path: Path) -> list[dict[str, Any]]:
    """Return the metrics of each record of a file."""
    return [record["metrics"] for record in read_records(path)]


def assert_never_falls(rows: list[dict[str, Any]]) -> None:
    """Check that progress only grows, and inputs only become fewer."""
    progress = [row["progress"] for row in rows]
    assert progress == sorted(progress)
    remaining = [row["num_input_remaining"] for row in rows]
    assert remaining == sorted(remaining, reverse=True)


def test_a_pipeline_is_told_from_its_first_snapshot_to_its_true_last_one(tmp_path: Path) -> None:
    """Each row has every metric; fan-out and dropped samples are counted; the last row is true."""
    path = tmp_path / "stats.jsonl"
    spec = real_pipeline(
        PlanStage(triple),
        DownloadStage(drop_odd),
        BinIdxTokenizationStage(work_slowly),
        num_inputs=12,
        return_last_stage_outputs=True,
    )
    with make_hook(path, interval_s=1) as hook:
        outputs = pipelines_v1.run_pipeline(spec)
    assert sorted(outputs or ()) == list(range(0, 36, 2))
    assert hook.hook_errors == 0
    records = read_records(path)
    assert [record.get("final", False) for record in records[-2:]] == [False, True]
    keys = ("plan_stage", "download_stage", "bin_idx_tokenization_stage")
    expected = PIPELINE_METRICS | {f"stage/{key}/{name}" for key in keys for name in STAGE_METRICS}
    for record in records:
        assert record["stages"] == ["PlanStage", "DownloadStage", "BinIdxTokenizationStage"]
        assert expected <= record["metrics"].keys()
    assert any(f"stage/{key}/speed_tasks_per_s" in r["metrics"] for key in keys for r in records)
    assert_never_falls([record["metrics"] for record in records])
    last = records[-1]["metrics"]
    assert last["progress"] == 100
    assert last["num_input_remaining"] == 0
    assert last["num_outputs"] == 18
    assert [last[f"stage/{key}/tasks_completed"] for key in keys] == [12, 36, 18]
    assert last["hook_errors"] == 0
    assert last["bottleneck_stage"] == hook.bottleneck_stage == keys[2]
    assert [last[f"stage/{key}/resource/actor_count"] for key in keys] == [0, 0, 0]
    working = records[-2]["metrics"]
    assert working["stage/bin_idx_tokenization_stage/resource/actor_count"] == 1
    assert working["stage/bin_idx_tokenization_stage/resource/mem_gb"] > 0
    assert working["cluster/total_cpus"] == 8


@pytest.mark.parametrize(
    ("stage", "error_type", "message"),
    [
        (DownloadStage(fail_on_three), "ValueError", "three is bad"),
        (UnsetStage(keep), "RuntimeError", "no weights here"),
        (DownloadStage(die), "ActorDiedError|RuntimeError", "unexpected"),
    ],
    ids=["in-a-task", "in-set-up", "by-dying"],
)
def test_a_pipeline_that_fails_leaves_the_state_at_failure(
    tmp_path: Path, stage: PlanStage, error_type: str, message: str
) -> None:
    """Nested hooks both tell what was done, which error ended it, and in which stage."""
    spec = real_pipeline(PlanStage(keep), stage, BinIdxTokenizationStage(keep), num_inputs=40)
    paths = [tmp_path / "outer.jsonl", tmp_path / "inner.jsonl"]
    hooks = [make_hook(path, interval_s=1) for path in paths]
    with pytest.raises(Exception, match=message) as caught, hooks[0], hooks[1]:
        pipelines_v1.run_pipeline(spec)
    assert re.search(error_type, type(caught.value).__name__)
    stories = [[record | {"timestamp": 0} for record in read_records(path)] for path in paths]
    assert stories[0] == stories[1]
    records = stories[0]
    error = records[-1]["error"]
    key = "unset_stage" if isinstance(stage, UnsetStage) else "download_stage"
    assert error["type"] in error_type.split("|")
    assert error["stage"] == key
    assert message in error["message"]
    last = records[-1]["metrics"]
    assert records[-1]["final"] is True
    assert last["error_type"] == error["type"]
    assert last["error_stage"] == key
    assert last["progress"] < 100
    done = last["stage/plan_stage/tasks_completed"]
    assert last["num_outputs"] <= last[f"stage/{key}/tasks_completed"] <= min(done, 39)
    assert 0 < last["num_input_remaining"] <= 40 - done
    assert_never_falls([record["metrics"] for record in records])


def test_a_short_pipeline_with_failed_tasks_and_batches_has_a_true_last_row(
    tmp_path: Path,
) -> None:
    """Shorter than one interval: one snapshot, and then all that was done."""
    path = tmp_path / "stats.jsonl"
    spec = real_pipeline(
        PlanStage(fail_on_three),
        DownloadStage(keep, batch_size=4),
        BinIdxTokenizationStage(pack, batch_size=4),
        num_inputs=10,
        interval_s=60,
        ignore_failures=True,
        return_last_stage_outputs=True,
    )
    with make_hook(path, interval_s=1) as hook:
        outputs = pipelines_v1.run_pipeline(spec) or []
    assert sorted(sample for batch in outputs for sample in batch) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    first, last = metrics_of(path)
    assert first["num_input_remaining"] == 10
    assert last["progress"] == 100
    assert last["num_input_remaining"] == 0
    assert last["num_outputs"] == len(outputs)
    assert last["stage/plan_stage/tasks_completed"] == 10
    assert last["stage/plan_stage/tasks_returned_none"] == 1
    assert last["bottleneck_stage"] == hook.bottleneck_stage


def test_pipelines_in_batch_mode_and_at_once_do_not_mix(tmp_path: Path) -> None:
    """One streaming, one in batch mode, in two threads at once; progress is asked for meanwhile."""
    path = tmp_path / "stats.jsonl"
    batch = real_pipeline(
        PlanStage(keep, batch_size=4),
        DownloadStage(work_slowly, batch_size=4),
        num_inputs=10,
        execution_mode=pipelines_v1.ExecutionMode.BATCH,
    )
    streaming = real_pipeline(PlanStage(triple), BinIdxTokenizationStage(work_slowly), num_inputs=5)
    asked: list[Any] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.wait(0.05):
            asked.append(hook.progress())

    with make_hook(path, interval_s=1) as hook:
        asking = threading.Thread(target=ask)
        running = [
            threading.Thread(target=pipelines_v1.run_pipeline, args=(spec,))
            for spec in (batch, streaming)
        ]
        for thread in (asking, *running):
            thread.start()
        for thread in running:
            thread.join()
        is_over.set()
        asking.join()
    assert hook.hook_errors == 0
    for stage, num_inputs, num_outputs in (
        ("DownloadStage", 10, 10),
        ("BinIdxTokenizationStage", 5, 15),
    ):
        mine = [r for r in read_records(path) if r["stages"] == ["PlanStage", stage]]
        rows = [record["metrics"] for record in mine]
        assert [record.get("final", False) for record in mine] == [False] * (len(mine) - 1) + [True]
        assert rows[0]["num_input_remaining"] == num_inputs
        assert_never_falls(rows)
        assert rows[-1]["progress"] == 100
        assert rows[-1]["num_input_remaining"] == 0
        assert rows[-1]["num_outputs"] == num_outputs
    told = [stages for stages in asked if stages]
    assert {stages[0].stage for stages in told} == {"plan_stage"}
    assert any(stages[0].tasks_completed == stages[0].tasks_expected for stages in told)


INTERRUPTED = """
import sys, threading
sys.path[:0] = {paths!r}
import ray
ray.init(address={address!r}, log_to_driver=False)
import xenna_cases
from raywb.xenna import XennaObservabilityConfig, XennaWandbStatsHook
ray.cloudpickle.register_pickle_by_value(xenna_cases)
config = XennaObservabilityConfig(
    wandb_log_pipeline_stats=False,
    pipeline_logging_interval_s=1,
    pipeline_stats_jsonl_path={path!r},
)
hook = XennaWandbStatsHook(observability=config, pipeline_kind="pretrain")

def tell():
    while not (hook.progress() and hook.progress()[1].tasks_completed):
        over.wait(0.05)
    print("WORKING", flush=True)

over = threading.Event()
threading.Thread(target=tell, daemon=True).start()
with hook:
    xenna_cases.pipelines_v1.run_pipeline(
        xenna_cases.real_pipeline(
            xenna_cases.PlanStage(xenna_cases.keep),
            xenna_cases.DownloadStage(xenna_cases.work_slowly),
            num_inputs=500,
        )
    )
"""


def test_an_interrupted_pipeline_leaves_a_true_last_row(tmp_path: Path) -> None:
    """Ctrl-C in the middle: the last row has what was done until then, and says what ended it."""
    path = tmp_path / "stats.jsonl"
    program = INTERRUPTED.format(
        paths=[str(TESTS), str(TESTS.parent)],
        address=ray.get_runtime_context().gcs_address,
        path=str(path),
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with contextlib.ExitStack() as stack:
        stack.callback(driver.kill)
        assert driver.stdout is not None
        drained: list[str] = []  # so that xenna's own lines do not fill the pipe
        reader = threading.Thread(target=lambda: drained.append(driver.stderr.read()))  # type: ignore[union-attr]
        reader.start()
        assert any("WORKING" in line for line in driver.stdout), drained
        driver.send_signal(signal.SIGINT)
        driver.wait(60)
        reader.join(60)
    assert driver.returncode != 0
    assert "KeyboardInterrupt" in drained[0]
    records = read_records(path)
    last = records[-1]["metrics"]
    assert records[-1]["final"] is True
    assert records[-1]["error"]["type"] == last["error_type"] == "KeyboardInterrupt"
    assert records[-1]["error"]["stage"] is None
    assert last["num_outputs"] == last["stage/download_stage/tasks_completed"] >= 1
    assert last["stage/plan_stage/tasks_completed"] >= last["num_outputs"]
    assert 0 < last["progress"] < 100
    assert 0 < last["num_input_remaining"] < 500
    assert_never_falls([record["metrics"] for record in records])


def test_through_the_service_pipelines_share_one_run(tmp_path: Path) -> None:
    """Nested hooks and two pipelines: each row is in the run once, under its pipeline's name."""
    path = tmp_path / "stats.jsonl"
    raywb.start(project="xenna", mode="offline", dir=str(tmp_path / "run"))
    try:
        outer = make_hook(path, interval_s=1, wandb=True, run_hash="abc", dataset_names=["stdlib"])
        with outer, make_hook(interval_s=1, wandb=True, pipeline_kind="inner"):
            for num_inputs in (3, 4):
                spec = real_pipeline(
                    PlanStage(keep), DownloadStage(work_slowly), num_inputs=num_inputs
                )
                pipelines_v1.run_pipeline(spec)
        raywb.finish(timeout_s=60)
    finally:
        stop_service()
    assert outer.hook_errors == 0
    (file,) = (tmp_path / "run").rglob("*.wandb")
    run = read_run(file)
    records = read_records(path)
    first_end = [record.get("final", False) for record in records].index(True) + 1
    for prefix, mine in (
        ("xenna/", records[:first_end]),
        ("xenna/pretrain_2/", records[first_end:]),
    ):
        axis = f"{prefix}pipeline_duration_s"
        rows = [row for row in run.history if f"{prefix}progress" in row]
        for row, record in zip(rows, mine, strict=True):
            for key, value in record["metrics"].items():
                if key != "bottleneck_stage":
                    assert row[prefix + key] == value
        assert rows[-1][f"{prefix}progress"] == 100
        assert run.metrics[f"{prefix}*"].step_metric == axis
        assert run.summary[f"{prefix}bottleneck_stage"] == "download_stage"
        assert run.summary[f"{prefix}run_hash"] == "abc"
        assert run.summary[f"{prefix}dataset_names"] == "stdlib"
