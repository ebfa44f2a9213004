"""Runs that stages have of their own: which there are, who writes to them, and how they end.

Everything here follows from messages that are in the ledger, and from the batches that were made
of them, so it is the same after a restart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from typing import NamedTuple

from raywb.rows import Channel, End, EndChannel
from raywb.service.definitions import Definitions

__all__ = ["FIRST_STAGE_RUN", "StageRuns", "Verdict"]

#: Runs of stages are numbered from here in the outbox; the cluster's runs are numbered from 1.
FIRST_STAGE_RUN = 1_000_000


class Verdict(NamedTuple):
    """How a run has ended: with an exit code, or crashed, since a writer of it was killed."""

    exit_code: int
    crashed: bool


class _Writer:
    """One channel that writes to a run; ``verdict`` is None while it is open."""

    def __init__(self, source_id: str) -> None:
        self.source_id = source_id
        self.verdict: Verdict | None = None


class StageRuns:
    """The state of all runs of stages, as far as the merge knows.

    Attributes:
        known: numbers of the runs that there are.
        rows: rows received for each.
    """

    def __init__(self) -> None:
        self.known: set[int] = set()
        self.rows: Counter[int] = Counter()
        self._definitions: dict[int, Definitions] = {}
        self._writers: dict[str, dict[int, _Writer]] = {}
        self._of_run: dict[tuple[int, int], dict[tuple[str, int], _Writer]] = {}

    def run_of(self, channel: Channel | None) -> int:
        """The run that a channel's rows belong to; 0 for the cluster's."""
        return channel.run if channel is not None and channel.run in self.known else 0

    def definitions(self, run: int) -> Definitions:
        """What is defined in a run."""
        if run not in self._definitions:
            self._definitions[run] = Definitions()
            self._definitions[run].open_run(run)
        return self._definitions[run]

    def note_channel(self, source_id: str, channel: Channel) -> None:
        """Somebody writes to a run."""
        if channel.session:
            writer = _Writer(source_id)
            self._writers.setdefault(source_id, {})[channel.channel] = writer
            of_run = self._of_run.setdefault((channel.run, channel.session), {})
            of_run[source_id, channel.channel] = writer

    def note_end_channel(self, source_id: str, message: EndChannel) -> None:
        """A client was closed."""
        writer = self._writers.get(source_id, {}).get(message.channel)
        if writer is not None:
            writer.verdict = Verdict(message.exit_code, crashed=False)

    def note_end(self, source_id: str, end: End) -> None:
        """A process has ended, and with it all of its clients."""
        for writer in self._writers.get(source_id, {}).values():
            # What it said before counts, also when rows of an exit handler came behind it.
            if writer.verdict is None:
                writer.verdict = Verdict(int(bool(end.failed)), crashed=end.killed)

    def verdict(self, run: int, session: int, writers: int) -> Verdict | None:
        """How a run has ended since it was opened for the n-th time; None while it goes on.

        Args:
            run: the run's number.
            session: how often it was opened.
            writers: how many attached to it since then; some may not have been heard yet.
        """
        known = self._of_run.get((run, session), {}).values()
        if len(known) < max(writers, 1) or any(writer.verdict is None for writer in known):
            return None
        return self.so_far(run, session)

    def so_far(self, run: int, session: int, lost: Container[str] = ()) -> Verdict:
        """What those say that have ended; those of sources that are ``lost`` count as killed."""
        verdicts = [
            writer.verdict or Verdict(0, crashed=writer.source_id in lost)
            for writer in self._of_run.get((run, session), {}).values()
        ]
        return Verdict(
            max((one.exit_code for one in verdicts), default=0),
            any(one.crashed for one in verdicts),
        )
