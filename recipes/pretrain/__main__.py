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

from recipes.command import Outcome, Recipe, main, started_job
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
    from recipes.run_record import RunFile
    from recipes.summary import data_in_words
    from recipes.training.launch import check_start
    from recipes.training.settings import is_training_wanted

    trains = is_training_wanted(settings.train, terminal.step)
    if trains:
        check_start(settings.train, layout)
    run_file = RunFile(layout.run_record, settings.train.resume) if trains else None
    plan = plan_data(settings, layout, terminal)
    terminal.step(f"{len(plan.shards)} shards; starting or joining Ray …")
    with started_job(settings, STAGE, terminal, run_file) as job:
        data = prepare_data(settings, plan, job.run, terminal)
        job.end_of_data_prep()
        trained = train(settings.train, layout, job.run, terminal) if trains else None
    lines = data_in_words(data, layout)
    return Outcome(job, [*lines, *(trained.in_words() if trained else [])])


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
