"""The process that reads a directory's history, seen from whoever asks it.

It is started at the first question, ends when nobody has asked for some minutes, and is started
again when it died, after a pause if it dies again and again. Its memory and time are its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from raywb.errors import ServiceUnavailable
from raywb.settings import child_environment, process_environment

__all__ = ["LENGTH", "HistoryProcess"]

#: The length of a message.
LENGTH = struct.Struct(">I")

#: It is ended when nobody has asked for so long, in seconds.
IDLE_S = 300.0

#: Longest that whoever asks waits for an answer, in seconds, and after which the process is taken
#: for stuck. In between it is left alone: what it has read would have to be read again.
ANSWER_S = 30.0
STUCK_S = 300.0

#: One that lived for less has died early, in seconds: the second time and later it is started
#: again only after a pause, which doubles up to this.
EARLY_S = 60.0

#: Answers that may be waited for at the same time.
QUEUE = 64


class _Question(NamedTuple):
    """What the process works on; its answer, and when it came, on the loop's clock."""

    message: bytes
    asked_at: float
    child: asyncio.subprocess.Process
    answer: asyncio.Task[tuple[bytes, float]]


class HistoryProcess:
    """Asks ``python -m raywb.view.history`` about one service's directory.

    Args:
        directory: the service's directory.
        idle_s: see :data:`IDLE_S`.
        background: it gives way to everything else on the machine.
    """

    def __init__(
        self, directory: Path, *, idle_s: float = IDLE_S, background: bool = False
    ) -> None:
        self.directory = directory
        self._options = ["--background"] if background else []
        self._idle_s = idle_s
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None
        self._question: _Question | None = None
        self._began = 0.0
        self._early_deaths = 0
        self._not_before = 0.0

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is none."""
        child = self._child
        return child.pid if child is not None and child.returncode is None else None

    async def start(self) -> None:
        """Start it, if it does not run."""
        async with self._turn:
            await self._running()

    async def ask(self, request: msgspec.Struct, *, idle: bool = False) -> bytes:
        """The JSON that answers a request.

        Args:
            request: one of :mod:`raywb.view.history.requests`.
            idle: the process may end as if this had not been asked.

        Raises:
            ServiceUnavailable: there is no answer; the message says why.
        """
        if self._waiting >= QUEUE:
            raise ServiceUnavailable("too many questions at once; ask again in a moment")
        self._waiting += 1
        if not idle:
            self._keep()
        try:
            async with self._turn:
                reply = await self._ask(msgspec.json.encode(request))
        finally:
            self._waiting -= 1
            if not idle:
                self._end_later()
        if reply[:1] != b"\1":
            raise ServiceUnavailable(str(msgspec.json.decode(reply[1:])["error"]))
        return reply[1:]

    async def tell(self, request: msgspec.Struct) -> Any:
        """The same, decoded."""
        return msgspec.json.decode(await self.ask(request))

    async def _ask(self, message: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        if (before := self._question) is not None:
            # Whoever asked went, and the answer comes all the same; who asks it again has it.
            reply, answered_at = await self._answer_to(before)
            if before.message == message and loop.time() - answered_at < ANSWER_S:
                return reply
        child = await self._running()
        answer = loop.create_task(_exchange(child, message))
        self._question = _Question(message, loop.time(), child, answer)
        return (await self._answer_to(self._question))[0]

    async def _answer_to(self, question: _Question) -> tuple[bytes, float]:
        """Wait for an answer, which goes on to be waited for when this is cancelled."""
        await asyncio.wait([question.answer], timeout=ANSWER_S)
        if not question.answer.done():
            if asyncio.get_running_loop().time() - question.asked_at > STUCK_S:
                raise ServiceUnavailable(await self._mourn(question.child))
            raise ServiceUnavailable("the history is long in answering; ask again in a moment")
        self._question = None
        try:
            return question.answer.result()
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ServiceUnavailable(await self._mourn(question.child)) from error

    async def _mourn(self, child: asyncio.subprocess.Process) -> str:
        """End what does not answer any more; returns what is to be said of it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await child.wait()
        code = child.returncode
        await self._end()
        now = asyncio.get_running_loop().time()
        self._early_deaths = self._early_deaths + 1 if now - self._began < EARLY_S else 0
        pause_s = min(2.0**self._early_deaths, EARLY_S) if self._early_deaths > 1 else 0.0
        self._not_before = now + pause_s
        how = "did not answer" if code is None else f"ended with code {code}"
        when = f"in {pause_s:.0f} s" if pause_s else "at the next question"
        return f"the process that reads the history {how}; it is started again {when}"

    def _keep(self) -> None:
        """It is asked something: it does not end before it has answered."""
        if self._idle is not None:
            self._idle.cancel()
        self._idle = None

    def _end_later(self) -> None:
        self._keep()
        self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._rest)

    async def _running(self) -> asyncio.subprocess.Process:
        if self._child is not None and self._child.returncode is None:
            return self._child
        loop = asyncio.get_running_loop()
        if (left_s := self._not_before - loop.time()) > 0:
            raise ServiceUnavailable(
                "the process that reads the history ended again and again (its standard error "
                f"says why); it is started again in {left_s:.0f} s"
            )
        try:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "raywb.view.history",
                *self._options,
                str(self.directory),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=2**20,
                env=child_environment(process_environment()),
            )
        except OSError as error:
            raise ServiceUnavailable(
                f"the process that reads the history cannot be started: {error}"
            ) from error
        self._began = loop.time()
        return self._child

    def _rest(self) -> None:
        self._idle = None
        self._ending = asyncio.get_running_loop().create_task(self._rest_if_unused())

    async def _rest_if_unused(self) -> None:
        async with self._turn:
            if self._idle is not None:
                return  # somebody asked meanwhile
            if self._waiting:
                self._end_later()
            else:
                await self._end()

    def _kill(self) -> None:
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
        self._child = None

    async def _end(self) -> None:
        child = self._child
        self._kill()
        if self._question is not None:
            self._question.answer.cancel()
            self._question = None
        if child is not None:
            if child.stdin is not None:
                child.stdin.close()
            await child.wait()
            if child.stdout is not None:
                # Then nothing is left that the loop would have to close later.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await child.stdout.read()

    async def close(self) -> None:
        """End it."""
        await self._end()
        if self._ending is not None:
            await self._ending
        self._keep()


async def _exchange(child: asyncio.subprocess.Process, message: bytes) -> tuple[bytes, float]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(LENGTH.pack(len(message)) + message)
    await child.stdin.drain()
    header = await child.stdout.readexactly(LENGTH.size)
    reply = await child.stdout.readexactly(LENGTH.unpack(header)[0])
    return reply, asyncio.get_running_loop().time()
