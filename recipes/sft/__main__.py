"""Supervised fine-tuning: conversations into packed Parquet, and a small GPT trained on them.

usage: python -m recipes.sft [default | tiny | FILE.yaml] [key=value ...]

  python -m recipes.sft                              questions about Python's standard library
  python -m recipes.sft tiny                         a small part of them, about a minute
  python -m recipes.sft train.enabled=false          data preparation alone
  python -m recipes.sft input.paths=/data/chats output_dir=/data/packs
  python -m recipes.sft my.yaml 'input.paths=[/data/*.jsonl.gz, /data/*.parquet]'
  python -m recipes.sft tokenizer.source=/data/model template.source=tokenizer \
                        tokenizer.eod_token='</s>' packing.pack_size=8192

The same command again goes on where the last start was ended.
Exit codes: 0 done, 1 failed, 2 a setting cannot be used, 130 interrupted with Ctrl-C,
143 terminated.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.command import Recipe, main
from recipes.job import Outcome, Parts, prepare_and_train
from recipes.stages.layout import OutputLayout
from recipes.terminal import Terminal

if TYPE_CHECKING:
    from recipes.sft.data_prep import SftSettings


def _settings() -> type[SftSettings]:
    from recipes.sft.data_prep import SftSettings

    return SftSettings


def _work(settings: SftSettings, layout: OutputLayout, terminal: Terminal) -> Outcome:
    from recipes.sft.data_prep import STAGE, packs_in_words, plan_data, prepare_data
    from recipes.sft.train import train

    parts = Parts(STAGE, plan_data, prepare_data, train, packs_in_words)
    return prepare_and_train(parts, settings, layout, terminal)


RECIPE = Recipe(
    module="recipes.sft",
    folder=Path(__file__).parent,
    usage=__doc__,
    settings=_settings,
    work=_work,
    whole="questions about the whole standard library",
)

if __name__ == "__main__":
    sys.exit(main(RECIPE, sys.argv[1:]))
