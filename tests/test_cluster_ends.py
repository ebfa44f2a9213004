"""Drivers and clusters that end in every way but by finish(), with real Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import RayCluster, clean_environment, driver_alone, until
from wandb_file import WandbRun, read_runs

pytestmark = pytest.mark.ray

#: Begins with what a driver needs to log from itself and from workers, noting what returned.
LOGGING = """
    import os, pathlib, signal, sys, time
    import ray, raywb
    from msgspec import to_builtins
    from ray_cluster import report, told, until, without_service

    def log(stage, rows, pause_s=0.0):
        client = raywb.attach(stage)
        noted = os.open(stage, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        i = 0
        while i < rows or rows < 0:
            client.log({"i": i}, step=i)
            os.write(noted, b".")
            i += 1
            time.sleep(pause_s)
        return client
"""


def run_of(info: dict[str, Any]) -> WandbRun:
    """What W&B's files hold of a run, which is nothing before there are any."""
    return read_runs(info["dir"]).get(info["id"], WandbRun())


def check_rows(run: WandbRun, stage: str, logged: int) -> None:
    """Each row whose log() had returned, once and in order; one more may have been written."""
    values = run.values(f"{stage}/i")
    assert values == list(range(len(values))), stage
    assert len(values) in (logged, logged + 1), stage


def test_a_whole_cluster_is_killed_and_recovered() -> None:
    """Every process killed in the middle of logging: `raywb recover` brings every row to W&B."""
    with RayCluster.start(num_cpus=4) as cluster:
        driver = cluster.driver(f"""{LOGGING}
    directory = os.getcwd()

    @ray.remote(num_cpus=0)
    class Worker:
        def log(self, stage):
            os.chdir(directory)
            log(stage, -1, 0.0005)

    ray.init()
    run = raywb.start(project="killed")
    workers = [Worker.remote() for _ in range(3)]
    for number, worker in enumerate(workers):
        worker.log.remote(f"worker_{{number}}")
    report(to_builtins(run))
    log("driver", -1, 0.0005)
""")
        info = driver.next_report()
        stages = ["driver", *(f"worker_{number}" for number in range(3))]
        noted = {stage: driver.directory / stage for stage in stages}

        def at_work() -> bool:
            return all(path.exists() and path.stat().st_size > 1000 for path in noted.values())

        until("all to log", at_work)
        time.sleep(1.0)
        cluster.kill()
        logged = {stage: path.stat().st_size for stage, path in noted.items()}
        print(logged)
        report = recover(cluster, Path(info["dir"]))
        run = run_of(info)
        for stage, rows in logged.items():
            check_rows(run, stage, rows)
        assert run.steps == list(range(len(run.history)))
        assert (run.damaged, run.exit_code) == (0, None)
        assert run.summary["driver/i"] == run.values("driver/i")[-1]
        assert report["ledger_rows"] == len(run.logged)
        assert (report["journals"], report["unconfirmed"]) == (4, [])
        assert [one["state"] for one in report["runs"]] == ["crashed"]
        assert [one["lost"] for one in report["runs"]] == [{}]
        assert recover(cluster, Path(info["dir"]))["runs"] == []


def recover(cluster: RayCluster, directory: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "raywb", "recover", str(directory), "--json"],
        env=clean_environment(cluster.home),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_how_a_driver_ends_on_a_cluster_that_was_there(cluster: RayCluster) -> None:
    """Raising: failed. Killed: crashed, rows there. With another job attached: the run goes on."""
    raising = cluster.driver(f"""{LOGGING}
    ray.init()
    without_service()
    report(to_builtins(raywb.start(project="raising")))
    log("driver", 200)
    raise RuntimeError("as the test asked")
""")
    info = raising.next_report()
    assert raising.wait() == 1
    until("the run to end", lambda: run_of(info).exit_code is not None)
    check_rows(run_of(info), "driver", 200)
    assert run_of(info).exit_code == 1

    killed = cluster.driver(f"""{LOGGING}
    ray.init()
    report(to_builtins(raywb.start(project="killed")))
    log("driver", 200)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    info = killed.next_report()
    assert killed.wait() == -signal.SIGKILL
    second = cluster.driver(f"""{LOGGING}
    ray.init()
    until("the run to be left", lambda: raywb.status().sink.state == "resting")
    report(True)
    client = log("second", 200)
    assert client.flush()
    until("the run to be back", lambda: raywb.status().sink.applied_rows >= 400)
    report(to_builtins(raywb.finish()))
""")
    assert second.next_report()
    check_rows(run_of(info), "driver", 200)
    assert run_of(info).exit_code is None
    report = second.succeed()
    assert (report["run"]["id"], report["state"]) == (info["id"], "finished")
    check_rows(run_of(info), "second", 200)
    assert run_of(info).exit_code == 0

    first = cluster.driver(f"""{LOGGING}
    ray.init()
    report(to_builtins(raywb.start(project="shared")))
    log("driver", 200)
    told()
    os.kill(os.getpid(), signal.SIGKILL)
""")
    info = first.next_report()
    other = cluster.driver(f"""{LOGGING}
    ray.init()
    client = log("other", 200)
    assert client.flush()
    report(True)
    told()
    for i in range(200, 300):
        client.log({{"i": i}}, step=i)
    assert client.flush()
    time.sleep(4)  # longer than a dead owner's run is left alone
    until("rows at W&B", lambda: raywb.status().sink.applied_rows >= 300)
    assert raywb.status().sink.state == "running", raywb.status()
    report(to_builtins(raywb.finish()))
""")
    assert other.next_report()
    first.tell()
    assert first.wait() == -signal.SIGKILL
    other.tell()
    report = other.succeed()
    assert (report["run"]["id"], report["delivered_rows"]) == (info["id"], 500)
    run = run_of(info)
    check_rows(run, "driver", 200)
    check_rows(run, "other", 300)
    assert (len(run.segments), run.exit_code) == (1, 0)


@pytest.mark.parametrize(
    ("ending", "exit_code", "state"),
    [("raise RuntimeError('as the test asked')", 1, "failed"), ("pass", 0, "finished")],
    ids=["raising", "ending"],
)
def test_a_local_cluster_ends_with_its_driver(ending: str, exit_code: int, state: str) -> None:
    """The driver that started the cluster ends without finish(): the run is whole, and ended."""
    script = f"""{LOGGING}
    import psutil
    psutil.process_iter = lambda *_, **__: iter(())  # other people's clusters are not for this test
    run = raywb.start(project="local", local_cluster=True)
    report(to_builtins(run))
    ray.get(ray.remote(num_cpus=0)(lambda: log("task", 100) and None).remote())
    log("driver", 200)
    {ending}
"""
    with driver_alone(script) as driver:
        info = driver.next_report()
        assert driver.wait() == exit_code, driver.output
        run = run_of(info)
        check_rows(run, "driver", 200)
        check_rows(run, "task", 100)
        assert run.exit_code == int(state == "failed")
        assert os.path.exists(info["dir"])
