"""What a run is like: from the settings of whoever starts it, before W&B has seen it."""

from __future__ import annotations

import datetime
import secrets
import string
from typing import Any

import msgspec

from raywb.errors import KeyMissing, SettingsConflict
from raywb.groups import Group
from raywb.reports import RunInfo
from raywb.service.state import RunState
from raywb.settings import DEFAULT_BASE_URL, DEFAULT_PROJECT, Settings, find_api_key

__all__ = [
    "check_settings",
    "describe_run",
    "find_key",
    "lacks_only_a_key",
    "new_run_id",
    "resolve_mode",
    "settings_of",
]

_ALPHABET = string.ascii_lowercase + string.digits


def new_run_id() -> str:
    """Eight letters and digits, as W&B makes them."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(8))


def resolve_mode(settings: Settings, api_key: str | None) -> str:
    """The explicit mode, else online where a key is to be had, else offline."""
    if settings.mode is not None:
        return settings.mode
    return "online" if api_key or find_api_key(settings) else "offline"


def describe_run(
    settings: Settings,
    group: Group,
    *,
    run_id: str,
    mode: str,
    directory: str,
    epoch: int,
    provisional: bool,
) -> RunInfo:
    """Everything that is known of a run before W&B has seen it."""
    project = settings.project or DEFAULT_PROJECT
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return RunInfo(
        project=project,
        id=settings.run_id or run_id,
        name=settings.name or f"{project}-{settings.job_type}-{now}",
        mode=mode,
        dir=directory,
        entity=settings.entity,
        group=group.name,
        group_source=group.source,
        job_type=settings.job_type,
        epoch=epoch,
        provisional=provisional,
    )


#: Settings that belong to the service or to the caller, not to the run.
_NOT_OF_A_RUN = ("dir", "local_cluster", "listen_host")


def check_settings(run: RunState, explicit: dict[str, Any]) -> None:
    """Make sure that a caller who joins a run asks for nothing that it is not.

    Raises:
        SettingsConflict: with each setting that differs, and both values.
    """
    has = msgspec.structs.asdict(msgspec.convert(run.settings, Settings))
    has |= {"project": run.info.project, "group": run.info.group or "", "mode": run.info.mode}
    has |= {"name": run.info.name, "run_id": run.info.id, "entity": run.info.entity}
    asked = {key: value for key, value in explicit.items() if key not in _NOT_OF_A_RUN}
    differing = sorted(key for key, value in asked.items() if has[key] != value)
    if differing:
        pairs = ", ".join(f"{key} is {has[key]!r}, not {asked[key]!r}" for key in differing)
        raise SettingsConflict(
            f"the raywb run {run.info.name!r} is open with other settings: {pairs}. "
            "Leave them out to join it, or end it first with `raywb finish`"
        )


def settings_of(run: RunState) -> Settings:
    """The settings that a run was started with."""
    return msgspec.convert(run.settings, Settings)


def find_key(run: RunState, handed_over: str | None) -> str | None:
    """W&B's key for a run: the one that a driver handed over, else where W&B's client looks.

    Raises:
        KeyMissing: the run is online, and there is none.
    """
    settings = settings_of(run)
    key = handed_over or find_api_key(settings)
    if key is None and run.info.mode == "online":
        raise KeyMissing(
            f"the service has no key for {settings.base_url or DEFAULT_BASE_URL}, and run "
            f"{run.info.name!r} is online: call raywb.start() again from where the key is, or put "
            "it where W&B's client looks on the head node (netrc, or api_key_file). Rows are "
            "safe on disk until then"
        )
    return key


def lacks_only_a_key(run: RunState) -> bool:
    """Whether a run is offline because nobody had a key, not because somebody asked for it.

    One whose files go on behind those of an earlier run stays offline: that one's rows are in no
    outbox of ours, and have to be uploaded first.
    """
    return run.info.mode == "offline" and "mode" not in run.settings and not run.base
