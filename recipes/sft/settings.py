"""The settings of the fine-tuning recipe, section by section as in ``default.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from recipes.cluster import RaySettings
from recipes.settings import Count, NotEmpty, Text
from recipes.sft.chat_template import TemplateSettings
from recipes.sft.conversations import ConversationReader
from recipes.sft.packing import Algorithm
from recipes.sft.splits import SplitSettings
from recipes.stages.sources import InputSettings
from recipes.stages.tokenizer import TokenizerSettings
from recipes.tracking import ObservabilitySettings, WandbSettings
from recipes.training.settings import TrainSettings

__all__ = [
    "ChatTokenizerSettings",
    "ConversationSettings",
    "PackingSettings",
    "SftSettings",
    "WorkerSettings",
]


@dataclass(frozen=True)
class ConversationSettings:
    """What is read, and where in a row the conversation is."""

    paths: Annotated[tuple[str, ...], NotEmpty()]
    format: Literal["auto", "jsonl", "parquet"]
    messages_field: Text
    tools_field: Text
    exclude: tuple[str, ...]
    limit_bytes: Count | None
    shard_bytes: Count
    max_row_bytes: Count

    def files(self) -> InputSettings:
        """Return the same as settings of files, rows aside."""
        return InputSettings(
            paths=self.paths,
            format=self.format,
            text_field=self.messages_field,
            exclude=self.exclude,
            limit_bytes=self.limit_bytes,
            shard_bytes=self.shard_bytes,
            max_document_bytes=self.max_row_bytes,
        )

    def reader(self) -> ConversationReader:
        """Return what reads the conversations of one shard."""
        return ConversationReader(self.messages_field, self.tools_field, self.max_row_bytes)


@dataclass(frozen=True)
class ChatTokenizerSettings(TokenizerSettings):
    """Where the tokenizer comes from, and which tokens a template needs of it."""

    special_tokens: tuple[str, ...] | None


@dataclass(frozen=True)
class PackingSettings:
    """How conversations become packs."""

    pack_size: Count
    algorithm: Algorithm
    seed: int


@dataclass(frozen=True)
class WorkerSettings:
    """How many workers each stage has; null leaves it to xenna's autoscaler."""

    plan: Count | None
    download: Count | None
    pack: Count | None


@dataclass(frozen=True)
class SftSettings:
    """Everything that ``default.yaml`` holds."""

    output_dir: Text
    overwrite: bool
    input: ConversationSettings
    tokenizer: ChatTokenizerSettings
    template: TemplateSettings
    packing: PackingSettings
    split: SplitSettings
    workers: WorkerSettings
    train: TrainSettings
    ray: RaySettings
    observability: ObservabilitySettings
    wandb: WandbSettings

    def idle_keys(self) -> dict[str, str]:
        """Return the keys that change nothing beside another, each with the other one."""
        idle = self.tokenizer.idle_keys() | self.train.idle_keys() | self.wandb.idle_keys()
        if self.template.source == "chatml":
            idle["template.today"] = "template.source"
        if self.packing.algorithm != "first_fit_shuffle":
            idle["packing.seed"] = "packing.algorithm"
        return idle
