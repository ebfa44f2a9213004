"""What clusters that are gone left in a directory on this machine, brought to W&B.

``raywb recover`` does it, in a process of its own; here it is decided where that is needed, and
read what it could not bring.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raywb.errors import DirectoryError
from raywb.launch.left_here import LeftRun, has_unopened_rows, is_settled, runs_in
from raywb.settings import child_environment

__all__ = ["InUse", "bring_home"]

#: What ``raywb recover`` exits with when a service, or another command, works in the directory.
_IN_USE = 6


class InUse(Exception):
    """Raised when a service, or another command, works in the directory."""


class _Recovered(NamedTuple):
    """What ``raywb recover`` said: its report, or what was in the way of one."""

    report: Mapping[str, Any]
    said: str | None


def bring_home(
    directory: Path,
    environment: Mapping[str, str],
    exit_code: int | None,
    deadline: float,
    tell: Callable[[str], None],
) -> list[str]:
    """Bring home what a directory and journals hold that W&B does not have.

    Args:
        directory: a service's, whose cluster is gone.
        environment: this process's.
        exit_code: how a run ended that nobody finished; None leaves it as crashed.
        deadline: by ``time.monotonic()``.
        tell: is told what is going on.

    Returns:
        What is still missing, in sentences.

    Raises:
        InUse: a service, or another command, works in it.
    """
    try:
        if is_settled(directory, environment):
            return []
        tell(f"Bringing home what a cluster that is gone left in {directory}")
        timeout_s = max(deadline - time.monotonic(), 1.0)
        done = _recover(directory, environment, exit_code, timeout_s)
        return _missing(directory, done)
    except (DirectoryError, OSError) as error:
        return [f"what lies in {directory} cannot be brought home: {error}"]


def _missing(directory: Path, done: _Recovered) -> list[str]:
    again = f"`raywb recover {directory}` tries again"
    runs = [(f"run {run.name}", run.message) for run in _unfinished(directory)]
    if done.said is not None and has_unopened_rows(directory):
        runs.append(("a run that was not opened yet", None))
    missing = [
        f"{name}: {done.said or message or 'W&B has not closed it'}; {again}"
        for name, message in runs
    ]
    if rows := done.report.get("after_finish_rows", 0):
        missing.append(
            f"{rows} rows came after the run was finished, and belong to no run; they are in "
            f"{directory}, and nothing uploads them: copy it from this machine"
        )
    for source_id, reason in sorted(done.report.get("failed", {}).items()):
        missing.append(f"the journal of source {source_id[:8]} is not home: {reason}; {again}")
    if missing:
        return missing
    if done.said is not None:
        return [f"{directory}: {done.said}; {again}"]
    unsure = [one for one in done.report.get("unconfirmed", []) if not one.get("quiet")]
    if unsure:
        return [
            f"nobody knows what {len(unsure)} processes logged last: their journals are not on "
            f"this machine, or they still live; {again}"
        ]
    return []


def _unfinished(directory: Path) -> list[LeftRun]:
    return [run for run in runs_in(directory) if not run.is_complete]


def _recover(
    directory: Path, environment: Mapping[str, str], exit_code: int | None, timeout_s: float
) -> _Recovered:
    """Run the command; ``said`` is what was in the way, None when nothing was."""
    words = ["recover", str(directory), "--json", f"--timeout-s={timeout_s:g}"]
    if exit_code is not None:
        words.append(f"--exit-code={exit_code}")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "raywb", *words],
            env=child_environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            # It keeps to its limit by itself, but for reading and merging before.
            timeout=timeout_s + 60.0,
        )
    except subprocess.TimeoutExpired:
        return _Recovered({}, "it took too long")
    if done.returncode == _IN_USE:
        raise InUse(f"a service or another command works in {directory}")
    report: Mapping[str, Any] = {}
    if done.stdout.strip():
        try:
            report = json.loads(done.stdout)
        except ValueError:
            return _Recovered({}, "what it answered cannot be read")
    if done.returncode == 0:
        return _Recovered(report, None)
    messages = [run["message"] for run in report.get("runs", ()) if run.get("message")]
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return _Recovered(report, "; ".join(messages) or last)
