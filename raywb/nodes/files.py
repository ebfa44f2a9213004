"""Reading the small files of /proc, /sys and /run, which may be missing, locked or odd."""

from __future__ import annotations

from pathlib import Path

__all__ = ["exists", "read_text"]

#: Longest part of a file that is read; what is looked at here has some hundred lines at most.
MAX_BYTES = 1 << 20


def read_text(path: Path) -> str | None:
    """The file's text; None when it is not there, or may not be read.

    Bytes that are no UTF-8 become replacement characters, since none of them can be an answer.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError):  # ValueError: a path with a NUL in it
        return None


def exists(path: Path) -> bool:
    """Whether there is such a file, as far as this user may see."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
