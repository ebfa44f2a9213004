"""A call of Ray's from the service's loop: in a thread that nothing else waits for.

Such a call may hang or raise, so each has a thread of its own, and whoever made it is told while
there is no answer.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["call_ray"]

_T = TypeVar("_T")


async def call_ray(
    name: str, call: Callable[[], _T], patience_s: float, tell: Callable[[float], None]
) -> _T:
    """Make the call in a thread, and wait for its answer, however long it takes.

    Args:
        name: what it is for, in a word.
        call: makes the call; may raise anything, which is raised here.
        patience_s: after this time, and again and again, ``tell`` is called.
        tell: is given the seconds since the call began.
    """
    future: Future[_T] = Future()
    thread = threading.Thread(
        target=_carry_out, args=(call, future), name=f"raywb-{name}", daemon=True
    )
    since = time.monotonic()
    thread.start()
    answer = asyncio.wrap_future(future)
    while not (await asyncio.wait([answer], timeout=patience_s))[0]:
        tell(time.monotonic() - since)
    return answer.result()


def _carry_out(call: Callable[[], _T], future: Future[_T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except Exception as error:  # noqa: BLE001 - it is raised again in the loop
        future.set_exception(error)
    else:
        future.set_result(result)
