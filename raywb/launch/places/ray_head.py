"""The cluster of ``ray up`` whose head this is, ended with ``ray down``.

``ray up`` leaves the cluster's description on the head, for the autoscaler. With it ``ray down``
works from there as far as the head's own credentials go: on AWS its role must be allowed
``ec2:DescribeInstances`` and ``ec2:TerminateInstances``, also for the head itself. Ray first ends
its processes over SSH, which from the head to itself may fail; it says so and goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from raywb.launch.places import EndFailed
from raywb.launch.places.bounded import run_bounded

__all__ = ["RayHead", "description_on"]

#: Where ``ray up`` puts the description, below the home directory.
FILE_NAME = "ray_bootstrap_config.yaml"

#: Longest that `ray down` may take, in seconds: it waits for nodes that it ends over SSH.
TIMEOUT_S = 900.0

_RAY = "from ray.scripts.scripts import main; main()"


def description_on(environment: Mapping[str, str]) -> Path | None:
    """The cluster's description, where this is a head that ``ray up`` made."""
    path = Path(environment.get("HOME", "/nowhere")) / FILE_NAME
    return path if path.is_file() else None


class RayHead:
    """The whole cluster, this head included."""

    name = "ray"
    keeps_disk = False

    def __init__(self, description: Path) -> None:
        self._description = description

    @property
    def what(self) -> str:
        return f"the Ray cluster of {self._description}"

    def end(self) -> str:
        """See :class:`raywb.launch.places.Place`.

        ``ray down`` returns when the provider lists no node of the cluster any more; this machine
        may be gone before.
        """
        code, said = run_bounded(
            [sys.executable, "-c", _RAY, "down", "--yes", str(self._description)],
            TIMEOUT_S,
            what=f"`ray down {self._description}`",
            capture=True,
        )
        if code:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise EndFailed(
                f"`ray down {self._description}` failed with exit code {code}: {last}. "
                "The head's credentials have to allow it; `ray down` from the launching machine "
                "ends the cluster, too"
            )
        return f"`ray down` has ended {self.what}"

    def has_ended(self, timeout_s: float) -> bool:
        """See :class:`raywb.launch.places.Place`."""
        return True
