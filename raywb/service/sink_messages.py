"""What the service and a sink's child process say to each other, through two pipes.

Each message is a four-byte length (little endian) and msgpack. The service asks, the child
answers each request once.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from raywb.rows import Cell, Scalar

__all__ = [
    "LEAVE_S",
    "LENGTH",
    "Applied",
    "Apply",
    "AskUpdates",
    "Confirm",
    "Confirmed",
    "Definition",
    "Failed",
    "Finish",
    "Finished",
    "LogArtifact",
    "LogTable",
    "LoggedTable",
    "Open",
    "Opened",
    "Reply",
    "Request",
    "SendAlert",
    "TableOfRow",
    "UpdateOutcome",
    "Updated",
    "pack",
]

LENGTH = struct.Struct("<I")

#: How long W&B is given to show all of a run that is left without its own finish, in seconds: its
#: client sends every 15 seconds.
LEAVE_S = 60.0


#: A metric definition: name, step metric, summary, and whether W&B fills the step metric in.
Definition = tuple[str, str | None, str | None, bool | None]


class TableOfRow(msgspec.Struct, frozen=True):
    """A table in a row; ``row`` is the row's number."""

    row: int
    key: str
    columns: list[str]
    rows: list[list[Cell]]


class Open(msgspec.Struct, tag=True, kw_only=True, frozen=True):
    """Open or resume the run; first message to every child.

    Attributes:
        api_key: W&B's key; it travels through the pipe only.
        base: W&B's own step of row 0; None while the run has never been opened online.
        began_offline: its files of that time are set aside, since all its rows go online.
        config: the fold of the run's config.
        defines: the fold of its metric definitions.
    """

    project: str
    run_id: str
    name: str
    mode: str
    dir: str
    entity: str | None
    group: str | None
    job_type: str | None
    tags: tuple[str, ...]
    notes: str | None
    base_url: str | None
    api_key: str | None
    base: int | None
    config: dict[str, Any]
    defines: list[Definition]
    deadline_s: float
    began_offline: bool = False


class Apply(msgspec.Struct, tag=True, frozen=True):
    """Log rows: number, time, values; and take config, summary and definitions in."""

    rows: list[tuple[int, float, dict[str, Scalar]]]
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    defines: list[Definition] = []
    tables: list[TableOfRow] = []


class LogTable(msgspec.Struct, tag=True, frozen=True):
    """Log the artifact that holds a table; the row that refers to it is, or was, logged apart."""

    number: int
    table: TableOfRow
    again: bool


class LogArtifact(msgspec.Struct, tag=True, frozen=True):
    """Log an artifact.

    Attributes:
        number: its number among the run's updates.
        files: path in the artifact, and where the content lies.
        again: an earlier sink may have logged it.
    """

    number: int
    name: str
    kind: str
    files: list[tuple[str, str]]
    again: bool


class SendAlert(msgspec.Struct, tag=True, frozen=True):
    """Send an alert; it is marked as sent already."""

    title: str
    text: str
    level: str


class AskUpdates(msgspec.Struct, tag=True, frozen=True):
    """What became of the tables and artifacts since it was asked last?"""


class Confirm(msgspec.Struct, tag=True, frozen=True):
    """Say what the server has shown so far; answered at once."""


class Finish(msgspec.Struct, tag=True, frozen=True):
    """End the run, its config and summary set to the fold.

    Attributes:
        exit_code: what W&B is told; None leaves the run without W&B's own finish as soon as W&B
            has all of it, so that it shows *crashed*.
    """

    exit_code: int | None
    summary: dict[str, Any]
    config: dict[str, Any] = {}


class Opened(msgspec.Struct, tag=True, frozen=True):
    """The run is open.

    Attributes:
        next_row: number of the first row that W&B does not have.
        base: W&B's own step of row 0.
        url: the run's page, when it has one.
        confirm_interval_s: how often this child asks the server for its step; None: never.
        alerts: alerts in the run's files (offline); None where nobody can tell (online).
    """

    next_row: int
    base: int
    url: str | None
    entity: str | None
    confirm_interval_s: float | None = None
    alerts: int | None = None


class LoggedTable(msgspec.Struct, frozen=True):
    """A table as the run's summary holds it, and the number of its row."""

    row: int
    key: str
    value: dict[str, Any]


class Applied(msgspec.Struct, tag=True, frozen=True):
    """Everything up to before this row number is with W&B's client.

    Attributes:
        tables: tables that were logged, as the summary holds them.
    """

    next_row: int
    tables: list[LoggedTable] = []


class UpdateOutcome(msgspec.Struct, frozen=True):
    """What became of a table or an artifact.

    Attributes:
        number: its number among the run's updates.
        state: ``done``: W&B has it; ``handed``: its client has it; ``failed``.
        error: why it failed.
        table: the table, where an earlier sink may have logged its row.
    """

    number: int
    state: str
    error: str = ""
    table: LoggedTable | None = None


class Updated(msgspec.Struct, tag=True, frozen=True):
    """Answer to whatever concerns tables, artifacts and alerts."""

    outcomes: list[UpdateOutcome] = []


class Confirmed(msgspec.Struct, tag=True, frozen=True):
    """What the server has said so far.

    Attributes:
        rows: rows that it has.
        answers: how often it has answered since the run was opened.
        error: why it did not answer the last time.
    """

    rows: int
    answers: int
    error: str | None


class Finished(msgspec.Struct, tag=True, frozen=True):
    """The run is ended, or left with all of it at W&B.

    Attributes:
        rows: rows found in the run's files (offline), or which the server has (online).
        updates: tables and artifacts that had been handed over, and were found in the files.
    """

    rows: int
    updates: list[int] = []


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The request could not be carried out; the child ends after this."""

    error: str


Request = Open | Apply | LogTable | LogArtifact | SendAlert | AskUpdates | Confirm | Finish
Reply = Opened | Applied | Updated | Confirmed | Finished | Failed

_encoder = msgspec.msgpack.Encoder()


def pack(message: Request | Reply) -> bytes:
    """A message as it goes through the pipe."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body
