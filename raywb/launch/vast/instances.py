"""Instances: rent one, list them, read a log, destroy one and see it gone."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from raywb.errors import InstanceUnknown, LaunchError, NoOffer, NotDestroyed, VastUnavailable
from raywb.launch.vast.client import asking
from raywb.launch.vast.offers import Offer, Wanted

__all__ = ["Instance", "create", "destroy", "follow_log", "list_instances", "read_log", "show"]

#: Variables of an instance that say what raywb launched there.
LAUNCH, COMMIT, RECIPE = "RAYWB_LAUNCH", "RAYWB_COMMIT", "RAYWB_RECIPE"

#: Most characters of one variable that Vast.ai takes.
MOST_IN_A_VARIABLE = 256

#: Longest that an instance is waited for to be gone, in seconds, and the pause between two looks.
GONE_TIMEOUT_S = 60.0
LOOK_PAUSE_S = 1.0

#: States from which an instance never comes to run.
_ENDED = ("exited", "offline", "stopped")


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as Vast.ai shows it.

    Attributes:
        state: *loading*, *running*, *exited*, *stopped*, *offline*, or *new* before any of them.
        price: dollars an hour.
        hours: since it was rented.
        commit: what raywb launched there; None where it did not.
    """

    id: int
    state: str
    gpu: str
    price: float
    hours: float
    label: str | None = None
    commit: str | None = None
    recipe: str | None = None
    launch: str | None = None


def create(
    client: Any,
    offer: Offer,
    wanted: Wanted,
    *,
    script: str,
    label: str,
    variables: Mapping[str, str],
    warn: Callable[[str], None],
) -> int:
    """Accept an offer; returns the number of the instance.

    Args:
        client: the official one.
        offer: what is accepted.
        wanted: says disk and image.
        script: runs at every start of the container.
        label: what the instance is called.
        variables: its environment; secrets among them go to Vast.ai and to the machine's owner.
        warn: told when the instance was made, and could not be seen.

    Raises:
        NoOffer: somebody else was faster.
        LaunchError: Vast.ai refuses, or nothing came of it.
    """
    _check(variables)
    launch = secrets.token_hex(8)
    environment = {**variables, LAUNCH: launch}
    try:
        with asking(f"rent offer {offer.number}"):
            answer = client.create_instance(
                offer.number,
                image=wanted.image,
                disk=wanted.disk_gb,
                env=environment,
                label=label,
                onstart_cmd=script,
                cancel_unavail=True,
                ssh=True,
                direct=True,
            )
            if answer.get("success") is not True:
                raise VastUnavailable(
                    f"Vast.ai did not rent offer {offer.number}: {answer.get('msg') or answer}"
                )
            number = int(answer["new_contract"])
    except LaunchError as error:
        # The client tries again by itself, and the first try may have been heard.
        return _found_after(error, client, launch)
    try:
        missing = show(client, number) is None
    except LaunchError as error:
        # It is rented, and costs: whoever launched has to get its number.
        warn(f"instance {number} was made, and could not be looked at: {error}")
        return number
    if missing:
        raise VastUnavailable(
            f"Vast.ai says that it made instance {number}, and does not show it: "
            f"`raywb vast list` shows whether it comes, and `raywb vast destroy {number}` ends it"
        )
    return number


def _found_after(error: LaunchError, client: Any, launch: str) -> int:
    """The instance that a launch made although it failed, if there is one.

    Raises:
        LaunchError: there is none, or nobody can say.
    """
    if not isinstance(error, NoOffer | VastUnavailable):
        raise error
    try:
        known = list_instances(client)
    except LaunchError as also:
        raise VastUnavailable(
            f"{error}; and whether an instance was made cannot be seen ({also}): look with "
            "`raywb vast list` before you launch again"
        ) from error
    for instance in known:
        if instance.launch == launch:
            return instance.id
    raise error


def _check(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        if len(value) > MOST_IN_A_VARIABLE:
            raise LaunchError(
                f"{name} has {len(value)} characters, and Vast.ai takes {MOST_IN_A_VARIABLE}: "
                "set it for the account, at https://cloud.vast.ai/account/"
            )


def list_instances(client: Any) -> list[Instance]:
    """All instances of the account, the oldest first."""
    with asking("list the instances"):
        return [_instance(row) for row in client.show_instances()]


def show(client: Any, number: int) -> Instance | None:
    """One instance, or None where there is no such one (any more)."""
    try:
        with asking(f"show instance {number}", number):
            row = client.show_instance(number)
            return None if row is None else _instance(row)
    except InstanceUnknown:
        return None


def _instance(row: dict[str, Any]) -> Instance:
    variables = row.get("extra_env") or {}
    return Instance(
        id=int(row["id"]),
        state=row.get("actual_status") or "new",
        gpu=f"{row.get('num_gpus') or 0} x {row.get('gpu_name') or '?'}",
        price=float(row.get("dph_total") or 0.0),
        hours=float(row["duration"]) / 3600,
        label=row.get("label"),
        commit=variables.get(COMMIT),
        recipe=variables.get(RECIPE),
        launch=variables.get(LAUNCH),
    )


def read_log(client: Any, number: int, tail: int) -> str:
    """The last lines of what an instance printed."""
    with asking(f"show the log of instance {number}", number):
        text = client.logs(number, tail=str(tail))
    if not isinstance(text, str):
        raise VastUnavailable(f"Vast.ai has no log of instance {number}: {text.get('msg') or text}")
    return text


def follow_log(
    client: Any,
    number: int,
    tail: int,
    pause_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """What an instance prints, as it comes, until the instance has ended or is gone.

    Vast.ai hands out the last lines and no stream, so they are asked for again and again; where
    more lines come between two looks than ``tail`` holds, a line says that some are missing.
    """
    shown: list[str] = []
    while True:
        instance = show(client, number)
        if instance is None:
            if not shown:
                raise InstanceUnknown(f"Vast.ai knows no instance {number} of this account")
            yield f"[instance {number} is gone]\n"
            return
        with contextlib.suppress(InstanceUnknown):
            lines = read_log(client, number, tail).splitlines(keepends=True)
            yield from _new_lines(shown, lines)
            shown = lines or shown
        if instance.state in _ENDED:
            yield f"[instance {number}: {instance.state}]\n"
            return
        sleep(pause_s)


def _new_lines(shown: list[str], lines: list[str]) -> list[str]:
    """The lines behind those that were shown, whose end is the beginning of ``lines``."""
    for start in range(len(shown)):
        overlap = shown[start:]
        if lines[: len(overlap)] == overlap:
            return lines[len(overlap) :]
    return ["[lines are missing here]\n", *lines] if shown and lines else lines


def destroy(
    client: Any,
    number: int,
    *,
    timeout_s: float = GONE_TIMEOUT_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Destroy an instance, and return once Vast.ai shows it no more.

    Raises:
        InstanceUnknown: there is none of this number.
        NotDestroyed: Vast.ai refuses, or shows it still when the time is over.
        LaunchError: Vast.ai cannot be asked.
    """
    with asking(f"destroy instance {number}", number):
        answer = client.destroy_instance(number)
        refused = answer.get("success") is not True
    if refused:
        raise NotDestroyed(
            f"Vast.ai refused to destroy instance {number}, which goes on costing: "
            f"{answer.get('msg') or answer}"
        )
    deadline = clock() + timeout_s
    while show(client, number) is not None:
        if clock() >= deadline:
            raise NotDestroyed(
                f"Vast.ai said that it destroys instance {number}, and still shows it after "
                f"{timeout_s:g} s: see https://cloud.vast.ai/instances/"
            )
        sleep(LOOK_PAUSE_S)
