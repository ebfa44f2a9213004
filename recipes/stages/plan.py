"""The first stage: find out which shards are finished already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_xenna.pipelines.v1 import Resources, Stage

from recipes.stages.layout import OutputLayout
from recipes.stages.receipts import Receipt, matching_receipt
from recipes.stages.shards import Shard

__all__ = ["PlanStage", "PlannedShard"]


@dataclass(frozen=True)
class PlannedShard:
    """A shard, and its receipt if there is nothing left to do."""

    shard: Shard
    receipt: Receipt | None


class PlanStage(Stage[Shard, PlannedShard]):  # type: ignore[misc]
    """Holds each shard against its receipt, which means reading finished shards through once.

    A finished shard flows on, marked as such: so every count of the pipeline includes it.
    """

    def __init__(self, output_dir: Path, settings_fingerprint: str) -> None:
        self._layout = OutputLayout(output_dir)
        self._settings_fingerprint = settings_fingerprint

    @property
    def required_resources(self) -> Resources:
        """Half a core: mostly waiting for the disk."""
        return Resources(cpus=0.5)

    def process_data(self, in_data: list[Shard]) -> list[PlannedShard]:
        """Return each shard with its receipt, if it is finished."""
        return [PlannedShard(shard, self._receipt(shard)) for shard in in_data]

    def _receipt(self, shard: Shard) -> Receipt | None:
        return matching_receipt(
            self._layout, shard.name, self._settings_fingerprint, shard.input_fingerprint
        )
