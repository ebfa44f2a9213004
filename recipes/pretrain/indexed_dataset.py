"""Megatron's indexed dataset: a shard as two files, written as a stream and read by mapping.

``PREFIX.bin`` holds the token ids of all documents, end to end. ``PREFIX.idx`` says where they are,
little-endian throughout:

    9 bytes    ``MMIDIDX\\0\\0``
    uint64     version, 1
    uint8      type of the token ids: 8 is uint16, 4 is int32
    uint64     S, the number of sequences
    uint64     D, the number of entries in the document index
    int32[S]   length of each sequence, in tokens
    int64[S]   where each sequence begins in the .bin, in bytes
    int64[D]   at which sequence each document begins, and at last S

Here every document is one sequence, so D = S + 1.
"""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt
import xxhash

from recipes.errors import RecipeError
from recipes.stages.layout import replace_file, temporary_name
from recipes.stages.receipts import WrittenFile

__all__ = ["IndexedDataset", "IndexedDatasetWriter", "WrittenDataset", "token_type"]

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, np.dtype[np.integer]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}

#: Megatron stores ids in 16 bits for vocabularies below this size.
_UINT16_BELOW = 65_500


def token_type(vocabulary_size: int) -> np.dtype[np.integer]:
    """Return the type of token ids that Megatron uses for a vocabulary of this size."""
    return _CODES[8] if vocabulary_size < _UINT16_BELOW else _CODES[4]


@dataclass(frozen=True)
class WrittenDataset:
    """What a finished writer has put on the disk."""

    documents: int
    tokens: int
    bin: WrittenFile
    idx: WrittenFile


class _HashedFile:
    """A file under a temporary name that knows size and hash of what went into it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = temporary_name(path)
        self._file: BinaryIO = self._temporary.open("wb")
        self._hash = xxhash.xxh64()
        self._size_bytes = 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._size_bytes += len(content)

    def flush_to_disk(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> WrittenFile:
        replace_file(self._temporary, self._path)
        return WrittenFile(self._size_bytes, self._hash.hexdigest())

    def discard(self) -> None:
        with contextlib.suppress(
            OSError
        ):  # a full disk fails again at closing; the name still goes
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class IndexedDatasetWriter:
    """Writes a dataset document by document; under its own name it appears whole or not at all.

    Example:
        >>> with IndexedDatasetWriter(Path("out/shard-00000"), token_type(16_000)) as writer:
        ...     writer.add_document([5, 7, 0])
        ...     written = writer.finish()
    """

    def __init__(self, prefix: Path, dtype: np.dtype[np.integer]) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._lengths = array("i")
        self._tokens = 0
        self._bin = _HashedFile(Path(f"{prefix}.bin"))
        self._idx: _HashedFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._bin, self._idx):
            if file is not None:
                file.discard()

    def add_document(self, token_ids: Sequence[int]) -> None:
        """Append one document; ids that the type cannot hold raise OverflowError."""
        self._bin.write(np.array(token_ids, dtype=self._dtype).tobytes())
        self._lengths.append(len(token_ids))
        self._tokens += len(token_ids)

    def finish(self) -> WrittenDataset:
        """Flush both files to the disk and give them their names, the data before the index."""
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        count = len(lengths)
        self._idx = _HashedFile(Path(f"{self._prefix}.idx"))
        self._idx.write(_HEADER.pack(_MAGIC, _VERSION, _code(self._dtype), count, count + 1))
        self._idx.write(lengths.tobytes())
        self._idx.write(np.concatenate(([0], ends[:-1])).astype("<i8")[:count].tobytes())
        self._idx.write(np.arange(count + 1, dtype="<i8").tobytes())
        self._bin.flush_to_disk()
        self._idx.flush_to_disk()
        return WrittenDataset(count, self._tokens, self._bin.publish(), self._idx.publish())


class IndexedDataset(Sequence[npt.NDArray[np.integer]]):
    """A dataset on disk, mapped into memory: ``dataset[k]`` is the ``k``-th sequence.

    Raises:
        RecipeError: The two files are no indexed dataset, or do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix
        raw = Path(f"{prefix}.idx").read_bytes()
        if len(raw) < _HEADER.size:
            raise self._broken("the index has no whole header")
        magic, version, code, sequences, documents = _HEADER.unpack_from(raw)
        if magic != _MAGIC or version != _VERSION or code not in _CODES:
            raise self._broken(f"unknown header {magic!r}, version {version}, type {code}")
        if len(raw) != _HEADER.size + 12 * sequences + 8 * documents:
            raise self._broken("the index is not as long as its header says")
        self.dtype = _CODES[code]
        fields = np.frombuffer
        self.lengths = fields(raw, "<i4", sequences, _HEADER.size)
        self.pointers = fields(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
        self.document_index = fields(raw, "<i8", documents, _HEADER.size + 12 * sequences)
        size_bytes = Path(f"{prefix}.bin").stat().st_size
        if size_bytes != self.tokens * self.dtype.itemsize:
            raise self._broken("the data is not as long as the index says")
        # an empty file cannot be mapped
        self._ids: npt.NDArray[np.integer] = (
            np.memmap(f"{prefix}.bin", dtype=self.dtype, mode="r")
            if size_bytes
            else np.empty(0, dtype=self.dtype)
        )

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_index) - 1

    def span(self, begin: int, end: int) -> npt.NDArray[np.integer]:
        """Return the tokens ``begin`` to ``end`` of all documents, end to end."""
        return self._ids[begin:end]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, key: int) -> npt.NDArray[np.integer]:  # type: ignore[override]
        begin = int(self.pointers[key]) // self.dtype.itemsize
        return self._ids[begin : begin + int(self.lengths[key])]

    def __iter__(self) -> Iterator[npt.NDArray[np.integer]]:
        return (self[key] for key in range(len(self)))

    def _broken(self, why: str) -> RecipeError:
        return RecipeError(f"{self._prefix}.idx is no indexed dataset: {why}")


def _code(dtype: np.dtype[np.integer]) -> int:
    return next(code for code, known in _CODES.items() if known == dtype)
