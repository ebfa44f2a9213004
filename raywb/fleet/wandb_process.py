"""Runs the process that reads from W&B, and ends it when the time is over."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO

import msgspec
import psutil

from raywb.errors import FleetError, FleetTimeout, KeyRefused, ProjectUnknown, RaywbError
from raywb.fleet.deadline import Deadline
from raywb.fleet.reading import NO_BASELINE, Line, Progress, Read, ReadRequest
from raywb.settings import fleet_reader_environment

__all__ = ["read_runs"]

#: How much of what the process printed goes into the text of an error, in characters.
_TAIL = 500

#: Once the window is there, its baseline may take this share of what is left of the time.
BASELINE_SHARE = 0.5


def read_runs(
    request: ReadRequest,
    deadline: Deadline,
    environment: Mapping[str, str],
    *,
    redact: Callable[[str], str] = str,
) -> Read:
    """Read a project's recent runs in a process of its own.

    Args:
        request: what is to be read.
        deadline: when the process is ended, whatever it waits for.
        environment: the process environment.
        redact: masks keys in what goes into the texts of errors.

    Raises:
        KeyRefused: W&B's server does not accept the key.
        ProjectUnknown: there is no such project, or the key may not see it.
        FleetTimeout: not everything had come in time.
        FleetError: the server answered with an error, or the process ended without a word.
    """
    last: Line = Progress(0, 0)
    with (
        # What W&B's client left running may still write there.
        tempfile.TemporaryDirectory(prefix="raywb-fleet-", ignore_cleanup_errors=True) as home,
        tempfile.TemporaryFile() as printed,
        _process(fleet_reader_environment(environment, home), printed) as child,
    ):
        stdin, stdout = child.stdin, child.stdout
        if stdin is None or stdout is None:
            raise FleetError("the process that reads from W&B has no pipes")
        with contextlib.suppress(BrokenPipeError):
            stdin.write(msgspec.json.encode(msgspec.structs.replace(request, home=home)) + b"\n")
            stdin.flush()
        window: Read | None = None
        patience = _Patience(deadline)
        for line in _lines(stdout, patience):
            last = msgspec.json.decode(line, type=Line)
            if isinstance(last, Read) and last.goes_on:
                window = last
                # What is left then is for the outlets.
                patience.deadline = Deadline(BASELINE_SHARE * deadline.left_s)
            elif not isinstance(last, Progress):
                break
        if window is not None and (last is window or not isinstance(last, Read)):
            notes = [*window.notes, NO_BASELINE]
            return msgspec.structs.replace(window, goes_on=False, notes=notes)
        if isinstance(last, Progress) and deadline.left_s:
            printed.seek(0)
            # Cut last: a part of a key would not be found.
            said = redact(printed.read().decode(errors="replace"))[-_TAIL:].strip()
            raise FleetError(f"the process that reads from W&B ended without a result: {said}")
    try:
        return _judged(last, request, deadline)
    except RaywbError as error:
        raise type(error)(" ".join(redact(str(error)).split())) from None


def _judged(last: Line, request: ReadRequest, deadline: Deadline) -> Read:
    if isinstance(last, Read):
        return last
    where = f"W&B's server at {request.base_url}"
    if isinstance(last, Progress):
        pages = "1 page" if last.pages == 1 else f"{last.pages} pages"
        come = f"{last.runs} runs on {pages} had come" if last.pages else "nothing came"
        raise FleetTimeout(
            f"{where} did not give all that was asked for within {deadline.limit_s:g} s: {come}"
        )
    if last.kind == "key":
        raise KeyRefused(
            f"{where} does not accept the key in WANDB_API_KEY, or in the secret ({last.text}): "
            "make a new one on the server's page /authorize"
        )
    if last.kind == "project":
        raise ProjectUnknown(
            f"{where} has no project {request.path}, or this key may not see it ({last.text}): "
            "check WANDB_ENTITY and WANDB_PROJECT"
        )
    raise FleetError(f"{last.text} ({where})")


@contextlib.contextmanager
def _process(
    environment: Mapping[str, str], printed: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """The child, and its end with all that it started."""
    child = subprocess.Popen(
        [sys.executable, "-m", "raywb.fleet.wandb_runs"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=printed,
        env=dict(environment),
        # A Ctrl-C on the terminal is for the parent, which ends the child.
        start_new_session=True,
    )
    try:
        yield child
    finally:
        started = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(child.pid).children(recursive=True)
        child.kill()
        child.wait()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what nobody read any more
                    pipe.close()


@dataclass
class _Patience:
    """How long is waited for the next line; it may change between two of them."""

    deadline: Deadline


def _lines(stdout: IO[bytes], patience: _Patience) -> Iterator[bytes]:
    """Lines as they come, until the end of the stream or of the time."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while selector.select(patience.deadline.left_s):
            chunk = os.read(stdout.fileno(), 1 << 16)
            if not chunk:
                return
            *whole, pending = (pending + chunk).split(b"\n")
            yield from whole
