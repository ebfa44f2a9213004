"""What ends where the work ran: one small interface, and a file for each kind of place.

vast_instance.py    the Vast.ai instance that this process runs on
slurm_job.py        the Slurm job that this process belongs to
ray_head.py         the cluster of `ray up` whose head this is
kuberay.py          the RayJob, whose cluster KubeRay deletes when the job has ended
plain_command.py    whatever a command of the user's ends
choice.py           which of them this is
"""

from __future__ import annotations

from typing import Protocol

from raywb.errors import LaunchError

__all__ = ["EndFailed", "Place"]


class EndFailed(LaunchError):
    """Raised when a place cannot be ended: it was refused, or could not be asked for."""


class Place(Protocol):
    """Where the work ran, and how that ends.

    Attributes:
        name: as in ``--place``.
        what: for a sentence, for instance "Vast.ai instance 42".
        keeps_disk: what lies on its disk is still to be had when it has ended.
    """

    @property
    def name(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def keeps_disk(self) -> bool: ...

    def end(self) -> str:
        """Have it ended; returns once that was accepted, with a sentence that says so.

        Nothing can be done after it for certain: this process runs in what ends.

        Raises:
            EndFailed: it was not accepted, or nobody answered.
        """
        ...

    def has_ended(self, timeout_s: float) -> bool:
        """Ask until whoever was asked shows that it is gone, for at most ``timeout_s``."""
        ...
