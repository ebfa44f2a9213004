"""What was brought from the cluster, its nodes and W&B: plain values that cross processes."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from raywb.reports import Status

__all__ = [
    "ClusterLook",
    "ClusterRequest",
    "Connected",
    "DiskLook",
    "Imported",
    "KeyLook",
    "Line",
    "NodeLook",
    "Nodes",
    "NotConnected",
    "RunAtServer",
    "ServerLook",
    "ServiceLook",
    "WandbLook",
    "WandbRequest",
]


#: A module's version, if it tells one, and why it cannot be imported.
Imported: TypeAlias = tuple[str | None, str | None]


class WandbRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked about W&B.

    Attributes:
        base_url, api_key_file: as in :class:`raywb.Settings`.
        ask_server: the server may be asked, too; not where the user wants nothing sent.
        entity, project, run_id: the run that the server is asked for.
        limit_s: longest that the server may take.
    """

    base_url: str | None = None
    api_key_file: str | None = None
    ask_server: bool = True
    entity: str | None = None
    project: str | None = None
    run_id: str | None = None
    limit_s: float = 10.0


class KeyLook(msgspec.Struct, frozen=True, kw_only=True):
    """W&B's key, without the key: where it was found, and what is wrong with its form."""

    origin: str
    problem: str | None = None


class RunAtServer(msgspec.Struct, frozen=True, kw_only=True):
    """What W&B's server has of the run.

    Attributes:
        known: it knows the run.
        stages_without_speed: stages of a pipeline, and how many tasks they have completed.
    """

    known: bool
    rows: int = 0
    state: str | None = None
    stages_without_speed: dict[str, int] = {}


class ServerLook(msgspec.Struct, frozen=True, kw_only=True):
    """W&B's server.

    Attributes:
        reached: something answered there.
        accepted: it took the key; None where it could not be asked.
        entities: the user and the teams that the key may write to.
        error: what went wrong.
    """

    reached: bool = False
    accepted: bool | None = None
    username: str | None = None
    entities: list[str] = []
    run: RunAtServer | None = None
    error: str | None = None


class WandbLook(msgspec.Struct, frozen=True, kw_only=True):
    """W&B as one process sees it; the server is None where it was not asked."""

    base_url: str
    key: KeyLook | None
    server: ServerLook | None


class DiskLook(msgspec.Struct, frozen=True, kw_only=True):
    """Room at a place where something is written; ``error`` is what a write there met."""

    use: str
    path: str
    free_bytes: int
    total_bytes: int
    error: str | None = None


class NodeLook(msgspec.Struct, frozen=True, kw_only=True):
    """One node, looked at from a task on it.

    Attributes:
        processes: values of variables in the environment of Ray's own processes, by process.
        imports: version and error of each module that a worker is to import.
        autoscales, wandb: told by the head alone.
        failed: parts that could not be looked at, and why.
        clock_ahead_s, clock_error_s: how far the node's clock goes before the asking process's,
            and how far that may be off.
    """

    node_id: str
    name: str
    is_head: bool
    cpus: float
    gpus: float
    hostname: str = ""
    versions: dict[str, str] = {}
    processes: dict[str, dict[str, str | None]] = {}
    imports: dict[str, Imported] = {}
    disks: list[DiskLook] = []
    autoscales: bool = False
    wandb: WandbLook | None = None
    failed: dict[str, str] = {}
    clock_ahead_s: float | None = None
    clock_error_s: float = 0.0


class ClusterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a cluster.

    Attributes:
        address: as for ``ray.init``.
        variables: whose values are told.
        modules: that a worker is to import.
        wandb: what is asked about W&B, from the head.
        nodes_limit_s: longest that all nodes may take.
    """

    address: str
    variables: list[str]
    modules: list[str]
    wandb: WandbRequest
    nodes_limit_s: float = 60.0


class Connected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """There is a cluster; ``state_api_error`` is why it tells nobody of its actors."""

    address: str
    ray_version: str
    available_cpus: float
    state_api_error: str | None = None


class NotConnected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """There is none, or it does not let this process in.

    Attributes:
        kind: ``none``, ``several``, ``authentication``, ``version`` or ``other``.
        text: what Ray said, in one line.
    """

    kind: str
    text: str


class ServiceLook(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """raywb's service: its status, or why there is none; neither where none runs."""

    status: Status | None = None
    error: str | None = None


class Nodes(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The nodes that answered, and the others with the reason, by name."""

    nodes: list[NodeLook]
    unanswered: dict[str, str]


#: What the process that asks the cluster writes, one JSON line each.
Line: TypeAlias = Connected | NotConnected | ServiceLook | Nodes


class ClusterLook(msgspec.Struct, kw_only=True):
    """All that came of the cluster, as far as it came.

    Attributes:
        ended: why not everything came.
    """

    connected: Connected | None = None
    refused: NotConnected | None = None
    service: ServiceLook | None = None
    nodes: list[NodeLook] = []
    unanswered: dict[str, str] = {}
    ended: str | None = None

    @property
    def head(self) -> NodeLook | None:
        """The head node, if it answered."""
        return next((node for node in self.nodes if node.is_head), None)

    @property
    def status(self) -> Status | None:
        """The service's status, if it gave one."""
        return self.service.status if self.service else None
