"""Which runs of a directory ``raywb sync`` has sent where: its own small file beside the state.

It is apart from ``service.json``, since a service may be at work on that one meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from raywb.errors import DirectoryError
from raywb.service.state import UpdateMarks, replace_file

__all__ = ["Target", "Upload", "Uploads"]

FILE_NAME = "uploads.json"


class Target(NamedTuple):
    """Where a run goes; the entity is None where the server decides."""

    base_url: str
    entity: str | None
    project: str


class Upload(msgspec.Struct, kw_only=True):
    """One run at one server.

    Attributes:
        run: the run's number in the directory.
        base: W&B's step of its first row there; None while it was never opened there.
        closed: it was brought to its end there.
        opened_entity: the entity that the server put it under.
        url: the run's page.
        updates: which of its tables, artifacts and alerts are there.
    """

    run: int
    target: Target
    base: int | None = None
    closed: bool = False
    opened_entity: str | None = None
    url: str | None = None
    updates: UpdateMarks = msgspec.field(default_factory=UpdateMarks)


class Uploads:
    """The file, read and replaced whole.

    Raises:
        DirectoryError: it is there and cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._known: list[Upload] = []
        if self._path.exists():
            try:
                self._known = msgspec.json.decode(self._path.read_bytes(), type=list[Upload])
            except (OSError, msgspec.DecodeError) as error:
                raise DirectoryError(
                    f"{self._path} cannot be read ({error}): it says what was sent to W&B before. "
                    "Without the file the server's own rows are looked at instead"
                ) from error

    def of(self, run: int, target: Target) -> Upload:
        """What is known of a run at a target."""
        for upload in self._known:
            if (upload.run, upload.target) == (run, target):
                return upload
        upload = Upload(run=run, target=target)
        self._known.append(upload)
        return upload

    def has(self, run: int) -> bool:
        """Whether a run was brought to its end at some server."""
        return any(upload.run == run and upload.closed for upload in self._known)

    def save(self) -> None:
        """Replace the file with what is known now."""
        known = [upload for upload in self._known if upload.base is not None]
        replace_file(self._path, msgspec.json.format(msgspec.json.encode(known)))
