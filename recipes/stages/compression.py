"""Unpacking gzip and zstd as a stream: bounded memory, and a file that breaks off is noticed."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import TYPE_CHECKING, BinaryIO, cast

from recipes.errors import InputError
from recipes.stages.sources import Compression

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["CORRUPT", "CorruptArchiveError", "unpacked"]


class CorruptArchiveError(Exception):
    """Raised when a zstd archive is damaged, or breaks off."""


#: What reading a damaged archive raises; what was read before it is as it was packed.
CORRUPT = (gzip.BadGzipFile, EOFError, zlib.error, CorruptArchiveError)

#: Packed bytes that are unpacked at once. A block of 128 KiB may be packed into four bytes, so that
#: more at once could unpack to gigabytes.
_PACKED_BYTES = 4 << 10
#: A frame may ask for this much memory to be unpacked in: the most that ``zstd --long=31`` does.
_LARGEST_WINDOW_BYTES = 1 << 31


def unpacked(stream: BinaryIO, compression: Compression | None) -> BinaryIO:
    """Return a stream of what a stream holds, unpacked; reading it may raise ``CORRUPT``.

    Raises:
        InputError: The package that unpacks it is not installed.
    """
    if compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if compression == "zstd":
        return _UpToTheBreak(_ZstdFrames(stream), 1 << 18)
    return stream


class _UpToTheBreak(io.BufferedReader):
    """Hands out what came before a break first, and raises at the next read."""

    def read(self, size: int | None = -1) -> bytes:
        """Return what one read of the archive gives, at most ``size`` bytes."""
        return self.read1(-1 if size is None else size)


class _ZstdFrames(io.RawIOBase):
    """The content of all frames of a zstd file, one after the other."""

    def __init__(self, packed: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise InputError(
                "reading .zst needs the package zstandard: pip install 'raywb[recipes]'"
            ) from error
        self._packed = packed
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
        self._damage = zstandard.ZstdError
        self._frame = self._unpacker.decompressobj()
        self._frame_begun = False
        self._rest = b""  # packed bytes of the next frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Say that this stream is for reading."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer as far as possible; nothing is put into it at the end alone."""
        while not self._ready:
            packed = self._rest or self._packed.read(_PACKED_BYTES)
            self._rest = b""
            if not packed:
                if self._frame_begun:
                    raise CorruptArchiveError("the last frame breaks off")
                return 0
            self._ready = memoryview(self._unpack(packed))
        target = memoryview(buffer).cast("B")
        taken = min(len(target), len(self._ready))
        target[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken

    def _unpack(self, packed: bytes) -> bytes:
        try:
            content = bytes(self._frame.decompress(packed))
        except self._damage as error:
            raise CorruptArchiveError(str(error)) from error
        self._frame_begun = not self._frame.eof
        if self._frame.eof:
            self._rest = self._frame.unused_data
            self._frame = self._unpacker.decompressobj()
        return content
