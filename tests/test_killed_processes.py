"""Whoever is killed, each row that log() took is in the W&B run once, in its source's order.

Workers and drivers kill themselves the moment log() has returned. Then several processes log
without a pause while the service, the sink or wandb-core is killed at moments drawn from a seed,
which a failure shows. ``RAYWB_LONG=1`` makes many more rounds.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from child_processes import signal_all
from ray_cluster import Driver, RayCluster, until
from wandb_file import WandbRun, read_run, read_runs

pytestmark = pytest.mark.ray

# Read here, since each test runs without such variables.
LONG = bool(os.environ.get("RAYWB_LONG"))
SEED = os.environ.get("RAYWB_SEED")

#: Who writes to W&B: our child process, and W&B's own.
SINK, CORE = "raywb.service.wandb_sink", "wandb-core"


def test_rows_of_killed_workers_and_drivers_are_in_the_run(cluster: RayCluster) -> None:
    """Actors, a task and a driver kill themselves after log() returned; no row is missing."""
    killed_driver = cluster.driver("""
        import os, signal
        import ray, raywb
        from ray_cluster import report, without_service

        ray.init()
        without_service()
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
        workers = {rows: Worker.remote() for rows in (1, 10, 5_000)}
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
    assert (report["received_rows"], report["delivered_rows"]) == (5_811, 5_811)
    assert (report["complete"], report["lost"], again) == (True, {}, report)
    run = read_runs(report["run"]["dir"])[run_id]
    for rows in (1, 10, 5_000):
        assert run.values(f"actor_{rows}/i") == list(range(rows))
    assert run.values("task/i") == list(range(300))
    assert run.values("driver/i") == list(range(500))
    assert len({source["pid"] for source in sources}) == 5
    left = list((cluster.root / "ray").glob("session_2*/raywb/*/*/lock"))
    assert left == [], "journals of dead processes were not cleared away"


#: In each round: begin streams, be told that all is killed, end the streams, finish.
STREAMS = """
    import threading, time
    import ray, raywb
    from msgspec import to_builtins
    from ray_cluster import report, told, without_service

    PAUSE_S = 0.004

    class Stream:
        def begin(self, stage):
            self.client = raywb.attach(stage)
            self.going, self.rows, self.slowest_s, self.error = True, 0, 0.0, None
            self.thread = threading.Thread(target=self.log)
            self.thread.start()

        def log(self):
            try:
                while self.going:
                    began = time.perf_counter()
                    self.client.log({"i": self.rows}, step=self.rows)
                    self.slowest_s = max(self.slowest_s, time.perf_counter() - began)
                    self.rows += 1
                    time.sleep(PAUSE_S)
            except Exception as error:
                self.error = repr(error)

        def end(self):
            self.going = False
            self.thread.join()
            return {"rows": self.rows, "slowest_s": self.slowest_s, "error": self.error}

    def burst(rows):
        client = raywb.attach("burst")
        for i in range(rows):
            client.log({"i": i}, step=i)
        return {"rows": rows, "slowest_s": 0.0, "error": None}

    ray.init()
    without_service()
    workers = [ray.remote(num_cpus=0)(Stream).remote() for _ in range(3)]
    while (rows := told()) is not None:
        run = raywb.start(project="streams", sink_deadline_s=30.0)
        mine = Stream()
        mine.begin("driver")
        bursted = burst(rows)
        ray.get([worker.begin.remote(f"worker_{n}") for n, worker in enumerate(workers)])
        report(to_builtins(run))
        told()
        # Whoever attaches while the service is away waits for it, and gets the same run.
        late = raywb.attach("late")
        late.log({"i": 0})
        told()
        streams = {f"worker_{n}": ray.get(worker.end.remote())
                   for n, worker in enumerate(workers)}
        streams["driver"] = mine.end()
        if rows:
            streams["burst"] = bursted
        report(streams)
        report([late.run.id, to_builtins(raywb.finish(timeout_s=120))])
        report(to_builtins(raywb.status()))
"""


@pytest.fixture
def dice() -> Iterator[random.Random]:
    """Random numbers from a seed that a failing test shows; ``RAYWB_SEED`` repeats it."""
    seed = int(SEED or random.SystemRandom().randrange(2**32))
    print(f"RAYWB_SEED={seed}")
    return random.Random(seed)


class Round:
    """One run in which something is killed."""

    def __init__(self, cluster: RayCluster, driver: Driver, burst_rows: int = 0) -> None:
        self.cluster = cluster
        self.driver = driver
        driver.tell(burst_rows)
        self.run: dict[str, Any] = driver.next_report()

    def wait_for_rows(self, segments: int = 1) -> None:
        """Wait until W&B's so-manieth file has rows of this run: what is killed is at work."""

        def found() -> bool:
            run = read_runs(self.run["dir"]).get(self.run["id"])
            if run is None or len(run.segments) < segments:
                return False
            return bool(read_run(run.segments[-1]).history)

        until("rows in W&B's file", found)

    def kill_service(self) -> None:
        """SIGKILL, and wait until Ray has started it again."""
        service = until("the service", self.cluster.service)
        service.kill()
        until("the service to come back", lambda: self._other_service(service))

    def _other_service(self, dead: psutil.Process) -> bool:
        service = self.cluster.service()
        return service is not None and service != dead

    def kill(self, name: str) -> None:
        """SIGKILL each process of that name, of which there is at least one."""
        signal_all(until(name, lambda: self.cluster.processes(name)), signal.SIGKILL)

    def killed(self) -> None:
        """What this round kills at once is killed: another client attaches."""
        self.driver.tell()

    def end(self, during_finish: Callable[[], None] | None = None) -> None:
        """End the streams and the run, and check that every row is there once."""
        self.driver.tell()
        streams = self.driver.next_report()
        if during_finish:
            during_finish()
        late_run_id, report = self.driver.next_report()
        status = self.driver.next_report()
        slowest = max(stream["slowest_s"] for stream in streams.values())
        rows = {stage: stream["rows"] for stage, stream in streams.items()} | {"late": 1}
        print(f"{self.run['id']}: {rows}, slowest log() {slowest * 1e3:.1f} ms,")
        run = read_runs(report["run"]["dir"])[self.run["id"]]
        segments = [len(read_run(path).history) for path in run.segments]
        print(f"  rows of W&B's files {segments},")
        print(f"  incarnation {status['incarnation']}, sink {status['sink']}")
        assert [stream["error"] for stream in streams.values()] == [None] * len(streams)
        assert report["run"]["id"] == late_run_id == self.run["id"]
        assert report["run"]["group"] == self.run["group"]
        assert (report["complete"], report["message"], report["lost"]) == (True, None, {})
        assert report["received_rows"] == report["delivered_rows"] == sum(rows.values())
        check_rows(run, rows)
        assert run.group == self.run["group"]


def check_rows(run: WandbRun, rows: dict[str, int]) -> None:
    """Every row once, in order within each source, and W&B's steps without a gap."""
    for stage, count in rows.items():
        assert run.values(f"{stage}/i") == list(range(count)), stage
    assert run.steps == list(range(len(run.history)))
    assert len(run.logged) == sum(rows.values())
    assert (run.damaged, run.exit_code) == (0, 0)
    ended = [read_run(path).exit_code for path in run.segments[:-1]]
    assert ended == [None] * len(ended), "a sink that lost its service ended the run"


@pytest.fixture(scope="module")
def streaming(cluster: RayCluster) -> Iterator[Driver]:
    """A driver and its workers, for all rounds of this module."""
    driver = cluster.driver(STREAMS)
    yield driver
    driver.tell(None)
    driver.succeed()


#: How often the service is killed in each round, and whether its finish is among that.
KILLS = [(1, False), (2, False), (1, True)] * 7 if LONG else [(1, False), (2, True)]


@pytest.mark.timeout(1800 if LONG else 300)
def test_the_service_is_killed(cluster: RayCluster, streaming: Driver, dice: random.Random) -> None:
    """The service comes back by itself with the same run and group, and loses and repeats nothing.

    It is killed while rows stream, twice in a row, and while a finish is under way.
    """
    for number, (kills, in_finish) in enumerate(KILLS):
        # In some rounds the sink has more than it can write when the service is killed; in the
        # others it may still be opening the run.
        has_burst = number % len(set(KILLS)) == 0
        this = Round(cluster, streaming, burst_rows=8000 if has_burst else 0)
        if has_burst:
            this.wait_for_rows()
        time.sleep(dice.uniform(0.0, 2.0))
        until("the service", cluster.service).kill()
        this.killed()
        if kills == 2:
            until("the service to come back", cluster.service)
            time.sleep(dice.uniform(0.0, 2.0))
            this.kill_service()
        if in_finish:
            time.sleep(dice.uniform(0.0, 2.0))
            until("the service", cluster.service)
            moment = dice.uniform(0.0, 1.0)

            def kill_in_finish(this: Round = this, moment: float = moment) -> None:
                time.sleep(moment)
                this.kill_service()

            this.end(kill_in_finish)
        else:
            this.end()


#: Who is killed in each round; several at once, or each when the one before was replaced.
VICTIMS = [[SINK], [CORE], [SINK, CORE]] * 6 if LONG else [[SINK, CORE]]


@pytest.mark.timeout(1800 if LONG else 300)
def test_the_writer_to_wandb_is_killed(
    cluster: RayCluster, streaming: Driver, dice: random.Random
) -> None:
    """A sink that dies, or loses W&B's own process, is replaced behind the last row in the file."""
    for victims in VICTIMS:
        this = Round(cluster, streaming)
        for killed, victim in enumerate(victims):
            if not LONG or not killed:
                this.wait_for_rows(segments=killed + 1)
                time.sleep(dice.uniform(0.0, 2.0))
            this.kill(victim)
        this.killed()
        this.end()
