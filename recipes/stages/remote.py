"""Inputs in a store that fsspec knows: objects, prefixes and globs, read in ranges.

Credentials are each store's own affair (environment, profile, role); no setting holds any. Each
store's library tries again by itself where that helps, and gives up on a store that is silent:

    s3://       s3fs waits 15 s for an answer, and asks 25 times: about 7 minutes
    gs://       gcsfs asks 6 times, ``SILENCE_S`` each: about 4 minutes
    http(s)://  ``web.py``: ``SILENCE_S``, when listing; twice more where a part of a file is read
    hf://       HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT: 10 s unless set; files 5 times
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from recipes.errors import InputError
from recipes.stages.sources import Source, StoredFile
from recipes.stages.store_errors import missing_package, shown, told_clearly

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = [
    "SILENCE_S",
    "RemoteSource",
    "StoredBytes",
    "buffered",
    "remote_source",
    "silence_limits",
    "version_of",
]

#: How long a store may be silent, where its library leaves that to us.
SILENCE_S = 30.0
_CONNECT_S = 15.0

#: What a store may say about the version of a file, the most certain first.
_VERSION_KEYS = (
    *("ETag", "etag", "blob_id", "generation", "md5Hash", "checksum", "Content-MD5"),
    *("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "modified", "created"),
)
#: Stores that say the same of a file in a listing and when they are asked about it alone.
_WHOLE_LISTINGS = frozenset({"s3", "s3a", "gs", "gcs"})
_LOUD_LIBRARIES = ("aiobotocore", "botocore", "fsspec", "gcsfs", "s3fs")
#: Read at once where the reader jumps, and at most where he reads on.
_FIRST_BYTES, _MOST_BYTES = 256 << 10, 4 << 20
_BUFFER_BYTES = 64 << 10
#: What makes a path a glob.
_MAGIC = re.compile(r"[*?\[]")


def remote_source(scheme: str, location: str) -> Source:
    """Return the store for a scheme.

    Raises:
        InputError: fsspec knows no such store.
    """
    try:
        from fsspec import available_protocols
    except ImportError as error:
        raise InputError(
            f"reading {scheme}:// needs the package fsspec: pip install 'raywb[recipes]'"
        ) from error
    if scheme in ("http", "https"):
        from recipes.stages.web import WebSource

        return WebSource()
    if scheme == "hf":
        from recipes.stages.hub import HubSource

        return HubSource()
    for library in _LOUD_LIBRARIES:
        # What fails is told in a sentence; without a handler, Python prints its traceback as well.
        logging.getLogger(library).addHandler(logging.NullHandler())
    if scheme not in available_protocols():
        raise InputError(
            f"input.paths: no store for {scheme}:// ({shown(location)}); allowed: paths, globs, "
            "stdlib://, s3://, gs://, https://, hf://, and others that fsspec knows"
        )
    return RemoteSource(listing_is_whole=scheme in _WHOLE_LISTINGS)


class RemoteSource:
    """A store that can list what it holds: by name, below a prefix, or by a glob."""

    #: Endings of names that are left out of a directory.
    left_out: tuple[str, ...] = ()
    #: Whether a file may become another under the same address.
    changes = True

    def __init__(self, *, listing_is_whole: bool = True) -> None:
        """Make a source.

        Args:
            listing_is_whole: A listing says the same of a file as a question about it alone;
                otherwise each file is asked about.
        """
        self._listing_is_whole = listing_is_whole

    def list(self, location: str) -> Iterator[tuple[StoredFile, bool]]:
        """Yield the files at an address; a directory is walked, hidden names left out."""
        with told_clearly("list", location):
            fs, path = file_system(location)
            fs.invalidate_cache()
            prefix = location.rstrip("/").removesuffix(path)
            root, found = _found(fs, path)
            if not self._listing_is_whole:
                found = {name: (fs.info(name), named) for name, (_, named) in found.items()}
        for name, (info, by_name) in found.items():
            relative = name.removeprefix(root).lstrip("/") or name.rpartition("/")[2]
            if by_name or not self._is_left_out(relative):
                yield (
                    StoredFile(f"{prefix}{name}", relative, info.get("size"), version_of(info)),
                    by_name,
                )

    def stat(self, url: str) -> tuple[int | None, str]:
        """Return size and version of a file now."""
        with told_clearly("read", url):
            fs, path = file_system(url)
            if self.changes:
                fs.invalidate_cache()
            info = fs.info(path)
            return info.get("size"), version_of(info)

    def readable(self, url: str) -> bool:
        """Say yes: only the attempt to read can tell."""
        return True

    def open(self, url: str) -> BinaryIO:
        """Open a file for reading; what the store has to say against it is told in a sentence."""
        with told_clearly("read", url):
            fs, path = file_system(url)
            file = fs.open(path, "rb", cache_type="none")
        return buffered(StoredBytes(file, url, file.size))

    def _is_left_out(self, name: str) -> bool:
        return any(part.startswith(".") for part in name.split("/")) or name.endswith(self.left_out)


def file_system(location: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path in it.

    Raises:
        InputError: The package that it needs is not installed.
    """
    from fsspec.core import url_to_fs

    scheme = location.partition("://")[0]
    try:
        fs, path = url_to_fs(location, **_options(scheme))
    except ImportError as error:
        raise missing_package(scheme, error) from error
    return fs, path


def version_of(info: Mapping[str, Any]) -> str:
    """Return what changes when a file's content may have; empty where the store says nothing."""
    for key in _VERSION_KEYS:
        if info.get(key) not in (None, ""):
            value = info[key]
            return str(value.isoformat() if hasattr(value, "isoformat") else value).strip('"')
    return ""


def silence_limits() -> Any:
    """Return aiohttp's limits: none for the whole, as files are large, but one for silence."""
    from aiohttp import ClientTimeout

    return ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=SILENCE_S)


def _options(scheme: str) -> dict[str, Any]:
    """Return what a file system is told beside its address."""
    if scheme in ("gs", "gcs"):
        return {"use_listings_cache": False, "requests_timeout": silence_limits()}
    if scheme in ("s3", "s3a"):
        return {"use_listings_cache": False}
    return {}


def _found(fs: Any, path: str) -> tuple[str, dict[str, tuple[dict[str, Any], bool]]]:
    """Return the folder of all, and each file with its facts and whether it was named."""
    if not _MAGIC.search(path):
        try:
            matches = {path: fs.info(path)}
        except FileNotFoundError:
            return path, {}
        root = path if matches[path]["type"] == "directory" else path.rpartition("/")[0]
    else:
        matches = fs.glob(path, detail=True)
        root = _MAGIC.split(path, maxsplit=1)[0].rpartition("/")[0]
    found: dict[str, tuple[dict[str, Any], bool]] = {}
    for name, info in matches.items():
        if info["type"] != "directory":
            found[name] = info, True
            continue
        for below, facts in fs.find(name, detail=True).items():
            if facts["type"] == "file" and not below.endswith("/"):
                found.setdefault(below, (facts, False))
    return root, found


class _Opened(Protocol):
    """What fsspec's files have in common."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, /) -> Any: ...
    def close(self) -> None: ...


class StoredBytes(io.RawIOBase):
    """A stored file as a stream; where the reader goes on, more and more is fetched at once.

    Args:
        file: fsspec's file, that keeps nothing in memory itself.
        url: Its address, for messages.
        size_bytes: Its size; None: it is unknown, or the store hands out no parts, so that the
            file can only be read through.
    """

    def __init__(self, file: _Opened, url: str, size_bytes: int | None) -> None:
        self._file = file
        self._url = url
        self._size_bytes = size_bytes
        self._position = 0
        self._content = b""
        self._content_begin = 0
        self._ahead_bytes = _FIRST_BYTES

    def readable(self) -> bool:
        """Say that this stream is for reading."""
        return True

    def seekable(self) -> bool:
        """Say whether the store hands out parts."""
        return self._size_bytes is not None

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        if self._size_bytes is None:
            raise io.UnsupportedOperation("the store hands out no parts of this file")
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}
        self._position = max(base[whence] + offset, 0)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer with what is there at once or comes with one request."""
        target = memoryview(buffer).cast("B")
        offset = self._position - self._content_begin
        if not 0 <= offset < len(self._content):
            self._fetch(len(target), reads_on=offset == len(self._content))
            offset = 0
        content = self._content[offset : offset + len(target)]
        target[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        """Close the stored file, too."""
        if not self.closed:
            self._file.close()
        super().close()

    def _fetch(self, size_bytes: int, *, reads_on: bool) -> None:
        self._ahead_bytes = min(2 * self._ahead_bytes, _MOST_BYTES) if reads_on else _FIRST_BYTES
        wanted = max(size_bytes + _BUFFER_BYTES, self._ahead_bytes)
        self._content_begin = self._position
        with told_clearly("read", self._url):
            if self._size_bytes is None:
                self._content = self._file.read(wanted)
                return
            wanted = min(wanted, self._size_bytes - self._position)
            self._content = b""
            if wanted > 0:
                self._file.seek(self._position)
                self._content = self._file.read(wanted)
        if len(self._content) < wanted:
            raise InputError(
                f"cannot read {shown(self._url)}: it ended before its end; start again"
            )


def buffered(stored: StoredBytes) -> BinaryIO:
    """Return a stored file as the readers of this package want it."""
    return io.BufferedReader(stored, _BUFFER_BYTES)
