"""Connect to a Ray cluster that may be gone, without waiting for it for minutes.

``ray.init`` asks an address at which nobody listens for more than five minutes, and a head that
was killed leaves its address behind in Ray's directory.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

import ray
from ray._private.services import find_gcs_addresses, get_ray_address_from_environment

from raywb.errors import NoClusterError, ServiceUnavailable

__all__ = ["connect_if_alive"]

#: Longest that a head may take to accept a connection, in seconds.
ACCEPT_S = 10.0


def connect_if_alive(address: str, environment: Mapping[str, str]) -> None:
    """Connect this process to a cluster, as a driver that prints nothing of its workers'.

    Args:
        address: as for ``ray.init()``; ``auto`` is ``RAY_ADDRESS``, else the one on this machine.
        environment: this process's.

    Raises:
        NoClusterError: there is none: nobody listens where it was.
        ServiceUnavailable: there may be one, and it cannot be connected to.
    """
    if address == "auto" and not environment.get("RAY_ADDRESS"):
        found = sorted(find_gcs_addresses())
        if len(found) > 1:
            raise ServiceUnavailable(
                f"several Ray clusters run on this machine ({', '.join(found)}), and nobody says "
                "which one is meant: set RAY_ADDRESS"
            )
    try:
        address = get_ray_address_from_environment(address, None)
    except ConnectionError as error:
        raise NoClusterError("no Ray cluster runs on this machine") from error
    _check_that_somebody_listens(address)
    try:
        ray.init(address=address, logging_level="warning", log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ServiceUnavailable(
            f"the Ray cluster at {address} cannot be connected to: {error}"
        ) from error


def _check_that_somebody_listens(address: str) -> None:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ACCEPT_S).close()
    except ConnectionRefusedError as error:
        raise NoClusterError(f"no Ray cluster runs at {address} any more") from error
    except OSError as error:
        raise ServiceUnavailable(
            f"the Ray cluster at {address} cannot be reached: {error}"
        ) from error
