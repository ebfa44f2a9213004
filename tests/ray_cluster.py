"""Real Ray clusters and real driver processes for tests, each with its own directories.

A test starts a cluster (``ray start --head --block``), runs driver scripts on it as processes of
their own, and talks to them in between::

    with RayCluster.start() as cluster:
        driver = cluster.driver('''
            import raywb
            from ray_cluster import report, told
            report(raywb.start(project="demo").id)
            told()                       # until the test says something
        ''')
        run_id = driver.next_report()
        driver.tell("go on")
        driver.succeed()

Nothing here touches another Ray of the machine: what was started is ended by its process id.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

__all__ = [
    "Driver",
    "RayCluster",
    "SharedCluster",
    "clean_environment",
    "driver_alone",
    "report",
    "told",
    "until",
    "without_service",
]

#: Variables with these beginnings would make a test depend on who runs it, and where.
FOREIGN = ("WANDB_", "RAYWB_", "SLURM_", "SUBMITIT_")

#: Longest that anything here waits, in seconds, unless it is told otherwise. Machines that run
#: several clusters at a time are slow.
PATIENCE_S = 120.0

#: Names the descriptor through which a driver talks to its test.
_CHANNEL = "DRIVER_CHANNEL_FD"

_T = TypeVar("_T")


def until(what: str, condition: Callable[[], _T | None], timeout_s: float = PATIENCE_S) -> _T:
    """Wait until ``condition()`` is true, and return it.

    Raises:
        TimeoutError: it was not in time; ``what`` says what was waited for.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.05)
    return found


def clean_environment(home: Path) -> dict[str, str]:
    """This process's environment without what would steer raywb, W&B or Ray."""
    foreign = (*FOREIGN, "RAY_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    paths = [str(_package_root()), str(Path(__file__).parent)]
    return kept | {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [kept.get("PYTHONPATH")])]),
        # A local cluster leaves a token in HOME which would switch authentication on later.
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Workers start when they are wanted: on a small machine the others only cost time.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_raylet_start_wait_time_s": "60",
    }


def _package_root() -> Path:
    """Where raywb lies; it is not imported here, since drivers import this module too."""
    spec = importlib.util.find_spec("raywb")
    assert spec is not None, "raywb is not installed, and this is not its directory"
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


class Driver:
    """A Python script that runs as a process of its own."""

    def __init__(self, script: str, directory: Path, environment: Mapping[str, str]) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self._log = directory / "output.log"
        path = directory / "driver.py"
        path.write_text(textwrap.dedent(script))
        ours, theirs = socket.socketpair()
        with open(self._log, "wb") as log, theirs:
            self._process = psutil.Popen(
                [sys.executable, str(path)],
                cwd=directory,
                env={**environment, _CHANNEL: str(theirs.fileno())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours
        self._lines = ours.makefile("r", encoding="utf-8")

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def output(self) -> str:
        """All that the driver printed, and what Ray printed there for its workers."""
        return self._log.read_text(errors="replace")

    def next_report(self, timeout_s: float = PATIENCE_S) -> Any:
        """What the script reports next.

        Raises:
            AssertionError: the script ended, or reported nothing in time.
        """
        self._socket.settimeout(timeout_s)
        try:
            line = self._lines.readline()
        except TimeoutError:
            line = ""
        if not line:
            raise AssertionError(f"the driver reports nothing more; it printed:\n{self.output}")
        return json.loads(line)

    def tell(self, value: Any = None) -> None:
        """Answer the script's ``told()``."""
        self._socket.sendall(json.dumps(value).encode() + b"\n")

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for the end of the process; returns its exit code."""
        return int(self._process.wait(timeout_s))

    def succeed(self, timeout_s: float = PATIENCE_S) -> Any:
        """Wait for a last report and a good end; returns the report (None: there was none)."""
        self._socket.settimeout(timeout_s)
        lines = self._lines.readlines()
        assert self.wait(timeout_s) == 0, self.output
        return json.loads(lines[-1]) if lines else None

    def close(self) -> None:
        """End the process and what it started, if there still is any."""
        _end([self._process, *_descendants(self._process)])
        self._lines.close()
        self._socket.close()


class RayDidNotStart(Exception):
    """Raised when ``ray start`` ends, or is not done in time; its text is what Ray printed."""


class RayCluster:
    """A Ray cluster on this machine, which belongs to no driver.

    Attributes:
        root: directory of everything that belongs to it.
        home: the HOME of its processes and drivers.
        address: what drivers connect to; they find it in ``RAY_ADDRESS``.
        client_address: what a driver outside the cluster connects to, through Ray Client.
        dashboard_address: where jobs are submitted, on a cluster with a dashboard.
    """

    def __init__(
        self,
        root: Path,
        num_cpus: int,
        journals: str | None = None,
        *,
        dashboard: bool = False,
        environment: Mapping[str, str] | None = None,
        prepare_head: Callable[[Path], tuple[Sequence[str], Mapping[str, str]]] | None = None,
    ) -> None:
        self.root = root
        self.home = root / "home"
        self.home.mkdir()
        self._drivers: list[Driver] = []
        self._nodes: list[psutil.Popen] = []
        self._environment = clean_environment(self.home) | dict(environment or {})
        client_port, dashboard_port = _free_port(), _free_port()
        self.dashboard_address = f"http://127.0.0.1:{dashboard_port}"
        self.client_address = f"ray://127.0.0.1:{client_port}"
        head = [
            *("--head", "--port=0", f"--temp-dir={root / 'ray'}", f"--num-cpus={num_cpus}"),
            *(f"--include-dashboard={dashboard}".lower(), f"--dashboard-port={dashboard_port}"),
            f"--ray-client-server-port={client_port}",
        ]
        if prepare_head is not None:
            arguments, variables = prepare_head(root)
            head += arguments
            self._environment |= variables
        try:
            said = self._start_node(*head, journals=journals)
        except BaseException:
            self.close()
            raise
        self.address = re.findall(r"--address='([^']+)'", said)[0]
        self._environment["RAY_ADDRESS"] = self.address

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, num_cpus: int = 4, journals: str | None = None, **options: Any
    ) -> Iterator[RayCluster]:
        """Start a cluster, and end it with the block; for ``journals`` see :meth:`add_node`.

        Args:
            num_cpus: how many the head says that it has.
            journals: the name of the head's disk.
            **options: ``dashboard=True`` lets jobs be submitted to it; ``environment`` has further
                variables of all its processes and of its drivers; ``prepare_head`` is called
                with the cluster's directory, and returns further arguments of ``ray start`` and
                variables of all processes.
        """
        cluster = cls._try(num_cpus, journals, options) or cls._try(
            num_cpus, journals, options, last=True
        )
        assert cluster is not None
        try:
            yield cluster
        finally:
            cluster.close()

    @classmethod
    def _try(
        cls, num_cpus: int, journals: str | None, options: dict[str, Any], *, last: bool = False
    ) -> RayCluster | None:
        """A cluster, or None: on a machine that is very busy Ray at times does not come up."""
        # Ray's socket paths have 107 characters at most, so pytest's directories are too deep.
        root = Path(tempfile.mkdtemp(prefix="rw", dir="/tmp"))
        try:
            return cls(root, num_cpus, journals, **options)
        except RayDidNotStart as error:
            if last:
                raise
            print(f"{error}\nanother try")
            return None

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its drivers."""
        return dict(self._environment)

    def add_node(
        self,
        num_cpus: int,
        journals: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> psutil.Popen:
        """Add a node, which is another raylet on this machine.

        Args:
            num_cpus: how many it says that it has.
            journals: a name for the node's disk, as far as journals are concerned; nodes without
                one share theirs.
            environment: further variables of the node's processes.

        Returns:
            The process that all of the node's others descend from.
        """
        arguments = (f"--address={self.address}", f"--num-cpus={num_cpus}")
        self._start_node(*arguments, journals=journals, environment=environment)
        return self._nodes[-1]

    def disk(self, journals: str) -> dict[str, str]:
        """Environment of processes that keep their journals on this disk."""
        return {"RAYWB_JOURNAL_DIR": str(self.root / "journals" / journals)}

    def _start_node(
        self,
        *arguments: str,
        journals: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run ``ray start`` in the foreground; returns what it said when it was up."""
        log = self.root / f"node_{len(self._nodes)}.log"
        with open(log, "wb") as output:
            process = psutil.Popen(
                [
                    *(sys.executable, "-c", "from ray.scripts.scripts import main; main()"),
                    *("start", "--block", "--disable-usage-stats"),
                    # Ray's usual port numbers are those of every other cluster on the machine.
                    *("--min-worker-port=0", "--max-worker-port=0"),
                    *("--dashboard-agent-listen-port=0", "--object-store-memory=100000000"),
                    *arguments,
                ],
                cwd=self.root,
                env={
                    **self._environment,
                    **(self.disk(journals) if journals else {}),
                    **(environment or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._nodes.append(process)

        def said() -> str | None:
            text = log.read_text(errors="replace")
            if process.poll() is not None:
                raise RayDidNotStart(text)
            return text if "Ray runtime started" in text and "--block" in text else None

        try:
            return until("Ray to start", said)
        except TimeoutError as error:
            raise RayDidNotStart(log.read_text(errors="replace")) from error

    def driver(self, script: str, environment: Mapping[str, str] | None = None) -> Driver:
        """Start a script as a driver of this cluster; it ends with the cluster at the latest."""
        directory = self.root / f"driver_{len(self._drivers)}"
        driver = Driver(script, directory, {**self._environment, **(environment or {})})
        self._drivers.append(driver)
        return driver

    def run_driver(self, script: str, environment: Mapping[str, str] | None = None) -> Any:
        """Run a script to its good end; returns its last report."""
        return self.driver(script, environment).succeed()

    def processes(self, name: str) -> list[psutil.Process]:
        """The cluster's living processes whose command line has ``name`` in it."""
        return [
            process
            for node in self._nodes
            for process in _descendants(node)
            if name in _command(process)
        ]

    def service(self) -> psutil.Process | None:
        """The process of raywb's actor, when there is one."""
        return next(iter(self.processes("ray::RaywbService")), None)

    def kill(self) -> None:
        """SIGKILL to every process of the cluster and to its drivers, as in a reboot."""
        ends = [*self._nodes, *(driver._process for driver in self._drivers)]
        _end([*ends, *(process for end in ends for process in _descendants(end))])

    def end_drivers(self) -> None:
        """End every driver that was started, and what it started."""
        for driver in self._drivers:
            driver.close()

    def close(self) -> None:
        """End drivers and cluster, all that they started, and their directories."""
        self.end_drivers()
        started = [process for node in self._nodes for process in _descendants(node)]
        for node in reversed(self._nodes):
            with contextlib.suppress(psutil.NoSuchProcess):
                node.terminate()
        _end([*self._nodes, *started], grace_s=1.0)
        shutil.rmtree(self.root, ignore_errors=True)


class SharedCluster:
    """One cluster for a process's test modules: to start one takes longer than most tests.

    A module finds it as if nobody had used raywb on it before.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._cluster: RayCluster | None = None

    @contextlib.contextmanager
    def lent(self) -> Iterator[RayCluster]:
        """Lend it to a module; one that does not work any more is replaced."""
        if self._cluster is not None:
            try:
                self._cluster.run_driver(_CLEAR)
            except (AssertionError, TimeoutError, psutil.TimeoutExpired) as error:
                print(f"{error}\nthe shared cluster does not work any more: another one")
                self.close()
        if self._cluster is None:
            self._cluster = self._stack.enter_context(RayCluster.start(num_cpus=4))
        try:
            yield self._cluster
        finally:
            self._cluster.end_drivers()

    def close(self) -> None:
        """End it, if it was ever asked for."""
        self._cluster = None
        self._stack.close()


_CLEAR = """
    import ray
    from ray_cluster import without_service
    ray.init()
    without_service()
"""


@contextlib.contextmanager
def driver_alone(script: str, environment: Mapping[str, str] | None = None) -> Iterator[Driver]:
    """Run a script without a cluster; it may start its own with ``ray.init(address="local")``."""
    root = Path(tempfile.mkdtemp(prefix="rw", dir="/tmp"))
    home = root / "home"
    home.mkdir()
    ours = {**clean_environment(home), "RAY_TMPDIR": str(root / "ray")}
    driver = Driver(script, root / "driver", {**ours, **(environment or {})})
    try:
        yield driver
    finally:
        driver.close()
        shutil.rmtree(root, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _end(processes: list[psutil.Process], grace_s: float = 0.0) -> None:
    """Kill what is still there after ``grace_s``, and wait for the end."""
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


# ----------------------------------------------------------------------------------------------
# The driver's side


_channel: socket.socket | None = None


def _to_the_test() -> socket.socket:
    global _channel
    if _channel is None:
        _channel = socket.socket(fileno=int(os.environ[_CHANNEL]))
    return _channel


def report(value: Any) -> None:
    """In a driver: send the test a value that JSON can carry."""
    _to_the_test().sendall(json.dumps(value).encode() + b"\n")


def without_service() -> None:
    """In a driver: the cluster as if nobody had used raywb on it before."""
    from ray.experimental.internal_kv import _internal_kv_del

    from raywb import cluster
    from raywb.lifecycle import stop_service

    stop_service()
    _internal_kv_del(cluster.DIRECTORY_KEY)
    until("the service's name to be free", lambda: cluster.find_service() is None)
    # A service in another directory has never seen what earlier sources left.
    for base in cluster.connect().journal_bases():
        shutil.rmtree(base, ignore_errors=True)


def told() -> Any:
    """In a driver: wait for what the test tells next."""
    line = b""
    while not line.endswith(b"\n"):
        byte = _to_the_test().recv(1)
        if not byte:
            raise SystemExit("the test is gone")
        line += byte
    return json.loads(line)
