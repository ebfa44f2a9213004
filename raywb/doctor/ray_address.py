"""Is there a cluster, which one, and does it let this process in?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from raywb.doctor.cluster_look import can_reach
from raywb.doctor.findings import Finding, counted, trouble, warning, well
from raywb.doctor.look import ClusterLook, NotConnected

__all__ = ["Address", "check_address", "name_address", "unreachable"]

CHECK = "Ray cluster"

_NAME_IT = (
    "`ray start --head` starts one on this machine; `raywb --address HOST:PORT doctor`, or "
    "RAY_ADDRESS=HOST:PORT in the environment, names one elsewhere; "
    "`ray job submit -- raywb doctor` looks from inside of it"
)

_TOKEN = Path(".ray/auth_token")


class Address:
    """The address that is looked at.

    Args:
        text: as for ``ray.init``; ``auto`` is the cluster on this machine.
        source: who named it, as a person would say it; empty where nobody did.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source

    def __str__(self) -> str:
        return f"{self.text} ({self.source})" if self.source else self.text


def name_address(option: str | None, environment: Mapping[str, str]) -> Address:
    """Which address counts: the command's, else the environment's, else this machine's."""
    if option not in (None, "", "auto", "local"):
        return Address(option, "--address")
    named = environment.get("RAY_ADDRESS", "")
    if named not in ("", "auto", "local"):  # ray.init would start a cluster for the last of them
        return Address(named, "RAY_ADDRESS")
    return Address("auto", "")


def unreachable(address: Address) -> Finding | None:
    """The finding for an address that no cluster can be at; None where it is worth a try."""
    if address.text.startswith(("http://", "https://")):
        return trouble(
            CHECK,
            f"{address} is where jobs are submitted, and nothing can be connected to",
            f"name the cluster's HOST:PORT (the port is 6379 by default) in {address.source}, or "
            "look from inside: `ray job submit -- raywb doctor`",
        )
    if ":" not in address.text:
        return None
    reason = can_reach(address.text)
    if reason is None:
        return None
    remedy = f"a Ray driver would wait there for minutes; {_NAME_IT}"
    if address.source == "RAY_ADDRESS":
        remedy = (
            "the cluster that it names is gone, or a firewall is between: `unset RAY_ADDRESS` "
            f"finds the one on this machine. {_NAME_IT}"
        )
    return trouble(CHECK, f"nothing answers at {address}: {reason}", remedy)


def check_address(
    address: Address, look: ClusterLook, environment: Mapping[str, str], home: Path
) -> list[Finding]:
    """What came of the attempt to connect."""
    connected = look.connected
    if connected is not None:
        cpus = sum(node.cpus for node in look.nodes)
        source = f" ({address.source})" if address.source else ""
        found = f"{connected.address}{source}, Ray {connected.ray_version}"
        if look.nodes:
            found += f", {counted(len(look.nodes), 'node')}, {cpus:g} CPUs"
        findings = [well(CHECK, found)]
        if look.ended is not None:
            findings.append(
                warning(
                    CHECK,
                    f"not all could be asked: {look.ended}",
                    "the checks below say what they know; look with `ray status` whether nodes "
                    "hang, and run `raywb doctor` again",
                )
            )
        return findings
    if look.refused is not None:
        return [_refused(address, look.refused, environment, home)]
    return [
        trouble(
            CHECK,
            f"{address} gives no answer: {look.ended}",
            f"look with `ray status --address {address.text}` whether its head node lives. "
            f"{_NAME_IT}",
        )
    ]


def _refused(
    address: Address, refused: NotConnected, environment: Mapping[str, str], home: Path
) -> Finding:
    if refused.kind == "none":
        remedy = _NAME_IT
        if (home / _TOKEN).is_file() and not environment.get("RAY_AUTH_MODE"):
            remedy += (
                f". {home / _TOKEN} is there (a local ray.init() leaves it): `ray start --head` "
                "now asks every driver for it, so set RAY_AUTH_MODE=disabled, or =token, for all "
                "alike"
            )
        return warning(CHECK, "there is none on this machine", remedy)
    if refused.kind == "several":
        return trouble(
            CHECK,
            "there are several on this machine, and nobody says which one",
            "`export RAY_ADDRESS=HOST:PORT` for the one that is meant; `ray start` printed it",
        )
    if refused.kind == "authentication":
        mode = environment.get("RAY_AUTH_MODE") or "not set"
        return trouble(
            CHECK,
            f"{address} does not let this process in: its token authentication and this "
            f"process's differ (RAY_AUTH_MODE is {mode} here)",
            "set RAY_AUTH_MODE to the same value for `ray start` on every node and for every "
            f"driver; with token, copy the head's {Path('~') / _TOKEN} here, too. A local "
            "ray.init() leaves such a file, and switches authentication on for the next "
            "`ray start --head`",
        )
    if refused.kind == "version":
        return trouble(
            CHECK,
            f"{address} has other versions than this process: {refused.text}",
            "install the cluster's versions of Python and Ray here, or look from inside: "
            "`ray job submit -- raywb doctor`",
        )
    return trouble(CHECK, f"{address} cannot be connected to: {refused.text}", _NAME_IT)
