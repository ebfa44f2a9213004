"""The service in a process of its own, without Ray: to be killed, stopped and made again.

A test holds a :class:`ServiceProcess` where it would hold a ``RaywbService``; what it calls is
carried out over there. :func:`local_service` takes it as what makes the service.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from child_processes import children

from raywb.service.actor import Boot, RaywbService


class ServiceProcess:
    """One incarnation; what it answers and raises comes over a socket.

    Raises:
        EOFError: on a call whose process has died.
    """

    def __init__(self, boot: Boot, api_key: str | None = None) -> None:
        ours, theirs = socket.socketpair()
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                pass_fds=[theirs.fileno()],
            )
        self.process = psutil.Process(self._popen.pid)
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        self._connection.send((boot, api_key))

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self._call(method, *arguments)

    def _call(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            try:
                self._connection.send((method, arguments))
                good, value = self._connection.recv()
            except OSError as error:
                raise EOFError(f"the service's process is gone: {error}") from error
        if not good:
            raise value
        return value

    def children(self, name: str) -> list[psutil.Process]:
        """What works for it: ``raywb.service.wandb_sink`` or ``wandb-core``."""
        return children(self.process, name)

    def kill(self) -> None:
        """SIGKILL; its children notice by themselves."""
        self._popen.kill()
        self._popen.wait()

    def close(self) -> None:
        """End it and all that it started."""
        started = self.process.children(recursive=True) if self._popen.poll() is None else []
        for process in [self.process, *started]:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        self._popen.wait()
        psutil.wait_procs(started, timeout=10)
        self._connection.close()


def _serve(connection: Connection) -> None:
    boot, api_key = connection.recv()
    service = RaywbService(boot, api_key)
    while True:
        method, arguments = connection.recv()
        try:
            answer = (True, getattr(service, method)(*arguments))
        except Exception as error:  # noqa: BLE001 - whatever it raises is the caller's
            answer = (False, error)
        connection.send(answer)


if __name__ == "__main__":
    try:
        _serve(Connection(int(sys.argv[1])))
    except EOFError:
        os._exit(0)
