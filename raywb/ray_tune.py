"""Ray Tune: every trial is a W&B run of its own, in the cluster's group.

    from raywb.ray_tune import RaywbCallback

    run_config = tune.RunConfig(callbacks=[RaywbCallback()])

It is what W&B's own integration gives (run id is the trial's id, its name the trial's name, its
config the trial's; keys without a prefix; ``training_iteration`` is the axis), without a process
for each trial on the driver's side. It needs ``ray[tune]``; importing this module imports
ray.tune, so ``import raywb`` leaves it alone.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ray.tune.logger import LoggerCallback

from raywb.client import Client
from raywb.lifecycle import attach, attach_for_callback, attach_own_run
from raywb.ray_train import is_local
from raywb.reported import (
    CALLBACK_TIMEOUT_S,
    MESSAGE_CHARACTERS,
    TRACEBACK_CHARACTERS,
    Attempts,
    LateClient,
    artifact_name,
    never_raises,
    step_of,
)
from raywb.values import flatten

__all__ = ["RaywbCallback"]

_log = logging.getLogger("raywb")

#: What Tune adds to a result that says nothing of the trial's progress.
LEFT_OUT = ("done", "should_checkpoint", "config", "checkpoint_dir_name")

#: What Tune adds that stays the same: it goes into the config.
TO_CONFIG = ("trial_id", "experiment_tag", "node_ip", "hostname", "pid", "date", "experiment_id")


class RaywbCallback(LoggerCallback):  # type: ignore[misc]  # Ray's classes are Any to mypy
    """Logs every result of every trial.

    A trial that fails ends its run as failed, with the error's text in the summary
    (``error_message``, ``error_traceback``) and an alert. One that Tune tries again goes on in
    its run; ``failures`` counts. Nothing that goes wrong here ends a trial.

    Args:
        stage: job type of the trials' runs; or, without runs of their own, what their keys begin
            with: ``<stage>/<trial id>/``.
        own_runs: a run for each trial. W&B's client takes a process of some 100 MB on the head
            node for each that runs at the same time; with hundreds of them, False makes them
            stages of the cluster's run, with their configs under the same name.
        step_key: the metric that is the row's step; by default ``step``, ``epoch`` or
            ``training_iteration``, whichever is reported. Tune always reports the last.
        log_config: put the trial's config into the run's.
        checkpoints: log each checkpoint as a version of the artifact ``checkpoint_<trial>``; one
            that lies in a remote store is not fetched for it.
        exclude: results that are left out, by name.
    """

    def __init__(
        self,
        stage: str = "tune",
        *,
        own_runs: bool = True,
        step_key: str | None = None,
        log_config: bool = True,
        checkpoints: bool = False,
        exclude: Collection[str] = (),
    ) -> None:
        self.stage = stage
        self.own_runs = own_runs
        self.step_key = step_key
        self.log_config = log_config
        self.checkpoints = checkpoints
        self.exclude = tuple(exclude)
        self._begin()

    def _begin(self) -> None:
        self._clients: dict[str, LateClient] = {}
        self._attempts = Attempts()
        self._failures: dict[str, int] = {}
        self._configs: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What travels: Tune writes its callbacks down with the experiment."""
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _client_of(self, trial: Any, *, is_row: bool = False) -> Client | None:
        if trial.trial_id not in self._clients:
            self._clients[trial.trial_id] = LateClient(lambda: self._attach(trial), self._attempts)
        return self._clients[trial.trial_id].get(is_row=is_row)

    def _attach(self, trial: Any) -> Client:
        limit_s = CALLBACK_TIMEOUT_S
        if self.own_runs:
            trial_id, name = trial.trial_id, str(trial)
            client = attach_own_run(self.stage, run_id=trial_id, name=name, timeout_s=limit_s)
            client.config.update(_compute_of(trial))
        else:
            client = attach_for_callback(f"{self.stage}/{trial.trial_id}", timeout_s=limit_s)
        if self.log_config:
            config = {key: value for key, value in trial.config.items() if key != "callbacks"}
            self._update_config(trial, client, config)
        return client

    def _update_config(self, trial: Any, client: Client, values: dict[str, Any]) -> None:
        # Under the stage's name a config is one value, so it is given as a whole.
        known = self._configs.setdefault(trial.trial_id, {})
        known |= values
        if known:
            client.config.update(known if self.own_runs else {str(client.stage): known})

    @never_raises
    def setup(self, *args: Any, **info: Any) -> None:
        """Before any trial: the service may have to be made, and no trial waits for it yet."""
        attach()

    @never_raises
    def log_trial_start(self, trial: Any) -> None:
        """A trial begins, or goes on after a pause or a failure."""
        self._client_of(trial)

    @never_raises
    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """A trial has reported."""
        client = self._client_of(trial, is_row=True)
        if client is None:
            return
        dropped = {*LEFT_OUT, *TO_CONFIG, *self.exclude}
        row, refused = flatten({k: v for k, v in result.items() if k not in dropped})
        # What W&B cannot chart is no mistake here: Tune itself adds some of it.
        _log.debug("raywb: trial %s: left out %s", trial, [one.key for one in refused])
        step = step_of(row, self.step_key, None)
        client.log(row, step=step)
        if result.get("training_iteration") == 1:
            facts = {key: result[key] for key in TO_CONFIG if key in result}
            self._update_config(trial, client, facts)

    @never_raises
    def log_trial_save(self, trial: Any) -> None:
        """A trial has a new checkpoint."""
        checkpoint, client = trial.checkpoint, self._client_of(trial)
        if client is not None and checkpoint is not None:
            client.summary["checkpoint"] = checkpoint.path
            if self.checkpoints and is_local(checkpoint):
                client.log_artifact(checkpoint.path, artifact_name(f"checkpoint_{trial}"), "model")

    @never_raises
    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial has failed, and is tried again."""
        self._tell_failure(trial, "is tried again")

    @never_raises
    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """A trial is over."""
        if failed:
            self._tell_failure(trial, "is over")
        self._configs.pop(trial.trial_id, None)
        late = self._clients.pop(trial.trial_id, None)
        # What it missed without one is told by the next client of any trial.
        client = late.get() if late is not None else None
        if client is not None:
            # The journal has all of it; nothing here is worth letting other trials wait for.
            client.close(timeout_s=0.0, exit_code=int(failed))

    def _tell_failure(self, trial: Any, what: str) -> None:
        client = self._client_of(trial)
        if client is None:
            return
        self._failures[trial.trial_id] = self._failures.get(trial.trial_id, 0) + 1
        text = _error_of(trial)
        last = text.rstrip().rpartition("\n")[2][:MESSAGE_CHARACTERS]
        client.summary.update(
            {
                "error_message": last,
                "error_traceback": text[-TRACEBACK_CHARACTERS:],
                "failures": self._failures[trial.trial_id],
            }
        )
        client.alert(f"trial {trial} failed", f"It {what}. {last}", level="ERROR")

    @never_raises
    def on_experiment_end(self, trials: Any, **info: Any) -> None:
        """All trials are over."""
        for late in self._clients.values():
            if (client := late.present) is not None:
                client.flush(5.0)


def _compute_of(trial: Any) -> dict[str, int | float]:
    """CPUs and GPUs that the trial has of Ray; a part of one is a fraction."""
    resources = trial.placement_group_factory.required_resources
    counts = {name: float(resources.get(name, 0)) for name in ("CPU", "GPU")}
    return {
        f"compute.{name.lower()}_count": int(count) if count.is_integer() else count
        for name, count in counts.items()
    }


def _error_of(trial: Any) -> str:
    """What a trial's error file says."""
    path = trial.error_file
    if not path or not Path(path).is_file():
        return "no error text"
    return Path(path).read_text(errors="replace")[-10 * TRACEBACK_CHARACTERS :]
