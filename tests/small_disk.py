"""A disk of a few pages that a test may fill: a tmpfs of its own, where the machine allows it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["SmallDisk", "small_disk"]

PAGE_BYTES = 4096


class SmallDisk:
    """A mounted disk, and the file that takes what room it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self, *, but_bytes: int = 0) -> None:
        """Take all the room that there is, but for whole pages of ``but_bytes``."""
        fd = os.open(self._filler, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            with contextlib.suppress(OSError):
                while os.write(fd, bytes(PAGE_BYTES)) == PAGE_BYTES:
                    pass
            os.ftruncate(fd, max(os.fstat(fd).st_size - but_bytes, 0))
        finally:
            os.close(fd)

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(path: Path, size_bytes: int, *, inodes: int = 1000) -> Iterator[SmallDisk]:
    """Mount a disk of that size at ``path``; skips the test where nothing may be mounted."""
    path.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes},nr_inodes={inodes},mode=700"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "raywb-test", str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
