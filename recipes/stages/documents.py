"""From rows and texts to documents; what cannot become one is counted by kind, nothing raises.

    row          a JSONL line, a row of a Parquet file, or a whole text file
    kept         its text goes to the tokenizer
    filtered     empty · too_long
    errors       broken_json · corrupt_gzip · corrupt_parquet · corrupt_zstd · missing_text ·
                 undecodable

rows in = kept + filtered + errors, for every shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from recipes.stages.rows import BYTE_ORDER_MARK, LocalFile, RowCounts, RowReader

__all__ = ["ERROR_KINDS", "FILTER_KINDS", "DocumentReader", "LocalFile"]

#: Why a readable row was left out on purpose.
FILTER_KINDS = ("empty", "too_long")
#: Why a row could not be read.
ERROR_KINDS = (
    "broken_json",
    "corrupt_gzip",
    "corrupt_parquet",
    "corrupt_zstd",
    "missing_text",
    "undecodable",
)

#: A row holds escapes and other fields beside the text: only a row this many times longer than a
#: document may be is left out unparsed, so that memory stays bounded.
_ROW_PER_DOCUMENT = 8


@dataclass
class DocumentReader:
    """Reads the documents of one shard, and keeps count of its rows."""

    text_field: str
    max_document_bytes: int
    counts: RowCounts = field(default_factory=RowCounts)

    @property
    def rows_in(self) -> int:
        """Rows read so far."""
        return self.counts.rows_in

    @property
    def filtered(self) -> Counter[str]:
        """Readable rows that were left out on purpose, by kind."""
        return self.counts.filtered

    @property
    def errors(self) -> Counter[str]:
        """Rows that could not be read, by kind."""
        return self.counts.errors

    def read(self, file: LocalFile) -> Iterator[str]:
        """Yield the texts of a file that are fit to become documents."""
        if file.format == "text":
            with file.path.open("rb") as stream:
                yield from self._read_whole(stream, file)
            return
        longest = self.max_document_bytes * _ROW_PER_DOCUMENT
        for row in RowReader(longest, self.counts, not_an_object="missing_text").read(file):
            text = self._text_of(row)
            if text is not None:
                yield text

    def _read_whole(self, stream: BinaryIO, file: LocalFile) -> Iterator[str]:
        self.counts.rows_in += 1
        raw = stream.read(self.max_document_bytes + len(BYTE_ORDER_MARK) + 1)
        if file.corrupt:
            self.errors[file.corrupt_kind] += 1
            return
        text = self._decoded(raw.removeprefix(BYTE_ORDER_MARK))
        if text is not None:
            yield text

    def _text_of(self, row: dict[str, Any]) -> str | None:
        """Return the text of a row, or count why there is none."""
        text = row.get(self.text_field)
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
