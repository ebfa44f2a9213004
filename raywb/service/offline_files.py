"""The files of a run that began offline and went online: kept, but out of ``wandb sync``'s way.

Its rows all go to the server from the outbox; whoever uploaded the files as well would have them
there twice.
"""

from __future__ import annotations

from pathlib import Path

from raywb.service.transaction_log import find_segments

__all__ = ["SUPERSEDED", "set_aside"]

#: Directory beside ``wandb`` that takes them.
SUPERSEDED = "superseded"


def set_aside(directory: Path, run_id: str) -> list[Path]:
    """Move the offline files of one run to where ``wandb sync wandb/offline-run-*`` finds none.

    Args:
        directory: the service's directory.
        run_id: whose files; nobody writes to them any more.

    Returns:
        All of them, also those that an earlier call moved.

    Raises:
        OSError: they cannot be moved.
    """
    aside = directory / SUPERSEDED
    for segment in find_segments(directory / "wandb", run_id):
        aside.mkdir(exist_ok=True)
        segment.parent.rename(aside / segment.parent.name)
    return find_segments(aside, run_id)
