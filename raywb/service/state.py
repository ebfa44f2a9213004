"""What the service must know again after a restart, in one small file.

``service.json`` lies beside the ledger and is replaced whole, so it is always the old one or the
new one. It holds the token and is readable by its owner only; it never holds W&B's key.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import msgspec

from raywb.reports import FinishReport, RunInfo

__all__ = ["RunState", "ServiceState", "load_state", "lock_directory", "save_state"]

FILE_NAME = "service.json"


class UpdateMarks(msgspec.Struct, kw_only=True):
    """Which of a run's tables, artifacts and alerts need nothing more; they are numbered from 0.

    Attributes:
        before: all before this number are done.
        done: numbers behind it that are done too.
        unconfirmed_alerts: alerts that were marked, and then the sink died: sent or not.
        tables: by key, the last row that holds a table, and what the run's summary says of it.
    """

    before: int = 0
    done: list[int] = []
    unconfirmed_alerts: int = 0
    tables: dict[str, tuple[int, dict[str, Any]]] = {}


class RunState(msgspec.Struct, kw_only=True):
    """One run of this service.

    Attributes:
        number: its number in the outbox, from 1.
        info: what the user sees of it.
        settings: the settings it was started with.
        base: W&B's step of its first row, once it was opened online.
        exit_code: set when ``finish()`` was asked for.
        cut: ledger position up to which rows belong to it, set with ``exit_code``.
        received_rows, lost, rejected: what had come by the cut.
        updates: how far its tables, artifacts and alerts are.
        report: how it ended.
    """

    number: int
    info: RunInfo
    settings: dict[str, Any]
    base: int | None = None
    exit_code: int | None = None
    cut: int | None = None
    received_rows: int = 0
    lost: dict[str, int] = {}
    rejected: int = 0
    updates: UpdateMarks = msgspec.field(default_factory=UpdateMarks)
    report: FinishReport | None = None


class ServiceState(msgspec.Struct, kw_only=True):
    """The service itself: who it is, where it listens, and its runs."""

    cluster_id: str
    token: str
    incarnation: int = 0
    port: int | None = None
    runs: list[RunState] = []


def load_state(directory: Path) -> ServiceState | None:
    """Read the state, or None when the directory holds none.

    Raises:
        OSError: the file cannot be read.
        msgspec.DecodeError: the file is not what this version writes.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return None
    return msgspec.json.decode(path.read_bytes(), type=ServiceState)


def save_state(directory: Path, state: ServiceState) -> None:
    """Replace the file, durably."""
    path = directory / FILE_NAME
    temporary = directory / f".{FILE_NAME}"
    fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        data = msgspec.json.format(msgspec.json.encode(state))
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, "the disk is full", str(temporary))
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)


def lock_directory(directory: Path) -> int:
    """Make sure that no other service works in this directory, as long as this process lives.

    Raises:
        OSError: another one does.
    """
    fd = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise OSError(f"another raywb service works in {directory}") from error
    return fd
