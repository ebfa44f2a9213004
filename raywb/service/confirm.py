"""Ask W&B's server which rows of a run it has: the only proof of delivery.

``historyTail`` is what W&B's own client asks for when it resumes a run (``RunResumeStatus`` in
wandb-core); the same field is asked here, over the same endpoint, and the run's state with it.

The sink's process asks at intervals, in a thread (:class:`Watch`), since a server that hangs must
not hold up the rows. The service judges the answers (:class:`Standstill`): a file stream that was
refused once never recovers and says nothing, so rows that were handed over while the server's
step stands still are the only sign of it.
"""

from __future__ import annotations

import base64
import http.client
import json
import threading
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple

from raywb.errors import SinkError

__all__ = ["RunAtServer", "Shown", "Standstill", "Watch", "ask_run"]

#: Longest wait for the answer, in seconds.
TIMEOUT_S = 15.0

#: So many intervals without a new row are a standstill; a server may be slow, and its answer
#: behind what it has.
PATIENT_INTERVALS = 4

#: A server that stands still again is given twice the time, up to so many times the first.
MOST_PATIENCE = 4

_QUERY = """
query RaywbConfirm($entity: String, $project: String, $run: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $run, missingOk: true) { historyLineCount historyTail summaryMetrics %s }
  }
}
"""


class RunAtServer(NamedTuple):
    """What the server has of a run.

    Attributes:
        rows: how many rows, as it counts them.
        last_row: the last of them; None without one.
        summary: the run's summary.
        state: its state, where that was asked for.
        config_keys: the names in its config, where they were asked for.
    """

    rows: int
    last_row: dict[str, Any] | None
    summary: dict[str, Any]
    state: str | None = None
    config_keys: frozenset[str] | None = None

    @property
    def next_step(self) -> int:
        """The step after the last row; 0 when there is none."""
        return int(self.last_row["_step"]) + 1 if self.last_row else 0


class Shown(NamedTuple):
    """How far W&B has come with a run.

    Attributes:
        next_step: the step after its last row.
        state: its state, where that was asked for.
        config_keys: the names in its config, where they were asked for.
    """

    next_step: int
    state: str | None = None
    config_keys: frozenset[str] | None = None

    @property
    def ended(self) -> bool:
        """Whether the server was told that the run is over."""
        return self.state not in ("pending", "running", "crashed")


def ask_run(
    base_url: str,
    api_key: str | None,
    *,
    entity: str | None,
    project: str,
    run_id: str,
    end: bool = False,
) -> RunAtServer | None:
    """What the server has of this run; None when it does not know it.

    Args:
        base_url: the server's address.
        api_key: W&B's key.
        entity: the run's team or user; None is the key's own.
        project: the run's project.
        run_id: the run.
        end: ask for state and config, too.

    Raises:
        SinkError: the server cannot be asked, or gives no answer that makes sense.
    """
    variables = {"entity": entity, "project": project, "run": run_id}
    query = _QUERY % ("state config" if end else "")
    body = json.dumps({"query": query, "variables": variables}).encode()
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
        config = bucket.get("config")
        return RunAtServer(
            rows=int(bucket["historyLineCount"] or 0),
            last_row={**last_row, "_step": int(last_row["_step"])} if last_row else None,
            summary=json.loads(bucket["summaryMetrics"] or "{}"),
            state=bucket.get("state"),
            config_keys=frozenset(json.loads(config)) if config else None,
        )
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        # The request carries the key in a header; neither is part of these errors' texts.
        raise SinkError(f"W&B's server could not be asked for its rows: {error!r}") from error


class Watch:
    """Asks the server again and again, in a thread of its own, and keeps what it said last.

    Args:
        ask: asks once.
        wanted: whether there is more to be shown than up to this step.
        next_step: the step up to which the server is known to have the run.
        interval_s: pause between two questions.
    """

    def __init__(
        self,
        ask: Callable[[], Shown],
        wanted: Callable[[int], bool],
        next_step: int,
        interval_s: float,
    ) -> None:
        #: The highest step that the server has shown.
        self.next_step = next_step
        #: How often the server has answered.
        self.answers = 0
        #: Why it did not answer last time.
        self.error: str | None = None
        self._ask = ask
        self._wanted = wanted
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="raywb-confirm", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def end(self) -> None:
        """Ask no more; a question that is under way is not waited for."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            if not self._wanted(self.next_step):
                continue
            try:
                self.next_step = max(self.next_step, self._ask().next_step)
            except Exception as error:  # noqa: BLE001 - there is a next question
                self.error = str(error)
                continue
            self.error = None
            self.answers += 1


class Standstill:
    """Tells a server that is slow from one that gets nothing any more.

    Only the time between answers counts: while the server cannot be asked, nothing is known.
    """

    def __init__(self) -> None:
        self._interval_s = 0.0
        self._patience = 1
        self._rows = 0
        self._answers = 0
        self._since: float | None = None

    def begin(self, rows: int, interval_s: float) -> None:
        """A sink has opened the run, of which the server has ``rows``, and asks at intervals."""
        if rows > self._rows:
            self._patience = 1
        self._interval_s = interval_s
        self._rows = rows
        self._answers = 0
        self._since = None

    @property
    def patience_s(self) -> float:
        """How long the server may show no new row."""
        return PATIENT_INTERVALS * self._interval_s * self._patience

    def note(self, rows: int, handed_over: int, answers: int, now: float) -> bool:
        """Take an answer in; True when rows do not arrive, upon which the sink is replaced.

        Args:
            rows: how many the server has shown.
            handed_over: how many W&B's client has taken.
            answers: how often the server has answered this sink.
            now: seconds on a monotonic clock.
        """
        if answers == self._answers:
            return False
        self._answers = answers
        if rows > self._rows or rows >= handed_over:
            self._patience = 1 if rows > self._rows else self._patience
            self._rows = rows
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since > self.patience_s:
            self._patience = min(self._patience * 2, MOST_PATIENCE)
            return True
        return False
