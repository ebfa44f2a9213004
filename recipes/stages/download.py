"""The second stage: bring the input of unfinished shards to the node, unpacked."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from cosmos_xenna.pipelines.v1 import NodeInfo, Resources, Stage, WorkerMetadata

from recipes.nodes import other_nodes, run_on_nodes
from recipes.stages.documents import LocalFile
from recipes.stages.plan import PlannedShard
from recipes.stages.receipts import Receipt
from recipes.stages.scratch import Scratch
from recipes.stages.shards import Shard

__all__ = ["DownloadStage", "FetchedShard", "files_on_this_node", "remove_scratch_everywhere"]


@dataclass(frozen=True)
class FetchedShard:
    """A shard whose input lies on a node; or its receipt, and no files."""

    shard: Shard
    receipt: Receipt | None
    node_id: str
    files: tuple[LocalFile, ...]


class DownloadStage(Stage[PlannedShard, FetchedShard]):  # type: ignore[misc]
    """Fetches through the interface in ``sources.py``, whatever the store."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch

    @property
    def required_resources(self) -> Resources:
        """Half a core: mostly waiting for the store."""
        return Resources(cpus=0.5)

    def setup_on_node(self, node_info: NodeInfo, worker_metadata: WorkerMetadata) -> None:
        """Wipe what a killed run left in this node's scratch space."""
        self._scratch.remove_all()

    def process_data(self, in_data: list[PlannedShard]) -> list[FetchedShard]:
        """Fetch the input of each shard that is not finished."""
        return [self._fetch(planned) for planned in in_data]

    def _fetch(self, planned: PlannedShard) -> FetchedShard:
        files = () if planned.receipt else self._scratch.fetch(planned.shard)
        return FetchedShard(planned.shard, planned.receipt, _node_id(), files)


def files_on_this_node(fetched: FetchedShard, scratch: Scratch) -> tuple[LocalFile, ...]:
    """Return a shard's input on this node; fetch it again if another node has it.

    xenna prefers to keep a task on its node, but does not promise it.
    """
    return fetched.files if fetched.node_id == _node_id() else scratch.fetch(fetched.shard)


def remove_scratch_everywhere(scratch: Scratch) -> None:
    """Remove the recipe's scratch space from every node that can still be reached."""
    scratch.remove_all()
    run_on_nodes({node_id: (Scratch.remove_all, scratch) for node_id in other_nodes()})


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())
