"""The service is one detached actor on the head, and every process of the cluster finds it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import RayCluster, driver_alone
from wandb_file import read_runs

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head with four CPUs, and a node that would have more room for an actor."""
    with RayCluster.start(num_cpus=4) as started:
        started.add_node(num_cpus=8)
        yield started


def test_the_actor_is_detached_on_the_head_and_takes_no_cpu(cluster: RayCluster) -> None:
    """Made while every CPU is taken, it runs on the head, takes none, and restarts without end."""
    found = cluster.run_driver("""
        import ray, raywb
        from ray._private.state import gcs_pb2, state as tables
        from ray_cluster import report, until, without_service

        ray.init()
        without_service()

        @ray.remote
        class Greedy:
            def ready(self):
                return True

        greedy = [Greedy.options(num_cpus=count).remote() for count in (4, 8)]
        ray.get([actor.ready.remote() for actor in greedy])
        free_cpus = lambda: ray.available_resources().get("CPU", 0.0)
        until("every CPU to be taken", lambda: free_cpus() == 0)
        raywb.start(project="actor")
        for actor in greedy:
            ray.kill(actor)
        until("every CPU to be free", lambda: free_cpus() == 12)

        actors = tables._connect_and_get_accessor().get_actor_table(None, "ALIVE")
        (actor,) = [
            actor for actor in map(gcs_pb2.ActorTableData.FromString, actors)
            if actor.class_name == "RaywbService"
        ]
        (head,) = [
            node["NodeID"] for node in ray.nodes()
            if "node:__internal_head__" in node["Resources"]
        ]
        report({
            "name": [actor.ray_namespace, actor.name],
            "detached": actor.is_detached,
            "max_restarts": actor.max_restarts,
            "wants": dict(actor.required_resources),
            "on_the_head": actor.node_id.hex() == head,
            "nodes": len(ray.nodes()),
        })
    """)
    assert found == {
        "name": ["raywb", "raywb"],
        "detached": True,
        "max_restarts": -1,
        "wants": {"node:__internal_head__": 0.001},
        "on_the_head": True,
        "nodes": 2,
    }


def test_a_second_job_joins_the_run_and_may_end_it(cluster: RayCluster) -> None:
    """The run outlives the job that began it; another one joins, ends it, and begins the next."""
    first_job = cluster.run_driver("""
        import ray, raywb
        from ray_cluster import report, without_service

        ray.init()
        without_service()
        run = raywb.start(project="jobs")
        client = raywb.attach("first")
        for i in range(5):
            client.log({"i": i}, step=i)
        report([run.id, run.group, run.epoch, ray.get_runtime_context().get_job_id()])
    """)
    service = cluster.service()
    assert service is not None, "the service ended with the driver that made it"

    second_job = cluster.driver("""
        import ray, raywb
        from msgspec import to_builtins
        from ray_cluster import report

        ray.init()
        client = raywb.attach("second")
        run = raywb.start(project="jobs")
        for i in range(7):
            client.log({"i": i}, step=i)
        report([run.id, run.group, run.epoch, ray.get_runtime_context().get_job_id()])
        report(client.run.id)
        report([to_builtins(raywb.finish()), to_builtins(raywb.finish())])
        next_run = raywb.start(project="jobs")
        client.log({"i": 100})
        report(to_builtins(next_run))
        report(to_builtins(raywb.finish(exit_code=3)))
    """)
    run_id, group, epoch, job_id = second_job.next_report()
    assert [run_id, group, epoch] == first_job[:3] == [run_id, group, 1]
    assert job_id != first_job[3], "these were meant to be two jobs"
    assert second_job.next_report() == run_id, "attach() and start() found different runs"
    report, again = second_job.next_report()
    assert report == again
    assert (report["received_rows"], report["delivered_rows"], report["complete"]) == (12, 12, True)
    next_run = second_job.next_report()
    assert next_run["id"] != run_id
    assert (next_run["epoch"], next_run["group"]) == (2, group)
    last_report = second_job.succeed()
    assert (last_report["delivered_rows"], last_report["exit_code"]) == (1, 3)
    assert cluster.service() == service, "a run's end is not the service's end"

    runs = read_runs(report["run"]["dir"])
    assert set(runs) == {run_id, next_run["id"]}
    ended, latest = runs[run_id], runs[next_run["id"]]
    assert ended.values("first/i") == list(range(5))
    assert ended.values("second/i") == list(range(7))
    assert ended.steps == list(range(len(ended.history)))
    assert len(ended.logged) == 12
    assert latest.values("second/i") == [100]
    assert latest.steps == list(range(len(latest.history)))
    assert len(latest.logged) == 1
    assert [run.group for run in (ended, latest)] == [group, group]
    assert [run.exit_code for run in (ended, latest)] == [0, 3]


def test_a_service_made_anew_takes_no_row_again(cluster: RayCluster) -> None:
    """A stopped service's successor works in its directory, and knows what journals gave it."""
    runs = cluster.run_driver("""
        import ray, raywb
        from msgspec import to_builtins
        from raywb.cluster import find_service
        from raywb.lifecycle import stop_service
        from ray_cluster import report, until, without_service

        @ray.remote(num_cpus=0)
        def work(i):
            raywb.attach("task").log({"i": i})

        ray.init()
        without_service()
        finished = []
        for first in (0, 100):
            raywb.start(project="anew")
            client = raywb.attach("driver")
            for i in range(first, first + 10):
                client.log({"i": i})
            ray.get(work.remote(first))
            finished.append(to_builtins(raywb.finish()))
            stop_service()
            until("the service's name to be free", lambda: find_service() is None)
        report(finished)
    """)
    assert runs[0]["run"]["dir"] == runs[1]["run"]["dir"]
    assert runs[0]["run"]["id"] != runs[1]["run"]["id"]
    written = read_runs(runs[0]["run"]["dir"])
    for finished, first in zip(runs, (0, 100), strict=True):
        assert (finished["received_rows"], finished["complete"]) == (11, True)
        run = written[finished["run"]["id"]]
        assert run.values("driver/i") == list(range(first, first + 10))
        assert run.values("task/i") == [first]


def test_the_page_of_a_cluster_is_found_and_goes_when_the_actor_goes(cluster: RayCluster) -> None:
    """`raywb ui` prints its address; it shows what was logged; what reads history ends with it."""
    overview, series, readers, left = cluster.run_driver("""
        import json, os, re, signal, subprocess, sys, urllib.request
        import psutil, ray, raywb
        from ray_cluster import report, until, without_service

        ray.init()
        without_service()
        raywb.start(project="page", mode="offline", node_metrics_interval_s=0)
        with raywb.attach("train") as client:
            client.log({"loss": 0.5}, step=7)
            assert client.flush(20)
        command = [sys.executable, "-m", "raywb", "ui", "--no-open"]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        url = re.search(r"http://localhost:[0-9]+/", said)[0]

        def get(path):
            with urllib.request.urlopen(url + path, timeout=20) as answer:
                return json.load(answer)

        def is_there():
            try:
                found = get("api/series?run=1")["series"]
                return "train/loss" in [one["key"] for one in found]
            except OSError:  # refused, or not ready
                return False

        until("the row", is_there)
        overview, series = get("api/overview"), get("api/series?run=1")["series"]

        def readers():
            return [one for one in psutil.process_iter(["cmdline"])
                    if "raywb.view.history" in (one.info["cmdline"] or [])
                    and overview["runs"][0]["dir"] in one.info["cmdline"]]

        (reader,) = readers()
        found = len(readers())
        os.kill(reader.ppid(), signal.SIGKILL)  # the actor; Ray makes it anew
        until("the reader's end", lambda: not readers())
        until("the page", is_there)
        report([overview, series, found, len(readers())])
        raywb.finish()
    """)
    assert overview["live"]
    assert overview["runs"][0]["project"] == "page"
    assert overview["ray_dashboard"] is None or overview["ray_dashboard"].startswith("http://")
    assert [(one["key"], one["last"]) for one in series] == [("train/loss", 0.5), ("train/step", 7)]
    assert (readers, left) == (1, 1)


def test_ranks_meet_in_one_row_and_a_killed_one_is_missing(cluster: RayCluster) -> None:
    """Training workers of one stage: a row for each step, with the ranks that logged it."""
    finished = cluster.run_driver("""
        import os, ray, raywb, signal
        from msgspec import to_builtins
        from ray_cluster import report, without_service

        @ray.remote(num_cpus=0, max_retries=0)
        def train(rank):
            client = raywb.attach("train", rank=rank, world_size=3)
            client.define_metric("x", across_ranks="per_rank")
            for step in range(30):
                client.log({"x": 100 * rank + step, "loss": rank}, step=step)
                if (rank, step) == (2, 10):
                    os.kill(os.getpid(), signal.SIGKILL)

        ray.init()
        without_service()
        raywb.start(project="ranks")
        workers = [train.remote(rank) for rank in range(3)]
        ray.wait(workers, num_returns=3)
        report(to_builtins(raywb.finish()))
    """)
    assert (finished["received_rows"], finished["delivered_rows"]) == (71, 71)
    run = read_runs(finished["run"]["dir"])[finished["run"]["id"]]
    ranks = dict(zip(run.values("train/step"), run.values("train/ranks"), strict=True))
    assert ranks == {step: 3 if step <= 10 else 2 for step in range(30)}
    for rank, steps in ((0, 30), (1, 30), (2, 11)):
        expected = [100 * rank + step for step in range(steps)]
        assert sorted(run.values(f"train/x/rank_{rank}")) == expected
    assert set(run.values("train/loss")) == {1.0, 0.5}


def test_a_run_ends_while_its_clients_go_on(cluster: RayCluster) -> None:
    """finish() takes a cut: what is logged after it waits, and begins the next run."""
    after_finish, rows, reports = cluster.run_driver("""
        import threading, time
        import ray, raywb
        from msgspec import to_builtins
        from ray_cluster import report, until, without_service

        class Stream:
            def begin(self, stage):
                self.client, self.rows, self.going = raywb.attach(stage), 0, True
                self.thread = threading.Thread(target=self.log)
                self.thread.start()

            def log(self):
                while self.going:
                    self.client.log({"i": self.rows}, step=self.rows)
                    self.rows += 1
                    time.sleep(0.002)

            def end(self):
                self.going = False
                self.thread.join()
                return self.rows

        ray.init()
        without_service()
        reports = []
        raywb.start(project="cut")
        here, there = Stream(), ray.remote(num_cpus=0)(Stream).remote()
        here.begin("here")
        ray.get(there.begin.remote("there"))
        until("rows of both", lambda: raywb.status().received_rows > 300)
        reports.append(raywb.finish())
        until("rows after it", lambda: raywb.status().after_finish_rows > 100)
        after_finish = raywb.status().after_finish_rows
        raywb.start(project="cut")
        until("rows of the next run", lambda: raywb.status().received_rows > after_finish + 100)
        rows = {"here": here.end(), "there": ray.get(there.end.remote())}
        reports.append(raywb.finish())
        report([after_finish, rows, to_builtins(reports)])
    """)
    assert [report["complete"] for report in reports] == [True, True]
    assert sum(report["received_rows"] for report in reports) == sum(rows.values())
    runs = read_runs(reports[0]["run"]["dir"])
    first, second = (runs[report["run"]["id"]] for report in reports)
    for stage, count in rows.items():
        assert first.values(f"{stage}/i") + second.values(f"{stage}/i") == list(range(count))
    assert len(second.history) > after_finish


def test_rows_of_every_kind_of_process_meet_in_one_run(cluster: RayCluster) -> None:
    """attach() works in the driver, in its threads, in tasks and in actors, on every node."""
    report = cluster.run_driver("""
        import threading
        import ray, raywb
        from msgspec import to_builtins
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        from ray_cluster import report, without_service

        ray.init()
        without_service()
        raywb.start(project="everywhere")

        def log(stage):
            client = raywb.attach(stage)
            for i in range(3):
                client.log({"i": i}, step=i)
            ids.append(client.run.id)

        @ray.remote(num_cpus=0)
        def in_task(stage):
            client = raywb.attach(stage)
            for i in range(3):
                client.log({"i": i}, step=i)
            return client.run.id

        @ray.remote(num_cpus=0)
        class InActor:
            def __init__(self, stage):
                self.client = raywb.attach(stage)

            def log(self):
                for i in range(3):
                    self.client.log({"i": i}, step=i)
                return self.client.run.id

        ids = []
        log("driver")
        thread = threading.Thread(target=log, args=["thread"])
        thread.start()
        thread.join()
        for number, node in enumerate(ray.nodes()):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = in_task.options(scheduling_strategy=there).remote(f"task_{number}")
            actor = InActor.options(scheduling_strategy=there).remote(f"actor_{number}")
            ids += ray.get([task, actor.log.remote()])
        report([ids, to_builtins(raywb.finish())])
    """)
    ids, report = report
    run = read_runs(report["run"]["dir"])[report["run"]["id"]]
    assert set(ids) == {run.run_id}
    for stage in ("driver", "thread", "task_0", "task_1", "actor_0", "actor_1"):
        assert run.values(f"{stage}/i") == [0, 1, 2], stage
        assert run.metrics[f"{stage}/*"].step_metric == f"{stage}/step"
    assert len(run.logged) == report["received_rows"] == 18


def test_attach_makes_a_provisional_service_that_start_settles(cluster: RayCluster) -> None:
    """Rows logged before any start() wait in the ledger, and are in the run that it opens."""
    driver = cluster.driver("""
        import ray, raywb
        from msgspec import to_builtins
        from ray_cluster import report, without_service

        ray.init()
        without_service()
        client = raywb.attach("early")
        for i in range(4):
            client.log({"i": i}, step=i)
        flushed = client.flush()
        report([flushed, client.run.provisional, raywb.status().sink.state])
        run = raywb.start(project="settled", group="together", tags=["late"])
        client.log({"i": 4}, step=4)
        report([client.run.id, to_builtins(run)])
        report(to_builtins(raywb.finish()))
    """)
    assert driver.next_report() == [True, True, "waiting"]
    announced_id, opened = driver.next_report()
    assert (opened["id"], opened["provisional"]) == (announced_id, False)
    report = driver.succeed()
    run = read_runs(report["run"]["dir"])[announced_id]
    assert run.values("early/i") == list(range(5))
    assert (run.project, run.group, run.tags) == ("settled", "together", ("late",))


def test_a_provisional_run_opens_by_itself(cluster: RayCluster) -> None:
    """When no start() comes, the run opens with the defaults, and says so; a later one joins."""
    opened, joined, refusal, report = cluster.run_driver("""
        import ray, raywb
        from msgspec import to_builtins
        from raywb import cluster
        from raywb.errors import SettingsConflict
        from raywb.groups import Group
        from ray_cluster import report, until, without_service

        ray.init()
        without_service()
        # As attach() makes one, but less patient.
        cluster.make_service(
            cluster.connect(), raywb.Settings(provisional_wait_s=0.5), Group(None, "nobody"), None,
        )
        client = raywb.attach("alone")
        client.log({"i": 0})
        until("the run to open", lambda: raywb.status().sink.state == "running")
        opened = raywb.status().run
        joined = raywb.start()
        try:
            raywb.start(project="too-late")
        except SettingsConflict as error:
            refusal = str(error)
        report([*map(to_builtins, (opened, joined)), refusal, to_builtins(raywb.finish())])
    """)
    assert (opened["provisional"], opened["project"]) == (True, "raywb")
    assert joined["id"] == opened["id"]
    assert "project is 'raywb', not 'too-late'" in refusal
    run = read_runs(report["run"]["dir"])[opened["id"]]
    assert run.values("alone/i") == [0]


def test_settings_that_conflict_are_refused_by_name(cluster: RayCluster) -> None:
    """The same settings join, others are refused with both values, unknown ones with the name."""
    run_ids, conflict, unknown = cluster.run_driver("""
        import ray, raywb
        from raywb.errors import SettingsConflict, SettingsError
        from ray_cluster import report, without_service

        def refused(kind, **settings):
            try:
                raywb.start(**settings)
            except kind as error:
                return str(error)
            return "not refused"

        ray.init()
        without_service()
        settings = {"project": "settled", "group": "mine", "tags": ["a", "b"], "name": "first"}
        runs = [raywb.start(**settings), raywb.start(**settings), raywb.start(project="settled")]
        report([
            [run.id for run in runs],
            refused(SettingsConflict, project="settled", group="yours"),
            refused(SettingsError, projekt="settled"),
        ])
        raywb.finish()
    """)
    assert len(set(run_ids)) == 1
    assert "group is 'mine', not 'yours'" in conflict
    assert "projekt" in unknown
    assert "project" in unknown.removeprefix("unknown setting projekt"), "what is allowed"


def test_another_version_is_named_on_both_sides(cluster: RayCluster) -> None:
    """A client of another protocol is told its own version and the service's, and logs nothing."""
    refusal, client_version, service_version = cluster.run_driver("""
        import ray, raywb
        import raywb.cluster
        from raywb.errors import VersionMismatch
        from ray_cluster import report, without_service

        ray.init()
        without_service()
        raywb.start(project="versions")
        service_version = raywb.__version__
        raywb.__version__, raywb.cluster.PROTOCOL = "9.8.7", 999
        try:
            raywb.attach()
        except VersionMismatch as error:
            report([str(error), raywb.__version__, service_version])
        raywb.cluster.PROTOCOL = 1
        raywb.finish()
    """)
    assert f"this process has raywb {client_version} (protocol 999)" in refusal
    assert f"raywb {service_version} (protocol 1)" in refusal
    assert "install the same version" in refusal


def test_a_service_that_cannot_be_made_is_told_at_once(cluster: RayCluster) -> None:
    """When the head cannot load raywb's actor, the cause is in the error, and nobody waits."""
    refusal, waited_s, found = cluster.run_driver("""
        import time
        import ray, raywb
        from raywb import cluster
        from raywb.errors import ServiceUnavailable
        from raywb.groups import Group
        from ray_cluster import report, without_service

        class OnlyHere:
            \"\"\"What the actor's process fails to load.\"\"\"
            def __reduce__(self):
                return __import__, ("a_module_that_the_head_lacks",)

        ray.init()
        without_service()
        here = cluster.connect()
        service = cluster.make_service(
            here, raywb.Settings(), Group(None, "nobody"), OnlyHere()
        )
        try:
            cluster.join(service, here, timeout_s=60)
        except ServiceUnavailable as error:
            began = time.monotonic()
            try:
                cluster.join(service, here, timeout_s=60)
            except ServiceUnavailable as error:
                report([str(error), time.monotonic() - began, cluster.find_service() is not None])
    """)
    assert "a_module_that_the_head_lacks" in refusal
    assert waited_s < 30
    assert not found


def test_without_a_cluster_the_error_says_what_to_do() -> None:
    """Nothing starts a cluster by itself; the error names the ways, and the allowed one works."""
    script = """
        import ray, raywb
        from raywb.errors import NoClusterError
        from msgspec import to_builtins
        from ray_cluster import report

        # Ray's "auto" looks through all processes of the machine: other people's clusters are
        # not for this test.
        import psutil
        processes, psutil.process_iter = psutil.process_iter, lambda *_, **__: iter(())

        def refused(call, **arguments):
            try:
                call(**arguments)
            except NoClusterError as error:
                return str(error)
            return "not refused"

        report([refused(raywb.attach), refused(raywb.start, project="x"),
                refused(raywb.status), refused(raywb.finish)])
        report(ray.is_initialized())
        raywb.start(project="local", local_cluster=True)
        raywb.attach().log({"x": 1})
        report(to_builtins(raywb.finish()))
    """
    with driver_alone(script) as driver:
        refusals = driver.next_report()
        for refusal in refusals:
            for remedy in ("ray start --head", "ray.init()", "raywb.start(local_cluster=True)"):
                assert remedy in refusal
        assert driver.next_report() is False, "an error left a connection to Ray"
        report = driver.next_report()
        assert read_runs(Path(report["run"]["dir"]))[report["run"]["id"]].values("x") == [1]
        driver.succeed()
