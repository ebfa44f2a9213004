"""A stream of statuses, asked for by a process of its own.

A driver of Ray's ends with its cluster, without a word and without tidying up, and waits while a
service restarts. So whoever watches does not talk to Ray: a child asks, and writes what it is told
into a pipe. When it ends, another one is started.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from raywb.errors import NoClusterError, RaywbError, ServiceUnavailable, VersionMismatch
from raywb.reports import Status

__all__ = ["Answer", "StatusFeed", "serve_statuses"]

#: Longest that the child waits for an answer, in seconds.
TIMEOUT_S = 5.0

#: Pause before another child is started, in seconds.
RESTART_PAUSE_S = 2.0

#: How long a child may take to end by itself, in seconds.
GRACE_S = 2.0

_HEADER = struct.Struct("<I")
_READ_BYTES = 1 << 20


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the child was told: a status, or why there is none.

    Attributes:
        kind: name of the exception's class, where there was one.
    """

    status: Status | None = None
    trouble: str | None = None
    kind: str = ""

    def raise_trouble(self) -> None:
        """Raise what the child met.

        Raises:
            RaywbError: there is no status.
        """
        if self.trouble is not None:
            kinds = {one.__name__: one for one in (NoClusterError, ServiceUnavailable)}
            raise kinds.get(self.kind, RaywbError)(self.trouble)


def _trouble(error: Exception) -> Answer:
    """What to say of an exception: raywb's own are sentences, others name what they are."""
    kind = type(error).__name__
    if isinstance(error, RaywbError):
        kind = "ServiceUnavailable" if isinstance(error, VersionMismatch) else kind
        return Answer(trouble=str(error), kind=kind)
    return Answer(trouble=f"{kind}: {' '.join(str(error).split())}".rstrip(": "), kind=kind)


def serve_statuses(
    connect: Callable[[], None], ask: Callable[[float], Status], interval_s: float
) -> None:
    """The child's side: ask at intervals, and write the answers to the standard output.

    It ends when nobody reads them any more, when there is no cluster, and, after it has said so,
    at an exception that is none of raywb's own: a process that starts anew may not meet it.

    Args:
        connect: connects to the cluster.
        ask: returns the status within a time limit in seconds.
        interval_s: pause between two answers.
    """
    # What Ray prints must not get between the answers.
    with os.fdopen(os.dup(1), "wb", buffering=0) as output:
        os.dup2(2, 1)
        try:
            connect()
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever watches is to read it
            _write(output, _trouble(error))
            return
        with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
            while True:
                began_s = time.monotonic()
                try:
                    answer = Answer(status=ask(TIMEOUT_S))
                except RaywbError as error:
                    answer = _trouble(error)
                except Exception as error:  # noqa: BLE001 - whatever it is, whoever watches is to read it
                    _write(output, _trouble(error))
                    return
                _write(output, answer)
                time.sleep(max(interval_s - (time.monotonic() - began_s), 0.05))


def _write(output: BinaryIO, answer: Answer) -> None:
    data = msgspec.msgpack.encode(answer)
    view = memoryview(_HEADER.pack(len(data)) + data)
    while view:
        view = view[output.write(view) :]


class StatusFeed:
    """The parent's side: starts the child, reads its answers, starts another when it ends.

    Args:
        command: what starts a child.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._child: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self._start_at_s = 0.0
        self._last: Answer | None = None
        self._answered = False

    def fileno(self) -> int | None:
        """What is readable when there is news; None while there is no child."""
        if self._child is None or self._child.stdout is None:
            return None
        return self._child.stdout.fileno()

    def poll(self) -> Answer | None:
        """The newest answer, if there is a new one; starts a child where there is none."""
        if self._child is None:
            if time.monotonic() < self._start_at_s:
                return None
            self._last = None
            # Ctrl-C is for the parent, which ends the child.
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        found: Answer | None = None
        descriptor = self.fileno()
        while descriptor is not None and select.select([descriptor], [], [], 0)[0]:
            data = os.read(descriptor, _READ_BYTES)
            if not data:
                return self._ended(found)
            self._buffer += data
            found = self._newest() or found
            self._last = found or self._last
            self._answered |= found is not None and found.status is not None
        return found

    def _newest(self) -> Answer | None:
        found = None
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            found = self._decoder.decode(bytes(self._buffer[_HEADER.size : end]))
            del self._buffer[:end]
        return found

    def _ended(self, found: Answer | None) -> Answer | None:
        """The child is over: it has said why, or its cluster is gone and took it along."""
        if self._child is not None and not self._answered:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(GRACE_S)  # its own exit code tells more than one of a signal's
        code = self.close()
        self._start_at_s = time.monotonic() + RESTART_PAUSE_S
        if self._last is not None and self._last.trouble is not None:
            return found
        told = "the connection to the Ray cluster is lost"
        if not self._answered:
            told = (
                f"the process that asks the service has ended (exit code {code}) before it had an "
                "answer: `raywb status` may show why"
            )
        return Answer(trouble=told, kind="ServiceUnavailable")

    def close(self) -> int | None:
        """End the child; returns its exit code, if there was one."""
        child, self._child = self._child, None
        self._buffer.clear()
        if child is None:
            return None
        if child.stdout is not None:
            child.stdout.close()
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        return child.returncode


def feed_command(address: str, interval_s: float) -> list[str]:
    """What starts a child of this same program."""
    own = [sys.executable, "-m", "raywb", "--address", address]
    return [*own, "watch", "--feed", "--interval-s", str(interval_s)]
