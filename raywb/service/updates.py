"""A run's tables, artifacts and alerts: which of them W&B has, and what is to be done next.

They are numbered in the outbox like rows, but W&B's step is no cursor over them: a row says
nothing of the files that it refers to. So what is done is marked, one by one, in the run's state:
an artifact, and that which holds a table, when W&B has it, until then it is handed over again and
W&B knows it by its digest; an alert, online, before it is sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from raywb.service.blobs import BlobStore
from raywb.service.outbox import OutAlert, OutArtifact, Outbox, OutRow
from raywb.service.sink_messages import (
    AskUpdates,
    LogArtifact,
    LoggedTable,
    LogTable,
    Request,
    SendAlert,
    TableOfRow,
    Updated,
)
from raywb.service.state import UpdateMarks

__all__ = ["Updates", "table_of_row"]

_log = logging.getLogger(__name__)

#: Tables and artifacts that W&B's client works on at the same time.
AT_ONCE = 4

#: How often W&B's client is asked what became of them, in seconds.
ASK_EVERY_S = 0.25

#: Pauses before one that failed is tried again: first and longest, in seconds.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0

#: Time in which an alert leaves W&B's client, in seconds. If the client dies before, it counts
#: as unconfirmed.
ALERT_LEAVES_S = 10.0

#: A run that is to end waits for one that fails until it was tried this often.
ATTEMPTS_AT_FINISH = 4

#: Most that are named in a report; the others are counted.
MOST_NAMED = 20


class Ask(Protocol):
    """Sends one request to the sink's process and returns its answer."""

    async def __call__(self, request: Request, expected: type[Updated], /) -> Updated: ...


def table_of_row(row: int, item: OutRow) -> TableOfRow | None:
    """The table of a numbered row as the sink's process takes it."""
    table = item.table
    return TableOfRow(row, table.key, table.columns, table.rows) if table is not None else None


class Updates:
    """The updates of one run that are no plain rows.

    Args:
        number: the run's number in the outbox.
        marks: what is known to be done; changed here.
        save: writes the marks down.
        on_done: called when an artifact or a table needs nothing more.
    """

    def __init__(
        self,
        number: int,
        outbox: Outbox,
        blobs: BlobStore,
        marks: UpdateMarks,
        save: Callable[[], None],
        on_done: Callable[[], None],
    ) -> None:
        self._run = number
        self._outbox = outbox
        self._blobs = blobs
        self._marks = marks
        self._save = save
        self._on_done = on_done
        self._seen = marks.before
        #: Numbers that are neither done nor given up; those before `_again` may be with W&B.
        self._pending: dict[int, _Attempts] = {}
        self._again = outbox.updates_of(number)
        self._sessions = 0
        #: How many W&B's client works on.
        self._working = 0
        self._asked_at = 0.0
        #: When the alerts of this session were sent that may still be on their way.
        self._sent_at: list[float] = []
        self._files_tell = False

    @property
    def tables(self) -> dict[str, Any]:
        """What the run's summary holds of its tables."""
        return {key: value for key, (_, value) in self._marks.tables.items()}

    @property
    def unconfirmed_alerts(self) -> int:
        """Alerts of which nobody knows whether W&B got them."""
        return self._marks.unconfirmed_alerts - len(self._sent_at)

    def begin_session(self, alerts_in_files: int | None) -> None:
        """Another child begins: what the one before had not finished is to be done again.

        Args:
            alerts_in_files: offline, the files tell how many alerts they hold, and these are the
                first ones; None where nobody can tell.
        """
        self._look()
        if self._sessions:
            self._again = self._outbox.updates_of(self._run)
        self._sessions += 1
        for attempts in self._pending.values():
            attempts.state = "waiting"
        self._sent_at.clear()
        self._files_tell = alerts_in_files is not None
        numbers = range(self._outbox.updates_of(self._run))
        alerts = [n for n in numbers if self._outbox.update_type(self._run, n) is OutAlert]
        self.note_done([n for n in alerts[: alerts_in_files or 0] if n in self._pending])

    def end_session(self, found: list[int]) -> None:
        """The child has ended the run: all that it was handed is with W&B.

        Args:
            found: tables and artifacts that are in the run's files (offline).
        """
        if self._files_tell:
            kinds = {n: self._outbox.update_type(self._run, n) for n in self._pending}
            found = [*found, *(n for n, kind in kinds.items() if kind is OutAlert)]
        self._settle_alerts(len(self._sent_at))
        self.note_done(found)

    def note_tables(self, tables: list[LoggedTable]) -> None:
        """Remember what the summary says of tables; of each key, the last row's counts."""
        known = self._marks.tables
        newer = [one for one in tables if one.key not in known or known[one.key][0] < one.row]
        if newer:
            known |= {one.key: (one.row, one.value) for one in newer}
            self._save()

    def _look(self) -> None:
        for number in range(self._seen, self._outbox.updates_of(self._run)):
            if number not in self._marks.done:
                self._pending[number] = _Attempts()
        self._seen = self._outbox.updates_of(self._run)

    async def step(self, ask: Ask, applied_rows: int) -> float | None:
        """Hand over what can be, and hear what became of the rest.

        Args:
            ask: reaches the present child.
            applied_rows: rows that W&B's client has.

        Returns:
            In how many seconds there is something to do again; None when nothing is known of.

        Raises:
            OSError: the marks cannot be written.
        """
        self._look()
        now = time.monotonic()
        self._settle_alerts(sum(now - sent_at > ALERT_LEAVES_S for sent_at in self._sent_at))
        await self._hear(ask)
        before: set[str] = set()
        self._working = sum(one.state == "working" for one in self._pending.values())
        for number, attempts in list(self._pending.items()):
            is_due = attempts.state == "waiting" and attempts.due_at <= time.monotonic()
            if is_due and attempts.name not in before:
                await self._begin(number, attempts, ask, applied_rows, before)
            self._working += is_due and attempts.state == "working"
            if attempts.name and self._may_come(attempts):
                before.add(attempts.name)
        if any(attempts.state == "working" for attempts in self._pending.values()):
            return ASK_EVERY_S
        due_at = [a.due_at for a in self._pending.values() if a.failed and a.state == "waiting"]
        return max(min(due_at) - time.monotonic(), ASK_EVERY_S) if due_at else None

    async def _hear(self, ask: Ask) -> None:
        working = any(attempts.state == "working" for attempts in self._pending.values())
        if not working or time.monotonic() < self._asked_at + ASK_EVERY_S:
            return
        self._asked_at = time.monotonic()
        done = []
        outcomes = (await ask(AskUpdates(), Updated)).outcomes
        self.note_tables([outcome.table for outcome in outcomes if outcome.table is not None])
        for outcome in outcomes:
            attempts = self._pending.get(outcome.number)
            if attempts is None:
                continue
            if outcome.state == "done":
                done.append(outcome.number)
            elif outcome.state == "handed":
                attempts.state = "handed"
            else:
                attempts.fail(outcome.error)
                _log.warning("raywb: %s", self._describe(outcome.number, attempts))
        if done:
            self.note_done(done)
            self._on_done()

    async def _begin(
        self, number: int, attempts: _Attempts, ask: Ask, applied_rows: int, before: set[str]
    ) -> None:
        """Hand one over, unless an earlier one of its name (in ``before``) is on its way.

        W&B numbers the versions of a name in the order in which they arrive.
        """
        if attempts.waits_for is not None and not self._blobs.has(attempts.waits_for):
            return
        if self._working >= AT_ONCE and self._outbox.update_type(self._run, number) is not OutAlert:
            return
        try:
            update = self._outbox.update(self._run, number)
        except OSError as error:
            attempts.fail(str(error))
            return
        again = number < self._again
        attempts.name = _artifact_name(update.item)
        if attempts.name in before:
            return
        match update.item:
            case OutAlert():
                await self._alert(number, attempts, ask, update.item)
            case OutArtifact(name=name, kind=kind):
                attempts.waits_for = self._missing(update.item)
                if attempts.waits_for is None:
                    files = [(f.path, str(self._blobs.path(f.digest))) for f in update.item.files]
                    await ask(LogArtifact(number, name, kind, files, again), Updated)
                    attempts.state = "working"
            case OutRow() if update.row is not None and update.row < applied_rows:
                table = table_of_row(update.row, update.item)
                if table is not None:
                    await ask(LogTable(number, table, again), Updated)
                    attempts.state = "working"

    async def _alert(self, number: int, attempts: _Attempts, ask: Ask, item: OutAlert) -> None:
        """Send an alert, at most once.

        Offline the files tell which alerts there are. Online it is marked first: it may be lost
        in between, and is counted then, but never sent twice.
        """
        if not self._files_tell:
            self._marks.unconfirmed_alerts += 1
            self._sent_at.append(time.monotonic())
            self.note_done([number])
        await ask(SendAlert(item.title, item.text, item.level), Updated)
        attempts.state = "handed"

    def _settle_alerts(self, count: int) -> None:
        """These have had the time to leave W&B's client."""
        if count:
            del self._sent_at[:count]
            self._marks.unconfirmed_alerts -= count
            self._save()

    def _missing(self, artifact: OutArtifact) -> str | None:
        """Digest of the first of its files that is not here."""
        return next((f.digest for f in artifact.files if not self._blobs.has(f.digest)), None)

    def note_done(self, numbers: list[int]) -> None:
        """Mark these as needing nothing more."""
        if not numbers:
            return
        marks = self._marks
        for number in numbers:
            self._pending.pop(number, None)
        found = {*marks.done, *numbers}
        while marks.before in found:
            found.discard(marks.before)
            marks.before += 1
        marks.done = sorted(number for number in found if number > marks.before)
        self._save()

    def try_again(self) -> None:
        """Somebody asks for another try of what failed before."""
        for attempts in self._pending.values():
            attempts.failed = 0
            attempts.due_at = 0.0

    def note_alerts_sent(self) -> None:
        """All alerts that there are were sent by somebody else."""
        numbers = range(self._outbox.updates_of(self._run))
        self._look()
        alerts = [n for n in numbers if self._outbox.update_type(self._run, n) is OutAlert]
        self.note_done([n for n in alerts if n in self._pending])

    @property
    def settled(self) -> bool:
        """Nothing more will come of waiting: what is not done cannot be done now."""
        self._look()
        return not any(self._may_come(attempts) for attempts in self._pending.values())

    def _may_come(self, attempts: _Attempts) -> bool:
        if attempts.state != "waiting":
            return attempts.state == "working"
        if attempts.waits_for is not None and not self._blobs.has(attempts.waits_for):
            return self._blobs.are_coming
        return attempts.failed < ATTEMPTS_AT_FINISH

    def undelivered(self, *, closed: bool) -> list[str]:
        """What W&B does not have, each with the reason.

        Args:
            closed: the run has ended; until then, what W&B's client has written to its files
                counts as delivered.
        """
        self._look()
        left = {n: a for n, a in self._pending.items() if closed or a.state != "handed"}
        shown = [self._describe(number, left[number]) for number in list(left)[:MOST_NAMED]]
        return shown + ([f"{len(left) - MOST_NAMED} more"] if len(left) > MOST_NAMED else [])

    def _describe(self, number: int, attempts: _Attempts) -> str:
        try:
            item = self._outbox.update(self._run, number).item
        except OSError as error:
            return str(error)
        match item:
            case OutArtifact(name=name):
                what = f"artifact {name!r}"
            case OutAlert(title=title):
                what = f"alert {title!r}"
            case OutRow(table=table):
                what = f"table {table.key!r}" if table else "row"
        if attempts.error:
            return f"{what} ({attempts.error})"
        if isinstance(item, OutArtifact) and self._missing(item):
            return f"{what} (its files have not come)"
        return f"{what} (on its way)"

    def needed_blobs(self) -> set[str]:
        """Digests of the blobs that an artifact which W&B does not have is made of.

        Raises:
            OSError: one of them cannot be read in the outbox.
        """
        self._look()
        items = (self._outbox.update(self._run, number).item for number in self._pending)
        artifacts = (item for item in items if isinstance(item, OutArtifact))
        return {file.digest for artifact in artifacts for file in artifact.files}


def _artifact_name(item: OutRow | OutArtifact | OutAlert) -> str:
    """What tells artifacts of one name from those of another; nothing for an alert."""
    match item:
        case OutArtifact(name=name):
            return f"artifact {name}"
        case OutRow(table=table) if table is not None:
            return f"table {table.key}"
    return ""


class _Attempts:
    """What was tried with one update: ``waiting``, ``working`` or ``handed``.

    ``name`` is empty until it is known. ``handed`` is what W&B's client has in hand offline: it
    is in its files when the run ends.
    """

    def __init__(self) -> None:
        self.state = "waiting"
        self.name = ""
        self.failed = 0
        self.due_at = 0.0
        self.error = ""
        self.waits_for: str | None = None

    def fail(self, error: str) -> None:
        pause_s = min(FIRST_PAUSE_S * 2**self.failed, LONGEST_PAUSE_S)
        self.state = "waiting"
        self.failed += 1
        self.due_at = time.monotonic() + pause_s
        self.error = error
