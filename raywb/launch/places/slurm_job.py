"""The Slurm job that this process belongs to, given back with ``scancel``.

All of its steps end with it, Ray's processes on its other nodes among them. Slurm shows it as
cancelled: a batch script that can simply end had better do that.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping

from raywb.launch.places import EndFailed

__all__ = ["SlurmJob"]

#: Longest that one of Slurm's commands may take, in seconds.
COMMAND_TIMEOUT_S = 60.0

#: Pause between two looks whether the job is over, in seconds.
LOOK_PAUSE_S = 0.5

#: States in which the job's end has begun, or is over.
_ENDING = (
    *("COMPLETING", "CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "PREEMPTED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"),
)


class SlurmJob:
    """One job.

    A run's directory is taken to lie where it outlives the job, as a home directory on a cluster
    does: what lies there is no reason to keep nodes.
    """

    name = "slurm"
    keeps_disk = True

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._id = environment["SLURM_JOB_ID"]

    @property
    def what(self) -> str:
        return f"Slurm job {self._id}"

    def end(self) -> str:
        """See :class:`raywb.launch.places.Place`."""
        self._run("scancel", self._id)
        return f"Slurm has accepted to cancel job {self._id}"

    def has_ended(self, timeout_s: float) -> bool:
        """See :class:`raywb.launch.places.Place`."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                states = self._run("squeue", "--noheader", "--format=%T", f"--jobs={self._id}")
            except EndFailed as error:
                if "Invalid job id" in str(error):
                    return True
                states = "unknown"
            if all(state in _ENDING for state in states.split()):
                return True
            if time.monotonic() + LOOK_PAUSE_S > deadline:
                return False
            time.sleep(LOOK_PAUSE_S)

    def _run(self, *words: str) -> str:
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=COMMAND_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EndFailed(f"`{' '.join(words)}` could not be run: {error}") from error
        if done.returncode:
            raise EndFailed(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
        return done.stdout
