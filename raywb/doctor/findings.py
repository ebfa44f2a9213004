"""What a check found: how it stands, in one line, and what to do about it."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Diagnosis", "Finding", "counted", "named", "trouble", "warning", "well"]

#: ``well``: as it should be. ``warning``: it works, or nobody can say. ``trouble``: it does not.
State = Literal["well", "warning", "trouble"]

#: Nodes that are named one by one.
NAMED_NODES = 3


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report.

    Attributes:
        check: what was looked at, in one or two words.
        found: what there is.
        remedy: what to do about it, with the command or the file.
    """

    check: str
    state: State
    found: str
    remedy: str | None = None


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """All findings, in the order in which they are told.

    Attributes:
        version: raywb's, in the process that asked.
        cluster: address of the cluster that was looked at; None without one.
    """

    version: str
    cluster: str | None
    findings: list[Finding]

    @property
    def is_well(self) -> bool:
        """Nothing is wrong; there may be warnings."""
        return all(finding.state != "trouble" for finding in self.findings)


def well(check: str, found: str, remedy: str | None = None) -> Finding:
    """It is as it should be; what there still is to know about it may stand beside."""
    return Finding(check=check, state="well", found=found, remedy=remedy)


def warning(check: str, found: str, remedy: str) -> Finding:
    """It works, but not as one may expect; or it could not be found out."""
    return Finding(check=check, state="warning", found=found, remedy=remedy)


def trouble(check: str, found: str, remedy: str) -> Finding:
    """Something does not work until somebody does something."""
    return Finding(check=check, state="trouble", found=found, remedy=remedy)


def counted(count: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def named(nodes: list[str], total: int) -> str:
    """Which nodes of how many, as a part of a sentence."""
    if len(nodes) == total:
        return "on the only node" if total == 1 else f"on all {total} nodes"
    shown = ", ".join(sorted(nodes)[:NAMED_NODES])
    more = ", …" if len(nodes) > NAMED_NODES else ""
    return f"on {len(nodes)} of {total} nodes ({shown}{more})"
