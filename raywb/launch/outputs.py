"""Results in a directory of this machine, brought to where they outlive it.

Nothing else can tell whether they are safe: what lies in a directory that was named is
undelivered until each of its files is at the other place, as it is here. A list of what was
uploaded lies there beside them; only what that names is not sent again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raywb.launch.aside import aside

__all__ = ["MANIFEST", "upload_outputs"]

#: The list's name at the other place.
MANIFEST = ".raywb-upload.json"

#: Files that are named one by one where several are missing.
_NAMED = 3

_Lines = tuple[Sequence[str], Sequence[str]]


def upload_outputs(
    directory: Path | None,
    url: str | None,
    *,
    timeout_s: float | None = None,
    local_is_elsewhere: bool = False,
    may_be_missing: bool = False,
) -> _Lines:
    """Upload what this upload has not brought there yet, and look whether all of it is there.

    Args:
        directory: the results; None where there are none to be kept.
        url: where they go, in a form that ``fsspec`` knows; None uploads nothing.
        timeout_s: longest that it may take; None waits for the end.
        local_is_elsewhere: a path of this machine is one of another machine's file system.
        may_be_missing: that there is no such directory is no fault.

    Returns:
        What lies on this machine only since nobody named another place, and what could not be
        uploaded, each in sentences.
    """
    if directory is None:
        return (), ()
    directory = directory.expanduser()
    if not directory.is_dir():
        lost = f"there is no directory {directory}, whose files were to be kept"
        return ((), ()) if may_be_missing else ((lost,), ())
    try:
        files = dict(_files(directory))
        if not files:
            return (), ()
        if url is None:
            return (
                f"{len(files)} files lie in {directory} only: --upload-to s3://… brings them off "
                "this machine",
            ), ()
        missing = aside(
            lambda: _upload(files, url, local_is_elsewhere=local_is_elsewhere), timeout_s
        )
    except Exception as error:  # noqa: BLE001 - each store has exceptions of its own
        return (), (f"the upload of {directory} to {url} failed: {error}",)
    if not missing:
        return (), ()
    more = len(missing) - _NAMED
    names = ", ".join(missing[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    return (), (f"{len(missing)} files of {directory} are not whole at {url}: {names}",)


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Files by their names below the directory, also behind links to other directories.

    Raises:
        OSError: a directory cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    above: dict[str, set[str]] = {}
    for root, inner, names in os.walk(directory, onerror=fail, followlinks=True):
        lineage = above.setdefault(root, {os.path.realpath(root)})
        for name in list(inner):
            real = os.path.realpath(os.path.join(root, name))
            if real in lineage:  # a link to what it lies in
                inner.remove(name)
            above[os.path.join(root, name)] = lineage | {real}
        for name in sorted(names):
            path = Path(root, name)
            if path.is_file() and name != MANIFEST:
                yield path.relative_to(directory).as_posix(), path


def _upload(files: dict[str, Path], url: str, *, local_is_elsewhere: bool) -> list[str]:
    """Upload files; returns the names of those that are not there as they are here."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(url)
    _check_that_it_is_elsewhere(filesystem, url, local_is_elsewhere=local_is_elsewhere)
    root = root.rstrip("/")
    there = _sizes(filesystem, root)
    known = _manifest(filesystem, f"{root}/{MANIFEST}") if MANIFEST in there else {}
    sent: dict[str, list[int]] = {}
    try:
        for name, path in files.items():
            state = _state(path)
            if known.get(name) != state or there.get(name) != state[0]:
                target = f"{root}/{name}"
                filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
                filesystem.put_file(str(path), target)
            sent[name] = state
    finally:
        if sent:
            filesystem.pipe_file(f"{root}/{MANIFEST}", json.dumps(known | sent).encode())
    there = _sizes(filesystem, root)
    # What was written to meanwhile may be there torn.
    return [
        name
        for name, path in files.items()
        if sent[name] != _state(path) or there.get(name) != sent[name][0]
    ]


def _check_that_it_is_elsewhere(filesystem: Any, url: str, *, local_is_elsewhere: bool) -> None:
    """Refuse what ends with this machine.

    Raises:
        ValueError: it is this machine's memory, or a path of it.
    """
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.implementations.memory import MemoryFileSystem

    innermost = filesystem
    while (below := getattr(innermost, "fs", None)) is not None and below is not innermost:
        innermost = below
    if isinstance(innermost, MemoryFileSystem):
        raise ValueError("that is this process's own memory")  # noqa: TRY004 - no type of ours
    if isinstance(innermost, LocalFileSystem) and not local_is_elsewhere:
        raise ValueError(
            f"that is a path of this machine, and goes with it. A bucket is s3://{url} or the "
            "like; --upload-is-elsewhere says that it is another machine's file system"
        )


def _state(path: Path) -> list[int]:
    """What tells whether a file was changed: its size, and when it was written."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _manifest(filesystem: Any, path: str) -> dict[str, list[int]]:
    """What an upload before this one wrote down; nothing where that cannot be read."""
    try:
        known = json.loads(filesystem.cat_file(path))
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def _sizes(filesystem: Any, root: str) -> dict[str, int]:
    """What lies below an address, by its name there; asked anew, not remembered."""
    filesystem.invalidate_cache()
    found = filesystem.find(root, detail=True)
    return {name[len(root) :].lstrip("/"): int(one["size"]) for name, one in found.items()}
