"""The hook around `run_pipeline`, and the one guarded patch.

xenna has no public way to its statistics. So while a hook is active, one method of one class is
wrapped: `PipelineMonitor._make_stats`, which xenna calls at the start of a pipeline and then at its
logging interval, and whose result is passed on as it is. Inside that call a row is made and handed
over, and nothing else; the last row, which xenna does not ask for, is made when the hook ends. A
xenna whose `PipelineConfig` has a field `stats_callback` is not patched: give it
`hook.stats_callback`. What goes wrong in here is counted (`hook_errors`), never raised.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from raywb.errors import RaywbError, SettingsError
from raywb.xenna.outlets import AXIS, Contained, Delivery, SharedSeries
from raywb.xenna.pipeline import Pipeline, StageProgress
from raywb.xenna.stats import Metrics, describe_failure
from raywb.xenna.watch import Watch

__all__ = [
    "StageProgress",
    "XennaObservabilityConfig",
    "XennaWandbStatsHook",
    "make_xenna_wandb_stats_hook",
]

logger = logging.getLogger(__name__)

#: Where xenna keeps what is wrapped, and its parameters in every version from 0.1.8 to 0.5.12.
MONITORING_MODULE = "cosmos_xenna.pipelines.private.monitoring"
SPECS_MODULE = "cosmos_xenna.pipelines.private.specs"
MAKE_STATS = "_make_stats"
MAKE_STATS_PARAMETERS = ("self", "input_len", "ext_output_lens", "task_metadata_per_pool")
#: Field of xenna's `PipelineConfig` with which nothing has to be patched.
STATS_CALLBACK = "stats_callback"
#: Seconds between two lines of the log about swallowed errors.
ERROR_LOG_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True)
class XennaObservabilityConfig:
    """The `observability` section of a recipe.

    Attributes:
        wandb_log_pipeline_stats: Log the pipeline's statistics to W&B.
        pipeline_logging_interval_s: Seconds between two rows. A recipe passes it to
            `PipelineConfig.logging_interval_s`, which is what decides.
        pipeline_stats_jsonl_path: File to which each row is appended as JSON, too. Relative to
            the hook's `run_dir`, or without one to the working directory.
    """

    wandb_log_pipeline_stats: bool = True
    pipeline_logging_interval_s: int = 30
    pipeline_stats_jsonl_path: str | None = None

    def __post_init__(self) -> None:
        log_to_wandb = self.wandb_log_pipeline_stats
        if not isinstance(log_to_wandb, bool):
            raise _wrong("wandb_log_pipeline_stats", log_to_wandb, "true or false")
        interval_s = self.pipeline_logging_interval_s
        if not isinstance(interval_s, int) or isinstance(interval_s, bool) or interval_s < 1:
            allowed = "a whole number of seconds, 1 or more"
            raise _wrong("pipeline_logging_interval_s", interval_s, allowed)
        path = self.pipeline_stats_jsonl_path
        if path is not None and (not isinstance(path, str) or not path.strip()):
            raise _wrong("pipeline_stats_jsonl_path", path, "the path of a file, or null for none")


def _wrong(key: str, value: object, allowed: str) -> SettingsError:
    return SettingsError(f"observability.{key} is {value!r}; allowed is {allowed}")


def make_xenna_wandb_stats_hook(
    *,
    observability: XennaObservabilityConfig,
    pipeline_kind: str,
    run_hash: str | None = None,
    run_dir: str | Path | None = None,
    dataset_names: Sequence[str] = (),
) -> XennaWandbStatsHook | None:
    """Return a hook for the outputs that `observability` asks for, or None if it asks for none."""
    if not observability.wandb_log_pipeline_stats and not observability.pipeline_stats_jsonl_path:
        return None
    return XennaWandbStatsHook(
        observability=observability,
        pipeline_kind=pipeline_kind,
        run_hash=run_hash,
        run_dir=run_dir,
        dataset_names=dataset_names,
    )


class XennaWandbStatsHook:
    """Logs the statistics of every xenna pipeline that runs while it is entered.

    It can be entered again after its end, nested around the same pipeline as other hooks, and
    pipelines may run in several threads at once. An exception that passes through it is logged
    with the state at failure, and goes on.

    Args:
        observability: What to log where.
        pipeline_kind: What the pipeline does, e.g. `pretrain`; names the series of further
            pipelines, and is in each JSONL record.
        run_hash: Identifies the recipe's settings; in each JSONL record and in W&B's summary.
        run_dir: Directory to which a relative `pipeline_stats_jsonl_path` refers.
        dataset_names: Data sets that the pipeline reads; in W&B's summary.
    """

    def __init__(
        self,
        *,
        observability: XennaObservabilityConfig,
        pipeline_kind: str,
        run_hash: str | None = None,
        run_dir: str | Path | None = None,
        dataset_names: Sequence[str] = (),
    ) -> None:
        name = pipeline_kind.strip("/ ") if isinstance(pipeline_kind, str) else ""
        if not name or not name.isprintable() or "*" in name:
            allowed = "a printable name without '*'"
            raise SettingsError(f"pipeline_kind is {pipeline_kind!r}; allowed is {allowed}")
        self.observability = observability
        path = observability.pipeline_stats_jsonl_path
        names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
        identity: Metrics = {"pipeline_kind": pipeline_kind}
        if run_hash:
            identity["run_hash"] = run_hash
        if names:
            identity["dataset_names"] = ", ".join(names)
        self._delivery = Delivery(
            pipeline_kind,
            run_hash or "",
            identity,
            Path(run_dir or "", path).absolute() if path else None,
            self.swallow,
        )
        self._latest: Pipeline | None = None
        self._last_progress: list[StageProgress] | None = None
        self._warned_of: set[str] = set()
        self._error_logged_at = -ERROR_LOG_INTERVAL_S
        self._entered_at = 0.0
        self.hook_errors = 0
        self.bottleneck_stage: str | None = None

    def __enter__(self) -> Self:
        wants_wandb = self.observability.wandb_log_pipeline_stats
        open_outlet = self._delivery.find_wandb() if wants_wandb else None
        if wants_wandb and open_outlet is None:
            self._warn_once(
                "wandb",
                "xenna statistics do not go to W&B: there is no raywb service, and no wandb.run "
                "in this process. Call raywb.start() before the pipeline, or set "
                "observability.wandb_log_pipeline_stats=false",
            )
        with _watched.lock:
            _watched.add(self)
            self._delivery.open_outlet = open_outlet
            self._entered_at = time.time()
            self._last_progress = self.bottleneck_stage = None
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_plain_exit = isinstance(error, SystemExit) and not error.code
        try:
            _watched.conclude(self, None if is_plain_exit else error)
            self._last_progress = self.progress()
        finally:  # also when a second Ctrl-C interrupts the first one's last snapshot
            self._latest = None
            _watched.remove(self)
            self._delivery.drain()

    def stats_callback(self, stats: Any) -> None:
        """Take a `PipelineStats` from a xenna that calls back by itself."""
        with Contained("reading a snapshot", self.swallow):
            key = (stats.start_time, threading.get_ident())
            _watched.deliver(key, None, stats, [self])

    def progress(self) -> list[StageProgress] | None:
        """Return how far each stage of the newest pipeline is, None before there is one.

        For a progress bar: any thread may ask at any time, also after the end.
        """
        pipeline = self._latest
        if pipeline is None:
            return self._last_progress
        with Contained("reading the progress", self.swallow):
            return pipeline.progress()
        return None

    def swallow(self, doing: str, error: Exception) -> None:
        """Count an error that must not reach the pipeline, and log it if none was just logged."""
        with _watched.lock:
            self.hook_errors += 1
            now = time.monotonic()
            if now - self._error_logged_at < ERROR_LOG_INTERVAL_S:
                return
            self._error_logged_at = now
        logger.warning(
            "xenna statistics: %s failed (%d errors so far)",
            doing,
            self.hook_errors,
            exc_info=error,
        )

    def take(self, pipeline: Pipeline, row: Metrics, *, is_final: bool) -> None:
        """Hand a pipeline's row to W&B and the JSONL file; returns at once.

        Called with the lock of the watched pipelines held.
        """
        if self._latest is None or pipeline.started_at >= self._latest.started_at:
            self._latest = pipeline
            self.bottleneck_stage = pipeline.bottleneck_key()
        self._check_interval(pipeline)
        metrics = dict(row)
        if self.hook_errors or is_final:
            metrics["hook_errors"] = self.hook_errors
        with Contained("logging to W&B", self.swallow):
            self._delivery.log(pipeline.series, pipeline.number, metrics)
        self._delivery.write(metrics, pipeline.class_names, pipeline.failure, is_final=is_final)

    def take_failure(self, error: BaseException) -> None:
        """Log an exception that came before any pipeline had a snapshot."""
        failure = describe_failure(error)
        metrics: Metrics = {
            AXIS: time.time() - self._entered_at,
            **failure.as_metrics(),
            "hook_errors": self.hook_errors,
        }
        with Contained("logging to W&B", self.swallow):
            self._delivery.log(SharedSeries(), 1, metrics)
        self._delivery.write(metrics, [], failure, is_final=True)

    def _check_interval(self, pipeline: Pipeline) -> None:
        actual_s, wanted_s = pipeline.log_interval_s, self.observability.pipeline_logging_interval_s
        if actual_s is not None and actual_s != wanted_s:
            self._warn_once(
                "interval",
                f"the pipeline takes a snapshot every {actual_s:g} s, but "
                f"observability.pipeline_logging_interval_s is {wanted_s}: set "
                f"PipelineConfig.logging_interval_s={wanted_s}, which is what decides",
            )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned_of:
            self._warned_of.add(about)
            logger.warning("%s", message)


class _Patch:
    """`PipelineMonitor._make_stats`, wrapped so that each snapshot is passed on as well."""

    def __init__(self, monitor_class: type, deliver: Callable[[Any, Any], None]) -> None:
        self._class = monitor_class
        self._original = original = monitor_class.__dict__[MAKE_STATS]
        self._is_installed = True

        @functools.wraps(original)
        def make_stats(monitor: Any, *args: Any, **kwargs: Any) -> Any:
            stats = original(monitor, *args, **kwargs)
            if self._is_installed:
                deliver(monitor, stats)
            return stats

        self._wrapper = make_stats
        setattr(monitor_class, MAKE_STATS, make_stats)
        logger.info("Installed PipelineMonitor._make_stats patch")

    def remove(self) -> None:
        """Put the original back, unless somebody has patched on top of this one meanwhile."""
        self._is_installed = False  # if the wrapper has to stay, it does nothing any more
        if self._class.__dict__.get(MAKE_STATS) is self._wrapper:
            setattr(self._class, MAKE_STATS, self._original)
            return
        logger.warning(
            "PipelineMonitor._make_stats was patched by somebody else while the xenna hook was "
            "active; it is left as it is, and the hook's own part of it does nothing any more"
        )

    @classmethod
    def install(cls, deliver: Callable[[Any, Any], None]) -> _Patch | None:
        """Wrap the method; None where this xenna calls back by itself, or is not known.

        Raises:
            RaywbError: cosmos-xenna cannot be imported.
        """
        try:
            specs = importlib.import_module(SPECS_MODULE)
            monitoring = importlib.import_module(MONITORING_MODULE)
        except ImportError as error:
            raise RaywbError(
                f"the xenna hook needs cosmos-xenna, which cannot be imported: {error}. "
                "Install it with `pip install cosmos-xenna tqdm`"
            ) from error
        fields = getattr(getattr(specs, "PipelineConfig", None), "__attrs_attrs__", ())
        if any(field.name == STATS_CALLBACK for field in fields):
            logger.info("xenna has PipelineConfig.%s; nothing is patched", STATS_CALLBACK)
            return None
        monitor_class = getattr(monitoring, "PipelineMonitor", None)
        make_stats = vars(monitor_class).get(MAKE_STATS) if monitor_class is not None else None
        found = _parameters(make_stats)
        if monitor_class is None or found != MAKE_STATS_PARAMETERS:
            logger.warning(
                "cosmos-xenna %s is not known to this raywb: PipelineMonitor._make_stats has the "
                "parameters %s, not %s. It is not patched, and pipelines are not observed",
                _xenna_version(),
                found,
                MAKE_STATS_PARAMETERS,
            )
            return None
        return cls(monitor_class, deliver)


def _parameters(function: Any) -> tuple[str, ...] | None:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not a function, or one that does not say
        return None


def _xenna_version() -> str:
    try:
        return importlib.metadata.version("cosmos-xenna")
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


_watched = Watch(_Patch.install)
