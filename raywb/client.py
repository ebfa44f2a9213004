"""The :class:`Client`: what a worker, a driver or a stage script logs with."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import ray

from raywb import cluster as ray_side
from raywb.connection import Connection
from raywb.errors import ArtifactError, MetricTypeError, ServiceUnavailable, SettingsError
from raywb.frozen import check_artifact_names, find_files
from raywb.reports import RunInfo
from raywb.rows import (
    ACROSS_RANKS,
    MAX_MESSAGE_BYTES,
    ROW_TAG,
    Alert,
    Artifact,
    Define,
    Row,
    Table,
    encode,
)
from raywb.rows_aside import RowsAside
from raywb.run_values import Config, Summary
from raywb.shapes import NO_SHAPE, Shape, shape_of
from raywb.tables import plain_table
from raywb.values import Refusal, flatten, plain

__all__ = ["Client", "ClientStats", "Series"]

_log = logging.getLogger("raywb")

#: Values of these types need no look at them.
_PLAIN = frozenset((float, int, bool, str))
_TEXT = frozenset((str,))
_STEPS = frozenset((int, float, type(None)))

#: What W&B knows of.
ALERT_LEVELS = ("INFO", "WARN", "ERROR")

#: W&B takes titles of less than 64 characters.
ALERT_TITLE_CHARACTERS = 63
#: Shapes of rows that a client remembers; a training loop has a handful.
MOST_SHAPES = 64

_now = time.time
_as_int = int.from_bytes

_SUMMARIES = ("min", "max", "mean", "first", "last", "copy", "none")


class ClientStats(msgspec.Struct, frozen=True, kw_only=True):
    """What became of this process's rows.

    Attributes:
        logged: rows that this client's ``log()`` and ``log_table()`` took.
        acked_bytes: journal bytes that the service has.
        backlog_bytes: journal bytes that it has not.
        rejected: values that were refused, over all clients of the process.
        lost: rows that could not be kept, by reason, over all clients of the process; reasons
            that begin with ``artifact_`` count artifacts.
        failed_requests: requests to the service that failed.
        last_error: why the last request failed; None while all is well.
        waiting_files: files of artifacts that the service does not have.
        waiting_on_device: rows of this client that wait for a value on a GPU, and those behind
            them: not logged yet, and gone if the process is killed.
    """

    logged: int
    acked_bytes: int
    backlog_bytes: int
    rejected: int
    lost: dict[str, int]
    failed_requests: int
    last_error: str | None
    waiting_files: int = 0
    waiting_on_device: int = 0


class Client:
    """Sends updates to the cluster's W&B run; made by :func:`attach`.

    ``log`` appends to a journal on this node and returns: it waits for no network, and takes no
    lock that a network wait can hold. A thread ships the journal to the service.
    """

    def __init__(
        self,
        connection: Connection,
        channel: int,
        stage: str | None,
        run: RunInfo,
        *,
        strict: bool = False,
    ) -> None:
        self._connection = connection
        self._channel = channel
        self._strict = strict
        self._closed = False
        #: Each row needs a second look: the client is closed, or rows wait for a device.
        self._careful = False
        self._aside = RowsAside(
            self._take, self.refuse, connection.count_loss, connection.aside, self._look_twice
        )
        self._warned: set[str] = set()
        self._shapes: dict[int, Shape] = {}
        # Counted without a lock: Python changes threads at calls and at loops, and an addition
        # has neither.
        self._logged = 0
        #: Prefix of this client's keys, without the slash.
        self.stage = stage
        #: Its rank among those that log the stage; None without one.
        self.rank = connection.rank_of(channel)
        #: The run as it was known at ``attach()``.
        self.run = run
        #: The run's config; ``config.update({...})`` adds to it.
        self.config = Config(self)
        #: The run's summary; ``summary["x"] = 1`` and ``summary.update({...})`` add to it.
        self.summary = Summary(self)

    def log(self, metrics: Mapping[str, Any], *, step: int | float | None = None) -> None:
        """Log one row of values, and return at once.

        A tensor on a GPU is not waited for: its row, and what this client logs behind it, goes
        into the journal when the device has the value (asked at the next ``log()``; ``flush``,
        ``close`` and the end of the process wait for it). At most 64 rows wait so. A worker of Ray
        Train comes to no exit handler: it closes its client, best by ``with``.

        Args:
            metrics: floats, ints, bools, strings, numpy or torch scalars, or dicts of these,
                whose keys are joined with a slash. A value under ``_timestamp`` (unix seconds)
                is the row's time.
            step: the row's place on the stage's axis, ``<stage>/step``. Any order will do.

        Raises:
            MetricTypeError: a value cannot be charted, and the client is strict. Otherwise the
                value is left out, counted, and warned about once per key.
        """
        if type(metrics) is dict and not self._careful:
            try:
                # What a Row is encoded to, without making one.
                payload = encode((ROW_TAG, self._channel, _now(), step, metrics))
            except Exception:  # noqa: BLE001 - whatever it is, the look at each value tells
                return self._log_with_care(metrics, step)
            mask, fixed = self._shapes.get(len(payload), NO_SHAPE)
            if _as_int(payload, "little") & mask == fixed or self._is_plain(payload, step, metrics):
                self._connection.append(payload)
                self._logged += 1
                return None
        return self._log_with_care(metrics, step)

    def _is_plain(self, payload: bytes, step: Any, metrics: dict[Any, Any]) -> bool:
        """Whether a row is good as it is; if so, rows of its shape are known from now on."""
        types = set(map(type, metrics.values()))
        good = (
            bool(metrics)
            and types <= _PLAIN
            and _TEXT.issuperset(map(type, metrics))
            and type(step) in _STEPS
            and len(payload) <= MAX_MESSAGE_BYTES
        )
        # The first of two shapes of one length stays, so that rows in turn cause no work.
        known = str in types or len(payload) in self._shapes or len(self._shapes) >= MOST_SHAPES
        if good and not known and (shape := shape_of(payload, self._channel, step, metrics)):
            self._shapes[len(payload)] = shape
        return good

    def _log_with_care(self, metrics: Any, step: Any) -> None:
        if self._closed:
            self._connection.count_loss("after_close")
            return self._warn_once("", "log() came after close(); the row is counted as lost")
        if not isinstance(metrics, Mapping):
            name = type(metrics).__name__
            return self._refuse([Refusal("", name, "log() takes a dict of values")])
        on_device: dict[str, Any] = {}
        row, refused = flatten(metrics, on_device)
        if step is not None:
            taken, wrong = flatten({"step": int(step) if isinstance(step, bool) else step})
            step = taken.get("step")
            refused += wrong
        if isinstance(step, str):
            refused.append(Refusal("step", "str", "a step is a number"))
            step = None
        if refused:
            self._refuse(refused)
        if not row:
            return None
        time_s = time.time()
        payload = encode(Row(self._channel, time_s, step, row))
        if len(payload) > MAX_MESSAGE_BYTES:
            size = f"a row of {len(payload)} bytes"
            return self._refuse([Refusal(next(iter(row)), size, f"{MAX_MESSAGE_BYTES} are most")])
        if on_device or self._aside:
            return self._aside.put(time_s, step, row, on_device)
        self._connection.append(payload)
        self._logged += 1
        return None

    def _look_twice(self, waiting: bool) -> None:
        """Rows wait for a device, or do no longer; said with their lock held."""
        self._careful = waiting or self._closed

    def _take(self, time_s: float, step: Any, row: dict[str, Any]) -> None:
        self._connection.append(encode(Row(self._channel, time_s, step, row)))
        self._logged += 1

    def _refuse(self, refused: list[Refusal]) -> None:
        texts = [f"{item.key!r} is {item.type_name}: {item.why}" for item in refused]
        if self._strict:
            raise MetricTypeError(f"cannot log {'; '.join(texts)}")
        self.refuse(refused)

    def count_loss(self, reason: str) -> None:
        """Count a row that never came as far as ``log()``."""
        self._connection.count_loss(reason)

    def refuse(self, refused: list[Refusal]) -> None:
        """Count values that cannot be charted, and warn about each key once; raises nothing."""
        self._connection.rejected += len(refused)
        for key, type_name, why in refused:
            text = f"{key!r} is {type_name}: {why}"
            self._warn_once(key, f"cannot log {text}; left out, and counted from now on")

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            _log.warning("raywb: %s", text)

    def log_table(self, table: Any, name: str) -> None:
        """Log a table as a row of the run, and return at once: it becomes a ``wandb.Table``.

        Args:
            table: a pandas DataFrame, a pyarrow Table, or a list of dicts. Its values are
                numbers, strings, bools, numpy scalars or None; dates become text.
            name: its key; it gets the stage as prefix.

        Raises:
            MetricTypeError: the table is none of these, is too large (4 MiB; ``log_artifact``
                takes larger ones as a file), or holds another value, and the client is strict.
                Otherwise the table, or the value, is left out, counted, and warned about once.
        """
        if self._closed:
            self._connection.count_loss("after_close")
            return self._warn_once("", "log_table() came after close(); it is counted as lost")
        taken = plain_table(table)
        if isinstance(taken, Refusal):
            return self._refuse([taken._replace(key=name)])
        if taken.refused:
            self._refuse([one._replace(key=f"{name}/{one.key}") for one in taken.refused])
            self._connection.rejected += taken.refused_values - len(taken.refused)
        message = Table(self._channel, time.time(), str(name), taken.columns, taken.rows)
        payload = encode(message)
        if len(payload) > MAX_MESSAGE_BYTES:
            why = f"{MAX_MESSAGE_BYTES} are most; log_artifact() takes it as a file"
            return self._refuse([Refusal(name, f"a table of {len(payload)} bytes", why)])
        self._connection.append(payload)
        self._logged += 1
        return None

    def log_artifact(self, path: str | os.PathLike[str], name: str, type: str) -> None:
        """Log a file or a directory of this node as a new version of an artifact.

        The files are frozen before the call returns: what is written to them later does not
        change what was logged. They are reflinked where the file system can do that, else
        copied, and sent in the background, by a sweep if this process dies. The same contents
        again make no new version.

        Args:
            path: a file, or a directory with all that is in it; links are followed.
            name: the artifact's name: letters, digits, ``-``, ``_`` and ``.``. It gets no prefix.
            type: what it is, for instance ``model`` or ``dataset``.

        Raises:
            SettingsError: ``name`` or ``type`` is none that W&B takes.
            ArtifactError: there is no such file, it cannot be read, or it is too large (16 GiB),
                and the client is strict. Otherwise it is left out, counted, and warned about.
        """
        check_artifact_names(name, type)
        if self._closed:
            self._connection.count_loss("artifact_after_close")
            return self._warn_once("", "log_artifact() came after close(); it is counted as lost")
        try:
            found = find_files(Path(path))
            self._connection.log_artifact(Artifact(self._channel, name, type, []), found)
        except ArtifactError as error:
            if self._strict:
                raise
            self._connection.rejected += 1
            self._warn_once(str(path), f"{error}; left out, and counted from now on")
        return None

    def alert(self, title: str, text: str, level: str = "INFO") -> None:
        """Send an alert to whoever follows the run on W&B, at most once; returns at once.

        W&B itself passes over an alert whose title it had less than a minute ago.

        Args:
            title: at most 63 characters are shown; the rest goes before the text.
            text: what happened.
            level: ``INFO``, ``WARN`` or ``ERROR``.

        Raises:
            SettingsError: ``level`` is none of these.
        """
        if level not in ALERT_LEVELS:
            raise SettingsError(
                f"level={level!r} cannot be used: it is one of {', '.join(ALERT_LEVELS)}"
            )
        title, text = plain(str(title)), plain(str(text))
        if len(title) > ALERT_TITLE_CHARACTERS:
            text = f"{title}\n\n{text}"
            title = title[: ALERT_TITLE_CHARACTERS - 1] + "…"
        self._connection.say(Alert(self._channel, title, text, level))

    def define_metric(
        self,
        name: str,
        step_metric: str | None = None,
        summary: str | None = None,
        *,
        across_ranks: str | None = None,
    ) -> None:
        """Say how W&B is to chart a metric, as ``wandb.define_metric`` does.

        Args:
            name: the metric, without the stage; a trailing ``*`` stands for all that begin so.
            step_metric: the metric that is its x-axis, without the stage.
            summary: ``min``, ``max``, ``mean``, ``first``, ``last``, ``copy`` or ``none``;
                several with commas between.
            across_ranks: how the values of several ranks at one step become one: ``mean`` (the
                default), ``min``, ``max``, ``sum``, ``last`` (the one logged last) or
                ``per_rank`` (each of them, as ``<name>/rank_<rank>``).

        Raises:
            SettingsError: ``summary`` or ``across_ranks`` is none of these, or ``name`` has a
                ``*`` in the middle.
        """
        if not name or "*" in name[:-1]:
            raise SettingsError(
                f"name={name!r} cannot be used: a '*' stands only at the end of a metric's name"
            )
        kinds = [kind.strip() for kind in summary.split(",")] if summary else []
        if wrong := [kind for kind in kinds if kind not in _SUMMARIES]:
            raise SettingsError(
                f"summary={summary!r} cannot be used: {', '.join(wrong)} is not among "
                f"{', '.join(_SUMMARIES)}"
            )
        if across_ranks is not None and across_ranks not in ACROSS_RANKS:
            raise SettingsError(
                f"across_ranks={across_ranks!r} cannot be used: allowed are "
                f"{', '.join(ACROSS_RANKS)}"
            )
        kind = ",".join(kinds) or None
        self._connection.say(Define(self._channel, name, step_metric, kind, across_ranks))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until the service has everything that was logged before this call.

        Rows that wait for a device are asked for by the thread that logged them, while it runs.

        Returns:
            False when it has not after ``timeout_s``; all of it is safe on this node then.
        """
        deadline = time.monotonic() + timeout_s
        connection = self._connection
        if connection.shipper is not None and connection.shipper.failing:
            self._look_up(timeout_s / 2)
        return connection.flush(max(deadline - time.monotonic(), 0.0))

    def _look_up(self, timeout_s: float) -> None:
        """The address is lost: ask Ray again, in the caller's thread."""
        service = ray_side.find_service() if ray.is_initialized() else None
        if service is None:
            return
        try:
            joined = ray_side.join(service, self._connection.cluster, timeout_s=timeout_s)
        except ServiceUnavailable as error:
            self._warn_once("flush", f"the service does not answer: {error}")
            return
        self._connection.use(joined.endpoint, joined.epoch)

    def close(self, timeout_s: float = 10.0, *, exit_code: int = 0) -> None:
        """Flush, and take no more rows; a second call does nothing.

        Other clients of this process go on: they share the journal, not this client. A stage's
        own run ends when all that were attached to it are closed.

        Args:
            timeout_s: longest that it may take.
            exit_code: how a stage's own run ends: 0 for success, anything else as failed.
        """
        if not self._closed:
            self._closed = self._careful = True
            began = time.monotonic()
            self._aside.settle(timeout_s, give_up=True)
            timeout_s -= time.monotonic() - began
            self._connection.end_channel(self._channel, exit_code)
            self.flush(max(timeout_s, 0.0))

    def __reduce__(self) -> Any:
        raise TypeError(
            "a raywb client belongs to its process, and cannot be sent to another one: "
            f"call raywb.attach({self.stage!r}) there, it finds the same run"
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(exit_code=0 if exc_type is None else 1)

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called: it takes no more rows."""
        return self._closed

    @property
    def stats(self) -> ClientStats:
        """What became of the rows so far."""
        connection = self._connection
        journal, shipper = connection.journal, connection.shipper
        return ClientStats(
            logged=self._logged,
            acked_bytes=journal.acknowledged if journal else 0,
            backlog_bytes=journal.backlog_bytes if journal else 0,
            rejected=connection.rejected,
            lost=connection.lost,
            failed_requests=shipper.failures if shipper else 0,
            last_error=(shipper.last_error or shipper.blob_error) if shipper else None,
            waiting_files=shipper.blobs.left if shipper else 0,
            waiting_on_device=len(self._aside),
        )

    def open_series(self, namespace: str, *, label: str, axis: str) -> Series:
        """Open one of several series that share a namespace in the run.

        The first series of a run gets the namespace itself, further ones
        ``<namespace>/<label>_<n>``, wherever on the cluster they come from: the service names
        them. Returns at once.

        Args:
            namespace: what the series have in common, for instance ``xenna``.
            label: names further series.
            axis: the metric, in every row, that is the x-axis.
        """
        channel = self._connection.open_channel(namespace, None, None, label=label, axis=axis)
        return Series(Client(self._connection, channel, namespace, self.run))

    def open_process_series(self, name: str, *, axis: str, is_alone: bool = False) -> Series:
        """Open a series under this client's stage into which no other process writes.

        In the cluster's run the first process gets ``<name>``, further ones
        ``<name>/process_<n>``. The service names no series in a stage's own run: there it is
        ``<name>/<host>_<pid>``.

        Args:
            name: relative to the stage.
            axis: the metric, in every row, that is the x-axis.
            is_alone: no other process asks for this name in a stage's own run, which then is
                the series' name as it is.
        """
        if not self._connection.is_own_run(self._channel):
            namespace = name if self.stage is None else f"{self.stage}/{name}"
            return self.open_series(namespace, label="process", axis=axis)
        beside = Client(self._connection, self._channel, self.stage, self.run)
        host = socket.gethostname().partition(".")[0]
        prefix = f"{name}/" if is_alone else f"{name}/{host}_{os.getpid()}/"
        beside.define_metric(f"{prefix}*", step_metric=f"{prefix}{axis}")
        return Series(beside, prefix)


class Series:
    """Rows on an axis of their own; made by :meth:`Client.open_series`."""

    def __init__(self, client: Client, prefix: str = "") -> None:
        self._client = client
        self._prefix = prefix

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log one row; keys are relative to the series, and the axis is among them."""
        if self._prefix:
            metrics = {self._prefix + key: value for key, value in metrics.items()}
        self._client.log(metrics)

    def log_table(self, table: Any, name: str) -> None:
        """Log a table; see :meth:`Client.log_table`."""
        self._client.log_table(table, self._prefix + name)

    def set_summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the run's summary under the series' name."""
        prefixed = {self._prefix + key: value for key, value in values.items()}
        self._client.summary.update(prefixed)
