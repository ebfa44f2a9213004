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

from raywb.errors import DirectoryError
from raywb.groups import Group
from raywb.reports import FinishReport, RunInfo, UnconfirmedSource

__all__ = [
    "Origin",
    "RunState",
    "ServiceState",
    "load_left_state",
    "load_state",
    "lock_directory",
    "replace_file",
    "save_state",
]

FILE_NAME = "service.json"
COPY_NAME = "service.json.copy"


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
        number: its number in the outbox, from 1; a stage's own run from a million.
        info: what the user sees of it.
        settings: the settings it was started with.
        base: W&B's step of its first row, once it was opened online.
        exit_code: set when ``finish()`` was asked for.
        crashed: it is left as crashed, whatever ``exit_code`` says.
        cut: ledger position up to which rows belong to it, set with ``exit_code``.
        closed_rows: rows that W&B had when it closed the run.
        received_rows, lost, rejected: what had come by the cut.
        updates: how far its tables, artifacts and alerts are.
        unconfirmed: sources whose journal could not be had for it.
        unreached: nodes that did not answer then.
        report: how it ended.
        session: of a stage's own run: how often it was opened.
        writers: the clients that attached to a stage's own run since it was opened last.
        parent: the cluster's run that was the last one when a stage's own run was opened.
    """

    number: int
    info: RunInfo
    settings: dict[str, Any]
    base: int | None = None
    exit_code: int | None = None
    crashed: bool = False
    cut: int | None = None
    closed_rows: int | None = None
    received_rows: int = 0
    lost: dict[str, int] = {}
    rejected: int = 0
    updates: UpdateMarks = msgspec.field(default_factory=UpdateMarks)
    unconfirmed: list[UnconfirmedSource] = []
    unreached: list[str] = []
    report: FinishReport | None = None
    session: int = 0
    writers: list[str] = []
    parent: int = 0


class Origin(msgspec.Struct, kw_only=True):
    """What the service was made with, for whoever works in the directory without its cluster.

    Attributes:
        settings: settings that differ from their defaults, for a run that nobody starts.
        run_id: id of the first run.
        session_dir: the cluster's session directory, below which journals lie.
    """

    settings: dict[str, Any]
    group: Group
    run_id: str
    session_dir: str | None = None


class ServiceState(msgspec.Struct, kw_only=True):
    """The service itself: who it is, where it listens, and its runs.

    Attributes:
        runs: the cluster's, one after the other.
        stage_runs: those that stages have of their own, side by side.
        checksum: of all the rest, as it is in the file.
        restored: how often the file was damaged, and its copy was used.
    """

    checksum: str = ""
    restored: int = 0
    cluster_id: str
    token: str
    incarnation: int = 0
    port: int | None = None
    origin: Origin | None = None
    runs: list[RunState] = []
    stage_runs: list[RunState] = []

    @property
    def all_runs(self) -> list[RunState]:
        """The cluster's runs and those of stages."""
        return [*self.runs, *self.stage_runs]


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


def load_left_state(directory: Path) -> ServiceState:
    """What a service wrote down of itself in its directory.

    Raises:
        DirectoryError: the directory is not a service's, or its state cannot be read.
    """
    if not directory.is_dir():
        raise DirectoryError(f"there is no directory {directory}")
    try:
        state = load_state(directory)
    except (OSError, msgspec.DecodeError) as error:
        raise DirectoryError(
            f"{directory / 'service.json'} cannot be read ({error}): without it nobody knows which "
            "runs the rows beside it belong to"
        ) from error
    if state is None:
        inner = sorted(path.parent for path in directory.glob("*/service.json"))
        hint = f"Did you mean {inner[0]}?" if inner else "It is what start() printed as dir"
        raise DirectoryError(
            f"{directory} is not the directory of a raywb service, there is no service.json in it. "
            f"{hint}"
        )
    return state


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
        replace_file(directory / name, data)


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file of ours, durably: it is always the old one or the new one."""
    temporary = path.with_name(f".{path.name}")
    fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, "the disk is full", str(temporary))
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)


def lock_directory(directory: Path, name: str = "lock") -> int:
    """Make sure that no other service works in this directory, as long as this process lives.

    Args:
        directory: the service's directory.
        name: the lock's file; there is another one for those who only read.

    Raises:
        BlockingIOError: another one does.
        OSError: the lock cannot be had.
    """
    fd = os.open(directory / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise BlockingIOError(f"another raywb service works in {directory}") from error
    return fd
