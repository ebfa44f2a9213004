"""Ray Train: what workers give to ``ray.train.report`` goes to the cluster's run.

    from raywb.ray_train import RaywbCallback

    run_config = ray.train.RunConfig(callbacks=[RaywbCallback(stage="training/pretrain")])

Ray calls it in the actor that controls the training, with the metrics of all ranks. It needs
``ray[train]``; importing this module imports ray.train, so ``import raywb`` leaves it alone.
"""

from __future__ import annotations

from typing import Any

from ray.train import Checkpoint, UserCallback

from raywb.across_ranks import combined
from raywb.client import Client
from raywb.errors import SettingsError
from raywb.lifecycle import attach_for_callback
from raywb.reported import (
    CALLBACK_TIMEOUT_S,
    LateClient,
    artifact_name,
    described,
    never_raises,
    step_of,
)
from raywb.rows import ACROSS_RANKS, Scalar
from raywb.values import Refusal, flatten

__all__ = ["RaywbCallback"]


class RaywbCallback(UserCallback):  # type: ignore[misc]  # Ray's classes are Any to mypy
    """Logs every report of a training as one row, over all ranks.

    A number becomes the mean of the ranks', unless ``across_ranks`` says otherwise; of a text
    the first rank's counts. ``<stage>/ranks`` is how many there were. An exception of a worker
    goes into the summary (``<stage>/error_type``, ``error_message``, ``error_rank``, ``failures``;
    its traceback, which Ray keeps in the worker's log, only where Ray hands it over), and is an
    alert; how the run ends is for the driver to say, where ``fit()`` raises it. Nothing that goes
    wrong here ends a training.

    Args:
        stage: prefix of the keys.
        step_key: the metric that is the row's step; by default ``step``, ``epoch`` or
            ``training_iteration``, whichever is reported, else the report's number.
        across_ranks: how a metric's values become one, by its name: ``mean``, ``min``, ``max``,
            ``sum``, ``last`` (the highest rank's) or ``per_rank``.
        checkpoints: log each reported checkpoint as a version of the artifact
            ``checkpoint_<stage>``, or of this name. It is copied, or reflinked, before the next
            report is handled. One that lies in a remote store is named in the summary instead,
            as every one is (``<stage>/checkpoint``).
        log_config: put ``train_loop_config`` into the run's config, under the stage's name.

    Raises:
        SettingsError: ``across_ranks`` has another word.
    """

    def __init__(
        self,
        stage: str = "training",
        *,
        step_key: str | None = None,
        across_ranks: dict[str, str] | None = None,
        checkpoints: bool | str = False,
        log_config: bool = False,
    ) -> None:
        if wrong := sorted(set((across_ranks or {}).values()) - set(ACROSS_RANKS)):
            raise SettingsError(
                f"across_ranks={across_ranks!r} cannot be used: {', '.join(wrong)} is not among "
                f"{', '.join(ACROSS_RANKS)}"
            )
        self.stage = stage
        self.step_key = step_key
        self.across_ranks = dict(across_ranks or {})
        self.checkpoints = checkpoints
        self.log_config = log_config
        self._begin()

    def _begin(self) -> None:
        self._reports = 0
        self._failures = 0
        self._said_config = False
        self._late = LateClient(
            lambda: attach_for_callback(self.stage, timeout_s=CALLBACK_TIMEOUT_S)
        )

    def __getstate__(self) -> dict[str, Any]:
        """What travels: Ray sends callbacks to the controller, and from there to each worker."""
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @never_raises
    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """All ranks have reported."""
        self._reports += 1
        client = self._late.get(is_row=True)
        if client is None:
            return
        if self.log_config and not self._said_config:
            self._said_config = True
            client.config.update({self.stage: run_context.train_loop_config or {}})
        row, refused = self._merged(metrics)
        if refused:
            client.refuse(refused)
        step = step_of(row, self.step_key, self._reports)
        client.log(row, step=step)
        if checkpoint is not None:
            self._log_checkpoint(client, checkpoint)

    def _merged(self, metrics: list[dict[str, Any]]) -> tuple[dict[str, Scalar], list[Refusal]]:
        parts, refused = [], []
        for one in metrics:
            row, wrong = flatten(one)
            parts.append(row)
            refused += wrong
        merged: dict[str, Scalar] = {}
        for key in {key: None for part in parts for key in part}:
            having = [(rank, part[key]) for rank, part in enumerate(parts) if key in part]
            kind = self.across_ranks.get(key, "mean")
            if kind == "per_rank":
                merged |= {f"{key}/rank_{rank}": value for rank, value in having}
            elif kind == "last" or len(having) == 1:
                merged[key] = having[-1][1]
            elif key in ("epoch", "step", "training_iteration", self.step_key):
                merged[key] = having[0][1]  # a place, which has no mean
            else:
                merged[key] = combined(kind, [value for _, value in having])
        merged["ranks"] = len(parts)
        return merged, refused

    def _log_checkpoint(self, client: Client, checkpoint: Checkpoint) -> None:
        client.summary["checkpoint"] = checkpoint.path
        if self.checkpoints and is_local(checkpoint):
            wanted = self.checkpoints if isinstance(self.checkpoints, str) else ""
            name = artifact_name(wanted or f"checkpoint_{self.stage}")
            client.log_artifact(checkpoint.path, name, "model")

    @never_raises
    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Workers have raised; Ray may start all of them again."""
        self._failures += 1
        client = self._late.get()
        if client is None:
            return
        rank, error = min(worker_exceptions.items(), key=lambda item: item[0])
        values = described(error)
        client.summary.update({**values, "error_rank": rank, "failures": self._failures})
        client.alert(
            f"{self.stage}: {values['error_type']} in rank {rank}",
            f"{len(worker_exceptions)} ranks raised, after report {self._reports}. Rank {rank}: "
            f"{values['error_type']}: {values['error_message']}",
            level="ERROR",
        )


def is_local(checkpoint: Any) -> bool:
    """Whether a checkpoint lies where this machine finds it as a path."""
    return getattr(checkpoint.filesystem, "type_name", "") == "local"
