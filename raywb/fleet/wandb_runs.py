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
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import psutil

from raywb.fleet.reading import (
    NO_BASELINE,
    Failed,
    Failure,
    Line,
    Page,
    Progress,
    Read,
    Reader,
    ReadRequest,
    Refused,
)
from raywb.fleet.runs import FleetRun

__all__ = ["main", "read"]

#: How often a directory is removed that somebody may still be writing to.
_REMOVALS = 3


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


def read(request: ReadRequest, tell: Callable[[Progress | Read], None]) -> Read:
    """Read what is asked for.

    Where a baseline is, too, ``tell`` is given the window as soon as it is there: no trouble with
    the baseline, and no wait for it, is to cost the metrics.

    Raises:
        Failure: there is nothing to go on with.
    """
    import wandb  # noqa: F401 - an import is no part of what is measured

    began = time.monotonic()
    asked = _Asked(request)
    reader = Reader(asked.pages, request, tell)
    runs = reader.read_window()

    def so_far(baseline: list[FleetRun] | None, *, goes_on: bool = False) -> Read:
        took_s = time.monotonic() - began
        notes, missing = reader.notes, reader.incomplete
        return Read(runs, baseline, asked.requests, took_s, notes, missing, goes_on)

    if not request.baseline:
        return so_far(None)
    tell(so_far(None, goes_on=True))
    try:
        return so_far(reader.read_baseline())
    except Exception as error:  # noqa: BLE001 - told as a note
        reader.notes.append(f"{NO_BASELINE} ({_told(error)})")
        return so_far(None)


def _told(error: Exception) -> str:
    """An error in one line, without the part of an address that pydantic shows in its errors."""
    text = re.sub(r"input_value=.*?, input_type=", "input_type=", str(error), flags=re.DOTALL)
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _end_with_the_parent(home: str) -> None:
    sys.stdin.buffer.read()
    started = psutil.Process().children(recursive=True)
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=5)
    # The parent would have, had it not been killed; there is nobody to be told of failures.
    # Again, where the main thread wrote into it meanwhile.
    for _ in range(_REMOVALS):
        if home and os.path.exists(home):
            shutil.rmtree(home, ignore_errors=True)
    os._exit(1)


def main() -> None:
    """Answer the request on stdin."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # W&B's client prints, and only answers belong on stdout
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=ReadRequest)
    ending = threading.Thread(target=_end_with_the_parent, args=(request.home,), daemon=True)
    ending.start()

    def write(line: Line) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is gone, which the thread sees
            out.write(msgspec.json.encode(line) + b"\n")

    try:
        write(read(request, write))
    except Failure as failure:
        write(Failed(failure.kind, str(failure)))
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is to know it
        write(Failed("server", _told(error)))
    # The parent takes the last line and kills this process, with W&B's Go process and all. If it
    # was killed itself, the thread clears up: an end of this process now would cut it short.
    ending.join()


if __name__ == "__main__":
    main()
