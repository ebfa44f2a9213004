"""Which place this is: what is asked for, or what the environment says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from raywb.errors import SettingsError
from raywb.launch.places import Place
from raywb.launch.places.kuberay import RayJob
from raywb.launch.places.plain_command import PlainCommand
from raywb.launch.places.ray_head import FILE_NAME, RayHead, description_on
from raywb.launch.places.slurm_job import SlurmJob
from raywb.launch.places.vast_instance import VastInstance
from raywb.settings import vast_environment

__all__ = ["PLACES", "choose_place"]

#: Kinds of places in the order in which ``auto`` looks for them, behind a command that was given,
#: and the variable that each is known by; a head of ``ray up`` comes last, known by a file.
_KNOWN_BY: dict[str, tuple[str, Callable[[Mapping[str, str]], Place]]] = {
    "vast": ("CONTAINER_ID", VastInstance),
    "slurm": ("SLURM_JOB_ID", SlurmJob),
    "kuberay": ("RAY_CLUSTER_NAME", RayJob),
}

#: What ``--place`` takes.
PLACES = ("auto", *_KNOWN_BY, "ray", "command")


def choose_place(
    asked_for: str,
    command: str | None,
    environment: Mapping[str, str],
    first_process: Path = Path("/proc/1/environ"),
) -> Place | str:
    """The place that is to end, or the sentence that says why there is none.

    Args:
        asked_for: one of :data:`PLACES`.
        command: the user's own command.
        environment: this process's.
        first_process: environment of the container's first process, see
            :func:`raywb.settings.vast_environment`.

    Raises:
        SettingsError: ``asked_for`` and ``command`` do not go together.
        EndFailed: the environment names a place that cannot be.
    """
    if (asked_for == "command") != (command is not None) and asked_for != "auto":
        raise SettingsError("--place command and --command come together")
    if command is not None:
        return PlainCommand(command)
    kinds = list(_KNOWN_BY) if asked_for == "auto" else [asked_for]
    if "vast" in kinds:
        environment = vast_environment(environment, first_process)
    for kind in (one for one in kinds if one in _KNOWN_BY):
        variable, make = _KNOWN_BY[kind]
        if environment.get(variable):
            return make(environment)
    description: Path | None = description_on(environment)
    if asked_for in ("auto", "ray") and description is not None:
        return RayHead(description)
    if asked_for == "ray":
        return f"no ~/{FILE_NAME} - cannot auto-shutdown"
    return f"{_KNOWN_BY[kinds[0]][0]} not set - cannot auto-shutdown"
