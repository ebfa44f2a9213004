"""Ask W&B's server which rows of a run it has: the only proof of delivery.

``historyTail`` and ``historyLineCount`` are what W&B's own client asks for when it resumes a run
(``RunResumeStatus`` in wandb-core); the same fields are asked here, over the same endpoint.
"""

from __future__ import annotations

import base64
import json
import urllib.request
from typing import Any, NamedTuple

from raywb.errors import SinkError

__all__ = ["RunAtServer", "ask_next_step", "ask_run"]

#: Longest wait for the answer, in seconds.
TIMEOUT_S = 15.0

_QUERY = """
query RaywbConfirm($entity: String, $project: String, $run: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $run, missingOk: true) { historyLineCount historyTail summaryMetrics }
  }
}
"""


class RunAtServer(NamedTuple):
    """What the server has of a run.

    Attributes:
        rows: how many rows, as it counts them.
        last_row: the last of them; None without one.
        summary: the run's summary.
    """

    rows: int
    last_row: dict[str, Any] | None
    summary: dict[str, Any]

    @property
    def next_step(self) -> int:
        """The step after the last row; 0 when there is none."""
        return int(self.last_row["_step"]) + 1 if self.last_row else 0


def ask_next_step(
    base_url: str, api_key: str | None, *, entity: str | None, project: str, run_id: str
) -> int:
    """The step after the last one that the server has of this run; 0 when it has none.

    Raises:
        SinkError: the server cannot be asked, or gives no answer that makes sense.
    """
    run = ask_run(base_url, api_key, entity=entity, project=project, run_id=run_id)
    return run.next_step if run else 0


def ask_run(
    base_url: str, api_key: str | None, *, entity: str | None, project: str, run_id: str
) -> RunAtServer | None:
    """What the server has of this run; None when it does not know it.

    Raises:
        SinkError: the server cannot be asked, or gives no answer that makes sense.
    """
    variables = {"entity": entity, "project": project, "run": run_id}
    body = json.dumps({"query": _QUERY, "variables": variables}).encode()
    request = urllib.request.Request(f"{base_url.rstrip('/')}/graphql", body)
    request.add_header("Content-Type", "application/json")
    login = base64.b64encode(f"api:{api_key or ''}".encode()).decode()
    request.add_header("Authorization", f"Basic {login}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answer = json.load(response)
        project_there: dict[str, Any] | None = answer["data"]["model"]
        bucket: dict[str, Any] | None = project_there["bucket"] if project_there else None
        if bucket is None:
            return None
        tail = json.loads(bucket["historyTail"] or "[]")
        last_row: dict[str, Any] = json.loads(tail[-1]) if tail else {}
        return RunAtServer(
            rows=int(bucket["historyLineCount"] or 0),
            last_row={**last_row, "_step": int(last_row["_step"])} if last_row else None,
            summary=json.loads(bucket["summaryMetrics"] or "{}"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        # The request carries the key in a header; neither is part of these errors' texts.
        raise SinkError(f"W&B's server could not be asked for its rows: {error!r}") from error
