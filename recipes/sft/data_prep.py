"""Data preparation for supervised fine-tuning: conversations in, packed Parquet out.

    python -m recipes.sft tiny
    python -m recipes.sft 'input.paths=[/data/*.jsonl.gz]' output_dir=/data/packs

    list and cut the inputs, find the template, train or load the tokenizer    here, in the driver
      → PlanStage               is the shard finished already?                 in Ray workers,
      → DownloadStage           bring its input to the node                    one task per shard
      → PackedSftParquetStage   template, tokens and mask, split, pack, write
    add up, check, write the blend                                             here again

The same input and settings give the same bytes, however many workers there are. A start after a
kill makes only the shards that have no valid receipt.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cosmos_xenna.pipelines.v1 import Resources, Stage, StageSpec, WorkerMetadata

from recipes.errors import InputError, SettingsError
from recipes.pipeline import PipelineIdentity
from recipes.settings import settings_as_dict
from recipes.sft.blend import write_blend
from recipes.sft.chat_encoder import ChatEncoder
from recipes.sft.chat_template import TemplateRefusal, TemplateSource, find_template
from recipes.sft.conversations import ConversationReader, ConversationTexts
from recipes.sft.packed_parquet import CompactConversation, write_packs
from recipes.sft.packing import efficiency, pack
from recipes.sft.settings import ConversationSettings, SftSettings
from recipes.sft.splits import SPLITS, split_ending, split_of
from recipes.sft.turns import Conversation, TemplateMismatch
from recipes.stages.dataset import (
    DataPrepResult,
    DatasetPlan,
    ShardResult,
    make_dataset,
    report,
)
from recipes.stages.download import DownloadStage, FetchedShard, files_on_this_node
from recipes.stages.layout import OutputLayout, write_whole
from recipes.stages.manifest import Manifest, claim
from recipes.stages.plan import PlanStage
from recipes.stages.receipts import Receipt, SplitCounts, WrittenFile, write_receipt
from recipes.stages.rows import LocalFile
from recipes.stages.scratch import Scratch
from recipes.stages.shards import Shard, cut_into_shards, fingerprint
from recipes.stages.sources import InputFile, list_inputs
from recipes.stages.store_errors import shown, shown_settings
from recipes.stages.tokenizer import PreparedTokenizer, TokenizerMaker
from recipes.terminal import Terminal
from recipes.tracking import TrackedRun

__all__ = [
    "STAGE",
    "PackedSftParquetStage",
    "SftPlan",
    "SftSettings",
    "packs_in_words",
    "plan_data",
    "prepare_data",
]

#: Changes when the same settings begin to give other bytes; finished shards are then made anew.
_FORMAT_VERSION = 1
#: The prefix of all that this part of the recipe logs.
STAGE = "sft/data_prep"


@dataclass(frozen=True)
class SftPlan:
    """What is to be made, and the template that it is made with."""

    dataset: DatasetPlan
    template: TemplateSource

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The units of work."""
        return self.dataset.shards


@dataclass(frozen=True)
class _ChatTokenizerMaker(TokenizerMaker):
    """Trains from what is said in conversations, whoever says it."""

    conversations: ConversationSettings
    special: tuple[str, ...]

    def special_tokens(self) -> tuple[str, ...]:
        return self.special

    def how_texts_are_read(self) -> list[object]:
        settings = self.conversations
        return [settings.messages_field, settings.tools_field, settings.max_row_bytes]

    def text_reader(self) -> ConversationTexts:
        return ConversationTexts(self.conversations.reader())


class PackedSftParquetStage(Stage[FetchedShard, ShardResult]):  # type: ignore[misc]
    """Writes one shard per task: a file of packs for each split, and last the receipt."""

    def __init__(
        self,
        plan: SftPlan,
        settings: SftSettings,
        settings_fingerprint: str,
    ) -> None:
        self._layout = plan.dataset.layout
        self._scratch = plan.dataset.scratch
        self._tokenizer: PreparedTokenizer = plan.dataset.tokenizer
        self._template = plan.template
        self._settings = settings
        self._settings_fingerprint = settings_fingerprint
        self._encoder: ChatEncoder | None = None

    @property
    def required_resources(self) -> Resources:
        """One core, kept busy."""
        return Resources(cpus=1.0)

    def setup(self, worker_metadata: WorkerMetadata) -> None:
        """Load the tokenizer and the template, once per worker."""
        self._encoder = ChatEncoder(self._tokenizer, self._template)

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
        reader = self._settings.input.reader()
        kept: dict[str, list[CompactConversation]] = {split: [] for split in SPLITS}
        for file in files:
            for conversation in reader.read(file):
                encoded = self._encode(conversation, reader)
                if encoded is not None:
                    kept[split_of(conversation, self._settings.split)].append(encoded)
        written: dict[str, WrittenFile] = {}
        splits: dict[str, SplitCounts] = {}
        for split, conversations in kept.items():
            splits[split] = self._write(shard, split, conversations, written)
        packs = sum(counts.packs for counts in splits.values())
        tokens = sum(counts.tokens for counts in splits.values())
        return Receipt(
            shard=shard.name,
            settings_fingerprint=self._settings_fingerprint,
            input_fingerprint=shard.input_fingerprint,
            rows_in=reader.counts.rows_in,
            rows_kept=sum(len(conversations) for conversations in kept.values()),
            rows_filtered=dict(reader.counts.filtered),
            rows_errors=dict(reader.counts.errors),
            tokens=tokens,
            files=written,
            splits=splits,
            packing_efficiency=efficiency(tokens, packs, self._settings.packing.pack_size),
        )

    def _encode(
        self, conversation: Conversation, reader: ConversationReader
    ) -> CompactConversation | None:
        """Return a conversation in tokens, or count why it is left out."""
        assert self._encoder is not None, "setup() comes first"
        try:
            encoded = self._encoder.encode(conversation)
        except TemplateRefusal:
            reader.counts.errors["template_refused"] += 1
            return None
        except TemplateMismatch:
            reader.counts.errors["template_mismatch"] += 1
            return None
        packing = self._settings.packing
        if not any(encoded.loss_mask):
            reader.counts.filtered["empty"] += 1
            return None
        if len(encoded.input_ids) > packing.pack_size and packing.algorithm != "concatenative":
            reader.counts.filtered["too_long"] += 1
            return None
        return CompactConversation(
            np.array(encoded.input_ids, dtype=np.int32), np.array(encoded.loss_mask, dtype=np.uint8)
        )

    def _write(
        self,
        shard: Shard,
        split: str,
        conversations: Sequence[CompactConversation],
        written: dict[str, WrittenFile],
    ) -> SplitCounts:
        """Pack and write one split of a shard; without conversations there is no file of it."""
        packing = self._settings.packing
        path = self._layout.shard_file(shard.name, split_ending(split))
        lengths = [len(conversation.input_ids) for conversation in conversations]
        seed = fingerprint([packing.seed, shard.name, split])
        packs = pack(lengths, packing.pack_size, packing.algorithm, seed)
        if packs:
            written[split_ending(split)] = write_packs(
                path, packs, conversations, packing.pack_size
            )
        else:  # nor one that other settings left here
            path.unlink(missing_ok=True)
        return SplitCounts(len(conversations), len(packs), sum(lengths))


def plan_data(settings: SftSettings, layout: OutputLayout, terminal: Terminal) -> SftPlan:
    """List and cut the inputs, make template and tokenizer ready, without Ray.

    Args:
        settings: What is made, from what.
        layout: The output directory; the caller holds its lock.
        terminal: Where steps are shown.

    Raises:
        RecipeError: One of its subclasses.
    """
    began = time.monotonic()
    split = settings.split
    if not split.train + split.valid + split.test:
        raise SettingsError("split.train, split.valid and split.test must not all be 0")
    template = find_template(
        settings.template, settings.tokenizer.source, {"eos_token": settings.tokenizer.eod_token}
    )
    terminal.step(f"Listing {', '.join(map(shown, settings.input.paths))} …")
    inputs = settings.input.files()
    fields = (settings.input.messages_field, settings.input.tools_field)
    files = _without_texts(list_inputs(inputs, fields), terminal)
    shards = cut_into_shards(files, inputs.shard_bytes, inputs.limit_bytes)
    scratch = Scratch.of(layout.root, inputs.max_document_bytes)
    tokenizer = _claim_output(settings, layout, scratch, shards, template, terminal)
    ChatEncoder(tokenizer, template).try_out()  # what cannot work is said before Ray is started
    dataset = DatasetPlan(layout, shards, scratch, tokenizer, "conversation", began)
    return SftPlan(dataset, template)


def prepare_data(
    settings: SftSettings, plan: SftPlan, run: TrackedRun, terminal: Terminal
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
    dataset = plan.dataset
    layout, inputs, tokenizer = dataset.layout, settings.input, dataset.tokenizer
    settings_fingerprint = fingerprint(
        [
            _FORMAT_VERSION,
            tokenizer.xxh64,
            dataclasses.asdict(plan.template),
            inputs.messages_field,
            inputs.tools_field,
            inputs.max_row_bytes,
            dataclasses.asdict(settings.packing),
            dataclasses.asdict(settings.split),
        ]
    )
    stages = [
        StageSpec(PlanStage(layout.root, settings_fingerprint), settings.workers.plan),
        StageSpec(DownloadStage(dataset.scratch), settings.workers.download),
        StageSpec(
            PackedSftParquetStage(plan, settings, settings_fingerprint), settings.workers.pack
        ),
    ]
    pack_size = settings.packing.pack_size
    result = make_dataset(
        dataset,
        stages,
        identity=PipelineIdentity(
            pipeline_kind="sft",
            run_hash=fingerprint(settings_as_dict(settings)),
            run_dir=str(layout.root),
            dataset_names=tuple(map(shown, inputs.paths)),
        ),
        observability=settings.observability,
        run=run,
        terminal=terminal,
        write_blend=lambda receipts: write_blend(layout, receipts, pack_size, tokenizer.xxh64),
    )
    report(run, result, _packing_counts(result, pack_size))
    return result


def packs_in_words(result: DataPrepResult, settings: SftSettings) -> list[tuple[str, object]]:
    """Say how full the packs are and what each split holds, in labelled lines."""
    splits, size = result.totals.splits, settings.packing.pack_size
    packs = sum(split.packs for split in splits.values())
    full = efficiency(result.totals.tokens, packs, size)
    held = ", ".join(f"{name} {split.rows:,}" for name, split in splits.items())
    return [
        ("packs", f"{packs:,} of {size:,} tokens, {full:.1%} filled"),
        ("splits", f"{held} conversations"),
    ]


def _packing_counts(result: DataPrepResult, pack_size: int) -> dict[str, float]:
    """Return what there is to say about packs and splits, for the W&B run."""
    splits = result.totals.splits
    packs = sum(split.packs for split in splits.values())
    counts: dict[str, float] = {
        "packs": packs,
        "packing_efficiency": efficiency(result.totals.tokens, packs, pack_size),
    }
    for name, split in splits.items():
        counts[f"{name}/conversations"] = split.rows
        counts[f"{name}/packs"] = split.packs
        counts[f"{name}/tokens"] = split.tokens
    return counts


def _without_texts(files: Sequence[InputFile], terminal: Terminal) -> tuple[InputFile, ...]:
    """Leave out texts that lie beside the conversations, such as a README."""
    conversations = tuple(file for file in files if file.format != "text")
    if not conversations:
        raise InputError(
            f"input.paths: {files[0].url} is a text, and holds no conversations; allowed: JSONL "
            "and Parquet files, by their endings or by input.format"
        )
    if len(conversations) < len(files):
        terminal.step(f"{len(files) - len(conversations)} text files hold no conversations")
    return conversations


def _claim_output(
    settings: SftSettings,
    layout: OutputLayout,
    scratch: Scratch,
    shards: tuple[Shard, ...],
    template: TemplateSource,
    terminal: Terminal,
) -> PreparedTokenizer:
    """Make sure that the output directory is of these settings, and lay the tokenizer into it."""
    special = settings.tokenizer.special_tokens
    if special is None:
        special = ("<|im_start|>", "<|im_end|>") if settings.template.source == "chatml" else ()
    maker = _ChatTokenizerMaker(
        settings.tokenizer, settings.input.files(), shards, settings.input, special
    )
    plain = shown_settings(settings_as_dict(settings))
    kept = {name: plain[name] for name in ("input", "tokenizer", "template", "packing", "split")}
    kept["template"]["fingerprint"] = fingerprint(template)
    manifest = claim(layout, Manifest(kept, maker.fingerprint()), settings.overwrite)
    tokenizer = maker.prepare(layout, scratch, manifest.tokenizer_xxh64, terminal.step)
    write_whole(layout.chat_template, template.text.encode())
    dataclasses.replace(manifest, tokenizer_xxh64=tokenizer.xxh64).write(layout)
    return tokenizer
