"""What Ray Train's and Ray Tune's callbacks share: a client that comes late, and never raises.

What a callback raises ends the user's training. So whatever goes wrong here is counted, said once
in the log, and left at that.
"""

from __future__ import annotations

import functools
import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from raywb.client import Client
from raywb.rows import Scalar

__all__ = [
    "CALLBACK_TIMEOUT_S",
    "Attempts",
    "LateClient",
    "artifact_name",
    "described",
    "never_raises",
    "step_of",
]

_log = logging.getLogger("raywb")

_MethodT = TypeVar("_MethodT", bound=Callable[..., None])

#: Keys that name a report's place, the first that is there.
STEP_KEYS = ("step", "epoch", "training_iteration")

#: Pause before another try to attach, in seconds; it doubles.
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0

#: Longest that one try may hold up Ray's own loop, in seconds.
CALLBACK_TIMEOUT_S = 3.0

#: Most characters of an exception's text that go into the run: of its message, its traceback.
MESSAGE_CHARACTERS = 1000
TRACEBACK_CHARACTERS = 4000


def never_raises(method: _MethodT) -> _MethodT:
    """Make a callback's method one that logs what goes wrong, once for each kind, and returns."""
    said: set[str] = set()

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the training
            text = f"{type(error).__name__}: {error}"
            if type(error).__name__ not in said:
                said.add(type(error).__name__)
                _log.warning(
                    "raywb: %s failed, and training goes on without it: %s",
                    method.__qualname__,
                    text,
                    exc_info=True,
                )

    return cast("_MethodT", guarded)


class Attempts:
    """When the clients of one callback may try to attach again, and what they missed till then.

    Attributes:
        missed: reports that no client had so far, and no loss was counted for.
    """

    def __init__(self) -> None:
        self.missed = 0
        self._not_before = 0.0
        self._pause_s = FIRST_PAUSE_S

    @property
    def is_due(self) -> bool:
        """Whether one may be made now."""
        return time.monotonic() >= self._not_before

    def failed(self, error: Exception) -> None:
        """None of the clients tries again before a pause is over."""
        _log.warning(
            "raywb: no client for Ray's callback, another try in %g s: %s", self._pause_s, error
        )
        self._not_before = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def succeeded(self) -> None:
        """The service is there."""
        self._not_before, self._pause_s = 0.0, FIRST_PAUSE_S

    def tell(self, client: Client) -> None:
        """Count what was missed as lost."""
        missed, self.missed = self.missed, 0
        for _ in range(missed):
            client.count_loss("not_attached")


class LateClient:
    """A client that is had at the first report, and again later where it cannot be had.

    Args:
        attach: makes the client; may raise anything.
        attempts: shared with the other clients of a callback.
    """

    def __init__(self, attach: Callable[[], Client], attempts: Attempts | None = None) -> None:
        self._attach = attach
        self._client: Client | None = None
        self._attempts = attempts or Attempts()

    def get(self, *, is_row: bool = False) -> Client | None:
        """The client; None where there is none yet.

        Args:
            is_row: it is for a report, which counts as lost without a client.
        """
        if self._client is None and self._attempts.is_due:
            try:
                self._client = self._attach()
            except Exception as error:  # noqa: BLE001 - a callback must not end the training
                self._attempts.failed(error)
            else:
                self._attempts.succeeded()
        if self._client is not None:
            self._attempts.tell(self._client)
        else:
            self._attempts.missed += is_row
        return self._client

    @property
    def present(self) -> Client | None:
        """The client, if there is one; makes no try."""
        return self._client


def step_of(
    row: dict[str, Scalar], step_key: str | None, otherwise: int | None
) -> int | float | None:
    """The place of a report: what it says itself, else its number.

    A ``step`` is taken out of the row, since the client puts it there itself.
    """
    for key in (step_key,) if step_key else STEP_KEYS:
        found = row.get(key)
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            if key == "step":
                del row["step"]
            return found
    return otherwise


def described(error: BaseException) -> Mapping[str, Any]:
    """An exception for a run's summary: its type, its message, the end of its traceback.

    Ray wraps what a worker raised, together with the text of its traceback.
    """
    cause = getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error
    values = {
        "error_type": type(cause).__name__,
        "error_message": str(cause)[:MESSAGE_CHARACTERS],
    }
    trace = getattr(error, "_traceback_str", None) or ""
    if not trace and error.__traceback__ is not None:  # what was pickled has none
        trace = "".join(traceback.format_exception(error))
    return values | ({"error_traceback": trace[-TRACEBACK_CHARACTERS:]} if trace else {})


def artifact_name(text: str) -> str:
    """The text as W&B takes it for an artifact's name."""
    return re.sub(r"[^A-Za-z0-9_.\-]+", "_", text)[:120]
