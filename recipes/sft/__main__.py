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

from recipes.command import Outcome, Recipe, main, started_job
from recipes.stages.layout import OutputLayout
from recipes.terminal import Terminal

if TYPE_CHECKING:
    from recipes.sft.data_prep import SftSettings


def _settings() -> type[SftSettings]:
    from recipes.sft.data_prep import SftSettings

    return SftSettings


def _work(settings: SftSettings, layout: OutputLayout, terminal: Terminal) -> Outcome:
    from recipes.run_record import RunFile
    from recipes.sft.data_prep import STAGE, packs_in_words, plan_data, prepare_data
    from recipes.sft.train import train
    from recipes.summary import data_in_words
    from recipes.training.launch import check_start
    from recipes.training.settings import is_training_wanted

    trains = is_training_wanted(settings.train, terminal.step)
    if trains:
        check_start(settings.train, layout)
    run_file = RunFile(layout.run_record, settings.train.resume) if trains else None
    plan = plan_data(settings, layout, terminal)
    terminal.step(f"{len(plan.dataset.shards)} shards; starting or joining Ray …")
    with started_job(settings, STAGE, terminal, run_file) as job:
        data = prepare_data(settings, plan, job.run, terminal)
        job.end_of_data_prep()
        trained = train(settings.train, layout, job.run, terminal) if trains else None
    lines = data_in_words(data, layout, *packs_in_words(data, settings))
    return Outcome(job, [*lines, *(trained.in_words() if trained else [])])


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
