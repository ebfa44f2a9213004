"""Packs in a Parquet file: one row per pack, in the file whole or no file at all.

    input_ids      list<int32>    tokens of the pack's conversations, end to end, not padded
    loss_mask      list<uint8>    1 where ``input_ids[i]`` is to be predicted
    seq_start_id   list<int32>    where in ``input_ids`` each conversation begins; the first is 0

Compressed with zstd. The first token of a conversation has nothing before it that it could be
predicted from, so it is never learnt, not even where a conversation was torn in the middle.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from recipes.sft.packing import Piece
from recipes.stages.layout import replace_file, temporary_name
from recipes.stages.receipts import WrittenFile, hash_file

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["CompactConversation", "write_packs"]

#: Packs are gathered into row groups of about this many tokens.
_ROW_GROUP_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class CompactConversation:
    """A conversation's tokens and mask, in five bytes each."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]


def write_packs(
    path: Path,
    packs: Sequence[Sequence[Piece]],
    conversations: Sequence[CompactConversation],
    pack_size: int,
) -> WrittenFile:
    """Write packs to a file, and return its size and hash.

    Args:
        path: The file.
        packs: Which parts of which conversations each pack holds.
        conversations: What the pieces' numbers stand for.
        pack_size: Decides how many packs make a row group.
    """
    import pyarrow.parquet as pq

    temporary = temporary_name(path)
    group = max(_ROW_GROUP_TOKENS // pack_size, 1)
    try:
        with temporary.open("wb") as file:
            with pq.ParquetWriter(file, _schema(), compression="zstd") as writer:
                for begin in range(0, len(packs), group):
                    writer.write_batch(_rows(packs[begin : begin + group], conversations))
            file.flush()
            os.fsync(file.fileno())
        written = hash_file(temporary)
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.uint8())),
            ("seq_start_id", pa.list_(pa.int32())),
        ]
    )


def _rows(
    packs: Sequence[Sequence[Piece]], conversations: Sequence[CompactConversation]
) -> pa.RecordBatch:
    import pyarrow as pa

    ids, masks, starts = [], [], []
    for pieces in packs:
        begin = 0
        for piece in pieces:
            conversation = conversations[piece.number]
            mask = conversation.loss_mask[piece.start : piece.stop].copy()
            mask[0] = 0
            ids.append(conversation.input_ids[piece.start : piece.stop])
            masks.append(mask)
            starts.append(begin)
            begin += piece.stop - piece.start
    tokens = [sum(piece.stop - piece.start for piece in pieces) for pieces in packs]
    columns = [
        (np.concatenate(ids), tokens),
        (np.concatenate(masks), tokens),
        (np.array(starts, dtype=np.int32), [len(pieces) for pieces in packs]),
    ]
    arrays = [
        pa.ListArray.from_arrays(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32), values)
        for values, lengths in columns
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=_schema())
