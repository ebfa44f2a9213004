"""Keeps one run's sink alive: starts the child, feeds it from the outbox, replaces it.

Every request has a deadline. A child that dies, hangs or refuses is killed and started again
after a growing pause; the new one says which row W&B has last, and the cursor is set there.
Nothing is kept in memory but the batch under way: the backlog is the outbox on disk.

Online, a row is delivered when the server shows it. The child is asked at intervals what the
server has shown; when rows do not arrive though it answers, the child is replaced, and the next
one goes on where the server really is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from raywb.errors import KeyMissing, SinkError
from raywb.reports import RunInfo, SinkStatus
from raywb.service.confirm import Standstill
from raywb.service.fold import Fold
from raywb.service.outbox import Cursor, Item, Outbox, OutConfig, OutDefine, OutRow, OutSummary
from raywb.service.sink_messages import (
    LEAVE_S,
    LENGTH,
    Applied,
    Apply,
    Confirm,
    Confirmed,
    Definition,
    Failed,
    Finish,
    Finished,
    Open,
    Opened,
    Reply,
    Request,
    pack,
)
from raywb.service.updates import Updates, table_of_row
from raywb.settings import process_environment, sink_environment

__all__ = ["SinkProcess", "definitions"]

_log = logging.getLogger(__name__)

_ReplyT = TypeVar("_ReplyT", bound=Reply)

#: Most rows in one request; with a deadline of a minute and a half, W&B's client may need a
#: tenth of a second for each.
ROWS_PER_REQUEST = 500

#: How often a run that is to end looks whether the last artifacts have come, in seconds.
LOOK_AGAIN_S = 0.5

#: Pauses before the child is started again: first and longest, in seconds. The first is above a
#: second, since W&B names an offline directory after the second in which it was made.
FIRST_PAUSE_S = 1.1
LONGEST_PAUSE_S = 30.0

#: Most rows that W&B's client is given beyond those that the server has shown: they would all be
#: sent again after a fault, and until then lie in W&B's client as well.
MOST_UNCONFIRMED_ROWS = 100_000


class SinkProcess:
    """The service's handle of one W&B run.

    Args:
        run: the run to write.
        outbox: where its rows are.
        fold: what the run amounts to so far; kept up to date by the service.
        updates: its tables, artifacts and alerts.
        open_request: makes the first message for a child; it is called at each start, so that
            a key that arrived meanwhile is found, and raises :class:`KeyMissing` without one.
        on_opened: called each time a child has opened the run.
        deadline_s: longest that one request may take.
        stderr: file for what the child and W&B's client print.
    """

    def __init__(
        self,
        run: RunInfo,
        outbox: Outbox,
        fold: Fold,
        updates: Updates,
        open_request: Callable[[], Open],
        *,
        on_opened: Callable[[Opened], None],
        deadline_s: float,
        stderr: Path,
    ) -> None:
        self.run = run
        #: Rows that W&B's client has taken, and rows that W&B has shown to have: online its
        #: server, offline its files, which are read when the run is opened and ended.
        self.delivered_rows = 0
        self.confirmed_rows = 0
        #: Rows that W&B had when it was first asked; None before.
        self.found_rows: int | None = None
        self._number = run.epoch
        self._outbox = outbox
        self._fold = fold
        self._updates = updates
        self._open_request = open_request
        self._on_opened = on_opened
        self._deadline_s = deadline_s
        self._stderr = stderr
        self._state = "opening"
        self._restarts = 0
        self._last_error: str | None = None
        self._child: asyncio.subprocess.Process | None = None
        #: Requests with rows that the child has not answered yet.
        self._unanswered = 0
        self._wake = asyncio.Event()
        self._again = asyncio.Event()
        self._finish: Finish | None = None
        self._resting = False
        #: Where a session that left had read to.
        self._cursor: Cursor | None = None
        self._standstill = Standstill()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self.done = asyncio.Event()

    @property
    def status(self) -> SinkStatus:
        """How this sink keeps up."""
        return SinkStatus(
            state=self._state,
            applied_rows=self.delivered_rows,
            confirmed_rows=self.confirmed_rows,
            restarts=self._restarts,
            last_error=self._last_error,
        )

    @property
    def emitted_rows(self) -> int:
        """Rows that W&B is to have, as far as they are known now."""
        return self._outbox.rows_of(self._number)

    def wake(self) -> None:
        """There is something new in the outbox."""
        self._wake.set()

    def finish(self, exit_code: int | None) -> None:
        """End the run as soon as everything in the outbox is with W&B; ``done`` tells when.

        Args:
            exit_code: what W&B is told; None leaves the run without W&B's own finish, so that
                it shows *crashed*.
        """
        self._finish = Finish(exit_code, {})
        self._wake.set()

    def rest(self, resting: bool) -> None:
        """Leave W&B alone while there is nothing to send, so that it shows the run as crashed.

        Whatever comes into the outbox later is sent, in a session that leaves again behind it.
        """
        if resting != self._resting:
            self._resting = resting
            self._wake.set()

    def retry_now(self) -> None:
        """What a sink waits for may have come: try again before the pause is over."""
        self._again.set()

    def stop(self) -> None:
        """Leave the run as it is, open; nothing that the child still says is heard."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def serve(self) -> None:
        """Deliver until the run is finished or the task is cancelled."""
        self._task = asyncio.current_task()
        pause_s = FIRST_PAUSE_S
        try:
            while not (self.done.is_set() or self._stopped):
                before = (self.delivered_rows, self.confirmed_rows)
                self._again.clear()
                try:
                    await self._session()
                except KeyMissing as error:
                    self._state, self._last_error = "no key", str(error)
                except (SinkError, OSError, TimeoutError, EOFError) as error:
                    self._restarts += 1
                    self._state = "retrying"
                    self._last_error = str(error) or type(error).__name__
                    _log.warning("W&B sink of %s: %s", self.run.name, self._last_error)
                finally:
                    await self._end_child()
                if self.done.is_set():
                    return
                if self._state == "resting":
                    await self._something_to_do()
                if self.delivered_rows > before[0] or self.confirmed_rows > before[1]:
                    pause_s = FIRST_PAUSE_S
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._again.wait()
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
        finally:
            await self._end_child()

    async def _session(self) -> None:
        """One child's life: open, feed, confirm, finish."""
        request = self._open_request()
        self._unanswered = 0
        with self._open_stderr() as stderr:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "raywb.service.wandb_sink",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env=sink_environment(process_environment(), f"{request.dir}/wandb-data"),
            )
        opened = await self._open(request)
        cursor = self._outbox.cursor(self._number, opened.next_row)
        interval_s = opened.confirm_interval_s
        loop = asyncio.get_running_loop()
        confirmed_at = loop.time()
        while True:
            self._wake.clear()
            if interval_s is not None and loop.time() - confirmed_at >= interval_s:
                confirmed_at = loop.time()
                await self._confirm()
            if self._window_is_full:
                await self._settle()
                await self._woken(interval_s)
                continue
            items = self._outbox.read(cursor, ROWS_PER_REQUEST)
            for start in range(0, len(items), ROWS_PER_REQUEST):
                await self._apply(items[start : start + ROWS_PER_REQUEST])
            if not items:
                await self._settle()
            pause_s = await self._updates.step(self._ask, self.delivered_rows)
            if items:
                continue
            if self._finish is not None and self._updates.settled:
                await self._end_run(self._finish.exit_code)
                if self._outbox.rows_of(self._number) > self.delivered_rows:
                    self._state = "opening"
                    return  # more came while W&B ended the run: it is opened again for that
                self._state = "finished"
                self.done.set()
                return
            if self._resting and self._finish is None and self._updates.settled:
                await self._end_run(None)
                self._state = "resting"
                self._cursor = cursor
                return
            ending = self._finish is not None or self._resting
            pauses_s = (pause_s, interval_s, LOOK_AGAIN_S if ending else None)
            await self._woken(min((one for one in pauses_s if one is not None), default=None))

    async def _something_to_do(self) -> None:
        """Wait until a run that was left has something for W&B again, or is to be ended."""
        while self._resting and self._finish is None:
            self._wake.clear()
            if self._cursor is None or self._outbox.read(self._cursor, 1):
                return
            if not self._updates.settled:
                return
            await self._wake.wait()

    async def _open(self, request: Open) -> Opened:
        opened = await self._ask(request, Opened)
        self._check_rows(opened.next_row)
        self._on_opened(opened)
        self._updates.begin_session(opened.alerts)
        self.delivered_rows = self.confirmed_rows = opened.next_row
        if self.found_rows is None:
            self.found_rows = opened.next_row
        self._standstill.begin(opened.next_row, opened.confirm_interval_s or 0.0)
        self._state = "running"
        return opened

    def _check_rows(self, rows: int) -> None:
        emitted = self._outbox.rows_of(self._number)
        if rows > emitted:
            raise SinkError(
                f"W&B's run {self.run.id} has {rows} rows and raywb emitted {emitted}: "
                "somebody else writes to this run; give this one another run_id"
            )

    @property
    def _window_is_full(self) -> bool:
        online = self.run.mode == "online"
        handed_rows = self.delivered_rows + self._unanswered * ROWS_PER_REQUEST
        return online and handed_rows - self.confirmed_rows >= MOST_UNCONFIRMED_ROWS

    async def _woken(self, timeout_s: float | None) -> None:
        """Wait until there is something to do, or it is time to look at the server's step."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    async def _confirm(self) -> None:
        """Take over what the server has shown.

        Raises:
            SinkError: rows were handed over, and the server's step stands still; or it has more
                than there are.
        """
        answer = await self._ask(Confirm(), Confirmed)
        self._check_rows(answer.rows)
        self.confirmed_rows = max(self.confirmed_rows, min(answer.rows, self.delivered_rows))
        self._last_error = answer.error or self._last_error
        now = asyncio.get_running_loop().time()
        patience_s = self._standstill.patience_s
        if self._standstill.note(answer.rows, self.delivered_rows, answer.answers, now):
            raise SinkError(
                f"W&B's server has shown {answer.rows} of {self.delivered_rows} rows for "
                f"{patience_s:g} s, and no more come; the rest is sent again"
            )

    def _open_stderr(self) -> IO[bytes]:
        self._stderr.parent.mkdir(parents=True, exist_ok=True)
        return open(self._stderr, "ab")

    async def _end_run(self, exit_code: int | None) -> None:
        deadline_s = self._deadline_s if exit_code is not None else self._deadline_s + LEAVE_S
        summary = {**self._updates.tables, **self._fold.summary()}
        end = Finish(exit_code, summary, self._fold.config)
        finished = await self._ask(end, Finished, deadline_s)
        self._updates.end_session(finished.updates)
        self.delivered_rows = self.confirmed_rows = finished.rows

    async def _apply(self, items: list[tuple[int | None, Item]]) -> None:
        """Hand rows over, and hear what became of those before them.

        So the child finds its next rows in the pipe when it is done with these.
        """
        self._pipes[0].write(pack(_apply_request(items)))
        self._unanswered += 1
        await self._settle(1)

    async def _settle(self, ahead: int = 0) -> None:
        """Hear what became of rows that were handed over, but for the last few requests."""
        while self._unanswered > ahead:
            applied = await self._answer("apply", Applied, self._deadline_s)
            self._unanswered -= 1
            self._updates.note_tables(applied.tables)
            self.delivered_rows = applied.next_row

    async def _ask(
        self, request: Request, expected: type[_ReplyT], deadline_s: float | None = None
    ) -> _ReplyT:
        """Send one request and read its answer, within the deadline."""
        await self._settle()
        self._pipes[0].write(pack(request))
        what = type(request).__name__.lower()
        return await self._answer(what, expected, deadline_s or self._deadline_s)

    @property
    def _pipes(self) -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
        """To the child, and from it."""
        child = self._child
        if child is None or child.stdin is None or child.stdout is None:
            raise SinkError("the sink's process is not running")
        return child.stdin, child.stdout

    async def _answer(self, what: str, expected: type[_ReplyT], deadline_s: float) -> _ReplyT:
        answers = self._pipes[1]
        try:
            async with asyncio.timeout(deadline_s):
                # Nobody waits until the request is taken: the child may be stuck in an answer
                # that fills its pipe. At most one request more is under way.
                header = await answers.readexactly(LENGTH.size)
                body = await answers.readexactly(LENGTH.unpack(header)[0])
        except TimeoutError:
            raise SinkError(
                f"W&B's client did not answer {what!r} within {deadline_s:g} s"
            ) from None
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise SinkError(f"the sink's process ended during {what!r}") from error
        reply: Reply = msgspec.msgpack.decode(body, type=Reply)
        if isinstance(reply, Failed):
            raise SinkError(reply.error)
        if not isinstance(reply, expected):
            raise SinkError(f"the sink answered {what!r} with {type(reply).__name__}")
        return reply

    async def _end_child(self) -> None:
        """Kill the child, and wait until it and both pipes are gone."""
        child = self._child
        if child is None:
            return
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        await child.wait()
        if child.stdout is not None:
            await child.stdout.read()
        if child.stdin is not None:
            child.stdin.close()
            with contextlib.suppress(ConnectionError):
                await child.stdin.wait_closed()
        # Only now: a cancellation in the middle comes back here and finds it.
        self._child = None


def _definition(item: OutDefine) -> Definition:
    return (item.name, item.step_metric, item.summary, item.step_sync)


def definitions(fold: Fold) -> list[Definition]:
    """A run's metric definitions, for whoever opens it again."""
    return [_definition(item) for item in fold.defines.values()]


def _apply_request(items: list[tuple[int | None, Item]]) -> Apply:
    rows = []
    config: dict[str, object] = {}
    summary: dict[str, object] = {}
    defines = []
    tables = []
    for number, item in items:
        match item:
            case OutRow() if number is not None:
                rows.append((number, item.time_s, item.metrics))
                if table := table_of_row(number, item):
                    tables.append(table)
            case OutConfig():
                config.update(item.values)
            case OutSummary():
                summary.update(item.values)
            case OutDefine():
                defines.append(_definition(item))
    return Apply(rows, config, summary, defines, tables)
