"""The one connection of this process: made at the first attach, ended at its exit.

A forked child is a new process, and leaves the connection that it inherited alone.
"""

from __future__ import annotations

import atexit
import os
import threading

from raywb.cluster import Cluster
from raywb.connection import EXIT_FLUSH_S, Connection
from raywb.journal import new_source_id
from raywb.shipping import Endpoint

__all__ = ["connection_for", "present_connection", "source_id_for"]

_present: Connection | None = None
_announced: str | None = None
_present_lock = threading.Lock()
_hooks_installed = False


def present_connection() -> Connection | None:
    """The connection of this process, if it has one."""
    return _present


def source_id_for(cluster: Cluster) -> str:
    """The source that this process is, or will be once it connects to this cluster.

    The service is told before there is a journal: whoever is killed before its first bytes are
    shipped is looked for.
    """
    global _announced
    with _present_lock:
        if _present is not None and _present.cluster.cluster_id == cluster.cluster_id:
            return _present.source_id
        _announced = _announced or new_source_id()
        return _announced


def connection_for(cluster: Cluster, endpoint: Endpoint | None, epoch: int) -> Connection:
    """The process's connection to this cluster; one to an earlier cluster is closed first."""
    global _present, _announced
    with _present_lock:
        _install_hooks()
        if _present is not None and _present.cluster.cluster_id != cluster.cluster_id:
            _present.close(EXIT_FLUSH_S)
            _present = None
        if _present is None:
            _present = Connection(cluster, endpoint, epoch, _announced)
            _announced = None
        else:
            _present.use(endpoint, epoch)
        return _present


def _install_hooks() -> None:
    """Once per process, at the first attach: an import alone changes nothing."""
    global _hooks_installed
    if not _hooks_installed:
        _hooks_installed = True
        atexit.register(_at_exit)
        os.register_at_fork(after_in_child=_after_fork_in_child)


def _at_exit() -> None:
    if _present is not None:
        _present.at_exit()


def _after_fork_in_child() -> None:
    global _present_lock, _announced
    _present_lock = threading.Lock()
    _announced = None
    if _present is not None:
        _present.after_fork_in_child()
