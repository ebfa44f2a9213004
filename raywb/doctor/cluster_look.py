"""Looks at a cluster from outside, through a process that may be ended at any moment."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO

import msgspec

from raywb.doctor.look import ClusterLook, ClusterRequest, Connected, Line, Nodes, NotConnected
from raywb.errors import RaywbError
from raywb.fleet.deadline import Deadline

__all__ = ["can_reach", "look_at_cluster"]

#: Longest wait for a connection to an address, in seconds.
REACH_S = 3.0

#: Longest that Ray may take to connect, in seconds. It tries for 20 before it says that its token
#: was refused.
CONNECT_S = 45.0

#: Longest that all of it may take, in seconds.
LIMIT_S = 120.0

#: How long the process may take to leave Ray in good order, in seconds.
END_S = 5.0

#: How much of what the process printed goes into an error, in characters.
_TAIL = 300


def can_reach(address: str) -> str | None:
    """Why nothing can be reached at ``host:port``, or None; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S):
            return None
    except ValueError:
        return "it is no host and port"
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__


def look_at_cluster(
    request: ClusterRequest, environment: Mapping[str, str], *, limit_s: float = LIMIT_S
) -> ClusterLook:
    """Ask the cluster all that is to be asked; what did not come in time is missing.

    Args:
        request: what to ask.
        environment: the process environment.
        limit_s: longest that all of it may take.
    """
    look = ClusterLook()
    with tempfile.TemporaryFile() as printed:
        child = subprocess.Popen(
            [sys.executable, "-m", "raywb.doctor.cluster_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            env=dict(environment),
            start_new_session=True,
        )
        stdin, stdout = child.stdin, child.stdout
        if stdin is None or stdout is None:
            raise RaywbError("the process that asks the cluster has no pipes")
        try:
            with stdin:
                stdin.write(msgspec.json.encode(request) + b"\n")
            with stdout:
                _take(look, stdout, limit_s)
        except BrokenPipeError:
            look.ended = "the process that asks it ended at once"
        finally:
            _end(child, patient=look.ended is None)
        if look.ended == "":
            printed.seek(0)
            said = printed.read().decode(errors="replace").strip()[-_TAIL:]
            look.ended = f"the process that asks it ended: {said or 'without a word'}"
    return look


def _take(look: ClusterLook, stdout: IO[bytes], limit_s: float) -> None:
    """Take lines until all have come, or the time is over; what is missing is in ``ended``."""
    deadline = Deadline(min(CONNECT_S, limit_s))
    whole = Deadline(limit_s)
    for text in _lines(stdout, lambda: deadline if look.connected is None else whole):
        line = msgspec.json.decode(text, type=Line)
        if isinstance(line, Connected):
            look.connected = line
        elif isinstance(line, NotConnected):
            look.refused = line
            return
        elif isinstance(line, Nodes):
            look.nodes, look.unanswered = line.nodes, line.unanswered
            return
        else:
            look.service = line
    over = deadline if look.connected is None else whole
    look.ended = "" if over.left_s else f"no answer within {over.limit_s:g} s"


def _lines(stdout: IO[bytes], present: Callable[[], Deadline]) -> Iterator[bytes]:
    """Lines as they come, until the end of the stream or of the present time limit."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while selector.select(present().left_s):
            chunk = os.read(stdout.fileno(), 1 << 16)
            if not chunk:
                return
            *whole, pending = (pending + chunk).split(b"\n")
            yield from whole


def _end(child: subprocess.Popen[bytes], *, patient: bool) -> None:
    """End the process if it has not ended, and what it has started: it leads their session."""
    try:
        child.wait(timeout=END_S if patient else 0.0)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
