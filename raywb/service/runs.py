"""What a W&B run is called and where it goes, made from settings."""

from __future__ import annotations

import datetime
import secrets
import string
from typing import Any

from raywb.groups import Group
from raywb.reports import RunInfo
from raywb.settings import DEFAULT_PROJECT, Settings, find_api_key

__all__ = ["describe_run", "new_run_id", "resolve_mode"]

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
    fields: dict[str, Any] = {
        "name": settings.name or f"{project}-{settings.job_type}-{now}",
        "entity": settings.entity,
        "group": group.name,
        "group_source": group.source,
        "job_type": settings.job_type,
    }
    return RunInfo(
        project=project,
        id=settings.run_id or run_id,
        mode=mode,
        dir=directory,
        epoch=epoch,
        provisional=provisional,
        **fields,
    )
