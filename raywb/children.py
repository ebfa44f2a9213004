"""What this process's children inherit: the W&B group, and where their runs go (SPEC C).

Tasks, actors and other jobs of the same Ray cluster get the group from its service. All others
start services of their own, and are told by

- this process's environment, which subprocesses inherit: ``start()`` exports ``WANDB_GROUP``;
- :func:`runtime_env`, for Ray jobs and Ray clusters;
- :func:`inject_group`, for Slurm jobs, whose environment may not be the submitting process's.

The group is that of the run which this process's own rows go to, so it is the parent's all the
way down, and comes before a child's own job id.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from raywb.errors import SettingsError
from raywb.groups import NAMELESS, Group, job_variables, resolve_group, setup_with_group
from raywb.reports import RunInfo
from raywb.settings import (
    Settings,
    process_environment,
    set_group_variable,
    variables_for_children,
)

__all__ = ["export_group", "inject_group", "runtime_env"]

_log = logging.getLogger("raywb")

#: Longest that a running service may take to name its run, in seconds.
ANSWER_LIMIT_S = 30.0

#: What ``export_group`` wrote last, and what it had found there before its first word.
_exported: tuple[str, str | None] | None = None


def export_group(run: RunInfo) -> bool:
    """Set ``WANDB_GROUP`` to a run's group, so that what this process launches inherits it.

    A run without a group, or with W&B disabled, takes back what an earlier one set.

    Returns:
        Whether the variable has a new value that children inherit.
    """
    global _exported
    present = process_environment().get("WANDB_GROUP")
    name = None if run.mode == "disabled" else run.group
    if name == present:
        return False
    ours = _exported is not None and _exported[0] == present
    before = _exported[1] if _exported is not None and ours else present
    if name is not None:
        set_group_variable(name)
        _exported = (name, before)
    elif ours:
        set_group_variable(before)
        _exported = None
    return name is not None


def inject_group(executor_or_setup: Any, group: str | None = None) -> list[str]:
    """Let Slurm jobs inherit the group: put ``export WANDB_GROUP=<group>`` in their setup.

    It comes after the last command that sources something or exports ``HYDRA_FULL_ERROR``, else
    first. Injecting twice changes nothing; another group replaces the first. With W&B disabled,
    or without a group, nothing is injected. An injection prints one line of JSON.

    Args:
        executor_or_setup: a submitit executor, whose ``setup`` parameter is updated, or a list
            of setup commands, which is left as it is.
        group: by default that of the run which this process's cluster logs to, else the first of
            ``WANDB_GROUP``, ``SUBMITIT_JOB_ID``, ``SLURM_JOB_ID`` and Ray's job id; the empty
            string means "no group".

    Returns:
        The setup commands with the injection, in a new list.

    Raises:
        SettingsError: ``group`` or ``executor_or_setup`` cannot be used.
        ServiceUnavailable: a service runs on this process's cluster, and does not answer.
    """
    setup = _setup_of(executor_or_setup)
    found = _group_for_children(group, _present_run(), process_environment())
    if found == NAMELESS:
        _log.warning(
            "raywb: there is no group to inject, and each job gets one of its own: call "
            "raywb.start() first, set WANDB_GROUP, or name the group"
        )
    name = found.name
    if name is None:
        return setup
    injected = setup_with_group(setup, name)
    if injected != setup:
        if hasattr(executor_or_setup, "update_parameters"):
            executor_or_setup.update_parameters(
                **{_setup_parameter(executor_or_setup): list(injected)}
            )
        said = {"debug": "injected_wandb_group", "group": name, "node": platform.node()}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
    return injected


def _setup_of(executor_or_setup: Any) -> list[str]:
    """The setup commands that are there, in a new list."""
    setup = executor_or_setup
    if hasattr(setup, "update_parameters"):
        setup = setup.parameters.get("setup") or []
    if isinstance(setup, (str, bytes, Mapping)) or not isinstance(setup, Iterable):
        raise SettingsError(
            f"{setup!r} is no list of setup commands: give a submitit executor, or a list with "
            "one command an element"
        )
    return list(setup)


def _setup_parameter(executor: Any) -> str:
    """What submitit calls it: an automatic executor takes the name of the real one as prefix."""
    cluster = getattr(executor, "cluster", None)
    if cluster is None:
        return "setup"
    # The one for debugging runs jobs in this process and has no setup; it passes over Slurm's.
    return f"{'slurm' if cluster == 'debug' else cluster}_setup"


def runtime_env(base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A Ray ``runtime_env`` by which jobs, tasks and clusters inherit the group and the settings.

    Its ``env_vars`` have ``WANDB_GROUP``, unless there is no group or W&B is disabled, and
    ``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_MODE``, ``WANDB_BASE_URL`` and
    ``RAYWB_JOURNAL_DIR`` where this process has them; never a key.

    In the driver of a submitted job, before ``ray.init``, variables that the job's own
    runtime_env sets are left out: they hold anyway, and Ray takes none of them twice. A driver
    that submits further jobs calls this after ``ray.init`` or ``raywb.start``.

    Args:
        base: the caller's own runtime_env, to which it is added; its values win. It is left as
            it is.

    Raises:
        ServiceUnavailable: a service runs on this process's cluster, and does not answer.
    """
    environment = process_environment()
    run = _present_run()
    merged = dict(base or {})
    own = dict(merged.get("env_vars") or {})
    variables = variables_for_children(environment)
    if run is not None:
        variables["WANDB_PROJECT"] = run.project
        if run.entity is not None:
            variables["WANDB_ENTITY"] = run.entity
        if "disabled" in (run.mode, variables.get("WANDB_MODE")):
            variables["WANDB_MODE"] = run.mode
    name = _group_for_children(None, run, environment).name
    if name is not None and own.get("WANDB_MODE") != "disabled":
        variables["WANDB_GROUP"] = name
    if not _ray_is_up() and environment.get("RAY_OVERRIDE_JOB_RUNTIME_ENV") != "1":
        for taken in job_variables(environment).names:
            variables.pop(taken, None)
    if variables := {**variables, **own}:
        merged["env_vars"] = variables
    return merged


def _group_for_children(
    explicit: str | None, run: RunInfo | None, environment: Mapping[str, str]
) -> Group:
    """The group that children are to have, and why."""
    if (run.mode if run else environment.get("WANDB_MODE")) == "disabled":
        return Group(None, "W&B is disabled")
    if explicit is not None:
        return resolve_group(Settings(group=explicit).group, None, environment)
    if run is not None:
        return Group(run.group, "the run")
    return resolve_group(None, None, environment)


def _present_run() -> RunInfo | None:
    """The run of this process's cluster, when it has one: its group is not to be guessed."""
    if not _ray_is_up():
        return None
    from raywb.cluster import present_run

    return present_run(timeout_s=ANSWER_LIMIT_S)


def _ray_is_up() -> bool:
    """Whether this process is part of a cluster; imports nothing."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
