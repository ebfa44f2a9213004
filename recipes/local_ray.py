"""What a local Ray cluster needs in the environment, set before Ray is imported.

Ray reads these variables when it is imported and when its processes start, and neither can be made
up for later. This module therefore imports nothing of Ray; a recipe's ``__main__`` calls
:func:`prepare_environment` first.
"""

from __future__ import annotations

import os

__all__ = ["XENNA_ACTOR_LIMIT", "XENNA_ENVIRONMENT", "cluster_is_there", "prepare_environment"]

#: cosmos-xenna lists this many actors at once; Ray refuses unless its processes know of the limit.
XENNA_ACTOR_LIMIT = 40_000

#: Needed by every process of a cluster on which cosmos-xenna runs. It sets CUDA_VISIBLE_DEVICES
#: itself, so Ray must not.
XENNA_ENVIRONMENT = {
    "RAY_MAX_LIMIT_FROM_API_SERVER": str(XENNA_ACTOR_LIMIT),
    "RAY_MAX_LIMIT_FROM_DATA_SOURCE": str(XENNA_ACTOR_LIMIT),
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}

#: Why: ``ray.init(_node_ip_address="127.0.0.1")`` is turned back into the machine's own address,
#: and all of Ray then listens on every interface (seen with 2.60). Without multi-node support,
#: Ray's switch for macOS and Windows, it takes the loopback address and listens there alone.
#: Remove when Ray takes a loopback address at its word.
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def cluster_is_there() -> bool:
    """Say whether the environment names a cluster: an address, or the job this process drives."""
    address = os.environ.get("RAY_ADDRESS", "")
    return address not in ("", "local") or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def prepare_environment() -> None:
    """Set what a local cluster needs, unless there is a cluster, or the user chose a value."""
    if not cluster_is_there():
        for name, value in (XENNA_ENVIRONMENT | _LOOPBACK_ONLY).items():
            os.environ.setdefault(name, value)
