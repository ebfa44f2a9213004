"""Which W&B run a training belongs to, over all its starts: ``run.json`` in the output directory.

One output directory is one training is one W&B run. A start that trains and finds the file goes on
in the run that it names, and what it logs comes behind the rows that are there:

- the run is open on the connected cluster (its driver was killed, the cluster was not): joined;
- the cluster of the earlier start is gone: ``raywb recover`` first brings home what its processes
  had logged and nobody had taken in, then a service in the same directory opens the run again;
- the run was finished, well or as failed: W&B opens the same run again. Online it shows *running*
  and then how this start ends; offline a further ``offline-run-…`` of the same id goes on at its
  step, and ``wandb sync`` appends it when all of them are uploaded in their order.

``train.resume=false`` begins a new run, and the file then names that one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from recipes.errors import TrackingError
from recipes.stages.layout import write_json

if TYPE_CHECKING:
    import raywb
    from raywb.reports import Status

__all__ = ["RunFile", "RunRecord", "running_service", "with_default_project"]

#: How long a service is waited for whose cluster was killed a moment ago.
_IN_USE_S = 30.0
_LOOK_AGAIN_S = 1.0

#: How long W&B may take for what an earlier start left behind.
_RECOVER_S = 180.0

#: What ``raywb recover`` exits with when not all rows are with W&B, and when it cannot work.
_UNDELIVERED, _DIRECTORY = 5, 6


@dataclass(frozen=True)
class RunRecord:
    """A W&B run, and the directory of the raywb service that wrote it."""

    project: str
    id: str
    name: str
    mode: str
    dir: str
    entity: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class RunFile:
    """The file, and whether this start goes on with the run that it names.

    Attributes:
        path: ``run.json`` of the output directory.
        resume: False: begin a new run.
    """

    path: Path
    resume: bool

    def settings_for(
        self,
        chosen: Mapping[str, Any],
        running: Status | None,
        announce: Callable[[str], None],
    ) -> dict[str, Any]:
        """Return the settings of ``raywb.start`` by which the recorded run is gone on with.

        Args:
            chosen: what the recipe's settings say by name; returned as it is without a record.
            running: the connected cluster's service, if there is one.
            announce: is told which run it is.

        Raises:
            TrackingError: the settings ask for another run, or the recorded one cannot be gone on
                with; the message says why.
        """
        record = self._read() if self.resume else None
        if record is None or "disabled" in (record.mode, chosen.get("mode")):
            return dict(chosen)
        self._check(record, chosen)
        announce(f"Going on in W&B run {record.name}")
        if running is not None and running.run.id == record.id and not running.finished:
            return {**chosen, "run_id": record.id}
        of_run: dict[str, Any] = {
            "run_id": record.id,
            "name": record.name,
            "project": record.project,
        }
        if running is None:
            record = _recovered(record, announce)
            of_run["dir"] = record.dir
        elif record.mode == "offline" and running.run.dir != record.dir:
            raise TrackingError(
                f"the offline run {record.name} lies in {record.dir}, and this cluster's raywb "
                f"service writes to {running.run.dir}: go on with it on another cluster, or set "
                "train.resume=false to train anew in a new run"
            )
        of_run |= {"entity": record.entity, "group": record.group or "", "mode": record.mode}
        return {**of_run, **chosen}

    def write(self, info: raywb.RunInfo) -> None:
        """Record a run, unless W&B is disabled."""
        if info.mode != "disabled":
            names = (field.name for field in dataclasses.fields(RunRecord))
            write_json(self.path, {name: getattr(info, name) for name in names})

    def _read(self) -> RunRecord | None:
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=RunRecord)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise TrackingError(
                f"{self.path} cannot be read, and it says which W&B run this training belongs to: "
                f"{error}. Remove it, and a new run is begun"
            ) from error

    def _check(self, record: RunRecord, chosen: Mapping[str, Any]) -> None:
        has = {**dataclasses.asdict(record), "group": record.group or ""}
        for key, wanted in chosen.items():
            if has.get(key, wanted) not in (wanted, None):
                raise TrackingError(
                    f"this training belongs to the W&B run {record.name} ({self.path}), whose "
                    f"{key} is {has[key]!r}, not {wanted!r}: leave wandb.{key} as it was, or set "
                    "train.resume=false to train anew in a new run"
                )


def running_service() -> Status | None:
    """Return how the connected cluster's raywb service is, or None where there is none."""
    import raywb
    from raywb.errors import ServiceUnavailable

    try:
        return raywb.status()
    except ServiceUnavailable:
        return None  # what is wrong with one that does not answer, start() will say


def with_default_project(chosen: Mapping[str, Any], project: str) -> dict[str, Any]:
    """Return settings of ``raywb.start`` that name a project, where nothing else does."""
    named = "project" in chosen or os.environ.get("WANDB_PROJECT")
    return dict(chosen) if named else {**chosen, "project": project}


def _recovered(record: RunRecord, announce: Callable[[str], None]) -> RunRecord:
    """Bring home what the earlier cluster left on this machine; return the run as it now is.

    Raises:
        TrackingError: W&B does not have all of it, or somebody else works with the run.
    """
    if not Path(record.dir).is_dir():
        return record  # on another machine, or removed
    announce(f"Bringing home what earlier starts left in {record.dir} …")
    deadline = time.monotonic() + _IN_USE_S
    while True:
        done = _recover(record.dir)
        if done.returncode != _DIRECTORY or time.monotonic() > deadline:
            break
        time.sleep(_LOOK_AGAIN_S)
    if done.returncode not in (0, _UNDELIVERED):
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TrackingError(f"the W&B run {record.name} cannot be gone on with now: {said}")
    runs = [run for run in json.loads(done.stdout)["runs"] if run["run"]["id"] == record.id]
    if any(run["state"] == "running" for run in runs):
        raise TrackingError(
            f"the W&B run {record.name} cannot be gone on with before W&B has what an earlier "
            f"start logged; `raywb recover {record.dir}` tells what is in the way"
        )
    return dataclasses.replace(
        record, mode=[record.mode, *(run["run"]["mode"] for run in runs)][-1]
    )


def _recover(directory: str) -> subprocess.CompletedProcess[str]:
    import raywb

    root = str(Path(raywb.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "raywb",
            "recover",
            "--json",
            f"--timeout-s={_RECOVER_S:g}",
            directory,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
