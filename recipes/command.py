"""The command line that every recipe has, and the job behind it.

    main            --help; settings; the output directory's lock; the work; a summary, or what
                    went wrong and the command that goes on from there
    started_job     the Ray cluster and the W&B run, open for as many parts as a recipe has:

        trains = is_training_wanted(settings.train, terminal.step)
        plan = plan_data(settings, layout, terminal)
        with started_job(settings, STAGE, terminal, run_file) as job:
            data = prepare_data(settings, plan, job.run, terminal)
            job.end_of_data_prep()
            trained = train(settings.train, layout, job.run, terminal) if trains else None

Nothing of Ray is imported here: a recipe's settings are, after the environment was made ready.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from recipes.errors import RecipeError
from recipes.local_ray import prepare_environment
from recipes.settings import load_settings, settings_as_dict
from recipes.stages.layout import OutputLayout
from recipes.terminal import Terminal, quiet_terminal

if TYPE_CHECKING:
    from recipes.cluster import RayCluster, RaySettings
    from recipes.run_record import RunFile
    from recipes.tracking import ObservabilitySettings, TrackedRun, WandbSettings
    from recipes.training.settings import TrainSettings

__all__ = ["Job", "Outcome", "Recipe", "main", "started_job"]

_INTERRUPTED = 130
_TERMINATED = 143


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


SettingsT = TypeVar("SettingsT", bound=RecipeSettings)


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
class Recipe(Generic[SettingsT]):
    """What tells one recipe's command from another's."""

    #: What stands behind ``python -m``.
    module: str
    #: Where its YAML files lie.
    folder: Path
    #: What ``--help`` begins with.
    usage: str
    #: Imports and returns the dataclass of its settings.
    settings: Callable[[], type[SettingsT]]
    #: Does everything.
    work: Callable[[SettingsT, OutputLayout, Terminal], Outcome]
    #: What the same command does without ``tiny``.
    whole: str


@contextlib.contextmanager
def started_job(
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


def main(recipe: Recipe[SettingsT], arguments: Sequence[str]) -> int:
    """Run a recipe as the command line says, and return the exit code."""
    if any(word in ("-h", "--help") for word in arguments):
        defaults = (recipe.folder / "default.yaml").read_text()
        sys.stdout.write(f"{recipe.usage}\nAll keys, with their defaults:\n\n{defaults}")
        return 0
    words = list(arguments)
    config = words.pop(0) if words and "=" not in words[0] else "default"
    try:
        # --help needs neither Ray nor cosmos-xenna, and Ray reads its environment when imported
        prepare_environment()
        settings = load_settings(recipe.settings(), recipe.folder, config, words)
        layout = OutputLayout(Path(settings.output_dir).expanduser().absolute())
        with layout.locked(), quiet_terminal(_log(layout)) as terminal:
            return _run(recipe, settings, layout, terminal, arguments)
    except RecipeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(
    recipe: Recipe[SettingsT],
    settings: SettingsT,
    layout: OutputLayout,
    terminal: Terminal,
    arguments: Sequence[str],
) -> int:
    began, began_at_s = time.monotonic(), time.time()

    def again() -> str:
        words = _words_to_go_on(settings, layout, arguments, began_at_s)
        return f"To go on from here:\n  {shlex.join(['python', '-m', recipe.module, *words])}"

    try:
        outcome = recipe.work(settings, layout, terminal)
    except KeyboardInterrupt:
        terminal.error(f"Interrupted. {again()}")
        return _INTERRUPTED
    except SystemExit:  # Ray's way of answering SIGTERM
        terminal.error(f"Terminated. {again()}")
        return _TERMINATED
    except RecipeError as error:
        text = "\n".join([f"Failed: {error}", *getattr(error, "__notes__", ())])
        terminal.error(f"{text}\nLog: {_log(layout)}\n{again()}")
        return error.exit_code
    more = []
    if arguments and arguments[0] == "tiny":
        more = [(f"python -m {recipe.module}", recipe.whole)]
    summary = _summary(settings, layout, outcome, more)
    terminal.result(f"Done in {time.monotonic() - began:.1f} s.\n\n{summary}")
    return 0


def _words_to_go_on(
    settings: RecipeSettings, layout: OutputLayout, words: Sequence[str], began_at_s: float
) -> list[str]:
    """Return the words of a command that goes on, also where this one said to begin anew."""
    from recipes.training.checkpoints import CheckpointFolder

    has_begun = CheckpointFolder(layout.checkpoints).has_progress_since(began_at_s)
    if settings.train.resume or not has_begun:
        return list(words)
    kept = [word for word in words if not word.startswith("train.resume=")]
    return [*kept, "train.resume=true"]


def _summary(
    settings: RecipeSettings,
    layout: OutputLayout,
    outcome: Outcome,
    more: Sequence[tuple[str, str]],
) -> str:
    from recipes.summary import commands_for_run, run_in_words

    job = outcome.job
    jsonl = settings.observability.pipeline_stats_jsonl_path
    lines = [
        *outcome.lines,
        *run_in_words(job.run),
        ("metrics", None if jsonl is None else layout.root / jsonl),
        ("log", _log(layout)),
    ]
    commands = [*commands_for_run(job.run, job.cluster.started_here), *more]
    table = "\n".join(f"  {label:<11} {text}" for label, text in lines if text is not None)
    following = "".join(f"\n  {command}    # {what}" for command, what in commands)
    return f"{table}\n\nNext:{following}\n"


def _log(layout: OutputLayout) -> Path:
    return layout.logs / "recipe.log"
