"""What the service must know again after a restart, in one small file.

``service.json`` lies beside the ledger and is replaced whole, so it is always the old one or the
new one. It holds the token and is readable by its owner only; it never holds W&B's key. A copy
lies beside it, in case the disk damages one of them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import zlib
from pathlib import Path
from typing import Any

import msgspec

from raywb.reports import FinishReport, RunInfo

__all__ = ["RunState", "ServiceState", "load_state", "lock_directory", "save_state"]

FILE_NAME = "service.json"
COPY_NAME = "service.json.copy"


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
    report: FinishReport | None = None


class ServiceState(msgspec.Struct, kw_only=True):
    """The service itself: who it is, where it listens, and its runs.

    Attributes:
        checksum: of all the rest, as it is in the file.
        restored: how often the file was damaged, and its copy was used.
    """

    checksum: str = ""
    restored: int = 0
    cluster_id: str
    token: str
    incarnation: int = 0
    port: int | None = None
    runs: list[RunState] = []


def load_state(directory: Path) -> ServiceState | None:
    """Read the state, or None when the directory holds none.

    Raises:
        OSError: the file cannot be read.
        msgspec.DecodeError: neither the file nor its copy is what this version writes.
    """
    damage: msgspec.DecodeError | None = None
    for name in (FILE_NAME, COPY_NAME):
        try:
            state = _decode(directory / name)
        except FileNotFoundError:
            continue
        except msgspec.DecodeError as error:
            damage = error
            continue
        state.restored += damage is not None
        return state
    if damage is not None:
        raise damage
    return None


def _decode(path: Path) -> ServiceState:
    try:
        state = msgspec.json.decode(path.read_bytes(), type=ServiceState)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"{path} holds no text: {error}") from error
    checksum, state.checksum = state.checksum, ""
    if checksum != _checksum(state):
        raise msgspec.ValidationError(f"{path} does not have the checksum that it names")
    return state


def _checksum(state: ServiceState) -> str:
    return f"{zlib.crc32(msgspec.json.encode(state)):08x}"


def save_state(directory: Path, state: ServiceState) -> None:
    """Replace the file and then its copy, durably."""
    checked = msgspec.structs.replace(state, checksum=_checksum(state))
    data = msgspec.json.format(msgspec.json.encode(checked))
    for name in (FILE_NAME, COPY_NAME):
        _replace(directory / name, data)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
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
