"""Ranks that hang are named in the status: behind, stopped, or all of them together."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
from local_service import CLUSTER, LocalService, local_service
from ray_cluster import RayCluster, until
from rich.console import Console
from test_ranks import Ranks

from raywb.client import Client
from raywb.reports import StageStatus, Status
from raywb.rows import Channel, End, EndChannel, Row
from raywb.service import rank_status
from raywb.service.ingest import KeepAlives
from raywb.service.pace import Pace
from raywb.view.terminal import render_status


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of tens of them."""
    monkeypatch.setattr(rank_status, "LAG_S", 0.5)
    monkeypatch.setattr(rank_status, "STALL_S", 1.0)
    monkeypatch.setattr(rank_status, "ATTACH_S", 0.5)


def ranks(service: LocalService, *numbers: int, world_size: int) -> list[Client]:
    return [service.client("train", rank=rank, world_size=world_size) for rank in numbers]


def stage(status: Status) -> StageStatus:
    (found,) = status.stages
    return found


def text_of(status: Status) -> str:
    console = Console(width=240, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_status(status))
    return console.export_text()


def log_until(service: LocalService, clients: list[Client], first: int, condition) -> Status:
    """Let clients log further steps until the status is as expected."""
    deadline = time.monotonic() + 30
    step = first
    while not condition(status := service.status()):
        assert time.monotonic() < deadline, status.stages
        for client in clients:
            client.log({"loss": 1.0}, step=step)
        step += 1
        time.sleep(0.1)
    return status


@pytest.mark.usefixtures("quick")
def test_a_rank_that_falls_silent_is_named(service: LocalService) -> None:
    """While others go on, with its process, its step, and how far the furthest is."""
    service.up()
    service.start()
    clients = ranks(service, 0, 1, 2, world_size=3)
    for step in range(3):
        for client in clients:
            client.log({"loss": 1.0}, step=step)
    status = log_until(
        service, clients[:2], 3, lambda s: any("nothing" in one for one in s.warnings)
    )
    (slow,) = stage(status).slow
    assert (slow.rank, slow.step, stage(status).slow_ranks) == (2, 2, 1)
    assert slow.pid
    assert slow.silent_s >= 0.5
    assert stage(status).step > 3
    (warning,) = status.warnings
    assert "train: rank 2" in warning
    assert "at step 2 logged nothing for" in warning
    assert "3 of 3" in text_of(status)
    assert warning in text_of(status)
    assert json.loads(msgspec.json.encode(status))["stages"][0]["slow"][0]["rank"] == 2
    clients[2].log({"loss": 1.0}, step=10_000)
    service.wait_for(lambda s: 2 not in [one.rank for one in s.stages[0].slow])


@pytest.mark.usefixtures("quick")
def test_ranks_that_hang_together_are_told(service: LocalService) -> None:
    """No row for much longer than a step took; after close() it is no trouble."""
    service.up()
    service.start()
    clients = ranks(service, 0, 1, world_size=2)
    for step in range(4):
        for client in clients:
            client.log({"loss": 1.0}, step=step)
            client.flush()
    status = service.wait_for(lambda s: bool(s.warnings))
    assert stage(status).slow == []
    assert "train: no rank has logged for" in status.warnings[0]
    assert "all are at step 3" in status.warnings[0]
    for client in clients:
        client.close()
    status = service.wait_for(lambda s: bool(s.stages) and s.stages[0].ended == 2)
    assert status.warnings == []
    assert "2 of 2, 2 ended" in text_of(status)


def test_two_jobs_in_one_stage_are_told(service: LocalService, tmp_path: Path) -> None:
    """While both come further; who takes over from a job that is done is no trouble."""
    jobs = [CLUSTER._replace(session_dir=str(tmp_path), job_id=f"{n:08x}") for n in (1, 2)]
    service.up()
    service.start()
    one, other = (service.client("train", rank=0, world_size=1, cluster=job) for job in jobs)
    one.log({"loss": 1.0}, step=0)
    assert one.flush(20.0)
    other.log({"loss": 2.0}, step=0)
    status = service.wait_for(lambda s: bool(s.stages) and s.stages[0].step == 0)
    assert status.warnings == []
    status = log_until(service, [one, other], 1, lambda s: bool(s.warnings))
    assert "train: two jobs log to it at the same time" in status.warnings[0]
    assert stage(status).attached == 1
    one.close()
    service.wait_for(lambda s: not s.warnings)


@pytest.mark.usefixtures("quick")
def test_a_rank_that_never_comes_is_named(service: LocalService) -> None:
    """Others have logged for a while, and it has not even attached."""
    service.up()
    service.start()
    (client,) = ranks(service, 1, world_size=2)
    client.log({"loss": 1.0}, step=0)
    client.flush()
    status = service.wait_for(lambda s: bool(s.warnings))
    assert [(one.rank, one.reason) for one in stage(status).slow] == [(0, "has not attached")]
    assert (stage(status).attached, stage(status).world_size) == (1, 2)


@pytest.mark.usefixtures("quick")
def test_the_end_survives_a_restart(service: LocalService) -> None:
    """A service that was started again knows who is done, and calls nobody hanging for its own
    absence."""
    service.up()
    service.start()
    one, other = ranks(service, 0, 1, world_size=2)
    for step in range(4):
        one.log({"loss": 1.0}, step=step)
        other.log({"loss": 1.0}, step=step)
    one.close()
    other._connection.close(5.0)
    service.wait_for(lambda s: bool(s.stages) and s.stages[0].ended == 2)
    service.down()
    service.up()
    status = service.wait_for(lambda s: bool(s.stages))
    assert (stage(status).ended, status.warnings) == (2, [])


@pytest.mark.usefixtures("quick")
def test_a_new_run_knows_nothing_of_ranks_before_it(tmp_path: Path, monkeypatch) -> None:
    """Stages of the run before are not among those of the next, nor is a finished run's."""
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path) as service:
        service.up()
        service.start()
        for client in ranks(service, 0, 1, world_size=2):
            client.log({"loss": 1.0}, step=1)
            client.flush()
        service.wait_for(lambda s: bool(s.stages))
        assert service.service is not None
        service.service.finish(60.0, 0)
        assert service.status().stages == []
        service.start()
        assert service.status().stages == []


def test_the_pace_of_a_stage() -> None:
    """The front moves with the furthest rank; the first interval is not a step's usual time."""
    pace = Pace()
    assert (pace.step_s, pace.passed_at(0)) == (None, None)
    for rank, step, at in [(0, 1, 0.0), (1, 1, 0.5), (0, 2, 90.0), (1, 2, 91.0)]:
        pace.note(rank, step, at)
    assert pace.step_s is None
    pace.note(0, 3, 92.0)
    assert pace.step_s == 90.0
    for step in range(4, 20):
        pace.note(0, step, 92.0 + step)
    assert pace.step_s == 1.0
    assert pace.heard == {0: 111.0, 1: 91.0}
    assert pace.passed_at(2) == 92.0
    assert pace.passed_at(18.5) == 111.0
    assert pace.passed_at(19) is None
    assert pace.passed_at(None) == 0.0


class Service:
    """A merge and its ranks at times of the test's own, with the real thresholds."""

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.killed: set[str] = set()
        self.silent: set[str] = set()

    def log(self, sources: Iterable[str], step: float, channel: int = 0) -> None:
        for source_id in sources:
            self.ranks.send(source_id, Row(channel, self.ranks.now_s, step, {"x": 1}))

    def go_on(self, sources: Collection[str], steps: range, every_s: float) -> None:
        """Each logs the steps, one after the other."""
        for step in steps:
            self.ranks.now_s += every_s
            self.log(sources, step)

    def status(self, stage: str = "t") -> StageStatus:
        now_s, merge = self.ranks.now_s, self.ranks.merge
        delivery = SimpleNamespace(
            merge=merge, began_s=-1000.0, liveness=SimpleNamespace(killed=self.killed)
        )
        heard = {one: now_s - 1000.0 * (one in self.silent) for one in merge.sources}
        ingest = SimpleNamespace(heard=heard, keep_alive_s=10.0, pace_s=0.25, silence_s=30.0)
        runs = SimpleNamespace(stages=SimpleNamespace(status=lambda: []))
        found: Any = rank_status.stage_statuses(delivery, ingest, runs, "r", now_s)  # type: ignore[arg-type]
        return next(one for one in found if one.stage == stage)

    def named(self) -> list[tuple[int, str]]:
        return [(one.rank, one.reason) for one in self.status().slow]


def test_a_rank_that_hangs_in_fast_steps_is_named() -> None:
    """At ten steps a second, too, and for as long as it hangs."""
    service = Service()
    rank = service.ranks.join(0, 1, 2, world_size=3)
    service.go_on(rank.values(), range(100), 0.1)
    service.go_on([rank[0], rank[1]], range(100, 190), 0.1)
    assert service.named() == []
    service.go_on([rank[0], rank[1]], range(190, 220), 0.1)
    assert service.named() == [(2, "logged nothing for 12 s")]
    service.go_on([rank[0], rank[1]], range(220, 3000), 0.1)
    assert service.named() == [(2, "logged nothing for 290 s")]
    # One that logs on, but far behind.
    service.log([rank[2]], 2800)
    assert service.named() == [(2, "is 19 s behind the first")]


def test_the_second_long_pause_is_no_alarm() -> None:
    """As of a validation: the stage has made such a pause before, many steps ago."""
    service = Service()
    rank = service.ranks.join(0, 1)
    service.go_on(rank.values(), range(10), 1.0)
    service.ranks.now_s += 30.0
    assert "hang together" in str(service.status().warning)
    service.go_on(rank.values(), range(10, 500), 1.0)
    service.ranks.now_s += 40.0
    assert service.status().warning is None
    service.ranks.now_s += 30.0
    assert "where a step took 2" in str(service.status().warning)


@pytest.mark.parametrize("ranks", [True, False], ids=["with ranks", "of one process"])
def test_a_stage_waits_while_its_processes_log_another(ranks: bool) -> None:
    """A validation that takes long is no alarm as long as anything is logged in it."""
    service = Service()
    rank = service.ranks.join(0, 1)
    service.go_on(rank.values(), range(10), 1.0)
    for number in (0, 1):
        service.ranks.send(
            rank[number], Channel(1, "val", *((number, 2) if ranks else (None, None)))
        )
    for step in range(10):
        service.ranks.now_s += 10.0
        service.log([rank[0]], step, channel=1)
        assert service.status().warning is None
    service.ranks.now_s += 31.0
    assert "no rank has logged for 131 s" in str(service.status().warning)


def test_a_rank_that_attached_and_logs_nothing_is_named_for_a_while() -> None:
    """From its attach, not the service's start; and not for ever, since only one may log."""
    service = Service()
    rank = service.ranks.join(0, 1)
    service.go_on([rank[0]], range(9), 1.0)
    assert service.named() == []
    service.go_on([rank[0]], range(9, 20), 1.0)
    assert service.named() == [(1, "logged nothing for 19 s")]
    service.go_on([rank[0]], range(20, 590), 1.0)
    assert [one for one, _ in service.named()] == [1]
    service.go_on([rank[0]], range(590, 620), 1.0)
    assert service.named() == []
    late = service.ranks.join(0, 1, world_size=3)
    assert late.keys() == {0, 1}
    service.ranks.now_s += 9.0
    assert service.named() == []


def test_a_rank_that_comes_again_alone_leaves_the_others_there() -> None:
    """They go on in the attempt before, and are named there if they hang."""
    service = Service()
    rank = service.ranks.join(0, 1, 2, 3, world_size=4)
    service.go_on(rank.values(), range(10), 1.0)
    (again,) = service.ranks.join(3, world_size=4, name="-again").values()
    service.silent.add(rank[3])
    service.go_on([rank[0], rank[1], rank[2], again], range(10, 60), 1.0)
    status = service.status()
    assert (status.slow, status.attached, status.warning, status.step) == ([], 4, None, 59)
    service.go_on([rank[0], rank[1], again], range(60, 80), 1.0)
    assert service.named() == [(2, "logged nothing for 20 s")]
    service.ranks.send(rank[1], End(0.0))
    service.go_on([rank[0], again], range(80, 82), 1.0)
    assert (1, "has not attached") in service.named()


def test_nobody_is_missed_when_all_that_came_are_done() -> None:
    """Rank 0 logs something alone and closes: the others were never to come."""
    service = Service()
    rank = service.ranks.join(0, world_size=4)
    service.go_on(rank.values(), range(40), 1.0)
    assert service.named() == [(one, "has not attached") for one in (1, 2, 3)]
    service.ranks.send(rank[0], EndChannel(0, 0))
    status = service.status()
    assert (status.slow, status.ended, status.warning) == ([], 1, None)


def test_a_million_ranks_are_counted_not_made() -> None:
    """The status answers at once, names the first, and says how many there are."""
    service = Service()
    rank = service.ranks.join(7, world_size=1_000_000)
    service.go_on(rank.values(), range(40), 1.0)
    began = time.process_time()
    status = service.status()
    took_s = time.process_time() - began
    assert status.slow_ranks == 999_999
    assert [one.rank for one in status.slow] == [one for one in range(21) if one != 7]
    assert "and 999996 more ranks" in str(status.warning)
    assert took_s < 0.1


def test_sources_keep_to_what_they_were_told() -> None:
    """When many sources end at once, the others still come as rarely as they were asked to."""
    asked = KeepAlives()
    assert asked.longest(0.0) is None
    asked.note(100.0, 0.0)
    asked.note(95.0, 1.0)
    for now_s in range(2, 50):
        asked.note(10.0, now_s)
    assert [asked.longest(now_s) for now_s in (50.0, 97.0, 101.0)] == [100.0, 100.0, 100.0]
    asked.note(10.0, 102.0)
    assert asked.longest(102.0) == 10.0
    asked.note(20.0, 103.0)
    assert asked.longest(103.0) == 20.0


@pytest.mark.ray
def test_a_stopped_rank_is_named_within_30_seconds(cluster: RayCluster) -> None:
    """Of real processes on Ray one is stopped, while all wait for each other at every step.

    Everything is 2.5 times as fast as with the default of ``silent_after_s``.
    """
    script = """
        import json, os, subprocess, sys, time
        import ray, raywb
        from ray_cluster import report, told
        raywb.start(project="ranks", mode="offline", node_metrics_interval_s=0,
                    silent_after_s=12)  # which is 30 otherwise

        @ray.remote(num_cpus=0)
        class Rank:
            def __init__(self, rank):
                self.client = raywb.attach("train", rank=rank, world_size=3)
            def pid(self):
                return os.getpid()
            def step(self, number):
                self.client.log({"loss": 1.0}, step=number)
                return number
            def close(self):
                self.client.close()

        ranks = [Rank.remote(rank) for rank in range(3)]
        report(ray.get([one.pid.remote() for one in ranks]))
        ready, number = True, 0
        while ready:
            number += 1
            done = [one.step.remote(number) for one in ranks]
            ready = len(ray.wait(done, num_returns=3, timeout=2.0)[0]) == 3
            time.sleep(0.2)
            if number == 10:
                report(number)
        began = time.time()
        while not (warnings := [w for w in raywb.status().warnings if w.startswith("train: ")]):
            assert time.time() < began + 60
            time.sleep(0.2)
        command = [sys.executable, "-m", "raywb", "status", "--json"]
        printed = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        slow = printed["stages"][0]["slow"]
        assert warnings[0][:20] in " ".join(printed["warnings"])
        report([warnings, [[one[key] for key in ("rank", "pid", "step")] for one in slow], number])
        told()
        ray.get(done)
        ray.get([one.close.remote() for one in ranks])
        while raywb.status().stages[0].ended < 3:
            time.sleep(0.1)
        time.sleep(1)
        report([w for w in raywb.status().warnings if w.startswith("train: ")])
    """
    driver = cluster.driver(script)
    pids = driver.next_report()
    driver.next_report()
    stopped = psutil.Process(pids[1])
    began = time.monotonic()
    stopped.send_signal(signal.SIGSTOP)
    try:
        warnings, slow, number = driver.next_report()
        took_s = time.monotonic() - began
    finally:
        stopped.send_signal(signal.SIGCONT)
    print(f"named after {took_s:.1f} s: {warnings}")
    assert [one[:2] for one in slow] == [[1, pids[1]]]
    assert f"rank 1 ({stopped_host()} pid {pids[1]})" in warnings[0]
    assert took_s < 30 / 2.5
    assert number > slow[0][2] - 1
    driver.tell()
    assert driver.next_report() == []
    until("the driver's end", lambda: driver.wait() == 0)


def stopped_host() -> str:
    import socket

    return socket.gethostname()
