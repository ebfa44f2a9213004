"""The RayJob that this process belongs to: KubeRay itself deletes its cluster.

With ``shutdownAfterJobFinishes`` the operator does that when the job's entrypoint has ended, well
or not. So there is nothing to ask for here: ``raywb shutdown`` is the last command of the
entrypoint, and its end is the end. What it could not deliver lies on the volume on which the
head keeps raywb's files (rayjob-alone.yaml).
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["RayJob"]


class RayJob:
    """The job, known by the name of its cluster, which KubeRay gives to every pod."""

    name = "kuberay"
    keeps_disk = True

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._cluster = environment["RAY_CLUSTER_NAME"]

    @property
    def what(self) -> str:
        return f"the Ray cluster {self._cluster}"

    def end(self) -> str:
        """See :class:`raywb.launch.places.Place`."""
        return (
            f"KubeRay deletes {self.what} after the job's end (shutdownAfterJobFinishes, "
            "ttlSecondsAfterFinished)"
        )

    def has_ended(self, timeout_s: float) -> bool:
        """See :class:`raywb.launch.places.Place`; this process is what it is waiting for."""
        return True
