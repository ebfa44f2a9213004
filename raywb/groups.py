"""Which W&B group runs belong to, and why, and how the setup of a Slurm job says so (SPEC C)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

__all__ = ["NAMELESS", "Group", "job_variables", "resolve_group", "setup_with_group"]

#: Commands of a setup that the group comes after: what is sourced may set a group of its own.
_BEFORE_THE_GROUP = re.compile(
    r"""(?:^|[;&|({]|\b(?:then|do|else)\b)\s*      # where a command begins
        (?:(?:source|\.)\s+\S|export\s[^;&|\#\n]*\bHYDRA_FULL_ERROR\b)""",
    re.MULTILINE | re.VERBOSE,
)

#: Words that open and close what a shell runs only under a condition.
_BLOCK_WORDS = re.compile(r"(?<![\w./-])(if|do|case|fi|done|esac)(?![\w./-])")


class Group(NamedTuple):
    """A group's name (None: no group) and where it came from, as a person would say it."""

    name: str | None
    source: str


#: Nothing names a group, and there is no cluster that it could be named after.
NAMELESS = Group(None, "nothing that names one")


def resolve_group(
    explicit: str | None,
    cluster_id: str | None,
    environment: Mapping[str, str],
    submission_id: str | None = None,
) -> Group:
    """Find the group: the first that answers wins.

    The order is the explicit setting (the empty string means "no group"), ``WANDB_GROUP``,
    ``SUBMITIT_JOB_ID``, ``SLURM_JOB_ID``, Ray's job submission id, and a name made for the
    cluster.

    Args:
        explicit: the setting.
        cluster_id: the cluster that the last resort is named after; None: there is none.
        environment: the process's environment.
        submission_id: what Ray says where the environment does not: in a job's workers.
    """
    if explicit is not None:
        return Group(explicit or None, "the settings" if explicit else "the settings (no group)")
    if name := environment.get("WANDB_GROUP"):
        # Bytes that are no text come as surrogates, which nothing that keeps text takes.
        return Group(name.encode(errors="replace").decode(), "WANDB_GROUP")
    for variable in ("SUBMITIT_JOB_ID", "SLURM_JOB_ID"):
        if job_id := environment.get(variable):
            return Group(f"slurm-{job_id}", variable)
    if submission_id := job_variables(environment).submission_id or submission_id:
        return Group(f"ray-{submission_id}", "Ray's job submission id")
    if cluster_id is None:
        return NAMELESS
    return Group(f"ray-cluster-{cluster_id[:8]}", "the cluster")


class JobVariables(NamedTuple):
    """What the driver of a submitted Ray job finds in its environment about its job.

    Attributes:
        submission_id: None where this is no such driver.
        names: the variables that the job's runtime_env sets.
    """

    submission_id: str | None = None
    names: frozenset[str] = frozenset()


def job_variables(environment: Mapping[str, str]) -> JobVariables:
    """Read the JSON that Ray's job manager leaves for the driver, which ``ray.init`` reads, too."""
    text = environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    if not text:
        return JobVariables()
    try:
        config = msgspec.json.decode(text, type=_JobConfig)
    except msgspec.DecodeError:
        return JobVariables()  # somebody else's variable of that name tells of no job
    names = (config.runtime_env or {}).get("env_vars") or {}
    return JobVariables(config.metadata.get("job_submission_id"), frozenset(names))


class _JobConfig(msgspec.Struct):
    metadata: dict[str, str] = {}
    runtime_env: dict[str, Any] | None = None


def setup_with_group(setup: Iterable[str], name: str) -> list[str]:
    """Setup commands of a Slurm job with ``export WANDB_GROUP=<name>`` among them, in a new list.

    It comes after the last command that sources something or exports ``HYDRA_FULL_ERROR``, and
    after the end of the block which that may be in, else first. An export that this function
    wrote is replaced; one that somebody else wrote is left.

    Args:
        setup: commands for a shell, one an element.
        name: the group; it is quoted, whatever is in it.
    """
    lines = [line for line in setup if not _is_ours(line)]
    before = [i for i, line in enumerate(lines, 1) if _BEFORE_THE_GROUP.search(line)]
    lines.insert(_after_block(lines, before[-1]) if before else 0, _export(name))
    return lines


def _after_block(lines: list[str], position: int) -> int:
    """The first position from this one on that is in no block and no continued line."""
    depth = 0
    for number, line in enumerate(lines, 1):
        words = _BLOCK_WORDS.findall(line)
        depth += sum(1 if word in ("if", "do", "case") else -1 for word in words)
        if number >= position and depth <= 0 and not line.endswith("\\"):
            return number
    return position  # these were words of something else


def _export(name: str) -> str:
    return f"export WANDB_GROUP={shlex.quote(name)}"


def _is_ours(line: str) -> bool:
    """Whether it is such an export and nothing else, to the letter."""
    try:
        words = shlex.split(line)
    except ValueError:  # an open quote: part of something longer
        return False
    return len(words) == 2 and line == _export(words[1].removeprefix("WANDB_GROUP="))
