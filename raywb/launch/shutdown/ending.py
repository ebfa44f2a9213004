"""The order of a shutdown: deliver, decide, wait, ask for the end, see that it has come."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

from raywb.launch.delivered import Delivery
from raywb.launch.places import EndFailed, Place
from raywb.launch.shutdown import outcomes
from raywb.launch.shutdown.outcomes import Asked, Decision
from raywb.launch.shutdown.signals import Signals, Stopped

__all__ = ["run_shutdown"]


def run_shutdown(
    place: Place,
    asked: Asked,
    signals: Signals,
    *,
    deliver: Callable[[], Delivery],
    upload: Callable[[], tuple[Sequence[str], Sequence[str]]],
    say: Callable[[str], None],
) -> int:
    """Do it; returns the exit code.

    Args:
        place: what is to end.
        asked: what the command was told.
        signals: of this process.
        deliver: brings off the machine what raywb holds.
        upload: brings off it what else is to be kept; returns what lies there only, and what
            could not be uploaded, in sentences.
        say: takes a line for the person at the terminal.
    """

    def told(decision: Decision) -> Decision:
        for line in decision.lines:
            say(line)
        return decision

    try:
        signals.listen()
        delivery = _delivered(deliver)
        outputs, failed_uploads = _uploaded(upload)
        decision = told(
            outcomes.before_grace(
                place.what,
                delivery,
                asked,
                keeps_disk=place.keeps_disk,
                outputs=outputs,
                failed_uploads=failed_uploads,
            )
        )
        if not decision.ends:
            return decision.exit_code
        time.sleep(asked.grace_s)
    except Stopped as stopped:
        return told(outcomes.interrupted(place.what, stopped.number)).exit_code
    return told(_end(place, asked.confirm_s, signals, say)).exit_code


def _delivered(deliver: Callable[[], Delivery]) -> Delivery:
    """The delivery; what fails in a way that nobody thought of is no answer."""
    try:
        return deliver()
    except Exception as error:  # noqa: BLE001 - told, and the place stays
        return Delivery(unanswered=f"the delivery failed: {error!r}")


def _uploaded(
    upload: Callable[[], tuple[Sequence[str], Sequence[str]]],
) -> tuple[Sequence[str], Sequence[str]]:
    """The same of the outputs."""
    try:
        return upload()
    except Exception as error:  # noqa: BLE001 - told, and the place stays
        return (), (f"the upload failed: {error!r}",)


def _end(place: Place, confirm_s: float, signals: Signals, say: Callable[[str], None]) -> Decision:
    """Ask for the end and see that it comes; this process may be ended by it at any moment."""
    with signals.noted_only():
        try:
            accepted = place.end()
        except EndFailed as error:
            return outcomes.refused(place.what, str(error))
        # Said at once: it may be the last thing that this process gets to say.
        say(accepted)
    number = signals.noted
    if number is None:
        try:
            return outcomes.after_asking(place.what, gone=place.has_ended(confirm_s))
        except Stopped as stopped:
            number = stopped.number
    return outcomes.after_asking(place.what, gone=False, ended_by_it=number != signal.SIGINT)
