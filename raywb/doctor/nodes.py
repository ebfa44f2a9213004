"""What holds of the nodes: CPUs for the pipeline, versions, imports, clocks, who answers at all."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping

from raywb import __version__
from raywb.doctor.findings import Finding, counted, named, trouble, warning, well
from raywb.doctor.look import ClusterLook, NodeLook

__all__ = ["check_answers", "check_clocks", "check_cpus", "check_imports", "check_versions"]

#: Beside one CPU per node for xenna's monitor: with fewer a pipeline of three stages stands still.
PIPELINE_CPUS = 2

#: A clock that is off by more makes charts of several nodes wrong, in seconds.
CLOCK_S = 2.0

#: By so much more than that no chart can be read any more.
CLOCK_TROUBLE_S = 60.0

#: Packages that have to be the same everywhere, and why.
SAME = {
    "raywb": "client and service speak one protocol only within a version",
    "ray": "Ray lets nobody in who has another version",
    "python": "what Ray sends from one Python cannot be read by another",
}

_INSTALL = "the environment that Ray runs in on every node"


def check_answers(look: ClusterLook) -> list[Finding]:
    """Nodes that did not answer, and what could not be looked at on those that did."""
    findings = []
    if look.unanswered:
        total = len(look.unanswered) + len(look.nodes)
        reason = next(iter(look.unanswered.values()))
        findings.append(
            trouble(
                "nodes",
                f"no answer {named(list(look.unanswered), total)}: {reason}",
                "a task that needs no CPU did not run there, so neither will others: look at "
                "`ray status`, and at raylet.out in the node's /tmp/ray/session_latest/logs",
            )
        )
    for part in ("versions", "imports", "disks", "autoscales"):
        if failed := [node for node in look.nodes if part in node.failed]:
            where = named(names_of(failed), len(look.nodes))
            findings.append(
                warning(
                    "nodes",
                    f"{part} could not be looked at {where}: {failed[0].failed[part]}",
                    "the other checks do not depend on it; run `raywb doctor` again, and tell us "
                    "if it stays",
                )
            )
    return findings


def check_cpus(look: ClusterLook) -> list[Finding]:
    """Whether cosmos-xenna's monitors leave enough for the stages."""
    nodes = look.nodes
    if not nodes:
        return []
    total = sum(node.cpus for node in nodes)
    needed = len(nodes) + PIPELINE_CPUS
    without = [node for node in nodes if node.cpus < 1]
    remedy = (
        f"a pipeline needs {needed} CPUs here: one on each node for cosmos-xenna's monitor, and "
        f"{PIPELINE_CPUS} for its stages; with fewer it waits without a word. CPUs are logical: "
        "`ray start --num-cpus=8` on a small machine, `resources: {CPU: 8}` in cluster.yaml"
    )
    if look.head is not None and look.head.autoscales and total < needed:
        found = f"{total:g} CPUs on {counted(len(nodes), 'node')}; more come when they are wanted"
        return [well("CPUs", found)]
    if total < needed or without:
        found = f"{total:g} CPUs on {counted(len(nodes), 'node')}"
        if without:
            found += f", none {named(names_of(without), len(nodes))}"
        return [trouble("CPUs", found, remedy)]
    available = look.connected.available_cpus if look.connected else total
    if available < needed:
        return [
            warning(
                "CPUs",
                f"{available:g} of {total:g} CPUs are free now, and a pipeline needs {needed}",
                "`ray list actors --filter state=ALIVE` and `ray status` show who has them; a "
                "pipeline that is started now waits for them",
            )
        ]
    return [well("CPUs", f"{total:g} on {counted(len(nodes), 'node')}, {available:g} free")]


def check_versions(look: ClusterLook, here: Mapping[str, str]) -> list[Finding]:
    """Whether all nodes, and this process, have the same versions.

    Args:
        look: what the nodes told.
        here: this process's versions.
    """
    findings = []
    known = {**here, "raywb": __version__, "python": platform.python_version()}
    by_node = {unique: _versions_of(node) for unique, node in _by_name(look.nodes).items()}
    for package in dict.fromkeys([*SAME, "wandb", "torch", "cosmos-xenna"]):
        found = {name: versions.get(package) for name, versions in by_node.items()}
        present = {version for version in found.values() if version}
        head = next(iter(found.values()), None)
        others = [name for name, version in found.items() if version and version != head]
        if len(present) > 1:
            told = ", ".join(sorted(present))
            text = f"{package} is not the same {named(others, len(found))}: {told}"
            findings.append(_differs(package, text))
        elif package in SAME and present and known.get(package) not in (None, *present):
            text = f"{package} is {known[package]} here, and {next(iter(present))} on the cluster"
            findings.append(_differs(package, text))
    if findings or not by_node:
        return findings
    first = next(iter(by_node.values()))
    told = ", ".join(f"{name} {version}" for name, version in sorted(first.items()))
    return [well("versions", told)]


def _differs(package: str, found: str) -> Finding:
    install = f"install one version in {_INSTALL}, and here"
    if package in SAME:
        return trouble("versions", found, f"{SAME[package]}: {install}")
    return warning("versions", found, f"what is computed may differ from node to node: {install}")


def _versions_of(node: NodeLook) -> dict[str, str]:
    """Its versions; raywb need not be installed to be imported, and then tells its own."""
    told = dict(node.versions)
    version, _ = node.imports.get("raywb", (None, None))
    return told | ({"raywb": version} if version else {})


def check_imports(look: ClusterLook) -> list[Finding]:
    """Whether a worker on each node, or without a cluster this Python, can import what it needs."""
    asked = [node for node in look.nodes if node.imports]
    who = "workers" if look.connected else "this Python"
    failures: dict[tuple[str, str], list[str]] = {}
    for unique, node in _by_name(asked).items():
        for module, (_, error) in node.imports.items():
            if error:
                failures.setdefault((module, error), []).append(unique)
    if not failures:
        modules = sorted({module for node in asked for module in node.imports})
        return [well("imports", f"{who} can import {', '.join(modules)}")] if asked else []
    return [
        trouble(
            "imports",
            f"`import {module}` fails "
            f"{named(where, len(asked)) if look.connected else 'here'}: {error}",
            _import_remedy(module, error),
        )
        for (module, error), where in failures.items()
    ]


def _import_remedy(module: str, error: str) -> str:
    if "tqdm" in error:
        return "cosmos-xenna imports tqdm without declaring it: `pip install tqdm` in " + _INSTALL
    if module.startswith("recipes"):
        return (
            "start the recipe with `ray job submit --working-dir . -- python -m recipes.…`, or "
            f"`pip install '.[recipes]'` in {_INSTALL}"
        )
    package = {"raywb": "raywb", "wandb": "wandb"}.get(module, "cosmos-xenna")
    return (
        f"`pip install {package}` in {_INSTALL} (in cluster.yaml under `setup_commands`), or "
        '`ray job submit --runtime-env-json=\'{"pip": ["' + package + "\"]}'`"
    )


def check_clocks(look: ClusterLook) -> list[Finding]:
    """Whether the nodes' clocks go with the head's."""
    read = {
        unique: node
        for unique, node in _by_name(look.nodes).items()
        if node.clock_ahead_s is not None
    }
    head = look.head
    if head is None or head.clock_ahead_s is None:
        return []
    apart = {}
    for unique, node in read.items():
        ahead_s = (node.clock_ahead_s or 0.0) - head.clock_ahead_s
        sure_s = abs(ahead_s) - node.clock_error_s - head.clock_error_s
        if sure_s > CLOCK_S:
            apart[unique] = ahead_s
    if not apart:
        most_s = max(node.clock_error_s for node in read.values()) + head.clock_error_s
        within = f"within {max(CLOCK_S, most_s):.0f} s" if len(read) > 1 else "only the head's"
        return [well("clocks", f"{counted(len(read), 'node')}, {within}")]
    worst = max(apart.values(), key=abs)
    way = "before" if worst > 0 else "behind"
    found = f"off by up to {abs(worst):.0f} s ({way} the head's) {named(list(apart), len(read))}"
    remedy = (
        "rows carry their node's time, so charts over wall time are shifted and `rank_spread_s` is "
        "wrong: `sudo timedatectl set-ntp true` (or chrony) on these nodes"
    )
    say = trouble if abs(worst) > CLOCK_TROUBLE_S else warning
    return [say("clocks", found, remedy)]


def names_of(nodes: Iterable[NodeLook]) -> list[str]:
    """Names that tell nodes apart, also where several are one machine."""
    return [f"{node.name} {node.node_id[:8]}" for node in nodes]


def _by_name(nodes: list[NodeLook]) -> dict[str, NodeLook]:
    return dict(zip(names_of(nodes), nodes, strict=True))
