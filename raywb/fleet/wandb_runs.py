"""The recent runs of one project, out of W&B's public API: ``python -m raywb.fleet.wandb_runs``.

This is a process of its own. W&B's client waits for its Go process, which waits for the server;
neither can be interrupted, and a client that was left in the middle is of no use afterwards. A
process can be ended at any moment (:mod:`raywb.fleet.wandb_process` does), and the next collection
begins with a fresh one.

It reads a :class:`ReadRequest`, one JSON line, from stdin, key included, so that the key is in no
argument and no environment, and writes JSON lines to stdout: :class:`Progress` for each page, then
:class:`Read` or :class:`Failed`. When its stdin ends, its parent is gone, and so is it.

``wandb.Api().runs()`` is used for what it is good at, login, filters, order and pages. Its own
selection is not: it leaves out summary and config, which it then fetches run by run. So the pages
are asked for with a query of ours, with six fields and, of summary and config, a few keys.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from raywb.fleet.runs import CONFIG_KEYS, SPS_KEYS, FleetRun, Window, run_from_node

__all__ = ["Failed", "Failure", "Line", "Progress", "Read", "ReadRequest"]

#: W&B's words for a run whose throughput counts.
MEASURED_STATES = ("finished", "crashed")


class ReadRequest(msgspec.Struct, frozen=True):
    """What is to be read, and with what.

    Attributes:
        baseline: regular expression of RE2 for the names of runs whose newest are read as well,
            from before the window too; empty for none.
        baseline_runs: how many of them.
        limit_s: longest that one request may take.
    """

    api_key: str
    base_url: str
    entity: str
    project: str
    window: Window
    per_page: int
    limit_s: float
    baseline: str = ""
    baseline_runs: int = 0

    @property
    def path(self) -> str:
        """How W&B names the project."""
        return f"{self.entity}/{self.project}"

    def __repr__(self) -> str:
        return f"ReadRequest({self.base_url} {self.path})"  # for tracebacks: without the key


class Progress(msgspec.Struct, frozen=True, tag=True):
    """A page has come."""

    pages: int
    runs: int


class Read(msgspec.Struct, frozen=True, tag=True):
    """What came of it.

    Attributes:
        runs: every run of the window, once.
        baseline: the newest runs of the baseline, newest first; None where they were not asked
            for, or cannot be.
        requests: how many requests it took, the login's included.
        elapsed_s: how long it took, from the login on.
        notes: what the server refused, and how it went on without.
        incomplete: which runs are therefore missing.
    """

    runs: list[FleetRun]
    baseline: list[FleetRun] | None
    requests: int
    elapsed_s: float
    notes: list[str]
    incomplete: list[str]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Why nothing came of it: ``key``, ``project`` or ``server``, and a text."""

    kind: str
    text: str


Line = Progress | Read | Failed


class Failure(Exception):
    """Raised when there is nothing to go on with."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Refused(Exception):
    """Raised when the server does not take a query as it is."""


#: One page of runs: its nodes, and how to ask for the page.
Page = list[dict[str, Any]]
Pages = Callable[[str, Mapping[str, Any], str, int], Iterator[Page]]

_QUERY = """
query RaywbFleet($entity: String!, $project: String!, $filters: JSONString, $order: String,
                 $perPage: Int!, $cursor: String) {
  project(name: $project, entityName: $entity) {
    runs(filters: $filters, order: $order, first: $perPage, after: $cursor) {
      edges {
        cursor
        node {
          name displayName state createdAt heartbeatAt sweepName
          summaryMetrics%(summary)s config%(config)s
        }
      }
      pageInfo { hasNextPage }
    }
  }
}
"""


def page_query(*, keys: bool) -> str:
    """The query for a page, with a few keys of summary and config, or with all of both."""

    def some(names: Sequence[str]) -> str:
        return f"(keys: {json.dumps(list(names))})" if keys else ""

    return _QUERY % {"summary": some(SPS_KEYS), "config": some(CONFIG_KEYS)}


def window_filters(window: Window) -> dict[str, dict[str, Any]]:
    """What makes a run belong to the window, each by the name of the field that it asks for."""
    return {
        "createdAt": {"createdAt": {"$gte": window.start}},
        "heartbeatAt": {"heartbeatAt": {"$gte": window.start}},
        "state": {"state": "running"},
    }


class Reader:
    """Reads a window, and goes on with less where the server does not know a filter.

    Args:
        pages: asks for runs by query, filters, order and page size; it yields page by page.
        request: what is to be read.
        tell: is told after each page.
    """

    def __init__(
        self, pages: Pages, request: ReadRequest, tell: Callable[[Progress], None]
    ) -> None:
        self.notes: list[str] = []
        self.incomplete: list[str] = []
        self._pages = pages
        self._request = request
        self._tell = tell
        self._query = page_query(keys=True)
        self._count = 0
        self._runs: dict[str, FleetRun] = {}

    def read_window(self) -> list[FleetRun]:
        """Every run of the window, once.

        Newest first: what begins while the pages come is in front of them, so that no run slips
        from one page to another unseen; one that is seen twice counts once.

        Raises:
            Failure: the server takes none of the questions.
        """
        filters = window_filters(self._request.window)
        try:
            self._take({"$or": list(filters.values())}, "-created_at")
        except Refused as error:
            self.notes.append(
                f"the server does not take the three filters as one ({error}): one by one"
            )
            self._read_one_by_one(filters)
        return list(self._runs.values())

    def read_baseline(self) -> list[FleetRun] | None:
        """The newest runs of the baseline, on one page; None where the server refuses that."""
        states = {"state": {"$in": list(MEASURED_STATES)}}
        named = {"display_name": {"$regex": self._request.baseline}}
        try:
            wanted = self._request.baseline_runs
            page = next(self._ask({"$and": [named, states]}, "-created_at", wanted), [])
        except Refused as error:
            self.notes.append(f"the server does not find runs by their name ({error})")
            return None
        return [run_from_node(node) for node in page][: self._request.baseline_runs]

    def _read_one_by_one(self, filters: Mapping[str, Mapping[str, Any]]) -> None:
        refused = []
        for name, wanted in filters.items():
            try:
                self._take(wanted, "-created_at")
            except Refused as error:
                refused.append(name)
                self.notes.append(f"the server refuses to filter by {name} ({error})")
        if "heartbeatAt" in refused:
            self._read_by_heartbeat(refused)
        if "state" in refused:
            self.incomplete.append("runs that still run and were not heard of in the window")

    def _read_by_heartbeat(self, refused: list[str]) -> None:
        """Without a filter, those last heard of first, up to the window's start."""
        try:
            self._take({}, "-heartbeat_at", by_heartbeat=True)
        except Refused as error:
            if len(refused) == len(window_filters(self._request.window)):
                text = f"W&B's server refuses to search for runs at all: {error}"
                raise Failure("server", text) from None
            self.incomplete.append("runs that began before the window and ended in it")
            self.notes.append(f"the server refuses the order by heartbeat ({error})")

    def _take(self, wanted: Mapping[str, Any], order: str, *, by_heartbeat: bool = False) -> None:
        window = self._request.window
        for page in self._ask(wanted, order, self._request.per_page):
            runs = [run_from_node(node) for node in page]
            belonging = [run for run in runs if window.has(run)]
            self._runs |= {run.id: run for run in belonging}
            self._tell(Progress(self._count, len(self._runs)))
            heard = [run.heartbeat_s for run in runs if run.heartbeat_s is not None]
            if by_heartbeat and heard and min(heard) < window.start_s:
                return
            if runs and not belonging:
                # Honoured filters bring no such page; the rest would be the whole history.
                self.notes.append("the server passes over the filters: read newest first")
                self.incomplete.append("runs that began long ago and still ran in the window")
                return

    def _ask(self, wanted: Mapping[str, Any], order: str, per_page: int) -> Iterator[Page]:
        """Page by page, without the selection of keys if the server does not know that."""
        try:
            for page in self._pages(self._query, wanted, order, per_page):
                self._count += 1
                yield page
        except Refused as error:
            knows = self._query == page_query(keys=False)
            if knows or not re.search(r"argument.*\bkeys\b|\bkeys\b.*argument", str(error), re.I):
                raise
            self.notes.append(f"the server cannot hand out parts of summary and config ({error})")
            self._query = page_query(keys=False)
            yield from self._ask(wanted, order, per_page)


# ----------------------------------------------------------------------------------------------
# W&B's client


class _Asked:
    """W&B's client, with errors that say what to do, and a count of its requests."""

    def __init__(self, request: ReadRequest) -> None:
        import wandb
        from wandb.errors import AuthenticationError

        self.requests = 1
        self._request = request
        try:
            self._api = wandb.Api(
                overrides={"base_url": request.base_url},
                timeout=math.ceil(request.limit_s),
                api_key=request.api_key,
            )
        except AuthenticationError as error:
            # The client says so of whatever goes wrong at the login.
            status = _status(error.__cause__) or _status_in(str(error))
            refused = error.__cause__ is None or status in (401, 403)
            text = str(error) if refused else f"W&B's server does not let in: {error}"
            raise Failure("key" if refused else "server", text) from error

    def pages(
        self, query: str, filters: Mapping[str, Any], order: str, per_page: int
    ) -> Iterator[Page]:
        """The pages of one question; the client's own paging, with our query in it."""
        self._api.flush()  # it would hand out a former answer, or try a former query again
        found = self._api.runs(
            self._request.path, filters=dict(filters), order=order, per_page=per_page
        )

        def page() -> list[Page]:
            self.requests += 1
            project = (found.last_response or {}).get("project")
            if project is None:
                raise Failure("project", "W&B's server knows no such project")
            return [[edge["node"] for edge in project["runs"]["edges"]]]

        found.QUERY = query
        found.convert_objects = page
        with self._failures():
            yield from found

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Tell a server that does not take a question from one that takes no key, or none."""
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        try:
            yield
        except WandbApiFailedError as error:
            status = _status(error)
            text = (error.response.message if error.response is not None else "") or str(error)
            if status == 401:
                raise Failure("key", text) from error
            if status in (403, 404):
                raise Failure("project", text) from error
            if status in (200, 400, 422):
                raise Refused(text) from error
            raise Failure("server", f"W&B's server answers with an error: {text}") from error


def _status(error: BaseException | None) -> int:
    """The HTTP status behind an error of W&B's client; 0 where there is none."""
    return int(getattr(getattr(error, "response", None), "http_status", 0) or 0)


def _status_in(text: str) -> int:
    """The same, out of the text of an error that does not carry it."""
    match = re.search(r"returned error (\d{3})", text)
    return int(match[1]) if match else 0


def read(request: ReadRequest, tell: Callable[[Progress], None]) -> Read:
    """Read what is asked for.

    Raises:
        Failure: there is nothing to go on with.
    """
    import wandb  # noqa: F401 - an import is no part of what is measured

    began = time.monotonic()
    asked = _Asked(request)
    reader = Reader(asked.pages, request, tell)
    runs = reader.read_window()
    baseline = reader.read_baseline() if request.baseline else None
    elapsed_s = time.monotonic() - began
    return Read(runs, baseline, asked.requests, elapsed_s, reader.notes, reader.incomplete)


def _end_with_the_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Answer the request on stdin."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # W&B's client prints, and only answers belong on stdout
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=ReadRequest)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()

    def write(line: Line) -> None:
        out.write(msgspec.json.encode(line) + b"\n")

    try:
        write(read(request, write))
    except Failure as failure:
        write(Failed(failure.kind, str(failure)))
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is to know it
        write(Failed("server", f"{type(error).__name__}: {error}"))
    # W&B's client would wait for its Go process, which ends by itself when its parent is gone.
    os._exit(0)


if __name__ == "__main__":
    main()
