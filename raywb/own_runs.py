"""A stage's own run as its process sees it: how it is asked for, and what goes into its config.

The service holds the run; the stage's process brings what only it knows: the settings that were
asked for by name, W&B's key where the service has none, and what the job was given (SPEC A).
"""

from __future__ import annotations

import logging
import secrets
import threading
from typing import Any

from raywb import cluster as ray_side
from raywb.client import Client
from raywb.errors import SettingsError
from raywb.nodes.compute import console_line, job_metadata
from raywb.reports import RunInfo, StageRunRequest
from raywb.settings import explicit_settings, find_api_key, process_environment, resolve

__all__ = ["check_own_run", "log_metadata", "open_own_run"]

_log = logging.getLogger("raywb")

#: Settings that a stage's own run may have otherwise than the cluster's.
OWN_SETTINGS = ("project", "entity", "group", "mode", "tags", "notes", "name")


def open_own_run(
    service: Any,
    stage: str,
    run_id: str | None,
    cfg: Any,
    *,
    timeout_s: float,
    name: str | None = None,
) -> tuple[RunInfo, int]:
    """Have the service open a stage's own run, or join the one of this id.

    Args:
        service: the service's handle.
        stage: the stage's name.
        run_id: W&B's id of the run; a new one by default.
        cfg: config with a ``wandb`` section, whose project, entity, group and mode count.
        timeout_s: longest that it may take.
        name: the run's name; by default project, stage and time.

    Returns:
        The run, and how often it was opened.

    Raises:
        SettingsError: ``run_id`` or ``cfg`` cannot be used.
        SettingsConflict: the id is that of a run with other settings, or the cluster's run is
            finished.
        ServiceUnavailable: no answer within ``timeout_s``.
    """
    if run_id is not None:
        resolve(overrides={"run_id": run_id})  # says what is wrong with it
    settings = resolve(cfg=cfg)
    named = [key for key in explicit_settings(cfg=cfg, overrides={}) if key in OWN_SETTINGS]
    explicit = {key: getattr(settings, key) for key in named}
    if name is not None:
        explicit["name"] = name
    api_key = None if settings.mode in ("offline", "disabled") else find_api_key(settings)
    request = StageRunRequest(
        stage=stage, run_id=run_id, explicit=explicit, nonce=secrets.token_hex(8)
    )
    answer: tuple[RunInfo, int] = ray_side.call(
        service, "open_stage_run", request, api_key, timeout_s=timeout_s
    )
    return answer


def log_metadata(client: Client, cfg: Any) -> str:
    """Put into the run's config what this process's job was given; returns a line that says so.

    What torch has to be asked for comes a moment later: that takes seconds.
    """
    environment = process_environment()
    metadata = job_metadata(cfg, environment, ask_torch=lambda _: None)
    client.config.update(metadata)
    if metadata.get("compute.gpus"):
        threading.Thread(
            target=_add_what_torch_knows, args=(client, cfg), name="raywb-torch", daemon=True
        ).start()
    return console_line(metadata)


def _add_what_torch_knows(client: Client, cfg: Any) -> None:
    try:
        client.config.update(job_metadata(cfg, process_environment()))
    except Exception as error:  # noqa: BLE001 - a thread of ours must not end with a traceback
        _log.warning("raywb: torch could not be asked about the GPUs: %s", error)


def check_own_run(stage: str | None, run_id: str | None, *, own_run: bool) -> None:
    """Make sure that what ``attach()`` was called with goes together.

    Raises:
        SettingsError: it does not.
    """
    if own_run and stage is None:
        raise SettingsError("own_run=True needs a stage, whose name becomes the run's job type")
    if run_id is not None and not own_run:
        raise SettingsError(
            f"run_id={run_id!r} is for a stage's own run: pass own_run=True with it, or give the "
            "cluster's run its id with raywb.start(run_id=…)"
        )
