"""What Ray's dashboard and ``ray list actors`` call the service: its run, and where that is.

Ray asks an actor for its ``repr`` once, right after ``__init__``, and shows that as long as the
process lives; no call changes it later (Ray 2.60). Then a new service's first run is not open yet,
so what is said of it is what it is made with; one that was restarted says what it finds on disk.
"""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec

from raywb.service.state import load_state
from raywb.settings import DEFAULT_BASE_URL, DEFAULT_PROJECT, Settings

__all__ = ["shown_name"]

#: Longest that the disk is waited for, in seconds: the service's start waits meanwhile.
PATIENCE_S = 2.0


def shown_name(directory: Path, settings: Settings, run_id: str) -> str:
    """One line, ``raywb <project>/<run id> <name> <address>``; it never raises, nor waits long.

    Args:
        directory: the service's directory.
        settings: what its first run is made with.
        run_id: the id of that run, unless the settings name one.
    """
    found: list[str] = []
    reader = threading.Thread(
        target=lambda: found.extend(_from_disk(directory, settings.run_id or run_id)),
        name="raywb-shown-name",
        daemon=True,
    )
    reader.start()
    reader.join(PATIENCE_S)
    return found[0] if found else _of_the_first(directory, settings, settings.run_id or run_id)


def _from_disk(directory: Path, first_id: str) -> list[str]:
    """The present run, or the last one, when there was one; else nothing."""
    try:
        state = load_state(directory)
    except (OSError, msgspec.DecodeError):
        return []  # the service itself says what is wrong with its directory
    if state is None or not state.runs:
        return []
    info = state.runs[-1].info
    if state.runs[-1].report is not None and all(run.info.id != first_id for run in state.runs):
        return []  # of an earlier service; the run that this one is made for comes now
    return [_line(info.project, info.id, info.name, info.url or f"{info.mode} {info.dir}")]


def _of_the_first(directory: Path, settings: Settings, run_id: str) -> str:
    project = settings.project or DEFAULT_PROJECT
    address = str(directory)
    if settings.mode in ("offline", "disabled"):
        address = f"{settings.mode} {address}"
    elif settings.entity:
        base = (settings.base_url or DEFAULT_BASE_URL).replace("://api.wandb.ai", "://wandb.ai")
        address = f"{base.rstrip('/')}/{settings.entity}/{project}/runs/{run_id}"
    return _line(project, run_id, settings.name, address)


def _line(project: str, run_id: str, name: str | None, address: str) -> str:
    return " ".join(["raywb", f"{project}/{run_id}", *([name] if name else []), address])
