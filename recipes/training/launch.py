"""Training as the driver sees it: put together, run on Ray Train, watched, and told in words."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import xxhash

from recipes.errors import RecipeError, SettingsError, TrainingError
from recipes.settings import settings_as_dict
from recipes.stages.layout import OutputLayout
from recipes.terminal import Terminal
from recipes.tracking import TrackedRun
from recipes.training.batches import SampleSource
from recipes.training.checkpoints import Checkpoint, CheckpointFolder, Losses, find_checkpoint
from recipes.training.settings import TrainSettings
from recipes.training.workers import (
    CPU_WORKERS,
    START_ATTEMPTS,
    Cluster,
    Workers,
    choose_workers,
    environment,
)

if TYPE_CHECKING:
    from recipes.training.worker import TrainingTask

__all__ = ["TrainResult", "check_start", "read_blend", "train_on_cluster"]


@dataclass(frozen=True)
class TrainResult:
    """What came out, for the summary.

    Attributes:
        steps: steps done, over all starts.
        losses: how it stands, in nats per token.
        tokens: tokens that the model was shown, over all starts.
        tokens_per_s: of all workers together, at the last step.
        checkpoint: the newest one.
        resumed_from: step that this start went on from; None when it began.
        workers: how many there were; 0 when nothing was left to do.
    """

    steps: int
    losses: Losses
    tokens: int
    tokens_per_s: float
    checkpoint: Path
    resumed_from: int | None
    workers: int
    duration_s: float

    def in_words(self) -> list[tuple[str, str]]:
        """Say it in labelled lines."""
        losses = self.losses
        loss = f"loss {losses.last:.3f}" if losses.last is not None else "no loss"
        if losses.validation is not None:
            loss += f", validation {losses.validation:.3f} (best {losses.best_validation:.3f})"
        since = "" if self.resumed_from is None else f", from step {self.resumed_from:,} on"
        speed = f"{self.tokens:,} tokens, {self.tokens_per_s:,.0f} a second"
        if not self.workers:
            since = ", all of them earlier: train.steps=… goes on, train.resume=false begins anew"
        return [
            ("training", f"{self.steps:,} steps{since}: {loss}; {speed}"),
            ("checkpoint", str(self.checkpoint)),
        ]


def check_start(settings: TrainSettings, layout: OutputLayout) -> None:
    """Refuse what can be known to fail before data are prepared, which may take long.

    Args:
        settings: the section ``train:``, of a start that trains.
        layout: the output directory.

    Raises:
        TrainingError: its checkpoint is of another training, or ``train.init_from`` cannot be used.
        SettingsError: the batch cannot be shared by the workers.
    """
    if settings.workers is None and settings.use_gpu is False:
        settings.check_workers(CPU_WORKERS)
    own = _own_checkpoint(settings, layout)
    if own is not None:
        own.check_identity(_identity_of(settings))
    _find_initial(settings, layout)


def _own_checkpoint(settings: TrainSettings, layout: OutputLayout) -> Checkpoint | None:
    """Return what this start goes on from."""
    return CheckpointFolder(layout.checkpoints).newest() if settings.resume else None


def _identity_of(settings: TrainSettings) -> dict[str, Any]:
    """Return what settings alone say of a training's identity."""
    plain = settings_as_dict(settings)
    train = {name: plain[name] for name in ("seed", "batch_size")}
    return {"model": plain["model"], "train": train}


def _find_initial(settings: TrainSettings, layout: OutputLayout) -> Checkpoint | None:
    """Return whose weights this start begins with; None where it goes on from its own.

    Raises:
        TrainingError: there is no checkpoint, or it cannot be used.
    """
    if settings.init_from is None or _own_checkpoint(settings, layout) is not None:
        return None
    initial = find_checkpoint(settings.init_from)
    if initial.path.resolve().is_relative_to(layout.checkpoints.resolve()):
        raise TrainingError(
            f"train.init_from={settings.init_from} lies among the checkpoints that "
            f"train.resume=false removes ({initial.path}): copy it to another place first"
        )
    has, wanted = initial.identity.get("model", {}), settings_as_dict(settings)["model"]
    keys = [name for name in has if has[name] != wanted.get(name)]
    if keys:
        raise TrainingError(
            f"train.init_from={settings.init_from}: the model of {initial.path} has another shape "
            f"({_listed(has)}) than train.model ({_listed(wanted)}): set "
            + " ".join(f"train.model.{name}={has[name]}" for name in keys)
        )
    return initial


def _listed(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in section.items())


def train_on_cluster(
    recipe: str,
    settings: TrainSettings,
    source: SampleSource,
    data: Mapping[str, Any],
    *,
    layout: OutputLayout,
    run: TrackedRun,
    terminal: Terminal,
) -> TrainResult:
    """Train to the last step, from the newest checkpoint of the output directory.

    Args:
        recipe: ``pretrain`` or ``sft``.
        settings: the section ``train:``.
        source: where the samples are.
        data: what decides which samples there are; a checkpoint of others is refused.
        layout: the output directory, with a tokenizer in it.
        run: the W&B run, which each worker logs to.
        terminal: where steps and progress are shown.

    Raises:
        TrainingError: it cannot begin or go on, or a worker failed more often than allowed.
        SettingsError: the batch cannot be shared by the workers that there are, or the best
            checkpoint is asked for and there is nothing to validate with.
        ClusterError: the cluster has not enough for the workers, and cannot grow.
    """
    began = time.monotonic()
    folder = CheckpointFolder(layout.checkpoints)
    folder.prepare()
    task = _make_task(recipe, settings, source, data, layout, run)
    before = _own_checkpoint(settings, layout)
    if before is not None:
        before.check_identity(task.identity)
    resumed_from = before.standing.step if before is not None else None
    if before is not None and before.standing.step >= settings.steps:
        return _result(before, resumed_from, workers=0, began=began)
    _check_validation(settings, source, terminal)
    workers = choose_workers(settings, Cluster.connected(), terminal.step)
    settings.check_workers(workers.count)
    begun = "" if resumed_from is None else f", from the checkpoint of step {resumed_from:,} on"
    kind = "GPUs" if workers.on_gpu else "CPUs"
    terminal.step(f"Training {settings.steps:,} steps, {workers.count} workers on {kind}{begun} …")

    def progress() -> list[tuple[str, int, int | None]]:
        return [(f"training/{recipe}", folder.progress() or resumed_from or 0, settings.steps)]

    if not settings.resume:  # last, so that nothing is lost by a start that is refused
        folder.clear()
    with terminal.progress(progress):
        _fit(task, workers, layout)
    newest = folder.newest()
    if newest is None or newest.standing.step < settings.steps:
        if (failure := folder.failure()) is not None:
            raise TrainingError(failure)
        raise TrainingError(
            f"training ended well, and {folder.root} has no checkpoint of its last step: "
            "output_dir must be a directory that every node sees under this path"
        )
    return _result(newest, resumed_from, workers=workers.count, began=began)


def _make_task(
    recipe: str,
    settings: TrainSettings,
    source: SampleSource,
    data: Mapping[str, Any],
    layout: OutputLayout,
    run: TrackedRun,
) -> TrainingTask:
    from recipes.training.model import ModelShape
    from recipes.training.worker import TrainingTask

    known = _identity_of(settings)
    tokenizer = layout.tokenizer.read_bytes()
    identity = {
        "recipe": recipe,
        **known,
        "data": {**data, "tokenizer_xxh64": xxhash.xxh64_hexdigest(tokenizer)},
    }
    return TrainingTask(
        recipe=recipe,
        settings=settings,
        source=source,
        shape=ModelShape(_vocabulary_size(layout.tokenizer), **known["model"]),
        identity=identity,
        folder=CheckpointFolder(layout.checkpoints),
        tokenizer=layout.tokenizer,
        initial=_find_initial(settings, layout),
        tracked=run.info is not None,
    )


def _check_validation(settings: TrainSettings, source: SampleSource, terminal: Terminal) -> None:
    """Tell when there is nothing to validate with.

    Raises:
        SettingsError: the best checkpoint is asked for, and nothing would say which one that is.
    """
    if settings.validation.every_steps is None or source.open(settings.seed)[1].size:
        return
    if settings.checkpoints.artifacts == "best":
        raise SettingsError(
            "train.checkpoints.artifacts=best needs validation, and the prepared data have no "
            "sample for it: keep a larger share of them for validation, or set artifacts=last"
        )
    terminal.step("Validation is left out: the prepared data have no sample for it")


def _vocabulary_size(tokenizer: Path) -> int:
    from recipes.stages.tokenizer import load

    vocabulary: dict[str, int] = load(str(tokenizer)).get_vocab(with_added_tokens=True)
    return max(vocabulary.values()) + 1


def _fit(task: TrainingTask, workers: Workers, layout: OutputLayout) -> None:
    """Run the workers to the end; they are started again from the newest checkpoint."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from recipes.training.worker import work

    trainer = TorchTrainer(
        work,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if workers.on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.on_gpu,
            resources_per_worker=workers.resources,
        ),
        run_config=RunConfig(
            # Its directory must hold the checkpoints that it is told of.
            name=layout.checkpoints.name,
            storage_path=str(layout.root),
            failure_config=FailureConfig(
                max_failures=task.settings.max_failures,
                controller_failure_limit=START_ATTEMPTS,
            ),
            worker_runtime_env={"env_vars": environment(workers)},
        ),
    )
    try:
        _interruptible(trainer.fit)
    except ray.exceptions.RayError as error:
        raise TrainingError(f"training ended with Ray's own words: {error}") from error
    except Exception as error:
        raise _in_words(error) from error


def _interruptible(fit: Callable[[], object]) -> None:
    """Call Ray Train so that Ctrl-C is a KeyboardInterrupt, as everywhere.

    Why: its own handler ends the training and then leaves the process, and it stays in place when
    the training is over (seen with 2.60).
    """
    if threading.current_thread() is not threading.main_thread():
        fit()
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        fit()
    except SystemExit as error:
        if error.code == signal.SIGTERM:  # as Ray answers it
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _in_words(error: Exception) -> RecipeError:
    """Say what a failed training's worker said: the cause, not what other ranks said of its end."""
    from recipes.pipeline import root_cause

    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    causes = {rank: root_cause(failure) for rank, failure in sorted(failures.items())}
    if not causes:
        cause = root_cause(getattr(error, "controller_failure", error))
        return TrainingError(f"training failed: {type(cause).__name__}: {cause}")
    rank = min(causes, key=lambda rank: (_comes_of_another(causes[rank]), rank))
    cause = causes[rank]
    if isinstance(cause, RecipeError):
        return cause
    text = str(cause).strip() or "no reason given"
    return TrainingError(f"training worker {rank} failed: {type(cause).__name__}: {text}")


def _comes_of_another(cause: BaseException) -> bool:
    """Whether this says no more than that another rank is gone."""
    text = f"{type(cause).__name__}: {cause}".lower()
    signs = ("gloo", "nccl", "connection closed", "connection reset", "distbackenderror")
    return not isinstance(cause, RecipeError) and any(sign in text for sign in signs)


def _result(
    checkpoint: Checkpoint, resumed_from: int | None, *, workers: int, began: float
) -> TrainResult:
    standing = checkpoint.standing
    return TrainResult(
        steps=standing.step,
        losses=standing.losses,
        tokens=standing.tokens,
        tokens_per_s=standing.tokens_per_s,
        checkpoint=checkpoint.path,
        resumed_from=resumed_from,
        workers=workers,
        duration_s=time.monotonic() - began,
    )


def read_blend(layout: OutputLayout) -> dict[str, Any]:
    """Return what ``blend.json`` says, with ``xxh64``, the hash of all of it.

    Raises:
        TrainingError: It is not there, or cannot be read.
    """
    try:
        raw = layout.blend.read_bytes()
        content: dict[str, Any] = json.loads(raw)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{layout.blend} cannot be read ({error}): data preparation writes it at its end"
        ) from error
    return {**content, "xxh64": xxhash.xxh64_hexdigest(raw)}
