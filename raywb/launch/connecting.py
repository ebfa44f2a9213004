"""Connect to a Ray cluster that may be gone, without waiting for it for minutes.

``ray.init`` asks an address at which nobody listens for more than five minutes, and a head that
was killed leaves its address behind in Ray's directory.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil
import ray

from raywb.errors import NoClusterError, ServiceUnavailable

__all__ = ["clusters_of", "connect_if_alive"]

#: How Ray's processes name the cluster that they belong to.
_FLAG = "--gcs-address="

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
    if address == "auto":
        address = environment.get("RAY_ADDRESS") or _the_one_here()
    _check_that_somebody_listens(address)
    try:
        # It warns of every thread that is not the main one.
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ServiceUnavailable(
            f"the Ray cluster at {address} cannot be connected to: {error}"
        ) from error


def _the_one_here() -> str:
    """Address of the one cluster of this user's that this machine is part of.

    Another user's is not meant; only root, who may have started it for that user, means any.
    """
    uid = os.getuid()
    found = clusters_of(uid) or (clusters_of(None) if uid == 0 else set())
    if not found:
        raise NoClusterError("no Ray cluster of this user's runs on this machine")
    if len(found) > 1:
        raise ServiceUnavailable(
            f"several Ray clusters run on this machine ({', '.join(sorted(found))}), and nobody "
            "says which one is meant: set RAY_ADDRESS"
        )
    return found.pop()


def clusters_of(uid: int | None) -> set[str]:
    """Clusters that the raylets of a user, None for any, belong to: each machine has one."""
    found = set[str]()
    for process in psutil.process_iter(["cmdline", "uids"]):
        words, uids = process.info["cmdline"], process.info["uids"]
        if not words or Path(words[0].split(" ")[0]).name != "raylet":
            continue
        if uid is None or (uids is not None and uids.effective == uid):
            # A process that has set its title has all words in the first one.
            named = (word for one in words for word in one.split() if word.startswith(_FLAG))
            found.update(word.removeprefix(_FLAG) for word in named)
    return found - {"", "None"}


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
