"""``WandbLogger``: a stage's own run for scripts that have their settings in a config (SPEC A)."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

from raywb.client import Client
from raywb.lifecycle import attach, hand_down_group
from raywb.settings import as_mapping

__all__ = ["WandbConfig", "WandbLogger"]


class WandbConfig(NamedTuple):
    """Where a logger's run goes."""

    group: str | None
    project: str
    entity: str | None
    mode: str


class WandbLogger:
    """A context manager around a stage's own W&B run, in the group of the cluster's.

    The run is opened when the block is entered, or at the first call. It ends with the block: as
    failed when an exception leaves it. With ``cfg.wandb.enabled: false`` nothing happens at all.

    Args:
        cfg: an OmegaConf or Hydra config, or a mapping. Of its ``wandb`` section ``enabled``,
            ``project``, ``entity``, ``group`` and ``mode`` are read.
        stage: the run's job type, and part of its name; ``monitor`` is an orchestrator's.
        run_id: W&B's id of the run; see :func:`raywb.attach`.
    """

    def __init__(self, cfg: Any = None, stage: str = "monitor", run_id: str | None = None) -> None:
        self._cfg = cfg
        self._stage = stage
        self._run_id = run_id
        section = as_mapping(as_mapping(cfg).get("wandb"))
        self._enabled = section.get("enabled") is not False
        self._client: Client | None = None
        self._left = False

    @property
    def client(self) -> Client | None:
        """The client behind it, for what it has no name for; None when it is not enabled.

        Raises:
            RaywbError: the run cannot be opened; see :func:`raywb.attach`.
        """
        if self._client is None and self._enabled:
            self._client = attach(self._stage, own_run=True, run_id=self._run_id, cfg=self._cfg)
            run = self._client.run
            if run.job_type == "orchestrator":
                hand_down_group(run)
        return self._client

    @property
    def wb_config(self) -> WandbConfig | None:
        """Where the run goes; None when it is not enabled."""
        if self.client is None:
            return None
        run = self.client.run
        return WandbConfig(run.group, run.project, run.entity, run.mode)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | float | None = None) -> None:
        """Log one row; see :meth:`Client.log`."""
        if self.client is not None:
            self.client.log(metrics, step=step)

    def log_table(self, df: Any, name: str) -> None:
        """Log a table; see :meth:`Client.log_table`."""
        if self.client is not None:
            self.client.log_table(df, name)

    def set_config(self, values: Mapping[str, Any], allow_val_change: bool = True) -> None:
        """Add to the run's config; see :meth:`Client.config`."""
        if self.client is not None:
            self.client.config.update(values, allow_val_change)

    def __enter__(self) -> WandbLogger:
        if self._left:  # entered again: the run of this id is opened again, or a new one
            self._client, self._left = None, False
        _ = self.client
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._client is not None:
            self._client.close(exit_code=0 if exc_type is None else 1)
            self._left = True
