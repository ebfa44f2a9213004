"""The recipe's side of raywb, in its driver (training workers: ``training/worker_log.py``).

with tracked(...) as run:          start or join the cluster's run, attach as one stage
    with run.pipeline_stats(...):  cosmos-xenna's metrics go into the run and into a JSONL file
        run_pipeline(...)
    run.summary({...})             totals
run.report                         what was delivered, once the run was finished
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from recipes.errors import TrackingError
from recipes.run_record import RunFile, running_service, with_default_project
from recipes.settings import Count, Text, switched_off

if TYPE_CHECKING:
    import raywb
    from raywb.reports import FinishReport
    from raywb.xenna import XennaWandbStatsHook

__all__ = ["ObservabilitySettings", "TrackedRun", "WandbSettings", "tracked"]


@dataclass(frozen=True)
class ObservabilitySettings:
    """The fields of ``raywb.xenna.XennaObservabilityConfig``."""

    wandb_log_pipeline_stats: bool
    pipeline_logging_interval_s: Count
    pipeline_stats_jsonl_path: Text | None


@dataclass(frozen=True)
class WandbSettings:
    """Which W&B run; where a value is null, the environment decides."""

    enabled: bool
    project: Text | None
    entity: Text | None
    group: str | None
    mode: Literal["online", "offline", "disabled"] | None

    def idle_keys(self) -> dict[str, str]:
        """Return the keys that change nothing beside another, each with the other one."""
        return {} if self.enabled else switched_off("wandb", self)


class TrackedRun:
    """One stage's part in the cluster's W&B run; without W&B, the same and nothing happens."""

    def __init__(
        self,
        client: raywb.Client | None,
        info: raywb.RunInfo | None,
        announce: Callable[[str], None],
    ) -> None:
        self._client = client
        self._announce = announce
        #: Where the run is to be found; None without W&B.
        self.info = info
        #: What ``raywb.finish()`` reported; None where the run was not finished here.
        self.report: FinishReport | None = None

    def config(self, values: Mapping[str, Any]) -> None:
        """Note the recipe's settings in the run."""
        if self._client is not None:
            self._client.config.update(dict(values))

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log a row."""
        if self._client is not None:
            self._client.log(dict(metrics))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Note results in the run's summary."""
        if self._client is not None:
            self._client.summary.update(dict(values))

    @contextlib.contextmanager
    def pipeline_stats(
        self,
        settings: ObservabilitySettings,
        *,
        pipeline_kind: str,
        run_hash: str,
        run_dir: str,
        dataset_names: Sequence[str],
    ) -> Iterator[XennaWandbStatsHook | None]:
        """Observe the pipeline inside the block; yields None when nothing is asked for."""
        to_wandb = settings.wandb_log_pipeline_stats and self._client is not None
        if not to_wandb and settings.pipeline_stats_jsonl_path is None:
            yield None
            return
        from raywb.xenna import XennaObservabilityConfig, make_xenna_wandb_stats_hook

        fields = {**dataclasses.asdict(settings), "wandb_log_pipeline_stats": to_wandb}
        hook = make_xenna_wandb_stats_hook(
            observability=XennaObservabilityConfig(**fields),
            pipeline_kind=pipeline_kind,
            run_hash=run_hash,
            run_dir=run_dir,
            dataset_names=list(dataset_names),
        )
        if hook is None:
            yield None
            return
        with hook:
            yield hook

    def end(self, finish: bool, exit_code: int) -> None:
        """Hand over what was logged, and finish the run if it is ours to finish."""
        if self._client is None:
            return
        import raywb

        try:
            self._client.close()
            if finish:
                self._announce("Finishing the W&B run …")
                self.report = raywb.finish(exit_code=exit_code)
        except raywb.RaywbError as error:
            raise TrackingError(f"raywb cannot confirm the W&B run: {error}") from error


@contextlib.contextmanager
def tracked(
    settings: WandbSettings,
    stage: str,
    *,
    finish: bool,
    announce: Callable[[str], None],
    default_project: str | None = None,
    run_file: RunFile | None = None,
) -> Iterator[TrackedRun]:
    """Start or join the cluster's W&B run, and attach to it as ``stage``.

    Args:
        settings: Which run.
        stage: The prefix of all keys that are logged.
        announce: Is told which run it is, and that it is being finished.
        default_project: Of a run that is begun here and of which nothing else says a project; a
            run that is open on the cluster is joined, whatever its project.
        finish: End the run on leaving, as failed if an exception passes through. Left to whoever
            started the cluster otherwise.
        run_file: Names the run to go on with, and the one that is started from now on; None
            always starts or joins whatever run there is.

    Raises:
        TrackingError: raywb could not start or finish the run.
    """
    if not settings.enabled:
        yield TrackedRun(None, None, announce)
        return
    import raywb

    chosen = {
        name: value
        for name, value in dataclasses.asdict(settings).items()
        if name != "enabled" and value is not None
    }
    try:
        running = running_service()
        if run_file is not None:
            chosen = run_file.settings_for(chosen, running, announce)
        is_open = running is not None and not (running.finished or running.run.provisional)
        if default_project is not None and not is_open:
            chosen = with_default_project(chosen, default_project)
        info = raywb.start(**chosen)
        if run_file is not None:
            run_file.write(info)
        run = TrackedRun(raywb.attach(stage), info, announce)
        announce(f"W&B run {info.name} ({info.mode}) in {info.dir}")
    except raywb.RaywbError as error:
        raise TrackingError(f"raywb cannot start the W&B run: {error}") from error
    try:
        yield run
    except BaseException as error:
        try:
            run.end(finish, exit_code=130 if isinstance(error, KeyboardInterrupt) else 1)
        except TrackingError as second:
            error.add_note(str(second))
        raise
    run.end(finish, exit_code=0)
