"""How far a command is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

__all__ = ["StepLike", "show_progress"]


class StepLike(Protocol):
    """A step of some work: what is being done, how much of it is done, and what is in the way."""

    @property
    def text(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def trouble(self) -> str | None: ...


@contextlib.contextmanager
def show_progress(console: Console) -> Iterator[Callable[[StepLike], None]]:
    """Yield what is to be told each step; the same one may be told often."""
    if console.is_terminal:
        with _bars(console) as tell:
            yield tell
    else:
        yield _lines(console)


@contextlib.contextmanager
def _bars(console: Console) -> Iterator[Callable[[StepLike], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[red]{task.fields[trouble]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as progress:

        def tell(step: StepLike) -> None:
            if step.text not in tasks:
                for earlier in tasks.values():
                    task = progress.tasks[earlier]
                    progress.update(earlier, completed=task.total, trouble="")
                tasks[step.text] = progress.add_task(step.text, total=1, trouble="")
            progress.update(
                tasks[step.text],
                completed=step.done,
                total=max(step.total, 1),
                trouble=step.trouble or "",
            )

        yield tell
        if tasks:
            last = progress.tasks[list(tasks.values())[-1]]
            progress.update(last.id, completed=last.total, trouble="")


def _lines(console: Console) -> Callable[[StepLike], None]:
    said: set[str] = set()

    def tell(step: StepLike) -> None:
        for text in (step.text, step.trouble and f"{step.text}: {step.trouble}"):
            if text and text not in said:
                said.add(text)
                console.print(text, markup=False, highlight=False, soft_wrap=True)

    return tell
