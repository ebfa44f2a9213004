"""The driver that owns the run, as it ends: what it knows of itself, and what it waits for.

These run in an exit handler, where Ray must not be called; HTTP does.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, NoReturn

from raywb.reports import RunInfo
from raywb.shipping import Endpoint, Sender

__all__ = ["ExitCode", "await_end_of_run"]

_log = logging.getLogger(__name__)

#: Longest that a driver whose cluster ends with it waits for W&B to close the run, in seconds.
CLOSE_LIMIT_S = 60.0

#: A service that does not answer for longer than its restart takes is gone, in seconds.
GONE_S = 5.0

#: Pause between two questions, in seconds.
PAUSE_S = 0.1


class ExitCode:
    """How this process ends, as far as that can be known in an exit handler.

    Python itself remembers an exception that nobody caught. What ``sys.exit`` was called with
    (Ray's handler of SIGTERM does that, too) it forgets, so that is noted on the way, as W&B's own
    client does it; the call itself is as ever.
    """

    def __init__(self) -> None:
        self._asked_for: Any = None
        self._original = sys.exit
        self._noting = self._note
        sys.exit = self._noting

    def _note(self, status: Any = None, /) -> NoReturn:
        self._asked_for = status
        self._original(status)

    def remove(self) -> None:
        """Note no more."""
        if sys.exit is self._noting:
            sys.exit = self._original

    @property
    def failed(self) -> bool:
        """An exception, or an exit code other than 0; at an interactive prompt neither counts."""
        if hasattr(sys, "ps1"):
            return False
        return getattr(sys, "last_type", None) is not None or self._asked_for not in (None, 0)


def await_end_of_run(endpoint: Endpoint, source_id: str, run: RunInfo) -> None:
    """Wait until W&B has closed the run that ends with this process, within a limit."""
    if not _is_closed_in_time(Sender(endpoint, timeout_s=GONE_S), source_id):
        _log.warning(
            "raywb: the driver and its Ray cluster end before run %s is with W&B; its rows are "
            "safe in %s: `raywb recover %s` brings them there",
            run.name,
            run.dir,
            run.dir,
        )


def _is_closed_in_time(sender: Sender, source_id: str) -> bool:
    now = heard_at = time.monotonic()
    deadline = now + CLOSE_LIMIT_S
    while now < deadline and now - heard_at < GONE_S:
        try:
            if sender.send(source_id, 0, b"").run_closed:
                return True
            heard_at = time.monotonic()
        except OSError as error:
            _log.debug("raywb: the service does not answer at the driver's end: %s", error)
        time.sleep(PAUSE_S)
        now = time.monotonic()
    return False
