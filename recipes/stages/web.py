"""Inputs on a web server: single files, in ranges where the server hands them out.

A server says with its first answer how large a file is, which version, and whether it hands out
parts. Where it does not, a file is read through in one go, and is never divided into slices.
Logins come from ``~/.netrc``, proxies from the environment; a signed address is its own key.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from recipes.errors import InputError
from recipes.stages.remote import StoredBytes, buffered, silence_limits, version_of
from recipes.stages.sources import StoredFile
from recipes.stages.store_errors import shown, told_clearly

__all__ = ["WebSource"]

#: Waiting times before a range is asked for again.
_PAUSES_S = (1.0, 3.0)
_WORTH_ANOTHER_TRY = frozenset({408, 429, 500, 502, 503, 504})
_PARTIAL_CONTENT, _RANGE_NOT_SATISFIABLE = 206, 416


@dataclass(frozen=True)
class _Facts:
    """What a server says about a file."""

    size_bytes: int | None
    version: str
    #: Whether the server hands out parts.
    parts: bool


class WebSource:
    """Files behind ``https://`` and ``http://``."""

    def list(self, location: str) -> Iterator[tuple[StoredFile, bool]]:
        """Yield the one file at an address."""
        address = urlsplit(location)
        name = unquote(address.path.rpartition("/")[2])
        if not name or "*" in name:
            raise InputError(
                f"input.paths: {shown(location)} is no file, and a web server cannot be listed; "
                "name each file"
            )
        if "@" in address.netloc:
            raise InputError(
                f"input.paths: {shown(location)} comes with a login; put it into ~/.netrc instead, "
                "as settings are written down in many places"
            )
        with told_clearly("read", location):
            facts = _ask(location)
        yield (
            StoredFile(location, name, facts.size_bytes, facts.version, divisible=facts.parts),
            True,
        )

    def stat(self, url: str) -> tuple[int | None, str]:
        """Return size, if the server says it, and version of a file now."""
        with told_clearly("read", url):
            facts = _ask(url)
        return facts.size_bytes, facts.version

    def readable(self, url: str) -> bool:
        """Say yes: the server has answered already."""
        return True

    def open(self, url: str) -> BinaryIO:
        """Open a file for reading; without parts it cannot seek."""
        with told_clearly("read", url):
            facts = _ask(url)
            fs = _file_system()
            if not facts.parts:
                return buffered(StoredBytes(fs.open(url, block_size=0, size=1), url, None))
            # fsspec takes a size of zero for an unknown one
            file = fs.open(url, size=facts.size_bytes or 1, cache_type="none")
            return buffered(StoredBytes(_Patient(file), url, facts.size_bytes))


class _Patient:
    """A file that is asked again when the connection was lost or the server was busy."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek = file.seek
        self.close = file.close

    def read(self, size: int, /) -> bytes:
        """Return the next bytes."""
        position = self._file.tell()
        for pause_s in _PAUSES_S:
            try:
                return bytes(self._file.read(size))
            except Exception as error:
                if not _may_pass(error):
                    raise
                time.sleep(pause_s)
                self._file.seek(position)
        return bytes(self._file.read(size))


def _may_pass(error: Exception) -> bool:
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in _WORTH_ANOTHER_TRY
    return isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError)


def _file_system() -> Any:
    import fsspec

    return fsspec.filesystem(
        "https",
        client_kwargs={
            "timeout": silence_limits(),
            "headers": {"Accept-Encoding": "identity"},
            "auto_decompress": False,  # what is packed for storage is unpacked by its ending
            "trust_env": True,
        },
    )


def _ask(url: str) -> _Facts:
    """Ask for a file's first byte: every server that hands out the file answers to that."""
    from fsspec.asyn import sync

    fs = _file_system()
    facts: _Facts = sync(fs.loop, _first_answer, fs, url)
    return facts


async def _first_answer(fs: Any, url: str) -> _Facts:
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers={"Range": "bytes=0-0"}) as answer:
        headers = answer.headers
        total = headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status == _RANGE_NOT_SATISFIABLE and total in ("0", "*", ""):  # an empty file
            return _Facts(0, version_of(headers), parts=True)
        answer.raise_for_status()
        if answer.status == _PARTIAL_CONTENT and total.isdecimal():
            return _Facts(int(total), version_of(headers), parts=True)
        size = headers.get("Content-Length", "")
        known = answer.status != _PARTIAL_CONTENT and size.isdecimal()
        return _Facts(int(size) if known else None, version_of(headers), parts=False)
