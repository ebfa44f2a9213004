"""Saves a view with W&B's workspaces package: ``python -m raywb.charts.views_process``.

This is a process of its own: the package imports W&B's client, which waits for its Go process and
for the server without an end. It reads a :class:`SaveRequest`, one JSON line, from stdin, and
writes :class:`Saved` or :class:`NotSaved` to stdout; W&B's key is in its environment, where the
package looks for it.

A view is found again by its name in the project's table of views, which is made of the title, so
the second save changes the first one's view. What a user added to it stays: sections and panels
with titles of his own, and the view's settings. Two first saves at the same moment may make two.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from typing import Any

import msgspec

from raywb.charts.panels import Panel, Section

__all__ = ["NotSaved", "SaveRequest", "Saved", "main"]

#: Length of the part of a view's name that tells it from others, as W&B's own have it.
NAME_LENGTH = 11


class SaveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be saved; without an entity it goes to the key's own."""

    entity: str | None
    project: str
    title: str
    sections: list[Section]


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The view is there; ``is_new`` says whether it was not before."""

    url: str
    entity: str
    is_new: bool
    panels: int


class NotSaved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """It is not.

    Attributes:
        kind: ``package``, ``key``, ``project`` or ``other``.
        text: what W&B's package or server said.
    """

    kind: str
    text: str


def main() -> None:
    """Answer one request."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # W&B's package prints what it does
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=SaveRequest)
    answer: Saved | NotSaved
    try:
        answer = _save(request)
    except ImportError as error:
        answer = NotSaved(kind="package", text=str(error))
    except Exception as error:  # noqa: BLE001 - whatever W&B's package raises is told
        answer = NotSaved(kind=_kind(error), text=f"{type(error).__name__}: {error}"[:500])
    answers.write(msgspec.json.encode(answer) + b"\n")


def _kind(error: Exception) -> str:
    name, text = type(error).__name__, str(error)
    if name in ("AuthenticationError", "UsageError") or "401" in text or "API key" in text:
        return "key"
    return "project" if re.search(r"[Pp]roject .*not found", text) else "other"


def _save(request: SaveRequest) -> Saved:
    import wandb_workspaces.workspaces as ws

    entity = request.entity or _own_entity()
    name = _view_name(entity, request.project, request.title)
    view = _find(ws, entity, request.project, name)
    is_new = view is None
    if view is None:
        view = ws.Workspace(entity=entity, project=request.project, name=request.title)
        # There is no public way to choose it, and a random one would not be found again.
        view._internal_name = f"nw-{name}-v"
    view.sections = _merged(ws, list(view.sections), request.sections)
    view.save()
    panels = sum(len(section.panels) for section in request.sections)
    return Saved(url=view.url, entity=entity, is_new=is_new, panels=panels)


def _own_entity() -> str:
    import wandb

    return str(wandb.Api().default_entity)


def _view_name(entity: str, project: str, title: str) -> str:
    text = f"raywb/{entity}/{project}/{title}"
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_LENGTH]


def _find(ws: Any, entity: str, project: str, name: str) -> Any | None:
    """The view of that name, or None; of the address only path and query are looked at."""
    try:
        return ws.Workspace.from_url(f"https://wandb.ai/{entity}/{project}?nw={name}")
    except ValueError as error:
        if re.search(r"[Ww]orkspace .*not found in project", str(error)):
            return None
        raise


def _merged(ws: Any, there: list[Any], wanted: list[Section]) -> list[Any]:
    """The sections that are there, ours brought up to date; what is missing comes at the end."""
    by_name = {section.name: section for section in there}
    for section in wanted:
        found = by_name.get(section.name)
        if found is None:
            panels = [_plot(panel) for panel in section.panels]
            there.append(ws.Section(name=section.name, panels=panels, is_open=section.is_open))
        else:
            found.panels = _merged_panels(list(found.panels), section.panels)
    return there


def _merged_panels(there: list[Any], wanted: tuple[Panel, ...]) -> list[Any]:
    """Our panels in our order, those that are as they should be untouched; then the user's."""
    by_title = {getattr(panel, "title", None): panel for panel in there}
    ours = {panel.title for panel in wanted}
    kept = [panel for panel in there if getattr(panel, "title", None) not in ours]
    found = []
    for panel in wanted:
        before, plot = by_title.get(panel.title), _plot(panel)
        found.append(before if before is not None and _shows_the_same(before, plot) else plot)
    return [*found, *kept]


def _shows_the_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and _shown(one) == _shown(other)


def _shown(plot: Any) -> tuple[Any, ...]:
    """Axis, metrics and pattern; what was loaded has objects where a new panel has names."""
    x, *y = (getattr(metric, "name", metric) for metric in (plot.x, *plot.y))
    return x, y, plot.metric_regex


def _plot(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(
        title=panel.title,
        x=panel.x or "Step",
        y=list(panel.y),
        metric_regex=panel.y_regex,
    )


if __name__ == "__main__":
    main()
