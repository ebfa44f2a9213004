"""Data preparation for pretraining: text in, Megatron indexed datasets out.

    python -m recipes.pretrain tiny
    python -m recipes.pretrain input.paths=[/data/*.jsonl.gz] output_dir=/data/tokens

    list and cut the inputs, train or load the tokenizer          here, in the driver
      → PlanStage                 is the shard finished already?  in Ray workers,
      → DownloadStage             bring its input to the node     one task per shard
      → BinIdxTokenizationStage   tokenize, write .bin .idx and receipt
    add up, check, write the blend                                here again

The same input and settings give the same bytes, however many workers there are. A start after a
kill makes only the shards that have no valid receipt.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from cosmos_xenna.pipelines.v1 import Resources, Stage, StageSpec, WorkerMetadata

from recipes.cluster import RaySettings
from recipes.pipeline import PipelineIdentity
from recipes.pretrain.blend import write_blend
from recipes.pretrain.indexed_dataset import IndexedDatasetWriter, token_type
from recipes.settings import Count, Text, settings_as_dict
from recipes.stages.dataset import (
    DataPrepResult,
    DatasetPlan,
    ShardResult,
    make_dataset,
    report,
)
from recipes.stages.documents import DocumentReader, LocalFile
from recipes.stages.download import DownloadStage, FetchedShard, files_on_this_node
from recipes.stages.layout import OutputLayout
from recipes.stages.manifest import Manifest, claim
from recipes.stages.plan import PlanStage
from recipes.stages.receipts import Receipt, write_receipt
from recipes.stages.scratch import Scratch
from recipes.stages.shards import Shard, cut_into_shards, fingerprint
from recipes.stages.sources import InputSettings, list_inputs
from recipes.stages.store_errors import shown, shown_settings
from recipes.stages.tokenizer import (
    DocumentEncoder,
    PreparedTokenizer,
    TokenizerMaker,
    TokenizerSettings,
)
from recipes.terminal import Terminal
from recipes.tracking import ObservabilitySettings, TrackedRun, WandbSettings
from recipes.training.settings import PretrainTrainSettings

__all__ = ["STAGE", "BinIdxTokenizationStage", "PretrainSettings", "plan_data", "prepare_data"]

#: Changes when the same settings begin to give other bytes; finished shards are then made anew.
_FORMAT_VERSION = 1

#: The prefix of all that this part of the recipe logs.
STAGE = "pretrain/data_prep"


@dataclass(frozen=True)
class WorkerSettings:
    """How many workers each stage has; null leaves it to xenna's autoscaler."""

    plan: Count | None
    download: Count | None
    tokenize: Count | None


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that ``default.yaml`` holds."""

    output_dir: Text
    overwrite: bool
    input: InputSettings
    tokenizer: TokenizerSettings
    workers: WorkerSettings
    train: PretrainTrainSettings
    ray: RaySettings
    observability: ObservabilitySettings
    wandb: WandbSettings

    def idle_keys(self) -> dict[str, str]:
        """Return the keys that change nothing beside another, each with the other one."""
        idle = self.tokenizer.idle_keys() | self.train.idle_keys() | self.wandb.idle_keys()
        if self.input.format == "text":
            idle["input.text_field"] = "input.format"
        return idle


class BinIdxTokenizationStage(Stage[FetchedShard, ShardResult]):  # type: ignore[misc]
    """Writes one shard per task: the tokens, their index, and last the receipt."""

    def __init__(
        self,
        layout: OutputLayout,
        scratch: Scratch,
        inputs: InputSettings,
        tokenizer: PreparedTokenizer,
        settings_fingerprint: str,
    ) -> None:
        self._layout = layout
        self._scratch = scratch
        self._inputs = inputs
        self._tokenizer = tokenizer
        self._settings_fingerprint = settings_fingerprint
        self._encoder: DocumentEncoder | None = None

    @property
    def required_resources(self) -> Resources:
        """One core, kept busy."""
        return Resources(cpus=1.0)

    def setup(self, worker_metadata: WorkerMetadata) -> None:
        """Load the tokenizer, once per worker."""
        self._encoder = DocumentEncoder(self._tokenizer)

    def process_data(self, in_data: list[FetchedShard]) -> list[ShardResult]:
        """Finish each shard; one that is finished already passes through."""
        return [self._finish(fetched) for fetched in in_data]

    def _finish(self, fetched: FetchedShard) -> ShardResult:
        if fetched.receipt is not None:
            return ShardResult(fetched.receipt, made_now=False)
        receipt = self._make(fetched.shard, files_on_this_node(fetched, self._scratch))
        write_receipt(self._layout, receipt)
        self._scratch.remove(fetched.shard)
        return ShardResult(receipt, made_now=True)

    def _make(self, shard: Shard, files: tuple[LocalFile, ...]) -> Receipt:
        assert self._encoder is not None, "setup() comes first"
        reader = DocumentReader(self._inputs.text_field, self._inputs.max_document_bytes)
        texts = (text for file in files for text in reader.read(file))
        dtype = token_type(self._tokenizer.vocabulary_size)
        with IndexedDatasetWriter(self._layout.shard_prefix(shard.name), dtype) as writer:
            for token_ids in self._encoder.encode(texts):
                if token_ids:
                    writer.add_document(token_ids)
                else:
                    reader.filtered["empty"] += 1
            written = writer.finish()
        return Receipt(
            shard=shard.name,
            settings_fingerprint=self._settings_fingerprint,
            input_fingerprint=shard.input_fingerprint,
            rows_in=reader.rows_in,
            rows_kept=written.documents,
            rows_filtered=dict(reader.filtered),
            rows_errors=dict(reader.errors),
            tokens=written.tokens,
            files={".bin": written.bin, ".idx": written.idx},
        )


def plan_data(settings: PretrainSettings, layout: OutputLayout, terminal: Terminal) -> DatasetPlan:
    """List and cut the inputs and make the tokenizer ready, without Ray.

    Args:
        settings: What is made, from what.
        layout: The output directory; the caller holds its lock.
        terminal: Where steps are shown.

    Raises:
        RecipeError: One of its subclasses.
    """
    began = time.monotonic()
    terminal.step(f"Listing {', '.join(map(shown, settings.input.paths))} …")
    inputs = settings.input
    shards = cut_into_shards(list_inputs(inputs), inputs.shard_bytes, inputs.limit_bytes)
    scratch = Scratch.of(layout.root, inputs.max_document_bytes + 4)
    tokenizer = _claim_output(settings, layout, scratch, shards, terminal)
    return DatasetPlan(layout, shards, scratch, tokenizer, "document", began)


def prepare_data(
    settings: PretrainSettings, plan: DatasetPlan, run: TrackedRun, terminal: Terminal
) -> DataPrepResult:
    """Make all shards that are missing, and the blend; the Ray cluster is there.

    Args:
        settings: What is made, from what.
        plan: What :func:`plan_data` returned for them.
        run: The W&B run.
        terminal: Where progress is shown.

    Raises:
        RecipeError: One of its subclasses; a later start goes on where this one ended.
    """
    layout, inputs, tokenizer = plan.layout, settings.input, plan.tokenizer
    settings_fingerprint = fingerprint(
        [
            _FORMAT_VERSION,
            tokenizer.xxh64,
            tokenizer.eod_id,
            inputs.text_field,
            inputs.max_document_bytes,
        ]
    )
    stages = [
        StageSpec(PlanStage(layout.root, settings_fingerprint), settings.workers.plan),
        StageSpec(DownloadStage(plan.scratch), settings.workers.download),
        StageSpec(
            BinIdxTokenizationStage(layout, plan.scratch, inputs, tokenizer, settings_fingerprint),
            settings.workers.tokenize,
        ),
    ]
    result = make_dataset(
        plan,
        stages,
        identity=PipelineIdentity(
            pipeline_kind="pretrain",
            run_hash=fingerprint(settings_as_dict(settings)),
            run_dir=str(layout.root),
            dataset_names=tuple(map(shown, inputs.paths)),
        ),
        observability=settings.observability,
        run=run,
        terminal=terminal,
        write_blend=lambda receipts: write_blend(layout, receipts, tokenizer.xxh64),
    )
    report(run, result)
    return result


def _claim_output(
    settings: PretrainSettings,
    layout: OutputLayout,
    scratch: Scratch,
    shards: tuple[Shard, ...],
    terminal: Terminal,
) -> PreparedTokenizer:
    """Make sure that the output directory is of these settings, and lay the tokenizer into it."""
    maker = TokenizerMaker(settings.tokenizer, settings.input, shards)
    plain = shown_settings(settings_as_dict(settings))
    wanted = Manifest({name: plain[name] for name in ("input", "tokenizer")}, maker.fingerprint())
    manifest = claim(layout, wanted, settings.overwrite)
    tokenizer = maker.prepare(layout, scratch, manifest.tokenizer_xxh64, terminal.step)
    replace(manifest, tokenizer_xxh64=tokenizer.xxh64).write(layout)
    return tokenizer
