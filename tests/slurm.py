"""A real Slurm of one node on this machine, in a directory and on ports of its own.

    with Slurm.start() as slurm:
        environment = clean_environment(home) | slurm.environment
        subprocess.run(["sbatch", "job.sh"], env=environment)

It needs Debian's `slurm-wlm` and `munge`, neither of them configured or running, and no root.
Jobs run as whoever runs the tests. What was started is ended by its pid files.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from ray_cluster import until

__all__ = ["PROGRAMS", "Slurm", "missing_programs"]

#: What of Slurm and munge is used here.
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo")

#: CPUs that the node says it has: jobs that wait for their children run beside them.
CPUS = 8

_CONFIGURATION = """
ClusterName=raywb
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
SlurmctldPort={slurmctld_port}
SlurmdPort={slurmd_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=600
KillWait=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000
PartitionName=main Nodes=ALL Default=YES State=UP OverSubscribe=NO
"""


def _program(name: str) -> str | None:
    """Where a program is; a user's search path has no daemons in it."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing_programs() -> list[str]:
    """The programs that this machine lacks."""
    return [name for name in PROGRAMS if _program(name) is None]


class Slurm:
    """A running cluster.

    Attributes:
        root: directory of everything that belongs to it.
        environment: what Slurm's commands need to find it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Slurm]:
        """Start a cluster, and end it with the block."""
        # A socket's path has 107 characters at most, so pytest's directories are too deep.
        slurm = cls(Path(tempfile.mkdtemp(prefix="rwslurm", dir="/tmp")))
        try:
            slurm._configure()
            slurm._run_daemons()
            yield slurm
        finally:
            slurm._close()
            shutil.rmtree(slurm.root, ignore_errors=True)

    def command(self, *arguments: str) -> str:
        """Run one of Slurm's commands; returns what it prints."""
        done = subprocess.run(
            [_program(arguments[0]) or arguments[0], *arguments[1:]],
            env={**os.environ, **self.environment},
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr}\n{self._logs()}")
        return done.stdout

    def _configure(self) -> None:
        for name in ("state", "spool"):
            (self.root / name).mkdir()
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        slurmctld_port, slurmd_port = _free_ports(2)
        configuration = _CONFIGURATION.format(
            root=self.root,
            user=pwd.getpwuid(os.getuid()).pw_name,
            slurmctld_port=slurmctld_port,
            slurmd_port=slurmd_port,
            cpus=CPUS,
        )
        (self.root / "slurm.conf").write_text(configuration)

    def _run_daemons(self) -> None:
        munge = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        files = [f"--{option}={self.root / name}" for option, name in munge.items()]
        self.command("munged", "--force", *files)
        conf = self.environment["SLURM_CONF"]
        self.command("slurmctld", "-f", conf)
        self.command("slurmd", "-f", conf, "-N", "localhost")

        def idle() -> bool:
            return self.command("sinfo", "--noheader", "--format=%t").strip() == "idle"

        try:
            until("Slurm's node to be idle", idle, 30)
        except TimeoutError as error:
            raise RuntimeError(f"Slurm did not come up: {self._logs()}") from error

    def _logs(self) -> str:
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')}" for log in self.root.glob("*.log")
        )

    def _close(self) -> None:
        """Let the jobs end, then kill the daemons: nothing of them is wanted any more."""
        with contextlib.suppress(RuntimeError, TimeoutError):
            for job in self.command("squeue", "--noheader", "--format=%i").split():
                self.command("scancel", job)
            until("the jobs to end", lambda: not self.command("squeue", "--noheader"), 20)
        ended = []
        for name in ("slurmd", "slurmctld", "munged"):
            with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
                process = psutil.Process(int((self.root / f"{name}.pid").read_text()))
                if name in process.name():
                    ended += [process, *process.children(recursive=True)]
        for process in ended:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ended, timeout=10)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        probes = [open_sockets.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
