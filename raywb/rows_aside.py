"""Rows that wait for a value on a device, and those behind them.

Such a row has no number yet, so it is in no journal: a process that is killed meanwhile takes it
along, with the rows of the same client behind it. Until then they count as waiting, not as
logged. Asked for is the device at each ``log()``, by ``flush()``, ``close()`` and at exit.

Nobody waits with the lock held: a thread that waits for a device does not hold up another one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from raywb.device_values import Copies
from raywb.rows import Scalar
from raywb.values import Refusal, scalar

__all__ = ["RowsAside"]

#: Most rows of a client that wait; with more of them ``log()`` waits for the first.
MOST_ROWS = 64

#: Longest that ``log()`` waits so, in seconds: then all rows go without what they have on that
#: device, and nothing waits for it any more until it answers.
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
        among: this is in there while rows wait; the process's clients share it.
        say_waiting: told whether rows wait, whenever that may have changed.
    """

    def __init__(
        self,
        take: Callable[[float, int | float | None, dict[str, Scalar]], None],
        refuse: Callable[[list[Refusal]], None],
        count_loss: Callable[[str], None],
        among: set[RowsAside],
        say_waiting: Callable[[bool], None],
    ) -> None:
        self._take = take
        self._refuse = refuse
        self._count_loss = count_loss
        self._among = among
        self._say_waiting = say_waiting
        self._rows: deque[_Waiting] = deque()
        #: Rows that came, and rows that went on.
        self._came = self._went = 0
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
            self._came += 1
            self._among.add(self)
            self._say_waiting(True)
            self._release()
        if len(self._rows) > MOST_ROWS:
            self._make_room()

    def settle(self, timeout_s: float, *, give_up: bool = False) -> bool:
        """Wait until the rows that are there have gone on.

        A thread asks the device for its own rows only, and waits for other threads to ask for
        theirs; where it gives up in the end, it asks for all of them.

        Args:
            timeout_s: longest that it may take.
            give_up: let the rows that still wait then go without what they wait for.

        Returns:
            False when there still are some.
        """
        deadline = time.monotonic() + timeout_s
        goal = self._came
        for pause_s in _pauses():
            with self._lock:
                self._release(ask_from_any_thread=give_up)
                if self._went >= goal:
                    return True
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            time.sleep(min(pause_s, left_s))
        if give_up:
            with self._lock:
                for waiting in list(self._rows):
                    if waiting.copies is not None:
                        waiting.copies.give_up()
                self._release(ask_from_any_thread=True)
        return self._went >= goal

    def abandon_in_child(self) -> None:
        """A forked child: the rows are its parent's, and the device must not be asked here."""
        self._lock = threading.RLock()
        self._rows = deque()
        self._went = self._came
        self._say_waiting(False)

    def _make_room(self) -> None:
        """Wait until no more rows wait than may; give up the device that holds them for long."""
        deadline = time.monotonic() + LONGEST_WAIT_S
        went = self._went
        for pause_s in _pauses():
            with self._lock:
                self._release(ask_from_any_thread=True)
                if len(self._rows) <= MOST_ROWS:
                    return
                first = self._rows[0].copies
            if time.monotonic() >= deadline:
                if self._went != went:
                    return  # the device works; other threads fill what it empties
                if first is not None:
                    self._give_up_devices(first)
                    went = self._went
                continue
            time.sleep(pause_s)

    def _give_up_devices(self, first: Copies) -> None:
        """A device hangs: no row of any client waits for it any longer."""
        with self._lock:
            devices = first.give_up_devices()
        for rows in list(self._among):
            with rows._lock:
                for waiting in list(rows._rows):
                    if waiting.copies is not None and waiting.copies.devices & devices:
                        waiting.copies.give_up()
                rows._release()

    def _release(self, *, ask_from_any_thread: bool = False) -> None:
        """Let the first rows go, as far as they have all their values; the lock is held."""
        while self._rows:
            copies = self._rows[0].copies
            if copies and not copies.arrived(ask_from_any_thread=ask_from_any_thread):
                break
            time_s, step, row, copies = self._rows.popleft()
            refused = self._fill(row, copies) if copies is not None else []
            if refused:
                self._refuse(refused)
            if row:
                self._take(time_s, step, row)
            else:
                self._count_loss("no_device_value")
            self._went += 1
        if not self._rows:
            self._among.discard(self)
            self._say_waiting(False)

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


def _pauses() -> Iterator[float]:
    """How long to sleep between two looks, in seconds; for ever."""
    pause_s, longest_s = PAUSE_RANGE_S
    while True:
        yield pause_s
        pause_s = min(pause_s * 1.5, longest_s)
