"""The thread in which everything of the service happens, and what goes on in it by itself."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from raywb.errors import ServiceUnavailable

__all__ = ["RETRY_PAUSE_S", "EventLoop"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Pause before something that failed in the background is tried again, in seconds.
RETRY_PAUSE_S = 1.0


class EventLoop:
    """One event loop in a thread of its own, and the parts of the service that it keeps running.

    Args:
        problems: where a part that failed is written down, for the status to show.
    """

    def __init__(self, problems: dict[str, str]) -> None:
        self._problems = problems
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="raywb-service", daemon=True)

    def begin(self, name: str, part: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start the thread, with this part as the first."""
        self._loop.call_soon(self.keep_running, name, part)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def call(self, coroutine: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """Run a coroutine there, and wait for it in the caller's thread.

        Raises:
            ServiceUnavailable: it took longer.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:
            future.cancel()
            raise ServiceUnavailable(
                f"the raywb service did not answer within {timeout_s:g} s"
            ) from None

    def keep_running(self, name: str, part: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a part, and start it again when it fails: without it the service would only seem
        to work. How often it failed stays in the status."""
        task = self._loop.create_task(self._run_again(name, part))
        self._tasks.add(task)
        task.add_done_callback(self._note_end)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """A part that ends with an exception is a problem that the status shows."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._problems["a part that failed"] = f"a part of the service failed: {error!r}"
            _log.error("raywb: a part of the service failed", exc_info=error)

    async def _run_again(self, name: str, part: Callable[[], Coroutine[Any, Any, None]]) -> None:
        failures = 0
        while True:
            try:
                await part()
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, the part has to go on
                failures += 1
                times = "once" if failures == 1 else f"{failures} times"
                self._problems[name] = (
                    f"{name} failed {times} and was started again; the last reason: {error!r}"
                )
                _log.error("raywb: %s", self._problems[name], exc_info=error)
            await asyncio.sleep(RETRY_PAUSE_S)

    async def end_parts(self) -> None:
        """End every part, and wait for it."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """Stop the loop, and wait for its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
