"""From stored bytes to documents; what cannot become one is counted by kind, and nothing raises.

    row          a JSONL line, or a whole text file
    kept         its text goes to the tokenizer
    filtered     empty · too_long
    errors       broken_json · corrupt_gzip · missing_text · undecodable

rows in = kept + filtered + errors, for every shard.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from recipes.stages.sources import Format

__all__ = ["ERROR_KINDS", "FILTER_KINDS", "DocumentReader", "LocalFile"]

#: Why a readable row was left out on purpose.
FILTER_KINDS = ("empty", "too_long")
#: Why a row could not be read.
ERROR_KINDS = ("broken_json", "corrupt_gzip", "missing_text", "undecodable")

#: A JSONL line holds escapes and other fields beside the text: only a line this many times longer
#: than a document may be is left out unparsed, so that memory stays bounded.
_LINE_PER_DOCUMENT = 8
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: Bytes read at once from a line that is too long anyway.
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True)
class LocalFile:
    """A slice of input as it lies on this node, unpacked."""

    path: Path
    format: Format
    #: The archive broke off or failed its checksum: what lies here is what came before that.
    corrupt: bool = False


@dataclass
class DocumentReader:
    """Reads the documents of one shard, and keeps count of its rows."""

    text_field: str
    max_document_bytes: int
    rows_in: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def read(self, file: LocalFile) -> Iterator[str]:
        """Yield the texts of a file that are fit to become documents."""
        with file.path.open("rb") as stream:
            if file.format == "jsonl":
                yield from self._read_lines(stream, file.corrupt)
            else:
                yield from self._read_whole(stream, file.corrupt)

    def _read_whole(self, stream: BinaryIO, corrupt: bool) -> Iterator[str]:
        self.rows_in += 1
        raw = stream.read(self.max_document_bytes + len(_BYTE_ORDER_MARK) + 1)
        if corrupt:
            self.errors["corrupt_gzip"] += 1
            return
        text = self._decoded(raw.removeprefix(_BYTE_ORDER_MARK))
        if text is not None:
            yield text

    def _read_lines(self, stream: BinaryIO, corrupt: bool) -> Iterator[str]:
        longest = self.max_document_bytes * _LINE_PER_DOCUMENT
        unfinished = False
        if stream.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
            stream.seek(0)
        while line := stream.readline(longest):
            self.rows_in += 1
            too_long = len(line) == longest and not line.endswith(b"\n")
            if too_long:
                line = _last_bytes_of_line(stream)
            unfinished = not line.endswith(b"\n")
            if corrupt and unfinished:
                self.errors["corrupt_gzip"] += 1
            elif too_long:
                self.filtered["too_long"] += 1
            else:
                text = self._text_of(line)
                if text is not None:
                    yield text
        if corrupt and not unfinished:  # how many rows were lost is unknown; one stands for them
            self.rows_in += 1
            self.errors["corrupt_gzip"] += 1

    def _text_of(self, line: bytes) -> str | None:
        """Return the text of a JSONL line, or count why there is none."""
        try:
            decoded = line.decode("utf-8")
        except UnicodeDecodeError:
            self.errors["undecodable"] += 1
            return None
        if not decoded.strip():
            self.filtered["empty"] += 1
            return None
        try:
            row = json.loads(decoded)
        except (ValueError, RecursionError):  # a million brackets in a row are no valid row either
            self.errors["broken_json"] += 1
            return None
        text = row.get(self.text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            self.errors["missing_text"] += 1
            return None
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair: valid JSON, but no text
            self.errors["undecodable"] += 1
            return None
        return self._within_limits(text, len(encoded))

    def _decoded(self, raw: bytes) -> str | None:
        """Return a file's bytes as text, or count why that cannot be."""
        if len(raw) > self.max_document_bytes:
            self.filtered["too_long"] += 1
            return None
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.errors["undecodable"] += 1
            return None
        return self._within_limits(text, len(raw))

    def _within_limits(self, text: str, size_bytes: int) -> str | None:
        if not text.strip():
            self.filtered["empty"] += 1
            return None
        if size_bytes > self.max_document_bytes:
            self.filtered["too_long"] += 1
            return None
        return text


def _last_bytes_of_line(stream: BinaryIO) -> bytes:
    """Skip to the end of a line that is too long, and return its last bytes."""
    last = b" "
    while not last.endswith(b"\n") and (read := stream.readline(_SKIP_BYTES)):
        last = read
    return last
