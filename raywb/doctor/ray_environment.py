"""What cosmos-xenna needs in the environment of Ray's own processes, node by node.

Ray reads these variables when its processes start, so neither a driver nor a runtime_env can make
up for them. ``recipes/local_ray.py`` sets the same ones for a cluster of its own; a test compares.
"""

from __future__ import annotations

from typing import NamedTuple

from raywb.doctor.findings import Finding, named, trouble, warning, well
from raywb.doctor.look import ClusterLook, NodeLook

__all__ = ["VARIABLES", "Variable", "check_environment", "check_state_api"]

CHECK = "environment"


class Variable(NamedTuple):
    """One variable.

    Attributes:
        value: what it is to be; a number is the least.
        why: what fails without it.
        of_gpus: it matters only where there are GPUs.
    """

    name: str
    value: str
    why: str
    of_gpus: bool = False


_LISTS = "cosmos-xenna lists 40000 actors at once; without it every pipeline ends with"

VARIABLES = (
    Variable(
        "RAY_MAX_LIMIT_FROM_API_SERVER",
        "40000",
        f'{_LISTS} "Given limit 40000 exceeds the supported limit 10000"',
    ),
    Variable(
        "RAY_MAX_LIMIT_FROM_DATA_SOURCE",
        "40000",
        "cosmos-xenna lists 40000 actors at once; without it Ray cuts the list at 10000",
    ),
    Variable(
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",
        "1",
        "cosmos-xenna hands out GPUs itself; without it Ray hides them from its actors, and "
        "stages with GPUs fail",
        of_gpus=True,
    ),
)


def check_environment(look: ClusterLook) -> list[Finding]:
    """One finding for each variable that is missing somewhere, else one for all."""
    nodes = [node for node in look.nodes if node.processes]
    findings: list[Finding] = []
    for variable in VARIABLES:
        if (found := _check(variable, nodes, is_first=not findings)) is not None:
            findings.append(found)
    if unread := [node for node in look.nodes if "processes" in node.failed]:
        reason = unread[0].failed["processes"]
        findings.append(
            warning(
                CHECK,
                f"Ray's processes could not be read {_where(unread, look)}: {reason}",
                "run Ray and the job as the same user, or look there yourself: "
                "`tr '\\0' '\\n' </proc/$(pgrep -o raylet)/environ | grep RAY_`",
            )
        )
    if not findings and nodes:
        names = ", ".join(f"{one.name}={one.value}" for one in VARIABLES)
        findings.append(well(CHECK, f"Ray's own processes have {names}"))
    return findings


def check_state_api(look: ClusterLook) -> list[Finding]:
    """Whether Ray's head tells of its actors, which cosmos-xenna asks for all the time."""
    if look.connected is None or look.connected.state_api_error is None:
        return []
    return [
        trouble(
            "state API",
            f"Ray's state API gives no answer: {look.connected.state_api_error}",
            "cosmos-xenna's monitor needs it, so a pipeline fails at its start: start the head "
            "with `ray start --head --include-dashboard=true`, after `pip install 'ray[default]'`",
        )
    ]


def _check(variable: Variable, nodes: list[NodeLook], *, is_first: bool) -> Finding | None:
    lacking: dict[str, list[str]] = {}
    for node in nodes:
        for process, values in node.processes.items():
            if not _is_enough(values.get(variable.name), variable.value):
                lacking.setdefault(_unique(node), []).append(process)
    if not lacking:
        return None
    wrong = {
        value
        for node in nodes
        for process in lacking.get(_unique(node), [])
        if (value := node.processes[process].get(variable.name))
    }
    has = ", ".join(f"={value}" for value in sorted(wrong))
    what = f"{variable.name}{has} is not {variable.value}" if has else f"{variable.name} is not set"
    processes = sorted({process for found in lacking.values() for process in found})
    found = f"{what} for Ray's {_and(processes)} {named(list(lacking), len(nodes))}"
    remedy = f"{variable.why}. Put {variable.name}={variable.value} "
    remedy += _where_to_put(variable) if is_first else "there, too"
    needs_gpus = any(node.gpus for node in nodes if _unique(node) in lacking)
    if variable.of_gpus and not needs_gpus:
        return warning(CHECK, f"{found} (no GPU there yet)", remedy)
    return trouble(CHECK, found, remedy)


def _where_to_put(variable: Variable) -> str:
    pair = f"{variable.name}={variable.value}"
    return (
        "where Ray's processes start, on the head and on every worker, and start them again: in "
        f"cluster.yaml under `docker: run_options` as `--env={pair}`, on Kubernetes in the `env` "
        f"of each group's container, else `export {pair}` before `ray start`; a runtime_env comes "
        "too late"
    )


def _is_enough(value: str | None, needed: str) -> bool:
    if value is None:
        return False
    if value.strip().isdigit():
        return int(value) >= int(needed)
    return needed == "1" and value.strip().lower() == "true"


def _unique(node: NodeLook) -> str:
    return f"{node.name} {node.node_id[:8]}"


def _where(nodes: list[NodeLook], look: ClusterLook) -> str:
    return named([_unique(node) for node in nodes], len(look.nodes))


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
