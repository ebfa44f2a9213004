"""Pretraining, data preparation: text in, Megatron indexed datasets out.

usage: python -m recipes.pretrain [default | tiny | FILE.yaml] [key=value ...]

  python -m recipes.pretrain                              Python's standard library, 1-3 minutes
  python -m recipes.pretrain tiny                         a small part of it, less than a minute
  python -m recipes.pretrain input.paths=/data/text output_dir=/data/tokens
  python -m recipes.pretrain my.yaml 'input.paths=[/data/*.jsonl.gz, /data/books]'
  python -m recipes.pretrain tokenizer.source=/data/tokenizer.json wandb.mode=online

The same command again goes on where the last start was ended.
Exit codes: 0 done, 1 failed, 2 a setting cannot be used, 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.errors import RecipeError
from recipes.local_ray import prepare_environment
from recipes.settings import load_settings
from recipes.stages.layout import OutputLayout
from recipes.summary import commands_for_run, rows_in_words, run_in_words
from recipes.terminal import Terminal, quiet_terminal

if TYPE_CHECKING:
    from recipes.pretrain.data_prep import DataPrepResult, PretrainSettings

_FOLDER = Path(__file__).parent
_INTERRUPTED = 130
_TERMINATED = 143


def main(arguments: Sequence[str]) -> int:
    """Run the recipe as the command line says, and return the exit code."""
    if any(word in ("-h", "--help") for word in arguments):
        defaults = (_FOLDER / "default.yaml").read_text()
        sys.stdout.write(f"{__doc__}\nAll keys, with their defaults:\n\n{defaults}")
        return 0
    words = list(arguments)
    config = words.pop(0) if words and "=" not in words[0] else "default"
    try:
        settings = _load(config, words)
        layout = OutputLayout(Path(settings.output_dir).expanduser().absolute())
        with layout.locked(), quiet_terminal(_log(layout)) as terminal:
            return _run(settings, layout, terminal, arguments)
    except RecipeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED


def _load(config: str, words: Sequence[str]) -> PretrainSettings:
    # --help needs neither Ray nor cosmos-xenna, and Ray reads its environment when it is imported
    prepare_environment()
    from recipes.pretrain.data_prep import PretrainSettings

    return load_settings(PretrainSettings, _FOLDER, config, words)


def _run(
    settings: PretrainSettings,
    layout: OutputLayout,
    terminal: Terminal,
    arguments: Sequence[str],
) -> int:
    from recipes.pretrain.data_prep import prepare_data

    began = time.monotonic()
    again = shlex.join(["python", "-m", "recipes.pretrain", *arguments])
    try:
        result = prepare_data(settings, layout, terminal)
    except KeyboardInterrupt:
        terminal.error(f"Interrupted. To go on from here:\n  {again}")
        return _INTERRUPTED
    except SystemExit:  # Ray's way of answering SIGTERM
        terminal.error(f"Terminated. To go on from here:\n  {again}")
        return _TERMINATED
    except RecipeError as error:
        text = "\n".join([f"Failed: {error}", *getattr(error, "__notes__", ())])
        terminal.error(f"{text}\nLog: {_log(layout)}\nTo go on from here:\n  {again}")
        return error.exit_code
    commands = commands_for_run(result.run, result.cluster.started_here)
    if arguments and arguments[0] == "tiny":
        commands.append(("python -m recipes.pretrain", "the whole standard library"))
    summary = _summary(settings, layout, result, commands)
    terminal.result(f"Done in {time.monotonic() - began:.1f} s.\n\n{summary}")
    return 0


def _summary(
    settings: PretrainSettings,
    layout: OutputLayout,
    result: DataPrepResult,
    commands: Sequence[tuple[str, str]],
) -> str:
    totals = result.totals
    there = totals.shards - result.shards_made
    removed = f", {result.shards_removed} outdated removed" if result.shards_removed else ""
    jsonl = settings.observability.pipeline_stats_jsonl_path
    lines = [
        ("rows", rows_in_words(totals)),
        ("tokens", f"{totals.tokens:,}, vocabulary {result.vocabulary_size:,}"),
        (
            "shards",
            f"{totals.shards:,}: {result.shards_made:,} made now, {there:,} already there{removed}",
        ),
        ("bottleneck", result.bottleneck_stage),
        ("data", layout.blend),
        *run_in_words(result.run),
        ("metrics", None if jsonl is None else layout.root / jsonl),
        ("log", _log(layout)),
    ]
    table = "\n".join(f"  {label:<11} {text}" for label, text in lines if text is not None)
    following = "".join(f"\n  {command}    # {what}" for command, what in commands)
    return f"{table}\n\nNext:{following}\n"


def _log(layout: OutputLayout) -> Path:
    return layout.logs / "data_prep.log"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
