"""Who is watching which pipeline: the hooks that are entered, and what they have seen.

A pipeline belongs to the hooks of the thread that runs it, or, if that thread has none, to all.
So a hook around a pool of threads sees the pipelines of all of them, and threads that each have a
hook of their own see their own pipelines.

One lock guards all of it. It is held for the time of one snapshot, well under a millisecond, so
pipelines in several threads do not wait for each other; and it is re-entrant, because a signal
handler may enter or leave a hook in the middle of a snapshot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raywb.errors import RaywbError
from raywb.xenna.outlets import Contained
from raywb.xenna.pipeline import Pipeline
from raywb.xenna.stats import Metrics, describe_failure


class Hook(Protocol):
    """What a watching hook does with what is seen."""

    def take(self, pipeline: Pipeline, row: Metrics, *, is_final: bool) -> None:
        """Take a pipeline's newest row."""

    def take_failure(self, error: BaseException) -> None:
        """Take an exception that came before any pipeline was seen."""

    def swallow(self, doing: str, error: Exception) -> None:
        """Count an error of ours."""


class Patch(Protocol):
    """What makes snapshots arrive."""

    def remove(self) -> None:
        """Stop it."""


Deliver = Callable[[Any, Any], None]


@dataclass(slots=True, eq=False)
class _Watched:
    """A pipeline and the hooks that have seen it."""

    pipeline: Pipeline
    hooks: list[Hook] = field(default_factory=list)


class Watch:
    """The hooks that are entered, and the pipelines that they watch.

    Args:
        install: Makes snapshots arrive at what it is given; called by the first hook that is
            entered, and undone by the last one that ends. None where nothing has to be undone.
    """

    def __init__(self, install: Callable[[Deliver], Patch | None]) -> None:
        self.lock = threading.RLock()
        self._install = install
        self._patch: Patch | None = None
        # Each hook with the thread that has entered it.
        self._hooks: dict[Hook, int] = {}
        self._watched: dict[object, _Watched] = {}

    def add(self, hook: Hook) -> None:
        """Let a hook see every snapshot from now on."""
        with self.lock:
            if hook in self._hooks:
                raise RaywbError("this xenna hook is entered already; nest another one")
            if not self._hooks:
                self._patch = self._install(self._take_snapshot)
            self._hooks[hook] = threading.get_ident()

    def remove(self, hook: Hook) -> None:
        """Let a hook see nothing any more, and forget what only it has seen."""
        with self.lock:
            del self._hooks[hook]
            if not self._hooks and self._patch is not None:
                patch, self._patch = self._patch, None
                patch.remove()
            for key, watched in list(self._watched.items()):
                if hook in watched.hooks:
                    watched.hooks.remove(hook)
                if not watched.hooks:
                    watched.pipeline.release()
                    del self._watched[key]

    def deliver(self, key: object, monitor: Any, stats: Any, hooks: Sequence[Hook]) -> None:
        """Give a pipeline's snapshot to those of `hooks` that are entered; raises nothing."""
        with self.lock:
            hooks = [hook for hook in hooks if hook in self._hooks]
            if not hooks:
                return

            def report(doing: str, error: Exception) -> None:
                for hook in hooks:
                    hook.swallow(doing, error)

            with Contained("reading a snapshot", report):
                watched = self._watched.get(key)
                if watched is None:
                    self._conclude_former(stats.start_time)
                    watched = _Watched(Pipeline(stats, threading.get_ident(), monitor))
                    self._watched[key] = watched
                watched.hooks += [hook for hook in hooks if hook not in watched.hooks]
                row = watched.pipeline.observe(stats)
                for hook in hooks:
                    hook.take(watched.pipeline, row, is_final=False)

    def conclude(self, hook: Hook, error: BaseException | None) -> None:
        """Give a hook that ends the last row of each pipeline that it has seen; raises nothing.

        An exception that passes through the hook is that of the pipelines whose work is not done;
        if all is done, it came after them, and the newest one carries it.
        """
        with self.lock:
            mine = [watched for watched in self._watched.values() if hook in watched.hooks]
            blamed = [watched for watched in mine if not self._is_complete(watched, hook)]
            blamed = blamed or mine[-1:]
            if error is not None and not mine:
                with Contained("logging the failure", hook.swallow):
                    hook.take_failure(error)
            for watched in mine:
                with Contained("taking the last snapshot", hook.swallow):
                    cause = error if watched in blamed else None
                    self._conclude_for(hook, watched, cause)

    def _take_snapshot(self, monitor: Any, stats: Any) -> None:
        with self.lock:
            here = threading.get_ident()
            hooks = [hook for hook, thread_id in self._hooks.items() if thread_id == here]
            self.deliver(id(monitor), monitor, stats, hooks or list(self._hooks))

    def _conclude_for(self, hook: Hook, watched: _Watched, error: BaseException | None) -> None:
        pipeline = watched.pipeline
        failure = None if error is None else describe_failure(error, pipeline.signs())
        # A pipeline in another thread may go on after this hook, and others watch it then.
        is_over = (
            pipeline.thread_id == threading.get_ident()
            or watched.hooks == [hook]
            or pipeline.is_stopped()
        )
        row = pipeline.conclude(failure, is_over=is_over)
        hook.take(pipeline, row, is_final=True)

    def _conclude_former(self, ended_at: float) -> None:
        """End the pipelines of this thread: it runs one after the other, and a new one begins."""
        for key, watched in list(self._watched.items()):
            if watched.pipeline.thread_id != threading.get_ident():
                continue
            row = watched.pipeline.conclude(None, ended_at=ended_at)
            for hook in watched.hooks:
                hook.take(watched.pipeline, row, is_final=True)
            watched.pipeline.release()
            del self._watched[key]

    def _is_complete(self, watched: _Watched, hook: Hook) -> bool:
        with Contained("reading the pools", hook.swallow):
            return watched.pipeline.is_complete()
        return False
