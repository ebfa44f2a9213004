"""What a recipe does: prepare data, then train on them, on one cluster and in one W&B run.

    Parts               what tells one recipe from another: how it plans, prepares and trains
    prepare_and_train   what all of them have in common: the order, the cluster, the run

Nothing of Ray is imported here: a recipe's settings are, after the environment was made ready.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from recipes.settings import settings_as_dict
from recipes.stages.layout import OutputLayout
from recipes.terminal import Terminal

if TYPE_CHECKING:
    from recipes.cluster import RayCluster, RaySettings
    from recipes.run_record import RunFile
    from recipes.stages.dataset import DataPrepResult
    from recipes.stages.shards import Shard
    from recipes.tracking import ObservabilitySettings, TrackedRun, WandbSettings
    from recipes.training.launch import TrainResult
    from recipes.training.settings import TrainSettings

__all__ = ["Job", "Outcome", "Parts", "RecipeSettings", "SettingsT", "prepare_and_train"]


class RecipeSettings(Protocol):
    """The sections that the settings of every recipe have."""

    @property
    def output_dir(self) -> str:
        """Where everything goes that the recipe makes."""
        ...

    @property
    def train(self) -> TrainSettings:
        """How a model is trained on it."""
        ...

    @property
    def ray(self) -> RaySettings:
        """How a local cluster is started."""
        ...

    @property
    def observability(self) -> ObservabilitySettings:
        """Which metrics of the pipeline are kept."""
        ...

    @property
    def wandb(self) -> WandbSettings:
        """Which W&B run."""
        ...


class Plan(Protocol):
    """What is to be made, known before there is a cluster."""

    @property
    def shards(self) -> Sequence[Shard]:
        """The units of work."""
        ...


SettingsT = TypeVar("SettingsT", bound=RecipeSettings)
PlanT = TypeVar("PlanT", bound=Plan)


@dataclass(frozen=True)
class Job:
    """What a recipe's parts run on and report to."""

    cluster: RayCluster
    run: TrackedRun

    def end_of_data_prep(self) -> None:
        """Give back what the pipeline had: training may need it, or nothing may be paid for it."""
        from recipes.cluster import leave_pipeline

        leave_pipeline()


@dataclass(frozen=True)
class Outcome:
    """What a person is told at the end: labelled lines; None in place of a text leaves one out."""

    job: Job
    lines: Sequence[tuple[str, object]]


@dataclass(frozen=True)
class Parts(Generic[SettingsT, PlanT]):
    """What tells one recipe's work from another's."""

    #: The prefix of all keys that data preparation logs.
    stage: str
    #: Lists the inputs and makes the tokenizer ready, without Ray.
    plan: Callable[[SettingsT, OutputLayout, Terminal], PlanT]
    #: Makes the data.
    prepare: Callable[[SettingsT, PlanT, TrackedRun, Terminal], DataPrepResult]
    #: Trains on them, with the section ``train`` of the settings.
    train: Callable[[Any, OutputLayout, TrackedRun, Terminal], TrainResult]
    #: Says of the data what other recipes' do not have, in labelled lines.
    in_words: Callable[[DataPrepResult, SettingsT], Sequence[tuple[str, object]]]


def prepare_and_train(
    parts: Parts[SettingsT, PlanT], settings: SettingsT, layout: OutputLayout, terminal: Terminal
) -> Outcome:
    """Prepare data, and where that is wanted, train on them.

    Args:
        parts: The recipe's own.
        settings: The recipe's, whole.
        layout: The output directory; the caller holds its lock.
        terminal: Where steps and progress are shown.

    Raises:
        RecipeError: One of its subclasses; a later start goes on where this one ended.
    """
    from recipes.run_record import RunFile
    from recipes.summary import data_in_words
    from recipes.training.launch import check_start
    from recipes.training.settings import is_training_wanted

    trains = is_training_wanted(settings.train, terminal.step)
    if trains:
        check_start(settings.train, layout)
    run_file = RunFile(layout.run_record, settings.train.resume) if trains else None
    plan = parts.plan(settings, layout, terminal)
    terminal.step(f"{len(plan.shards)} shards; starting or joining Ray …")
    with _started_job(settings, parts.stage, terminal, run_file) as job:
        data = parts.prepare(settings, plan, job.run, terminal)
        job.end_of_data_prep()
        trained = parts.train(settings.train, layout, job.run, terminal) if trains else None
    lines = data_in_words(data, layout, *parts.in_words(data, settings))
    return Outcome(job, [*lines, *(trained.in_words() if trained else [])])


@contextlib.contextmanager
def _started_job(
    settings: RecipeSettings, stage: str, terminal: Terminal, run_file: RunFile | None = None
) -> Iterator[Job]:
    """Start or join Ray and the cluster's W&B run; on leaving, end what was started here.

    Args:
        settings: Of the recipe; they go into the run's config.
        stage: The prefix of all keys that are logged through the job's run.
        terminal: Is told which run it is.
        run_file: Names the run that an earlier start's training belongs to, and then this one's;
            None where nothing is trained.

    Raises:
        ClusterError: The cluster lacks what the pipeline needs.
        TrackingError: raywb could not start or finish the run.
    """
    from recipes.cluster import ray_cluster
    from recipes.stages.store_errors import shown_settings
    from recipes.tracking import tracked

    with (
        ray_cluster(settings.ray, terminal.step) as cluster,
        tracked(
            settings.wandb,
            stage,
            default_project=f"raywb-{stage.partition('/')[0]}",
            finish=cluster.started_here,
            announce=terminal.step,
            run_file=run_file,
        ) as run,
    ):
        run.config({stage: shown_settings(settings_as_dict(settings))})
        yield Job(cluster, run)
