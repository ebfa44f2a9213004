"""What log() has taken reaches the run, though its process is killed the moment it returns."""

from __future__ import annotations

import signal

import pytest
from ray_cluster import RayCluster
from wandb_file import read_runs

pytestmark = pytest.mark.ray


def test_rows_of_killed_workers_and_drivers_are_in_the_run(cluster: RayCluster) -> None:
    """Actors, a task and a driver kill themselves after log() returned; no row is missing."""
    killed_driver = cluster.driver("""
        import os, signal
        import ray, raywb
        from ray_cluster import report

        ray.init()
        report(raywb.start(project="killed").id)
        client = raywb.attach("driver")
        for i in range(500):
            client.log({"i": i}, step=i)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    run_id = killed_driver.next_report()
    assert killed_driver.wait() == -signal.SIGKILL

    report, sources, again = cluster.run_driver("""
        import os, signal
        import ray, raywb
        from msgspec import to_builtins
        from ray_cluster import report

        def log_and_die(stage, rows):
            client = raywb.attach(stage)
            for i in range(rows):
                client.log({"i": i}, step=i)
            os.kill(os.getpid(), signal.SIGKILL)

        @ray.remote(num_cpus=0)
        class Worker:
            def log_and_die(self, stage, rows):
                log_and_die(stage, rows)

        ray.init()
        raywb.start(project="killed")
        workers = {rows: Worker.remote() for rows in (1, 10, 20_000)}
        dying = [worker.log_and_die.remote(f"actor_{rows}", rows)
                 for rows, worker in workers.items()]
        task = ray.remote(log_and_die).options(num_cpus=0, max_retries=0)
        dying.append(task.remote("task", 300))
        for reference in dying:
            try:
                ray.get(reference)
            except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError):
                pass
        ended = raywb.finish()
        sources = [to_builtins(source) for source in raywb.status().sources]
        report([to_builtins(ended), sources, to_builtins(raywb.finish())])
    """)
    assert report["run"]["id"] == run_id
    assert (report["received_rows"], report["delivered_rows"]) == (20_811, 20_811)
    assert (report["complete"], report["lost"], again) == (True, {}, report)
    run = read_runs(report["run"]["dir"])[run_id]
    for rows in (1, 10, 20_000):
        assert run.values(f"actor_{rows}/i") == list(range(rows))
    assert run.values("task/i") == list(range(300))
    assert run.values("driver/i") == list(range(500))
    assert len({source["pid"] for source in sources}) == 5
    left = list((cluster.root / "ray").glob("session_2*/raywb/*/*"))
    assert left == [], "journals of dead processes were not cleared away"
