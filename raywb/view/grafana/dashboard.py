"""The Grafana dashboard as JSON; ``raywb_dashboard.json`` beside this file holds what it yields.

``python -m raywb.view.grafana.dashboard`` writes that file anew. The format is Grafana's dashboard
model of schema version 36, which Grafana 9 and later read. Data source and session are
variables with the names and the meaning that they have in Ray's own dashboards.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from raywb.view.grafana.panels import ROWS, Panel, Query

__all__ = ["FILE", "UID", "dashboard", "dashboard_text"]

#: Where the package keeps the dashboard.
FILE = Path(__file__).with_name("raywb_dashboard.json")

#: Grafana knows the dashboard by this: it is in its address, and an import replaces it.
UID = "raywb"

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

_COLUMNS = 24


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's own model."""
    return {
        "uid": UID,
        "title": "raywb",
        "description": "Pipelines, training, nodes and delivery of what raywb takes to W&B.",
        "tags": ["raywb", "ray"],
        "schemaVersion": 36,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timepicker": {},
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": _variables()},
        "panels": _panels(),
    }


def dashboard_text() -> str:
    """The dashboard as its file has it."""
    return json.dumps(dashboard(), indent=2) + "\n"


def _variables() -> list[dict[str, Any]]:
    session = 'SessionName=~"$SessionName"'
    values = f'ray_raywb_stage_value{{{session}, run=~"$run"}}'
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "refresh": 1,
            "hide": 2,
            "includeAll": False,
            "multi": False,
        },
        _variable("SessionName", "Ray session", "ray_raywb_service_starts", "SessionName"),
        _variable("run", "W&B run", f"ray_raywb_run_info{{{session}}}", "run"),
        _variable("metric", "Value", values, "metric", every=False),
    ]


def _variable(name: str, label: str, series: str, of: str, *, every: bool = True) -> dict[str, Any]:
    """A variable whose values are those of a label; ``every`` of them unless one is chosen."""
    query = f"label_values({series}, {of})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,
        "sort": 2 if every else 1,
        "hide": 0,
        "multi": True,
        "includeAll": every,
        **(
            {
                "allValue": ".*",
                "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            }
            if every
            else {}
        ),
    }


def _panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    numbers = itertools.count(1)
    y = 0
    for row in ROWS:
        found.append(
            {
                "id": next(numbers),
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1},
                "panels": [],
            }
        )
        y += 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > _COLUMNS:
                x, y, height = 0, y + height, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            found.append(_panel(panel, next(numbers), place))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return found


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    steps = [{"value": value, "color": colour} for value, colour in panel.steps]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "custom": _drawing(panel),
    }
    if panel.least is not None:
        defaults["min"] = panel.least
    if panel.most is not None:
        defaults["max"] = panel.most
    made: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "targets": [
            _target(query, letter, panel.kind)
            for query, letter in zip(panel.queries, "ABCDEFGH", strict=False)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel.kind),
    }
    if panel.kind == "table":
        _link_to_wandb(made)
    if panel.repeat:
        made |= {"repeat": panel.repeat, "repeatDirection": "h", "maxPerRow": 2}
    return made


def _drawing(panel: Panel) -> dict[str, Any]:
    """How lines are drawn; a threshold is a line where crossing it means something."""
    if panel.kind != "timeseries":
        return {}
    return {
        "lineWidth": 1,
        "fillOpacity": 40 if panel.stacked else 5,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if len(panel.steps) > 1 else "off"},
    }


def _options(kind: str) -> dict[str, Any]:
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    match kind:
        case "timeseries":
            return {
                "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull"]},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
        case "bargauge":
            return {"reduceOptions": last, "orientation": "horizontal", "displayMode": "basic"}
        case "stat":
            return {"reduceOptions": last, "colorMode": "value", "graphMode": "area"}
        case "state-timeline":
            return {
                "mergeValues": True,
                "showValue": "never",
                "legend": {"displayMode": "list", "placement": "bottom"},
            }
        case _:
            return {"showHeader": True}


def _target(query: Query, letter: str, kind: str) -> dict[str, Any]:
    target: dict[str, Any] = {
        "refId": letter,
        "datasource": _DATASOURCE,
        "expr": query.expression,
        "legendFormat": query.legend,
        "range": kind != "table",
        "instant": kind == "table",
    }
    if kind == "table":
        target["format"] = "table"
    return target


def _link_to_wandb(table: dict[str, Any]) -> None:
    """A run's address becomes a link; time and value of an info series say nothing."""
    link = {"title": "Open the run in W&B", "url": "${__value.raw}", "targetBlank": True}
    table["fieldConfig"]["overrides"] = [
        {
            "matcher": {"id": "byName", "options": "url"},
            "properties": [{"id": "links", "value": [link]}],
        }
    ]
    hidden = {"Time": True, "Value": True}
    table["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]


if __name__ == "__main__":
    FILE.write_text(dashboard_text())
