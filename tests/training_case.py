"""A small training for tests: its data, its settings, and a driver that runs it like a recipe."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

from recipes.pretrain.indexed_dataset import IndexedDatasetWriter, token_type
from recipes.stages.layout import OutputLayout, write_json
from recipes.training.settings import (
    CheckpointSettings,
    ModelSettings,
    OptimizerSettings,
    PretrainTrainSettings,
    TrainSettings,
    ValidationSettings,
)

__all__ = ["VOCABULARY", "settings", "train_as_a_recipe", "write_data", "write_tokenizer"]

VOCABULARY = 48
CONTEXT = 16
#: Documents of each shard.
SHARDS = (40, 25)


def settings(**changes: Any) -> PretrainTrainSettings:
    """Settings of a training of some seconds; dotted sections as dicts."""
    whole = PretrainTrainSettings(
        enabled=True,
        resume=True,
        init_from=None,
        seed=7,
        workers=2,
        cpus_per_worker=1,
        use_gpu=None,
        precision="auto",
        max_failures=2,
        steps=40,
        batch_size=8,
        model=ModelSettings(layers=1, hidden_size=32, heads=2),
        optimizer=OptimizerSettings(0.01, 0.001, 4, 0.1, 1.0),
        validation=ValidationSettings(every_steps=10, batches=2),
        checkpoints=CheckpointSettings(every_steps=10, keep_last=2, artifacts="last"),
        context_tokens=CONTEXT,
        validation_share=0.1,
    )
    for name, value in changes.items():
        section = getattr(whole, name)
        whole = dataclasses.replace(
            whole,
            **{name: dataclasses.replace(section, **value) if isinstance(value, dict) else value},
        )
    return whole


def common(whole: PretrainTrainSettings) -> TrainSettings:
    """What SFT has of the settings."""
    fields = dataclasses.fields(TrainSettings)
    return TrainSettings(**{field.name: getattr(whole, field.name) for field in fields})


def write_tokenizer(path: Path, size: int = VOCABULARY) -> None:
    """Write a tokenizer of so many words."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{number}": number for number in range(size)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(path))


def documents(count: int, seed: int) -> list[list[int]]:
    """Documents that count on in a stride of their own, which can be learnt."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        begin, stride = chance.randrange(VOCABULARY), chance.choice((1, 2))
        length = chance.randrange(30, 60)
        found.append([(begin + stride * place) % VOCABULARY for place in range(length)])
    return found


def write_data(root: Path) -> OutputLayout:
    """Write what pretraining's data preparation would have."""
    layout = OutputLayout(root)
    layout.create()
    write_tokenizer(layout.tokenizer)
    shards = []
    for number, count in enumerate(SHARDS):
        name = f"shard-{number:05d}"
        with IndexedDatasetWriter(layout.shard_prefix(name), token_type(VOCABULARY)) as writer:
            for document in documents(count, number):
                writer.add_document(document)
            written = writer.finish()
        shards.append({"prefix": f"shards/{name}", "tokens": written.tokens})
    write_json(
        layout.blend,
        {
            "blend": [text for shard in shards for text in (str(shard["tokens"]), shard["prefix"])],
            "shards": shards,
            "tokens": sum(shard["tokens"] for shard in shards),
        },
    )
    return layout


def packs(count: int, seed: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Packs of two conversations: ids, mask (the second half of each), and where they begin."""
    found = []
    texts = documents(2 * count, seed)
    for first, second in zip(texts[::2], texts[1::2], strict=True):
        mask = [
            int(place >= len(text) // 2) for text in (first, second) for place in range(len(text))
        ]
        found.append((first + second, mask, [0, len(first)]))
    return found


def write_packs(root: Path, vocabulary: int = VOCABULARY) -> OutputLayout:
    """Write what SFT's data preparation would have."""
    import pyarrow
    import pyarrow.parquet

    layout = OutputLayout(root)
    layout.create()
    write_tokenizer(layout.tokenizer, vocabulary)
    splits: dict[str, Any] = {}
    for number, (shard, split, count) in enumerate(
        [("00000", "train", 12), ("00001", "train", 9), ("00001", "valid", 4)]
    ):
        path = layout.shards / f"shard-{shard}.{split}.parquet"
        ids, masks, starts = zip(*packs(count, number), strict=True)
        columns = {
            "input_ids": pyarrow.array(ids, pyarrow.list_(pyarrow.int32())),
            "loss_mask": pyarrow.array(masks, pyarrow.list_(pyarrow.uint8())),
            "seq_start_id": pyarrow.array(starts, pyarrow.list_(pyarrow.int32())),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd")
        shards = splits.setdefault(split, {"shards": []})["shards"]
        shards.append({"path": f"shards/{path.name}", "packs": count})
    write_json(layout.blend, {"splits": splits, "pack_size": 128})
    return layout


def train_as_a_recipe(root: Path, **changes: Any) -> dict[str, Any]:
    """In a driver: train on the data that lie here, in the W&B run of the directory."""
    import ray

    from recipes.pretrain.train import train
    from recipes.run_record import RunFile
    from recipes.terminal import Terminal
    from recipes.tracking import WandbSettings, tracked

    ray.init(log_to_driver=False, ignore_reinit_error=True)
    wanted = settings(**changes)
    layout = OutputLayout(root)
    terminal = Terminal(sys.stdout, sys.stderr)
    wandb = WandbSettings(enabled=True, project="t", entity=None, group=None, mode=None)
    with tracked(
        wandb,
        "pretrain/data_prep",
        finish=True,
        announce=terminal.step,
        run_file=RunFile(layout.run_record, wanted.resume),
    ) as run:
        result = train(wanted, layout, run, terminal)
    assert run.info is not None
    plain = json.loads(json.dumps(dataclasses.asdict(result), default=str))
    return {
        **plain,
        "words": result.in_words(),
        "run_id": run.info.id,
        "dir": run.info.dir,
        "report": run.report and {"complete": run.report.complete, "lost": run.report.lost},
    }
