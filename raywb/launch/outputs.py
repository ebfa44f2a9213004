"""Results in a directory of this machine, brought to where they outlive it.

Nothing else can tell whether they are safe: what lies in a directory that was named is
undelivered until each of its files is at the other place, with its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["upload_outputs"]

#: Files that are named one by one where several are missing.
_NAMED = 3


def upload_outputs(directory: Path | None, url: str | None) -> tuple[Sequence[str], Sequence[str]]:
    """Upload what is not there yet, and look whether all of it is.

    A file of the same name and size counts as uploaded.

    Args:
        directory: the results; None where there are none to be kept.
        url: where they go, in a form that ``fsspec`` knows; None uploads nothing.

    Returns:
        What lies on this machine only since nobody named another place, and what could not be
        uploaded, each in sentences.
    """
    if directory is None or not (files := _files(directory)):
        return (), ()
    if url is None:
        return (
            f"{len(files)} files lie in {directory} only: --upload-to s3://… brings them off "
            "this machine",
        ), ()
    try:
        missing = _upload(files, directory, url)
    except Exception as error:  # noqa: BLE001 - each store has exceptions of its own
        return (), (f"the upload of {directory} to {url} failed: {error}",)
    if not missing:
        return (), ()
    more = len(missing) - _NAMED
    names = ", ".join(missing[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    return (), (f"{len(missing)} files of {directory} are not whole at {url}: {names}",)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _upload(files: Sequence[Path], directory: Path, url: str) -> list[str]:
    """Upload files; returns the names of those that are not there with their size afterwards."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(url)
    root = root.rstrip("/")
    there = _sizes(filesystem, root)
    names = {path: path.relative_to(directory).as_posix() for path in files}
    for path in files:
        if there.get(names[path]) != path.stat().st_size:
            target = f"{root}/{names[path]}"
            filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(path), target)
    there = _sizes(filesystem, root)
    return [names[path] for path in files if there.get(names[path]) != path.stat().st_size]


def _sizes(filesystem: Any, root: str) -> dict[str, int]:
    """What lies below an address, by its name there; asked anew, not remembered."""
    filesystem.invalidate_cache()
    found = filesystem.find(root, detail=True)
    return {name[len(root) :].lstrip("/"): int(one["size"]) for name, one in found.items()}
