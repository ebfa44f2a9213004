"""Every way in which code runs on a Ray cluster: each row that log() took is in the run, once."""

from __future__ import annotations

import pytest
from ray_cluster import RayCluster
from wandb_file import read_runs

pytestmark = pytest.mark.ray

#: A module, since children of the multiprocessing kinds import it, and must find nothing to run.
WAYS = """
    import asyncio, multiprocessing, os, threading, time
    import ray, raywb
    from msgspec import to_builtins
    from ray_cluster import report, until, without_service

    ROWS = 50

    def log(client, rows=ROWS, first=0):
        for i in range(first, first + rows):
            client.log({"i": i}, step=i)

    def attach_and_log(stage):
        log(raywb.attach(stage))

    @ray.remote(num_cpus=0)
    class Asynchronous:
        async def log(self, number):
            client = raywb.attach("asynchronous")
            for i in range(number * ROWS, (number + 1) * ROWS):
                client.log({"i": i})
                await asyncio.sleep(0)

    @ray.remote(num_cpus=0, max_concurrency=8)
    class Concurrent:
        def __init__(self):
            self.together = threading.Barrier(8)

        def log(self, number):
            self.together.wait(60)
            attach_and_log(f"concurrent_{number}")

    @ray.remote(num_cpus=0)
    class Killed:
        def log(self, stage):
            attach_and_log(stage)

    @ray.remote(num_cpus=0)
    def attach_often(stage):
        for i in range(ROWS):
            with raywb.attach(stage) as client:
                client.log({"i": i})
                client.close()
                client.close()

    @ray.remote(num_cpus=0)
    def given(client):
        return "not refused"

    def main():
        ray.init()
        without_service()
        raywb.start(project="ways")
        client = raywb.attach("driver")
        log(client)

        asynchronous, concurrent, killed = (
            kind.remote() for kind in (Asynchronous, Concurrent, Killed)
        )
        calls = [asynchronous.log.remote(number) for number in range(8)]
        calls += [concurrent.log.remote(number) for number in range(8)]
        calls += [killed.log.remote("killed"), attach_often.remote("often")]

        for kind in ("spawn", "forkserver"):
            child = multiprocessing.get_context(kind).Process(target=attach_and_log, args=[kind])
            child.start()
            child.join()
            assert child.exitcode == 0, kind
        # A forked child cannot use its parent's Ray; what it inherited is enough to log.
        inherited = raywb.attach("fork")
        child = multiprocessing.get_context("fork").Process(target=log, args=[inherited])
        child.start()
        child.join()
        assert child.exitcode == 0

        ray.get(calls)
        ray.kill(killed)
        try:
            ray.get(given.remote(client))
            refusal = "not refused"
        except TypeError as error:
            refusal = f"{error} {error.__cause__}"

        # Ray again in the same process, on the same cluster: the same source goes on.
        ray.shutdown()
        log(client, first=ROWS)
        ray.init()
        log(raywb.attach("driver"), first=2 * ROWS)
        report([refusal, to_builtins(raywb.finish())])

        # What comes after a finish belongs to the next run.
        log(client, first=3 * ROWS)
        client.close()
        client.log({"i": -1})
        lost = client.stats.lost
        raywb.start(project="ways")
        report([lost, to_builtins(raywb.finish())])

    if __name__ == "__main__":
        main()
"""


def test_every_way_to_run_code(cluster: RayCluster) -> None:
    """asyncio and concurrent actors, killed ones, children of every kind, Ray begun again."""
    driver = cluster.driver(WAYS)
    refusal, report = driver.next_report()
    assert "call raywb.attach('driver') there" in refusal
    run = read_runs(report["run"]["dir"])[report["run"]["id"]]
    assert sorted(run.values("asynchronous/i")) == list(range(400))
    for stage in [*(f"concurrent_{number}" for number in range(8)), "killed", "often"]:
        assert run.values(f"{stage}/i") == list(range(50)), stage
    for stage in ("spawn", "forkserver", "fork"):
        assert run.values(f"{stage}/i") == list(range(50)), stage
    assert run.values("driver/i") == list(range(150))
    assert report["received_rows"] == len(run.logged) == 400 + 13 * 50 + 150
    assert (report["complete"], report["lost"]) == (True, {})
    lost, second = driver.next_report()
    later = read_runs(second["run"]["dir"])[second["run"]["id"]]
    assert later.values("driver/i") == list(range(150, 200))
    assert lost == {"after_close": 1}
    assert second["lost"] == lost
    driver.succeed()


def test_a_driver_outside_the_cluster(cluster: RayCluster) -> None:
    """Through Ray Client start, attach, log, status and finish work as they do inside."""
    status, report, journals = cluster.run_driver(
        f"""
        import os
        import ray, raywb
        from msgspec import to_builtins
        from ray_cluster import report

        @ray.remote(num_cpus=0)
        def clear():
            from ray_cluster import without_service
            without_service()

        @ray.remote(num_cpus=0)
        class Worker:
            def log(self):
                client = raywb.attach("inside")
                for i in range(30):
                    client.log({{"i": i}}, step=i)

        # Its server's own process comes up late at times on a busy machine.
        for patience in (2, 1, 0):
            try:
                ray.init("{cluster.client_address}")
                break
            except ConnectionAbortedError:
                if not patience:
                    raise
        ray.get(clear.remote())
        raywb.start(project="outside")
        client = raywb.attach("outside")
        worker = Worker.remote()
        ray.get(worker.log.remote())
        ray.kill(worker)
        for i in range(20):
            client.log({{"i": i}}, step=i)
        assert client.flush()
        status = to_builtins(raywb.status())
        base = client._connection.journal.directory.parent
        report([status, to_builtins(raywb.finish()), str(base)])
        """,
        {"RAY_ADDRESS": ""},
    )
    assert status["run"]["project"] == "outside"
    run = read_runs(report["run"]["dir"])[report["run"]["id"]]
    assert run.values("inside/i") == list(range(30))
    assert run.values("outside/i") == list(range(20))
    assert (report["received_rows"], report["complete"]) == (50, True)
    assert "session_" not in journals, "a driver outside has no place in the cluster's directory"
