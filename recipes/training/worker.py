"""One training worker: a process with one rank, which Ray Train starts and starts again."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as distributed
from torch import Tensor

from recipes.errors import TrainingError
from recipes.training.batches import Batch, SampleSource, places_of_rank
from recipes.training.checkpoints import (
    Checkpoint,
    CheckpointFolder,
    Standing,
    write_flushed,
)
from recipes.training.initial import load_initial_weights
from recipes.training.model import GPT, ModelShape, token_loss
from recipes.training.settings import TrainSettings
from recipes.training.worker_log import WorkerLog, worker_log

__all__ = ["TrainingTask", "learning_rate", "work"]

#: The terminal shows the progress twice a second, and needs it no more often.
_TELL_EVERY_S = 0.5


@dataclass(frozen=True)
class TrainingTask:
    """All that a worker needs to know; travels to each.

    Attributes:
        identity: what must be the same for a checkpoint to be one of this training.
        initial: whose weights a training begins with that has no checkpoint yet.
        tracked: whether there is a W&B run.
    """

    recipe: str
    settings: TrainSettings
    source: SampleSource
    shape: ModelShape
    identity: dict[str, Any]
    folder: CheckpointFolder
    tokenizer: Path
    initial: Checkpoint | None
    tracked: bool


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Return the rate of a step: up in a line, then down to the lowest in half a cosine."""
    optimizer = settings.optimizer
    highest, lowest = optimizer.learning_rate, optimizer.min_learning_rate
    if step <= optimizer.warmup_steps:
        return highest * step / optimizer.warmup_steps
    done = (step - optimizer.warmup_steps) / max(settings.steps - optimizer.warmup_steps, 1)
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def work(config: dict[str, TrainingTask]) -> None:
    """Train to the last step, from the newest checkpoint; Ray Train calls this in each worker."""
    task = config["task"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    try:
        with worker_log(task.recipe, rank, world_size, tracked=task.tracked) as log:
            _Worker(task, rank, world_size, log).run()
    except _FoundByAllRanks as error:
        # An error that left this function would make Ray Train start all workers again.
        if rank == 0:
            task.folder.tell_failure(str(error))


class _FoundByAllRanks(Exception):
    """Raised in all ranks at the same place, so that none waits for another; would come again."""


@contextlib.contextmanager
def _same_in_all_ranks() -> Iterator[None]:
    """Mark what is done with the same files and settings in all ranks, and fails in all or none."""
    try:
        yield
    except TrainingError as error:
        raise _FoundByAllRanks(str(error)) from error


class _Worker:
    """Model, optimizer and data of one rank."""

    def __init__(self, task: TrainingTask, rank: int, world_size: int, log: WorkerLog) -> None:
        self._task = task
        self._settings = task.settings
        self._rank = rank
        self._world_size = world_size
        self._log = log
        self._told_at = 0.0
        self._device = ray.train.torch.get_device()
        if self._device.type == "cpu":
            torch.set_num_threads(task.settings.cpus_per_worker)
        bf16 = {"auto": self._device.type == "cuda", "bf16": True, "fp32": False}
        self._bf16 = bf16[task.settings.precision]
        self._training, self._validation = task.source.open(task.settings.seed)
        torch.manual_seed(task.settings.seed)
        self._model = GPT(task.shape)
        self._standing = Standing()
        checkpoint = self._newest_checkpoint()
        if checkpoint is not None:
            self._model.load_state_dict(_load(checkpoint.model))
            self._standing = checkpoint.standing
        elif task.initial is not None:
            with _same_in_all_ranks():
                load_initial_weights(self._model, task.initial, task.tokenizer)
        self._parallel = ray.train.torch.prepare_model(self._model)
        self._optimizer = _make_optimizer(self._model, task.settings)
        if checkpoint is not None:
            decays = [group["weight_decay"] for group in self._optimizer.param_groups]
            self._optimizer.load_state_dict(_load(checkpoint.optimizer, self._device))
            # What was loaded says what settings said then.
            for group, decay in zip(self._optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    def run(self) -> None:
        """Take every step that is left."""
        settings = self._settings
        if self._rank == 0:
            self._describe()
        for step in range(self._standing.step + 1, settings.steps + 1):
            is_last = step == settings.steps
            self._train(step)
            better = self._validate(step) if self._validates(step) else False
            to_be_kept = better and settings.checkpoints.artifacts == "best"
            if to_be_kept or step % settings.checkpoints.every_steps == 0 or is_last:
                self._save(better=better, is_last=is_last)
            self._tell_progress(step)

    def _validates(self, step: int) -> bool:
        every = self._settings.validation.every_steps
        if every is None or not self._validation.size:
            return False
        return step % every == 0 or step == self._settings.steps

    def _describe(self) -> None:
        self._log.config(
            {
                "parameters": sum(weight.numel() for weight in self._model.parameters()),
                "workers": self._world_size,
                "device": self._device.type,
                "precision": "bf16" if self._bf16 else "fp32",
                "samples": self._training.size,
                "validation_samples": self._validation.size,
                **dataclasses.asdict(self._task.shape),
            }
        )

    # -- steps ----------------------------------------------------------------------------------

    def _train(self, step: int) -> None:
        began = time.perf_counter()
        settings = self._settings
        places = places_of_rank(step, settings.batch_size, self._rank, self._world_size)
        batch = self._training.batch(places)
        loss_sum, own_targets = self._loss(self._parallel, batch)
        total_loss, targets, tokens = self._added_up(loss_sum.item(), own_targets, batch.tokens)
        # Gradients of ranks are averaged, and ranks may have different numbers of targets.
        loss = loss_sum * (self._world_size / max(targets, 1))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = settings.optimizer.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(
            self._model.parameters(), math.inf if limit is None else limit
        ).item()
        if not math.isfinite(norm):  # the same in all ranks
            raise _FoundByAllRanks(
                f"the gradient is {norm} at step {step}: lower train.optimizer.learning_rate, or "
                "set train.optimizer.clip_grad_norm"
            )
        rate = learning_rate(step, settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        mean_loss = total_loss / max(targets, 1)
        step_time_s = time.perf_counter() - began
        self._log.step(
            {
                "loss": loss.item(),
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens_per_s": batch.tokens / step_time_s,
                "step_time_s": step_time_s,
            },
            step,
        )
        before = self._standing
        self._standing = Standing(
            step=step,
            tokens=before.tokens + int(tokens),
            tokens_per_s=tokens / step_time_s,
            losses=dataclasses.replace(
                before.losses, last=mean_loss, best=_lower(before.losses.best, mean_loss)
            ),
        )

    def _loss(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        """Return the sum of the losses of a batch, and over how many tokens it is."""
        tensors = [
            None if ids is None else torch.from_numpy(ids).to(self._device, non_blocking=True)
            for ids in (batch.input_ids, batch.positions, batch.segments)
        ]
        targets = torch.from_numpy(batch.targets).to(self._device, non_blocking=True)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            logits = model(*tensors)
        return token_loss(logits, targets), int((batch.targets >= 0).sum())

    def _added_up(self, *values: float) -> list[float]:
        """Add each value up over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def _validate(self, step: int) -> bool:
        """Validate, each rank on its share; say whether it is the best so far."""
        settings = self._settings
        wanted = settings.validation.batches * settings.batch_size
        mine = range(min(self._validation.size, wanted))[self._rank :: self._world_size]
        loss_sum, targets, tokens = 0.0, 0, 0
        with torch.no_grad():
            for places in _parts(mine, settings.batch_size // self._world_size):
                batch = self._validation.batch(places)
                loss, count = self._loss(self._model, batch)
                loss_sum, targets = loss_sum + loss.item(), targets + count
                tokens += batch.tokens
        total = self._added_up(loss_sum, targets)
        mean_loss = total[0] / max(total[1], 1)
        self._log.validation(mean_loss, tokens, step)
        before = self._standing.losses
        best = _lower(before.best_validation, mean_loss)
        losses = dataclasses.replace(before, validation=mean_loss, best_validation=best)
        self._standing = dataclasses.replace(self._standing, losses=losses)
        return best != before.best_validation

    # -- checkpoints ----------------------------------------------------------------------------

    def _newest_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint to go on from: rank 0 looks, so that all take the same."""
        newest = self._task.folder.newest() if self._rank == 0 else None
        found = torch.tensor([newest.standing.step if newest else -1], device=self._device)
        distributed.broadcast(found, src=0)
        step = int(found.item())
        if step < 0:
            return None
        checkpoint = self._task.folder.of_step(step)
        with _same_in_all_ranks():
            checkpoint.check_identity(self._task.identity)
        return checkpoint

    def _save(self, *, better: bool, is_last: bool) -> None:
        """Have rank 0 write a checkpoint, and tell Ray Train of it, where all ranks meet."""
        settings = self._settings.checkpoints
        standing = self._standing
        metrics = {"step": standing.step, **dataclasses.asdict(standing.losses)}
        reported = None
        if self._rank == 0:
            written = self._task.folder.write(self._task.identity, standing, self._fill)
            self._task.folder.keep_last(settings.keep_last)
            wanted = {"every": True, "best": better, "last": is_last, "none": False}
            if wanted[settings.artifacts]:
                self._log.checkpoint(written.path)
            self._log.losses(standing.losses)
            reported = ray.train.Checkpoint.from_directory(str(written.path))
        ray.train.report(
            metrics,
            checkpoint=reported,
            checkpoint_dir_name=f"step-{standing.step:08d}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def _fill(self, folder: Path) -> None:
        task = self._task
        write_flushed(folder / "model.pt", lambda file: torch.save(self._model.state_dict(), file))
        write_flushed(
            folder / "optimizer.pt", lambda file: torch.save(self._optimizer.state_dict(), file)
        )
        tokenizer = task.tokenizer.read_bytes()
        write_flushed(folder / "tokenizer.json", lambda file: file.write(tokenizer))

    def _tell_progress(self, step: int) -> None:
        due = time.monotonic() - self._told_at >= _TELL_EVERY_S
        if self._rank == 0 and (due or step == self._settings.steps):
            self._told_at = time.monotonic()
            self._task.folder.tell_progress(step)


def _make_optimizer(model: GPT, settings: TrainSettings) -> Any:
    """AdamW; scales of norms are not pulled towards zero."""
    weights = list(model.parameters())
    groups = [
        {
            "params": [weight for weight in weights if weight.dim() > 1],
            "weight_decay": settings.optimizer.weight_decay,
        },
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.optimizer.learning_rate, betas=(0.9, 0.95))


def _load(path: Path, device: torch.device | str = "cpu") -> Any:
    return torch.load(path, map_location=device, weights_only=True)


def _lower(before: float | None, now: float) -> float:
    return now if before is None else min(before, now)


def _parts(places: range, length: int) -> Sequence[range]:
    return [places[begin : begin + length] for begin in range(0, len(places), length)]
