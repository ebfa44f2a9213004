"""Python's own logging in the run: what was warned about, how often, and the last error.

    logging.getLogger().addHandler(raywb.log_handler.RaywbHandler(stage="training/pretrain"))

What arrives, under the stage's name:

* ``log/warnings`` and ``log/errors``, counted over all records, on the axis ``log/time_s``
  (seconds since the handler was made); of a rank they are ``log/rank_<n>/warnings``, …;
  further processes of the same stage, or rank, have theirs under ``log/process_<n>/``
  (``log/<host>_<pid>/`` in a stage's own run, where no rank tells them apart);
* the table ``log/records``: one row for each place in the code that logged, with its latest
  message, how often it did, and the end of its latest traceback;
* ``log/last_error`` in the summary;
* an alert for each place that logs an error, a few at first and then one a minute.

A loop that logs a million warnings is one row of the table with a large count. Nothing here waits
for anything, and nothing of the process is told but what the record says: no environment, no
local variables.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import traceback
from typing import Any

from raywb.client import Client

__all__ = ["RaywbHandler"]

#: Places in the code that get a row of their own; later ones are counted together.
MOST_PLACES = 100

#: What of a message and of a traceback is kept, in characters.
MESSAGE_CHARACTERS = 500
TRACEBACK_CHARACTERS = 2000

#: A place's traceback is formatted once in so many seconds.
TRACEBACK_EVERY_S = 1.0

#: Counts are written at once this often, and then once in so many seconds.
COUNTS_BURST, COUNTS_EVERY_S = 5, 10.0

#: The same of the table when it has a new place.
TABLES_BURST, TABLES_EVERY_S = 3, 10.0

#: Without a new place the table is written again after this time, which doubles, in seconds.
TABLE_AGAIN_S, TABLE_AGAIN_LONGEST_S = 60.0, 3600.0

#: The same of alerts.
ALERTS_BURST, ALERTS_EVERY_S = 3, 60.0

#: Loggers that are passed over, with all below them: what raywb says of itself.
OWN_LOGGERS = ("raywb",)


class _Allowance:
    """How often something may be done: some times at once, then once in a while."""

    def __init__(self, burst: int, every_s: float) -> None:
        self._burst, self._every_s = burst, every_s
        self._left, self._at = float(burst), time.monotonic()

    def take(self) -> bool:
        """Whether it may be done now."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) / self._every_s, self._burst)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class _Place:
    """One place in the code, and what it logged."""

    def __init__(self, record: logging.LogRecord) -> None:
        self.where = f"{record.pathname}:{record.lineno}"
        self.logger = record.name
        self.count = 0
        self.alerted = False
        self.trace = ""
        self._traced_s = 0.0

    def note(self, record: logging.LogRecord, message: str) -> None:
        self.count += 1
        self.level = record.levelname
        self.message = message
        self.time_s = record.created
        # To format one takes a hundred times as long as all the rest.
        if abs(record.created - self._traced_s) > TRACEBACK_EVERY_S:
            self._traced_s = record.created
            self.trace = _trace(record) or self.trace

    def row(self) -> dict[str, Any]:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time_s))
        return {
            "last": stamp,
            "level": self.level,
            "logger": self.logger,
            "message": self.message,
            "count": self.count,
            "where": self.where,
            "traceback": self.trace,
        }


class RaywbHandler(logging.Handler):
    """A ``logging.Handler`` that sends records of a level and above to the run.

    What was held back is written by its ``close()``; once its client is closed nothing is
    written any more.

    Args:
        client: whose stage it is; by default ``raywb.attach(stage, rank=…, world_size=…)``, in
            the calling thread. It is not closed here.
        level: records below it are passed over.
        stage: prefix of the keys, where no client is given.
        rank: this worker's rank among those that log the stage, where no client is given.
        world_size: how many there are.
        alert_level: records of this level and above are alerts too; None is never.

    Attributes:
        warnings, errors: records of these levels (below ERROR, and from it on) so far.

    Raises:
        RaywbError: no client is given, and none can be had; see :func:`raywb.attach`.
    """

    def __init__(
        self,
        client: Client | None = None,
        level: int | str = logging.WARNING,
        *,
        stage: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        alert_level: int | None = logging.ERROR,
    ) -> None:
        super().__init__(level)
        if client is None:
            from raywb.lifecycle import attach

            client = attach(stage, rank=rank, world_size=world_size)
        self._client = client
        self._alert_level = alert_level
        self._made_in = os.getpid()
        self._entered = threading.local()
        self._began = time.monotonic()
        self._begin()
        # After raywb's own exit handler was registered, so before it runs.
        atexit.register(self.close)

    def _begin(self) -> None:
        self._pid = os.getpid()
        rank = self._client.rank
        # Rows of its own client: they wait for no row of the user's that waits for a device.
        self._series = self._client.open_process_series(
            "log" if rank is None else f"log/rank_{rank}",
            axis="time_s",
            is_alone=rank is not None and self._pid == self._made_in,
        )
        self.warnings = self.errors = self._unlisted = 0
        self._places: dict[tuple[str, int, str, int], _Place] = {}
        self._counts = _Allowance(COUNTS_BURST, COUNTS_EVERY_S)
        self._tables = _Allowance(TABLES_BURST, TABLES_EVERY_S)
        self._alerts = _Allowance(ALERTS_BURST, ALERTS_EVERY_S)
        self._unwritten_counts = self._unwritten_rows = self._new_place = False
        self._last_error: str | None = None
        self._held_alerts = 0
        self._table_at, self._table_again_s = 0.0, TABLE_AGAIN_S

    def filter(self, record: logging.LogRecord) -> Any:
        """Pass over what raywb says of itself, before any lock is taken.

        A thread that logs with one of raywb's own locks held must not wait for another one that
        is in here and wants that lock.
        """
        if record.name.partition(".")[0] in OWN_LOGGERS or getattr(self._entered, "now", False):
            return False
        return super().filter(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record in; raises nothing, and waits for nothing."""
        self._entered.now = True
        try:
            if self._pid != os.getpid():
                self._begin()  # a forked child: its parent tells what was before
            self._take(record)
            self._write(at_once=False)
        except Exception:  # noqa: BLE001 - logging's own way with what a handler does wrong
            self.handleError(record)
        finally:
            self._entered.now = False

    def _take(self, record: logging.LogRecord) -> None:
        is_error = record.levelno >= logging.ERROR
        self.errors += is_error
        self.warnings += not is_error
        self._unwritten_counts = True
        key = (record.name, record.levelno, record.pathname, record.lineno)
        place = self._places.get(key)
        if place is None and len(self._places) < MOST_PLACES:
            place = self._places[key] = _Place(record)
            self._new_place = True
        message = _message(record)
        if place is None:
            self._unlisted += 1
        else:
            place.note(record, message)
        self._unwritten_rows = True
        if is_error:
            self._last_error = message
        if self._alert_level is not None and record.levelno >= self._alert_level:
            self._alert(record, place, message)

    def _alert(self, record: logging.LogRecord, place: _Place | None, message: str) -> None:
        if self._client.closed or place is None or place.alerted or not self._alerts.take():
            self._held_alerts += 1
            return
        place.alerted = True
        held = (
            f"\n{self._held_alerts} errors before it were no alerts." if self._held_alerts else ""
        )
        self._held_alerts = 0
        text = f"{message}\n{place.where}\n{place.trace}{held}"
        title = f"{record.levelname} in {self._client.stage or record.name}: {message}"
        self._client.alert(title.splitlines()[0][:60], text, level="ERROR")

    def _write(self, *, at_once: bool) -> None:
        """Write what is new, as far as it may be now."""
        if self._client.closed:
            return  # no loss: whoever closed it wants no more in the run
        if self._unwritten_counts and (at_once or self._counts.take()):
            self._unwritten_counts = False
            values = {"warnings": self.warnings, "errors": self.errors}
            values["time_s"] = time.monotonic() - self._began  # type: ignore[assignment]
            self._series.log(values)
            if self._last_error is not None:
                self._series.set_summary({"last_error": self._last_error})
                self._last_error = None
        if self._unwritten_rows and (at_once or self._may_write_table()):
            self._unwritten_rows = self._new_place = False
            self._table_at = time.monotonic()
            self._series.log_table(self._rows(), "records")

    def _may_write_table(self) -> bool:
        if self._new_place:
            return self._tables.take()
        if time.monotonic() - self._table_at < self._table_again_s:
            return False
        self._table_again_s = min(2 * self._table_again_s, TABLE_AGAIN_LONGEST_S)
        return True

    def _rows(self) -> list[dict[str, Any]]:
        latest = sorted(self._places.values(), key=lambda place: -place.time_s)
        rows = [place.row() for place in latest]
        if self._unlisted:
            rest = dict.fromkeys(rows[0], "") | {"message": "other places", "count": self._unlisted}
            rows.append(rest)
        return rows

    def flush(self) -> None:
        """Write what was held back so far; does not wait for the service."""
        self._guarded_write()

    def close(self) -> None:
        """Write what was held back, and let go; logging does so at the end of the process."""
        self._guarded_write()
        atexit.unregister(self.close)
        super().close()

    def _guarded_write(self) -> None:
        if getattr(self._entered, "now", False) or self._pid != os.getpid():
            return
        self.acquire()
        self._entered.now = True
        try:
            self._write(at_once=True)
        except Exception as error:  # noqa: BLE001 - the end of a process must not fail on this
            logging.getLogger("raywb").warning("raywb: log records are not written: %r", error)
        finally:
            self._entered.now = False
            self.release()


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception as error:  # noqa: BLE001 - arguments that do not fit, objects without text
        what = record.msg if isinstance(record.msg, str) else f"a {type(record.msg).__name__}"
        text = f"{what} (its text cannot be made: {type(error).__name__})"
    return text[:MESSAGE_CHARACTERS]


def _trace(record: logging.LogRecord) -> str:
    """The end of the record's traceback, without the values of variables."""
    if record.exc_info and record.exc_info[1] is not None:
        text = "".join(traceback.format_exception(record.exc_info[1]))
    else:
        text = record.exc_text or ""
    return text[-TRACEBACK_CHARACTERS:]
