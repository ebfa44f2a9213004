"""For drivers and workers that want it: flush when a signal announces the end, then go on.

Nothing of this is installed unless it is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from raywb.this_process import present_connection

__all__ = ["flush_on_signal"]

_log = logging.getLogger("raywb")


@contextlib.contextmanager
def flush_on_signal(
    *numbers: signal.Signals, timeout_s: float = 10.0, then_signal: bool = True
) -> Iterator[None]:
    """Within the block, a signal first sends this process's rows to the service.

    The sending happens in a thread, over HTTP alone, while the program goes on. Then the signal
    comes again and finds the handler that was there before the block: the program's own, Ray's,
    or none, and the process ends as it would have. A second signal finds that one at once.

    Args:
        *numbers: ``SIGTERM`` by default.
        timeout_s: longest that the sending may hold the signal back.
        then_signal: send it again; without, the program goes on after the flush.

    Raises:
        ValueError: this is not the main thread, which alone can take signals.
    """
    flush = _Flush(timeout_s, then_signal)
    for number in numbers or (signal.SIGTERM,):
        flush.before[number] = signal.signal(number, flush.take)
    try:
        yield
    finally:
        for taken in flush.before:
            flush.give_back(taken)


class _Flush:
    def __init__(self, timeout_s: float, then_signal: bool) -> None:
        self.before: dict[int, object] = {}
        self._timeout_s = timeout_s
        self._then_signal = then_signal

    def take(self, number: int, _frame: FrameType | None) -> None:
        # In the interrupted thread nothing is waited for: it may hold the journal's lock.
        if self._then_signal:
            self.give_back(number)
        threading.Thread(
            target=self._flush, args=(number,), name="raywb-flush", daemon=True
        ).start()

    def give_back(self, number: int) -> None:
        """Reinstall the handler that was there before, unless somebody has set another since."""
        if signal.getsignal(number) == self.take:
            before = self.before[number]
            signal.signal(number, before if before is not None else signal.SIG_DFL)  # type: ignore[arg-type]

    def _flush(self, number: int) -> None:
        connection = present_connection()
        if connection is not None and not connection.flush(self._timeout_s):
            _log.warning(
                "raywb: not all rows were sent within %g s of %s; the rest is safe in this "
                "process's journal",
                self._timeout_s,
                signal.Signals(number).name,
            )
        if self._then_signal:
            os.kill(os.getpid(), number)
