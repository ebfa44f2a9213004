"""Rows that wait for a value on a device, and those behind them.

Such a row has no number yet, so it is in no journal: a process that is killed meanwhile takes it
along, with the rows of the same client behind it. Until then they count as waiting, not as
logged. Asked for is the device at each ``log()``, by ``flush()``, ``close()`` and at exit.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from raywb.device_values import Copies
from raywb.rows import Scalar
from raywb.values import Refusal, scalar

__all__ = ["RowsAside"]

#: Most rows of a client that wait; with more of them ``log()`` waits for the first.
MOST_ROWS = 64

#: Longest that ``log()`` waits so, in seconds: then the row goes without what it waits for.
LONGEST_WAIT_S = 60.0

#: Pauses between two questions to a device that is waited for, in seconds.
PAUSE_RANGE_S = (0.0002, 0.01)


class _Waiting(NamedTuple):
    time_s: float
    step: int | float | None
    row: dict[str, Scalar]
    copies: Copies | None


class RowsAside:
    """The rows of one client that wait, in their order.

    Args:
        take: puts a row into the journal; it is given time, step and values.
        refuse: told of values that cannot be had.
        count_loss: counts a row that has no value left, by reason.
        among: this is in there while rows wait.
    """

    def __init__(
        self,
        take: Callable[[float, int | float | None, dict[str, Scalar]], None],
        refuse: Callable[[list[Refusal]], None],
        count_loss: Callable[[str], None],
        among: set[RowsAside],
    ) -> None:
        self._take = take
        self._refuse = refuse
        self._count_loss = count_loss
        self._among = among
        self._rows: deque[_Waiting] = deque()
        # Reentrant: a signal handler may log in the middle of a log().
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._rows)

    def put(
        self,
        time_s: float,
        step: int | float | None,
        row: dict[str, Scalar],
        on_device: dict[str, Any],
    ) -> None:
        """Take over a row; it goes on at once when nothing waits and it has all its values.

        Args:
            time_s: when it was logged.
            step: the user's step.
            row: its values; those on a device have a placeholder there.
            on_device: the tensors, by key.
        """
        copies = Copies(on_device) if on_device else None
        with self._lock:
            self._rows.append(_Waiting(time_s, step, row, copies))
            self._among.add(self)
            self._release()
            while len(self._rows) > MOST_ROWS:
                copies = self._rows[0].copies
                if not self._wait_for_first(time.monotonic() + LONGEST_WAIT_S) and copies:
                    copies.give_up()
                self._release()

    def settle(self, timeout_s: float, *, give_up: bool = False) -> bool:
        """Wait until nothing waits any more.

        Args:
            timeout_s: longest that it may take.
            give_up: let the rows that still wait then go without what they wait for.

        Returns:
            False when there still are some.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._release()
            while self._rows and self._wait_for_first(deadline):
                self._release()
            if give_up:
                for waiting in list(self._rows):
                    if waiting.copies is not None:
                        waiting.copies.give_up()
                self._release()
            return not self._rows

    def abandon_in_child(self) -> None:
        """A forked child: the rows are its parent's, and the device must not be asked here."""
        self._lock = threading.RLock()
        self._rows = deque()
        self._among = set()

    def _wait_for_first(self, deadline: float) -> bool:
        """Wait for what the first row needs; False when the time was over before."""
        pause_s, longest_s = PAUSE_RANGE_S
        while self._rows and (copies := self._rows[0].copies) is not None and not copies.arrived:
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, longest_s)
        return True

    def _release(self) -> None:
        """Let the first rows go, as far as they have all their values."""
        while self._rows and ((copies := self._rows[0].copies) is None or copies.arrived):
            time_s, step, row, copies = self._rows.popleft()
            refused = self._fill(row, copies) if copies is not None else []
            if refused:
                self._refuse(refused)
            if row:
                self._take(time_s, step, row)
            else:
                self._count_loss("no_device_value")
        if not self._rows:
            self._among.discard(self)

    def _fill(self, row: dict[str, Scalar], copies: Copies) -> list[Refusal]:
        refused = [Refusal(key, "a tensor", why) for key, why in copies.errors.items()]
        for key, value in copies.items():
            taken = scalar(value)
            if isinstance(taken, Refusal):
                refused.append(taken._replace(key=key))
            else:
                row[key] = taken
        for one in refused:
            row.pop(one.key, None)
        return refused
