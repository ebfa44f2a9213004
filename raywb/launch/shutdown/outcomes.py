"""What ``raywb shutdown`` decides, does and exits with: pure functions of what was found out.

The table of raywb/launch/README.md is these functions, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from raywb.launch.delivered import Delivery

__all__ = [
    "EXIT_CODES",
    "Asked",
    "Decision",
    "after_asking",
    "before_grace",
    "interrupted",
    "missing",
    "no_place",
    "refused",
]

#: The service did not answer, so nobody knows what is undelivered.
EXIT_UNANSWERED = 4
#: Rows are not with W&B.
EXIT_ROWS = 5
#: A run is offline.
EXIT_OFFLINE = 8
#: Outputs lie on the machine only.
EXIT_OUTPUTS = 9
#: Tables, artifacts, alerts or outputs could not be uploaded.
EXIT_UPLOAD = 10
#: It was asked to end, and did not take that.
EXIT_REFUSED = 11
#: It was accepted, and nobody has shown yet that it is gone.
EXIT_UNCONFIRMED = 12

#: Exit codes and what they mean, as ``--help`` says it.
EXIT_CODES = {
    0: "it is gone; or it stays, as asked with --keep-on-failure; or there is nothing to end",
    EXIT_UNANSWERED: "it stays: the cluster or its service did not answer",
    EXIT_ROWS: "it stays: rows are not with W&B",
    EXIT_OFFLINE: "it stays: a run is offline",
    EXIT_OUTPUTS: "it stays: outputs lie there only",
    EXIT_UPLOAD: "it stays: an upload failed",
    EXIT_REFUSED: "it stays: ending it failed",
    EXIT_UNCONFIRMED: "its end was accepted, and is not confirmed",
    130: "(SIGINT) it stays: ended in the grace time or before",
    143: "(SIGTERM) the same",
}


class Asked(NamedTuple):
    """What the command was told.

    Attributes:
        grace_s: how long to wait before the place is ended, in seconds.
        confirm_s: longest that is waited for it to be gone, in seconds.
        job_exit_code: how the work ended.
        keep_on_failure: a failed job's place stays.
        even_if_undelivered: it ends whatever is undelivered.
    """

    grace_s: float = 10.0
    confirm_s: float = 60.0
    job_exit_code: int = 0
    keep_on_failure: bool = False
    even_if_undelivered: bool = False


class Decision(NamedTuple):
    """What is said, whether the place is to end, and what the command exits with if not."""

    lines: tuple[str, ...]
    ends: bool
    exit_code: int = 0


def no_place(sentence: str) -> Decision:
    """There is nothing to end: a warning, and no failure of the job."""
    return Decision((sentence,), ends=False)


def missing(
    delivery: Delivery, outputs: Sequence[str] = (), failed_uploads: Sequence[str] = ()
) -> list[tuple[int, Sequence[str]]]:
    """What is not off the machine: sentences, by the exit code that they mean.

    The first is what a command exits with.
    """
    found: list[tuple[int, Sequence[str]]] = [
        (EXIT_UNANSWERED, [delivery.unanswered] if delivery.unanswered else []),
        (EXIT_ROWS, delivery.rows),
        (EXIT_UPLOAD, [*delivery.uploads, *failed_uploads]),
        (EXIT_OFFLINE, delivery.offline),
        (EXIT_OUTPUTS, outputs),
    ]
    return [(code, sentences) for code, sentences in found if sentences]


def before_grace(
    what: str,
    delivery: Delivery,
    asked: Asked,
    *,
    keeps_disk: bool,
    outputs: Sequence[str] = (),
    failed_uploads: Sequence[str] = (),
) -> Decision:
    """Whether the grace time begins, for what was found out about the delivery.

    Args:
        what: the place, for a sentence.
        delivery: what raywb itself could not bring off the machine.
        asked: what the command was told.
        keeps_disk: what lies on the place's disk is still to be had when it has ended; then
            files are no reason to stay.
        outputs: outputs that lie there only, each a sentence.
        failed_uploads: outputs that could not be uploaded, each a sentence.
    """
    if keeps_disk:
        delivery, outputs = delivery._replace(offline=()), ()
    undelivered = missing(delivery, outputs, failed_uploads)
    said = tuple(f"! {sentence}" for _, sentences in undelivered for sentence in sentences)
    if asked.job_exit_code and asked.keep_on_failure:
        failed = f"The job failed (exit code {asked.job_exit_code})"
        stays = f"{failed}, so {what} stays (--keep-on-failure)"
        return Decision((*said, stays), ends=False, exit_code=0)
    if undelivered and not asked.even_if_undelivered:
        stays = (
            f"Not everything is delivered, so {what} stays, and goes on costing what it costs. "
            "Deliver it, and call `raywb shutdown` again; with --even-if-undelivered it is "
            "ended and what lies there only is lost"
        )
        return Decision((*said, stays), ends=False, exit_code=undelivered[0][0])
    if undelivered:
        said = (*said, "Ended all the same, as asked with --even-if-undelivered")
    return Decision((*said, grace_line(asked.grace_s, asked.job_exit_code)), ends=True)


def grace_line(grace_s: float, job_exit_code: int = 0) -> str:
    """What is said when the grace time begins."""
    how = f"failed (exit code {job_exit_code})" if job_exit_code else "complete"
    return f"Training {how} - auto-shutdown in {grace_s:g} second{'s' * (grace_s != 1)}..."


def interrupted(what: str, signal_number: int) -> Decision:
    """A signal came before the place was asked to end."""
    return Decision(
        (f"Ended by signal {signal_number} before the end of the grace time: {what} stays",),
        ends=False,
        exit_code=128 + signal_number,
    )


def refused(what: str, reason: str) -> Decision:
    """It could not be asked to end, or did not take it."""
    return Decision(
        (f"! {reason}", f"{what} was not ended, and goes on costing what it costs"),
        ends=False,
        exit_code=EXIT_REFUSED,
    )


def after_asking(what: str, *, gone: bool, ended_by_it: bool = False) -> Decision:
    """What it means that the end was accepted.

    Args:
        what: the place, for a sentence.
        gone: whoever was asked has shown that it is gone.
        ended_by_it: this process was told to end meanwhile, as all processes there are: the end
            that was accepted is under way.
    """
    if gone:
        return Decision((f"✓ {what} is gone",), ends=True)
    if ended_by_it:
        return Decision((f"✓ {what} is ending, and this process with it",), ends=True)
    return Decision(
        (
            f"! the end of {what} was accepted, but it still shows up. It goes on costing what it "
            "costs until it is gone: look after it",
        ),
        ends=True,
        exit_code=EXIT_UNCONFIRMED,
    )
