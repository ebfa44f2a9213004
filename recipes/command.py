"""The command line that every recipe has.

    main            --help; settings; the output directory's lock; the work; a summary, or what
                    went wrong and the command that goes on from there

What the work is, is in ``job.py``.

Nothing of Ray is imported here: a recipe's settings are, after the environment was made ready.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from recipes.errors import RecipeError
from recipes.job import Outcome, RecipeSettings, SettingsT
from recipes.local_ray import prepare_environment
from recipes.settings import load_settings
from recipes.stages.layout import OutputLayout
from recipes.terminal import Terminal, quiet_terminal

__all__ = ["Recipe", "main"]

_INTERRUPTED = 130
_TERMINATED = 143


@dataclass(frozen=True)
class Recipe(Generic[SettingsT]):
    """What tells one recipe's command from another's."""

    #: What stands behind ``python -m``.
    module: str
    #: Where its YAML files lie.
    folder: Path
    #: What ``--help`` begins with.
    usage: str
    #: Imports and returns the dataclass of its settings.
    settings: Callable[[], type[SettingsT]]
    #: Does everything.
    work: Callable[[SettingsT, OutputLayout, Terminal], Outcome]
    #: What the same command does without ``tiny``.
    whole: str


def main(recipe: Recipe[SettingsT], arguments: Sequence[str]) -> int:
    """Run a recipe as the command line says, and return the exit code."""
    if any(word in ("-h", "--help") for word in arguments):
        defaults = (recipe.folder / "default.yaml").read_text()
        sys.stdout.write(f"{recipe.usage}\nAll keys, with their defaults:\n\n{defaults}")
        return 0
    words = list(arguments)
    config = words.pop(0) if words and "=" not in words[0] else "default"
    try:
        # --help needs neither Ray nor cosmos-xenna, and Ray reads its environment when imported
        prepare_environment()
        settings = load_settings(recipe.settings(), recipe.folder, config, words)
        layout = OutputLayout(Path(settings.output_dir).expanduser().absolute())
        with layout.locked(), quiet_terminal(_log(layout)) as terminal:
            return _run(recipe, settings, layout, terminal, arguments)
    except RecipeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(
    recipe: Recipe[SettingsT],
    settings: SettingsT,
    layout: OutputLayout,
    terminal: Terminal,
    arguments: Sequence[str],
) -> int:
    began, began_at_s = time.monotonic(), time.time()

    def again() -> str:
        words = _words_to_go_on(settings, layout, arguments, began_at_s)
        return f"To go on from here:\n  {shlex.join(['python', '-m', recipe.module, *words])}"

    try:
        outcome = recipe.work(settings, layout, terminal)
    except KeyboardInterrupt:
        terminal.error(f"Interrupted. {again()}")
        return _INTERRUPTED
    except SystemExit:  # Ray's way of answering SIGTERM
        terminal.error(f"Terminated. {again()}")
        return _TERMINATED
    except RecipeError as error:
        text = "\n".join([f"Failed: {error}", *getattr(error, "__notes__", ())])
        terminal.error(f"{text}\nLog: {_log(layout)}\n{again()}")
        return error.exit_code
    more = []
    if arguments and arguments[0] == "tiny":
        more = [(f"python -m {recipe.module}", recipe.whole)]
    summary = _summary(settings, layout, outcome, more)
    terminal.result(f"Done in {time.monotonic() - began:.1f} s.\n\n{summary}")
    return 0


def _words_to_go_on(
    settings: RecipeSettings, layout: OutputLayout, words: Sequence[str], began_at_s: float
) -> list[str]:
    """Return the words of a command that goes on, also where this one said to begin anew."""
    from recipes.training.checkpoints import CheckpointFolder

    has_begun = CheckpointFolder(layout.checkpoints).has_progress_since(began_at_s)
    if settings.train.resume or not has_begun:
        return list(words)
    kept = [word for word in words if not word.startswith("train.resume=")]
    return [*kept, "train.resume=true"]


def _summary(
    settings: RecipeSettings,
    layout: OutputLayout,
    outcome: Outcome,
    more: Sequence[tuple[str, str]],
) -> str:
    from recipes.summary import commands_for_run, run_in_words

    job = outcome.job
    jsonl = settings.observability.pipeline_stats_jsonl_path
    lines = [
        *outcome.lines,
        *run_in_words(job.run),
        ("metrics", None if jsonl is None else layout.root / jsonl),
        ("log", _log(layout)),
    ]
    commands = [*commands_for_run(job.run, job.cluster.started_here), *more]
    table = "\n".join(f"  {label:<11} {text}" for label, text in lines if text is not None)
    following = "".join(f"\n  {command}    # {what}" for command, what in commands)
    return f"{table}\n\nNext:{following}\n"


def _log(layout: OutputLayout) -> Path:
    return layout.logs / "recipe.log"
