"""Tables, artifacts and alerts at W&B's client, in the sink's process.

Everything here is idempotent. An artifact is known to W&B by its digest: the same contents under
the same name are one version, however often they are logged. What a row says of its table is the
same whoever logs it, for the ids by which it refers to the artifact are made from run, key and
row. Work that waits for uploads is done in threads, so that no row waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from raywb.errors import SinkError
from raywb.service.sink_messages import (
    LogArtifact,
    LogTable,
    SendAlert,
    TableOfRow,
    UpdateOutcome,
)

__all__ = ["WandbUpdates"]


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
    """

    def __init__(self, run: Any, base: int, segments: Callable[[], list[Path]] | None) -> None:
        self._run = run
        self._base = base
        self._segments = segments
        self._lock = threading.Lock()
        self._known: set[_Logged] | None = None
        self._outcomes: list[UpdateOutcome] = []
        self._handed: dict[int, _Logged] = {}

    def value(self, table: TableOfRow) -> Any:
        """The table as a value for ``run.log``, its file with W&B's client.

        The artifact that it refers to is logged apart, by :meth:`log_table`.
        """
        value, artifact = _make_table(self._run.id, table)
        _drop_staged(artifact)
        self._bind(value, table)
        return value

    def _bind(self, value: Any, table: TableOfRow) -> None:
        value.bind_to_run(self._run, table.key, self._base + table.row)

    def log_table(self, request: LogTable) -> None:
        """Log the artifact that holds a table; its file too, where an earlier sink may not have."""

        def make() -> Any:
            return _make_table(self._run.id, request.table)[1]

        def hand_file() -> None:
            if request.again:
                value, artifact = _make_table(self._run.id, request.table)
                _drop_staged(artifact)
                self._bind(value, request.table)

        self._begin(request.number, make, hand_file, again=request.again)

    def log_artifact(self, request: LogArtifact) -> None:
        """Log an artifact."""
        import wandb

        def make() -> Any:
            artifact = wandb.Artifact(request.name, request.kind)
            for path, content in request.files:
                # Nobody changes a blob, so W&B need not copy it.
                artifact.add_file(content, name=path, policy="immutable", skip_cache=True)
            artifact.finalize()
            return artifact

        self._begin(request.number, make, lambda: None, again=request.again)

    def _begin(
        self, number: int, make: Callable[[], Any], before: Callable[[], None], *, again: bool
    ) -> None:
        """Log what ``make`` makes, in a thread that waits until the server has it."""

        def work() -> None:
            try:
                outcome = UpdateOutcome(number, self._log(number, make(), before, again=again))
            except Exception as error:  # noqa: BLE001 - whatever it is, the service is told
                text = f"{type(error).__name__}: {error}"
                outcome = UpdateOutcome(number, "failed", text[:500])
            with self._lock:
                self._outcomes.append(outcome)

        threading.Thread(target=work, name=f"update-{number}", daemon=True).start()

    def _log(self, number: int, artifact: Any, before: Callable[[], None], *, again: bool) -> str:
        logged = _Logged(artifact.name.partition(":")[0], artifact.digest)
        if again and logged in self._known_from_files():
            _drop_staged(artifact)
            return "done"
        before()
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
        self._run.alert(request.title, request.text, level=request.level)

    def found_in_files(self) -> list[int]:
        """Numbers of what was handed over, all of which must be in the files after the end.

        Raises:
            SinkError: something is not; the next sink hands it over again.
        """
        if not self._handed or self._segments is None:
            return []
        known = _artifacts_in(self._segments())
        if missing := [logged.name for logged in self._handed.values() if logged not in known]:
            raise SinkError(f"W&B's files do not hold {', '.join(missing)}; it is logged again")
        return list(self._handed)


def _artifacts_in(segments: list[Path]) -> set[_Logged]:
    from raywb.service.transaction_log import read_artifacts

    return {_Logged(name, digest) for path in segments for name, digest in read_artifacts(path)}


def _make_table(run_id: str, table: TableOfRow) -> tuple[Any, Any]:
    """The table, and the artifact that ``run.log`` would make of it."""
    import wandb
    from wandb.sdk.artifacts._internal_artifact import InternalArtifact

    try:
        value = wandb.Table(columns=table.columns, data=table.rows)
    except TypeError:
        value = wandb.Table(columns=table.columns, data=table.rows, allow_mixed_types=True)
    artifact = InternalArtifact(f"run-{run_id}-{table.key}", "run_table")
    artifact._client_id = _client_id(run_id, table.key, str(table.row))
    artifact._sequence_client_id = _client_id(run_id, table.key)
    artifact.add(value, table.key)
    artifact.finalize()
    return value, artifact


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
