"""Which runs to ask for, and how to go on where the server does not know a filter.

Nothing here knows W&B's client: it asks for pages through a function that it is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from raywb.fleet.runs import CONFIG_KEYS, SPS_KEYS, FleetRun, Window, run_from_node

__all__ = [
    "NO_BASELINE",
    "Failed",
    "Failure",
    "Line",
    "Page",
    "Progress",
    "Read",
    "ReadRequest",
    "Reader",
    "Refused",
]

#: Said where the window is there and the baseline is not.
NO_BASELINE = "main's earlier runs did not come"

#: W&B's words for a run whose throughput counts.
MEASURED_STATES = ("finished", "crashed")


class ReadRequest(msgspec.Struct, frozen=True):
    """What is to be read, and with what.

    Attributes:
        baseline: regular expression of RE2 for the names of runs whose newest are read as well,
            from before the window too; empty for none.
        baseline_runs: how many of them.
        limit_s: longest that one request may take.
        home: directory that the process removes when its parent is gone; empty for none.
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
    home: str = ""

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
        goes_on: the baseline is still to come, in another of these.
    """

    runs: list[FleetRun]
    baseline: list[FleetRun] | None
    requests: int
    elapsed_s: float
    notes: list[str]
    incomplete: list[str]
    goes_on: bool = False


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


class _Order(NamedTuple):
    """An order that stands in for a filter.

    Attributes:
        field: the filter's field.
        name: the order, newest first.
        time: what of a run it goes by.
        missing: which runs are not seen without filter and order.
    """

    field: str
    name: str
    time: str
    missing: str


_ORDERS = (
    _Order(
        "createdAt",
        "-created_at",
        "created_s",
        "runs that began in the window and were not heard of since",
    ),
    _Order(
        "heartbeatAt",
        "-heartbeat_at",
        "heartbeat_s",
        "runs that began before the window and ended in it",
    ),
)

#: So many pages in a row without a run of the window say that a question is passed over. A single
#: one may come of runs whose state changed while the server looked.
PAGES_OUTSIDE = 2


def _is_outside(run: FleetRun, window: Window) -> bool:
    """Whether its times say that it does not belong; one without any that can be read may."""
    dated = run.created_s is not None or run.heartbeat_s is not None
    return dated and not window.has(run)


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
        self._outside = 0

    def read_window(self) -> list[FleetRun]:
        """Every run of the window, once.

        Newest first: what begins while the pages come is in front of them, so that no run slips
        from one page to another unseen; one that is seen twice counts once.

        Raises:
            Failure: the server takes none of the questions.
        """
        filters = window_filters(self._request.window)
        try:
            self._read_filtered({"$or": list(filters.values())})
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
                self._read_filtered(wanted)
            except Refused as error:
                refused.append(name)
                self.notes.append(f"the server refuses to filter by {name} ({error})")
        orders = [order for order in _ORDERS if order.field in refused]
        errors = [why for order in orders if (why := self._read_in_order(order))]
        if len(refused) == len(filters) and len(errors) == len(_ORDERS):
            text = f"W&B's server refuses to search for runs at all: {errors[-1]}"
            raise Failure("server", text)
        if "state" in refused:
            self.incomplete.append("runs that still run and were not heard of in the window")

    def _read_in_order(self, order: _Order) -> Refused | None:
        """Without a filter, newest first, up to the window's start; returns why it cannot be."""
        try:
            for runs in self._take({}, order.name):
                times = [at for run in runs if (at := getattr(run, order.time)) is not None]
                if times and min(times) < self._request.window.start_s:
                    return None
                if self._outside >= PAGES_OUTSIDE:
                    self.notes.append(f"the server passes over the order by {order.field}")
                    self.incomplete.append(order.missing)
                    return None
        except Refused as error:
            self.notes.append(f"the server refuses the order by {order.field} ({error})")
            self.incomplete.append(order.missing)
            return error
        return None

    def _read_filtered(self, wanted: Mapping[str, Any]) -> None:
        for _ in self._take(wanted, "-created_at"):
            if self._outside >= PAGES_OUTSIDE:
                # Honoured filters bring no such pages; the rest would be the whole history.
                self.notes.append("the server passes over the filters: read newest first")
                self.incomplete.append("runs that began long ago and still ran in the window")
                return

    def _take(self, wanted: Mapping[str, Any], order: str) -> Iterator[list[FleetRun]]:
        """Keep what belongs to the window, page by page; yields each page's runs."""
        window = self._request.window
        self._outside = 0
        for page in self._ask(wanted, order, self._request.per_page):
            runs = [run_from_node(node) for node in page]
            self._runs |= {run.id: run for run in runs if window.has(run)}
            self._tell(Progress(self._count, len(self._runs)))
            outside = runs and all(_is_outside(run, window) for run in runs)
            self._outside = self._outside + 1 if outside else 0
            yield runs

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
