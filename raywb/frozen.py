"""Artifacts on their own node: frozen at the moment of ``log_artifact``, kept until they are home.

A frozen file lies in its journal's directory under the SHA-256 of its content::

    <base>/<source id>/blobs/<sha-256>

It is a reflink where the file system can make one, which costs no space and no time, else a
copy. A hard link is neither safe nor enough: it is the same file, and a program that writes its
next checkpoint into the old one would change what was logged.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from raywb.errors import ArtifactError, SettingsError
from raywb.rows import MAX_ARTIFACT_BYTES, ArtifactFile, is_digest, is_plain_path

__all__ = ["Frozen", "blobs_in", "check_artifact_names", "find_files"]

#: Part of the disk that a copy leaves free: the journal and the user's own work need it.
LEFT_FREE = 0.05

#: The ioctl that makes a file a reflink of another one (FICLONE in linux/fs.h).
_FICLONE = 0x40049409

_PIECE_BYTES = 1024 * 1024

_ARTIFACT_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_ARTIFACT_TYPE = re.compile(r"[\w.\-][\w.\- ]{0,127}")

#: Types that W&B keeps for itself, where the name begins so.
_RESERVED = {"job": "", "run_table": "run-", "code": "source-"}


def check_artifact_names(name: str, type: str) -> None:
    """Make sure that W&B will take these words.

    Raises:
        SettingsError: it will not.
    """
    if not isinstance(name, str) or not _ARTIFACT_NAME.fullmatch(name):
        raise SettingsError(
            f"name={name!r} cannot be used: it is 1 to 128 letters, digits, '-', '_' and '.'"
        )
    if not isinstance(type, str) or not _ARTIFACT_TYPE.fullmatch(type):
        raise SettingsError(
            f"type={type!r} cannot be used: it is a word or more, such as 'dataset', without "
            "'/' and ':', of at most 128 characters"
        )
    beginning = _RESERVED.get(type)
    if type.startswith("wandb-") or (beginning is not None and name.startswith(beginning)):
        raise SettingsError(f"type={type!r}, name={name!r} cannot be used: W&B keeps them")


def blobs_in(journal: Path) -> list[str]:
    """Digests of the frozen files in a journal's directory, oldest first."""
    directory = journal / "blobs"
    try:
        found = [entry for entry in os.scandir(directory) if is_digest(entry.name)]
        return [entry.name for entry in sorted(found, key=lambda entry: entry.stat().st_mtime_ns)]
    except FileNotFoundError:
        return []


def find_files(path: Path) -> list[tuple[str, Path]]:
    """The files of an artifact and their paths in it; links are followed.

    Raises:
        ArtifactError: there is nothing to take, or something that cannot be taken.
    """
    found = [(path.name, path)] if path.is_file() else sorted(_walk(path, "", ()))
    if not found:
        why = "holds no file" if path.is_dir() else "is no file and no directory"
        raise ArtifactError(f"cannot log {str(path)!r}: it {why}")
    total = 0
    for name, file in found:
        if not is_plain_path(name):
            raise ArtifactError(f"cannot log {str(file)!r}: W&B could not lay out such a name")
        total += _size(file)
    if total > MAX_ARTIFACT_BYTES:
        raise ArtifactError(
            f"cannot log {str(path)!r}: {total} bytes, and {MAX_ARTIFACT_BYTES} are most"
        )
    return found


def _walk(directory: Path, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    real = os.path.realpath(directory)
    if real in above:
        raise ArtifactError(f"cannot log {str(directory)!r}: the link leads back to {real!r}")
    if not directory.is_dir():
        return
    for name in os.listdir(directory):
        inner = directory / name
        if inner.is_dir():
            yield from _walk(inner, f"{prefix}{name}/", (*above, real))
        else:
            yield prefix + name, inner


def _size(file: Path) -> int:
    try:
        status = file.stat()
    except OSError as error:
        raise ArtifactError(f"cannot log {str(file)!r}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"cannot log {str(file)!r}: it is no regular file")
    return status.st_size


class Frozen:
    """The frozen files of one journal; each is kept until everybody who counts on it is done."""

    def __init__(self, journal: Path) -> None:
        self.directory = journal / "blobs"
        self._uses: Counter[str] = Counter()
        self._lock = threading.Lock()

    def path(self, digest: str) -> Path:
        """Where a frozen file lies."""
        return self.directory / digest

    def take(self, found: list[tuple[str, Path]]) -> list[ArtifactFile]:
        """Freeze files, all or none.

        Raises:
            ArtifactError: one of them cannot be read.
            OSError: they cannot be kept here.
        """
        taken: list[ArtifactFile] = []
        try:
            for name, path in found:
                taken.append(self._freeze(name, path))
        except (OSError, ArtifactError):
            for file in taken:
                self.release(file.digest)
            raise
        return taken

    def release(self, digest: str) -> None:
        """Somebody is done with a file; when all are it is deleted."""
        with self._lock:
            self._uses[digest] -= 1
            if self._uses[digest] <= 0:
                del self._uses[digest]
                self.path(digest).unlink(missing_ok=True)

    def _freeze(self, name: str, path: Path) -> ArtifactFile:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        temporary = self.directory / f".{secrets.token_hex(8)}"
        try:
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ArtifactError(f"cannot log {str(path)!r}: {error.strerror}") from error
        try:
            digest, size = self._copy(source, temporary)
            with self._lock:
                temporary.rename(self.path(digest))
                self._uses[digest] += 1
        finally:
            os.close(source)
            temporary.unlink(missing_ok=True)
        return ArtifactFile(name, digest, size)

    def _copy(self, source: int, temporary: Path) -> tuple[str, int]:
        """Make the frozen file; returns the digest and size of what is in it now."""
        target = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.ioctl(target, _FICLONE, source)
            except OSError:
                # Another file system, or one that knows no reflinks.
                self._check_space(os.fstat(source).st_size)
            else:
                return _digest(target, None)
            return _digest(source, target)
        finally:
            os.close(target)

    def _check_space(self, size: int) -> None:
        disk = shutil.disk_usage(self.directory)
        if disk.free - size < disk.total * LEFT_FREE:
            raise OSError(errno.ENOSPC, "too little disk space for a copy", str(self.directory))


def _digest(source: int, target: int | None) -> tuple[str, int]:
    """SHA-256 and length of a file, which is copied to ``target`` on the way if there is one."""
    found = hashlib.sha256()
    size = 0
    while piece := os.pread(source, _PIECE_BYTES, size):
        if target is not None and os.write(target, piece) != len(piece):
            raise OSError(errno.ENOSPC, "the disk is full")
        found.update(piece)
        size += len(piece)
        if size > MAX_ARTIFACT_BYTES:
            raise ArtifactError(f"cannot log a file of more than {MAX_ARTIFACT_BYTES} bytes")
    return found.hexdigest(), size
