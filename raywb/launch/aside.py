"""Work that may hang, beside the main thread, which goes on heeding signals.

A signal's handler runs in the main thread, between two steps of Python. Inside a call to Ray it
runs late, and what it raises comes out as something else; so such calls are made in a thread, and
the main thread waits in Python.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

__all__ = ["aside", "leave"]

_T = TypeVar("_T")

#: Longest that the main thread waits at a time, in seconds.
LOOK_S = 0.5

_at_work: set[threading.Thread] = set()


def aside(work: Callable[[], _T], timeout_s: float | None = None) -> _T:
    """Do it in a thread, and wait for it; returns what it returns, raises what it raises.

    What is not done in time, or when a signal's handler raises, goes on: :func:`leave` ends it.

    Args:
        work: what is to be done.
        timeout_s: longest that is waited; None waits for the end.

    Raises:
        TimeoutError: it was not done in time.
    """
    results = list[_T]()
    errors = list[BaseException]()
    done = threading.Event()

    def do() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again, in the one who waits
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=do, name="raywb-aside", daemon=True)
    _at_work.add(thread)
    thread.start()
    deadline = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
    while not done.wait(min(LOOK_S, max(deadline - time.monotonic(), 0.0))):
        if time.monotonic() >= deadline:
            raise TimeoutError(f"it was not done within {timeout_s:g} s")
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def leave(exit_code: int, exit_now: Callable[[int], Any] = os._exit) -> NoReturn:
    """End this process, also where something of :func:`aside` is still at work.

    What works there may be deep in a library, which the interpreter's own end would wait for.
    """
    if any(thread.is_alive() for thread in _at_work):
        sys.stdout.flush()
        sys.stderr.flush()
        exit_now(exit_code)
    sys.exit(exit_code)
