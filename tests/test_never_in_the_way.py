"""raywb is never in the way: exit handlers, Ray itself, the environment and latency stay as is."""

from __future__ import annotations

from typing import Any

import pytest
from ray_cluster import RayCluster, driver_alone
from wandb_file import read_runs

#: Ends workers in each graceful way that Ray has, and says whose exit handlers came to their end.
#: Some of them, as a control, have nothing to do with raywb.
#: `attach` before or after the handler is registered decides which of the two runs first.
LEAVING = """
    import atexit, os, pathlib, signal, time
    import ray, raywb
    from msgspec import to_builtins
    from ray_cluster import report, told, until, without_service

    SERVICE_LIVES, TRIES, CONTROLS = told()
    marks = pathlib.Path.cwd() / "marks"
    marks.mkdir()

    def leave_slowly(name):
        (marks / f"{name}.begun").touch()
        time.sleep(1.0)
        (marks / f"{name}.done").touch()

    def prepare(name, number):
        if name.startswith("control"):
            atexit.register(leave_slowly, name)
            return None
        if number % 2:
            client = raywb.attach(name)
            atexit.register(leave_slowly, name)
        else:
            atexit.register(leave_slowly, name)
            client = raywb.attach(name)
        return client

    def log(client):
        for i in range(20 if client else 0):
            client.log({"i": i}, step=i)

    @ray.remote(num_cpus=0, max_calls=1)
    def task(name, number):
        log(prepare(name, number))
        return os.getpid()

    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self, name, number):
            self.client = prepare(name, number)

        def pid(self):
            return os.getpid()

        def log(self):
            log(self.client)

        def log_and_leave(self):
            log(self.client)
            ray.actor.exit_actor()

    ray.init()
    without_service()
    raywb.start(project="leaving")
    workers, pids = {}, {}
    for number in range(-CONTROLS, TRIES):
        way = ["exit_actor", "terminate", "out_of_scope", "sigterm", "max_calls"][number % 5]
        name = f"{way}_{number}" if number >= 0 else f"control_{way}"
        if way == "max_calls":
            pids[name] = task.remote(name, number)
        else:
            workers[name] = Worker.remote(name, number)
            pids[name] = workers[name].pid.remote()
    pids = dict(zip(pids, ray.get(list(pids.values()))))
    if not SERVICE_LIVES:
        raywb.lifecycle.stop_service()
    for name in list(workers):
        worker = workers.pop(name)
        if "exit_actor" in name:
            worker.log_and_leave.remote()
        else:
            ray.get(worker.log.remote())
        if "terminate" in name:
            worker.__ray_terminate__.remote()
        if "sigterm" in name:
            os.kill(pids[name], signal.SIGTERM)
    del worker

    def gone(pid):
        try:
            return pathlib.Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    until("the workers to leave", lambda: all(gone(pid) for pid in pids.values()))
    report({name: [(marks / f"{name}.{mark}").exists() for mark in ("begun", "done")]
            for name in pids})
    if SERVICE_LIVES:
        report(to_builtins(raywb.finish()))
"""

#: Each handler began, and came to its end.
WHOLE = [True, True]


def leave(cluster: RayCluster, *, service_lives: bool, tries: int, controls: int = 0) -> list[Any]:
    """Run ``LEAVING``; returns all that it reports."""
    driver = cluster.driver(LEAVING)
    driver.tell([service_lives, tries, controls])
    reports = [driver.next_report()]
    if last := driver.succeed():
        reports.append(last)
    return reports


@pytest.mark.ray
def test_exit_handlers_of_workers_complete(cluster: RayCluster) -> None:
    """A worker's own exit handler of one second ends as without us, in each of ten tries."""
    found, report = leave(cluster, service_lives=True, tries=10, controls=5)
    control = {name: found[name] for name in found if name.startswith("control")}
    assert control == dict.fromkeys(control, WHOLE), "Ray itself ran these handlers"
    assert len(control) == 5
    handlers = {name: found[name] for name in found if name not in control}
    assert handlers == dict.fromkeys(handlers, WHOLE)
    run = read_runs(report["run"]["dir"])[report["run"]["id"]]
    for name in handlers:
        assert run.values(f"{name}/i") == list(range(20)), name
    assert len(handlers) == 10


@pytest.mark.ray
def test_exit_handlers_complete_when_the_service_is_gone(cluster: RayCluster) -> None:
    """The same handlers complete when there is nobody to flush to."""
    (handlers,) = leave(cluster, service_lives=False, tries=4)
    assert handlers == dict.fromkeys(handlers, WHOLE)
    assert len(handlers) == 4


@pytest.mark.ray
def test_log_goes_on_without_a_service(cluster: RayCluster) -> None:
    """Rows wait on disk while the service is gone, and one on the same directory takes them all."""
    driver = cluster.driver("""
        import time
        import ray, raywb
        from msgspec import to_builtins
        from pathlib import Path
        from raywb.lifecycle import stop_service
        from ray_cluster import report, until, without_service

        ray.init()
        without_service()
        directory = str(Path.home() / "kept")
        first = raywb.start(project="gone", dir=directory)
        client = raywb.attach("driver")
        for i in range(50):
            client.log({"i": i}, step=i)
        assert client.flush()
        stop_service()
        times = []
        for i in range(50, 3000):
            began = time.perf_counter()
            client.log({"i": i}, step=i)
            times.append(time.perf_counter() - began)
        until("a request to fail", lambda: client.stats.failed_requests)
        report([client.flush(0.2), to_builtins(client.stats), sorted(times)])
        second = raywb.start(project="gone", dir=directory)
        flushed = client.flush(60)
        report([first.id, second.id, flushed, to_builtins(client.stats)])
        report(to_builtins(raywb.finish()))
    """)
    flushed, stats, times = driver.next_report()
    assert flushed is False
    assert stats["backlog_bytes"] > 2950 * 15
    assert (stats["logged"], stats["lost"], stats["rejected"]) == (3000, {}, 0)
    print(f"log() without a service: median {times[len(times) // 2] * 1e6:.1f} µs,")
    print(f"the slowest {times[-1] * 1e3:.2f} ms")
    # A wait for the network would be seen in most calls; the scheduler's pauses are in a few.
    assert times[len(times) * 9 // 10] < 0.001
    first_id, second_id, flushed, stats = driver.next_report()
    assert first_id == second_id
    assert flushed is True
    assert (stats["backlog_bytes"], stats["last_error"]) == (0, None)
    report = driver.succeed()
    run = read_runs(report["run"]["dir"])[first_id]
    assert run.values("driver/i") == list(range(3000))
    assert report["complete"] is True


@pytest.mark.ray
def test_ray_may_be_shut_down_and_started_again(cluster: RayCluster) -> None:
    """After ray.shutdown() nothing of ours calls Ray; another cluster is attached to as the first.

    Every call from a thread of ours into Ray's modules is noted. One would start a cluster, or
    connect to the one in RAY_ADDRESS.
    """
    driver = cluster.driver("""
        import os, sys, threading
        import psutil
        import ray, raywb
        from msgspec import to_builtins
        from ray_cluster import report, until, without_service

        into_ray = set()
        ray_directory = os.path.dirname(ray.__file__)

        def note(frame, event, argument):
            ours = threading.current_thread().name.startswith("raywb")
            if ours and frame.f_code.co_filename.startswith(ray_directory):
                into_ray.add(frame.f_code.co_qualname)

        threading.setprofile(note)

        def is_cluster(process):
            try:
                return "gcs_server" in process.name()
            except psutil.NoSuchProcess:
                return False

        def own_clusters():
            return sum(map(is_cluster, psutil.Process().children(recursive=True)))

        ray.init(address="local", num_cpus=1, include_dashboard=False)
        raywb.start(project="first")
        client = raywb.attach("a")
        client.log({"i": 0})
        first = raywb.finish()
        own = own_clusters()
        ray.shutdown()
        until("the first cluster to end", lambda: own_clusters() == 0)
        failures = client.stats.failed_requests
        client.log({"i": 1})
        until("our thread to notice", lambda: client.stats.failed_requests > failures + 1)
        report([own, ray.is_initialized(), own_clusters()])

        ray.init()
        without_service()
        raywb.start(project="second")
        client = raywb.attach("b")
        client.log({"i": 2})
        second = raywb.finish()
        report([ray.get_runtime_context().gcs_address, own_clusters()])
        report([to_builtins(first), to_builtins(second), sorted(into_ray)])
    """)
    assert driver.next_report() == [1, False, 0], "after ray.shutdown()"
    assert driver.next_report() == [cluster.address, 0], "after the second ray.init()"
    first, second, into_ray = driver.next_report()
    assert into_ray == []
    assert first["run"]["id"] != second["run"]["id"]
    runs = [read_runs(report["run"]["dir"]) for report in (first, second)]
    assert runs[0][first["run"]["id"]].values("a/i") == [0]
    assert runs[1][second["run"]["id"]].values("b/i") == [2]
    driver.succeed()


@pytest.mark.ray
def test_the_process_is_as_it_was(cluster: RayCluster) -> None:
    """Directory, signals, hooks, modules and all but one variable are the same after finish().

    The one is WANDB_GROUP, which only start() writes.
    """
    driver = cluster.driver("""
        import builtins, locale, logging, os, resource, signal, sys, threading
        import ray
        from ray_cluster import report

        def process():
            return {
                "environment": dict(os.environ),
                "directory": os.getcwd(),
                "signals": {
                    str(number): repr(signal.getsignal(number))
                    for number in sorted(signal.valid_signals())
                },
                "hooks": [
                    repr(hook) for hook in (
                        sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook,
                        sys.stdout, sys.stderr, builtins.__import__,
                    )
                ],
                "handlers": repr([logging.root.handlers, logging.root.level]),
                "search path": list(sys.path),
                "umask": os.umask(os.umask(0o22)),
                "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
                "locale": locale.setlocale(locale.LC_ALL),
                "threads": sorted(
                    thread.name for thread in threading.enumerate()
                    if not thread.name.startswith("raywb")
                ),
            }

        os.umask(0o22)
        ray.init()
        ray.nodes()
        before = process()
        import raywb
        with raywb.attach("driver") as client:
            client.log({"i": 0})
        raywb.runtime_env()
        raywb.inject_group([])
        attached = process()
        run = raywb.start(project="unchanged")
        raywb.status()
        raywb.finish()
        report([before, attached, process(), run.group])
        service = ray.get_actor("raywb", namespace="raywb")
        heavy = {"wandb", "torch", "pynvml", "cosmos_xenna"}
        report([
            sorted(heavy & set(sys.modules)),
            ray.get(service.__ray_call__.remote(lambda _: sorted(heavy & set(sys.modules)))),
        ])
    """)
    before, attached, after, group = driver.next_report()
    for what, value in before.items():
        assert attached[what] == value, what
    before["environment"]["WANDB_GROUP"] = group
    for what, value in before.items():
        assert after[what] == value, what
    driver_modules, service_modules = driver.next_report()
    assert driver_modules == []
    assert service_modules == []
    driver.succeed()


def test_an_import_does_nothing() -> None:
    """``import raywb`` loads none of the heavy modules, and writes, starts and connects nothing."""
    script = """
        import os, sys
        from ray_cluster import report

        done = []
        watched = ("os.mkdir", "os.putenv", "os.remove", "os.rename", "os.unsetenv", "os.chdir",
                   "subprocess.Popen", "os.fork", "os.posix_spawn", "socket.connect", "socket.bind")

        def audit(event, arguments):
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if watching and (writes or event in watched):
                done.append(f"{event} {arguments}")

        watching = False
        sys.addaudithook(audit)
        environment = dict(os.environ)
        sys.dont_write_bytecode = True
        watching = True
        import raywb
        watching = False
        heavy = {"wandb", "torch", "pynvml", "cosmos_xenna", "ray", "omegaconf", "aiohttp"}
        report([sorted(heavy & set(sys.modules)), done, environment == dict(os.environ)])
        raywb.attach, raywb.start, raywb.Settings
        report(sorted({"wandb", "torch", "pynvml", "cosmos_xenna"} & set(sys.modules)))
    """
    with driver_alone(script) as driver:
        loaded, done, same_environment = driver.next_report()
        assert loaded == []
        assert done == []
        assert same_environment
        assert driver.next_report() == [], "the public names need none of these either"
        driver.succeed()
