"""Pretraining: text into Megatron indexed datasets, and a small GPT trained on them.

usage: python -m recipes.pretrain [default | tiny | FILE.yaml] [key=value ...]

  python -m recipes.pretrain                              Python's standard library, minutes
  python -m recipes.pretrain tiny                         a small part of it, about a minute
  python -m recipes.pretrain train.enabled=false          data preparation alone
  python -m recipes.pretrain input.paths=/data/text output_dir=/data/tokens
  python -m recipes.pretrain my.yaml 'input.paths=[/data/*.jsonl.gz, /data/books]'
  python -m recipes.pretrain tokenizer.source=/data/tokenizer.json wandb.mode=online

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
    from recipes.pretrain.data_prep import PretrainSettings


def _settings() -> type[PretrainSettings]:
    from recipes.pretrain.data_prep import PretrainSettings

    return PretrainSettings


def _work(settings: PretrainSettings, layout: OutputLayout, terminal: Terminal) -> Outcome:
    from recipes.pretrain.data_prep import STAGE, plan_data, prepare_data
    from recipes.pretrain.train import train

    parts = Parts(STAGE, plan_data, prepare_data, train, lambda *_: ())
    return prepare_and_train(parts, settings, layout, terminal)


RECIPE = Recipe(
    module="recipes.pretrain",
    folder=Path(__file__).parent,
    usage=__doc__,
    settings=_settings,
    work=_work,
    whole="the whole standard library",
)

if __name__ == "__main__":
    sys.exit(main(RECIPE, sys.argv[1:]))
