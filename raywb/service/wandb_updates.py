"""Tables, artifacts and alerts at W&B's client, in the sink's process.

Everything here is idempotent. An artifact is known to W&B by its digest: the same contents under
the same name are one version, however often they are logged. What a row says of its table is the
same whoever logs it, for the ids by which it refers to the artifact are made from run, key and
row. Work that waits for uploads is done in threads, so that no row waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from raywb.errors import SinkError
from raywb.service.sink_messages import (
    LogArtifact,
    LoggedTable,
    LogTable,
    SendAlert,
    TableOfRow,
    UpdateOutcome,
)
from raywb.service.transaction_log import read_artifacts, read_segment

__all__ = ["WandbUpdates"]


#: W&B takes names of artifacts of 128 characters, and adds 7 where it has to replace some.
MOST_NAME_CHARS = 121


class _Logged(NamedTuple):
    """An artifact as W&B knows it."""

    name: str
    digest: str


class WandbUpdates:
    """What goes to one W&B run besides plain rows.

    Args:
        run: W&B's run.
        base: W&B's own step of row 0.
        segments: finds the run's offline files; None online.
        alerts: alerts in them.
    """

    def __init__(
        self, run: Any, base: int, segments: Callable[[], list[Path]] | None, alerts: int
    ) -> None:
        self._alerts = alerts
        self._run = run
        self._base = base
        self._segments = segments
        self._lock = threading.Lock()
        self._known: set[_Logged] | None = None
        self._outcomes: list[UpdateOutcome] = []
        self._handed: dict[int, _Logged] = {}

    def value(self, table: TableOfRow) -> tuple[Any, LoggedTable]:
        """The table as a value for ``run.log``, its file with W&B's client; and for the summary.

        The artifact that it refers to is logged apart, by :meth:`log_table`.
        """
        value, artifact = _make_table(self._run.id, table)
        _drop_staged(artifact)
        value.bind_to_run(self._run, table.key, self._base + table.row)
        # Through JSON, since W&B's own kinds of strings are among its values.
        of_summary = json.loads(json.dumps(value.to_json(self._run)))
        return value, LoggedTable(table.row, table.key, of_summary)

    def log_table(self, request: LogTable) -> None:
        """Log the artifact that holds a table.

        Where an earlier sink logged the row, nobody knows whether it came to do the rest.
        """

        def make() -> tuple[Any, LoggedTable | None]:
            table = self.value(request.table)[1] if request.again else None
            return _make_table(self._run.id, request.table)[1], table

        self._begin(request.number, make, again=request.again)

    def log_artifact(self, request: LogArtifact) -> None:
        """Log an artifact."""
        import wandb

        def make() -> tuple[Any, None]:
            artifact = wandb.Artifact(request.name, request.kind)
            for path, content in request.files:
                # Nobody changes a blob, so W&B need not copy it.
                artifact.add_file(content, name=path, policy="immutable", skip_cache=True)
            artifact.finalize()
            return artifact, None

        self._begin(request.number, make, again=request.again)

    def _begin(
        self, number: int, make: Callable[[], tuple[Any, LoggedTable | None]], *, again: bool
    ) -> None:
        """Log what ``make`` makes, in a thread that waits until the server has it."""

        def work() -> None:
            try:
                artifact, table = make()
                outcome = UpdateOutcome(
                    number, self._log(number, artifact, again=again), table=table
                )
            except Exception as error:  # noqa: BLE001 - whatever it is, the service is told
                text = f"{type(error).__name__}: {error}"
                outcome = UpdateOutcome(number, "failed", text[:500])
            with self._lock:
                self._outcomes.append(outcome)

        threading.Thread(target=work, name=f"update-{number}", daemon=True).start()

    def _log(self, number: int, artifact: Any, *, again: bool) -> str:
        logged = _Logged(artifact.name.partition(":")[0], artifact.digest)
        if again and logged in self._known_from_files():
            _drop_staged(artifact)
            return "done"
        self._run.log_artifact(artifact)
        if self._segments is not None:
            with self._lock:
                self._handed[number] = logged
            return "handed"
        artifact.wait()
        _drop_staged(artifact)
        return "done"

    def _known_from_files(self) -> set[_Logged]:
        """What earlier sinks wrote into the run's offline files."""
        with self._lock:
            if self._known is None:
                self._known = _artifacts_in(self._segments()) if self._segments else set()
            return self._known

    def outcomes(self) -> list[UpdateOutcome]:
        """What became of the requests since the last call."""
        with self._lock:
            found, self._outcomes = self._outcomes, []
        return found

    def alert(self, request: SendAlert) -> None:
        """Send an alert."""
        self._alerts += 1
        self._run.alert(request.title, request.text, level=request.level)

    def found_in_files(self, deadline: float) -> list[int]:
        """Numbers of what was handed over, all of which is in the files a moment after the end.

        Args:
            deadline: monotonic time at which they must be there.

        Raises:
            SinkError: something is not; the next sink hands it over again.
        """
        while missing := self._missing_in_files():
            if time.monotonic() > deadline:
                raise SinkError(f"W&B's files do not hold {missing}; it is handed over again")
            time.sleep(0.1)
        return list(self._handed)

    def _missing_in_files(self) -> str:
        if self._segments is None:
            return ""
        segments = self._segments()
        if sum(read_segment(path).alerts for path in segments) < self._alerts:
            return "all alerts"
        known = _artifacts_in(segments) if self._handed else set()
        missing = [logged.name for logged in self._handed.values() if logged not in known]
        return ", ".join(missing)


def _artifacts_in(segments: list[Path]) -> set[_Logged]:
    return {_Logged(name, digest) for path in segments for name, digest in read_artifacts(path)}


def _make_table(run_id: str, table: TableOfRow) -> tuple[Any, Any]:
    """The table, and the artifact that ``run.log`` would make of it."""
    import wandb
    from wandb.sdk.artifacts._internal_artifact import InternalArtifact

    try:
        value = wandb.Table(columns=table.columns, data=table.rows)
    except TypeError:
        value = wandb.Table(columns=table.columns, data=table.rows, allow_mixed_types=True)
    artifact = InternalArtifact(_table_artifact_name(run_id, table.key), "run_table")
    artifact._client_id = _client_id(run_id, table.key, str(table.row))
    artifact._sequence_client_id = _client_id(run_id, table.key)
    artifact.add(value, table.key)
    artifact.finalize()
    return value, artifact


def _table_artifact_name(run_id: str, key: str) -> str:
    """W&B's name for it; one that W&B would refuse as too long ends with a digest instead."""
    name = f"run-{run_id}-{key}"
    if len(name) <= MOST_NAME_CHARS:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[: MOST_NAME_CHARS - len(digest) - 1]}-{digest}"


def _client_id(*words: str) -> str:
    """An id as long as W&B's own, and always the same."""
    return hashlib.sha512("\0".join(words).encode()).hexdigest()


def _drop_staged(artifact: Any) -> None:
    """Delete the copies that W&B's client made of an artifact's files to upload them."""
    from wandb.sdk.artifacts.staging import get_staging_dir

    for entry in artifact.manifest.entries.values():
        if entry.local_path and Path(entry.local_path).parent == Path(get_staging_dir()):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.local_path)
