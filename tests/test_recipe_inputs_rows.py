"""Rows of JSONL and Parquet: the wanted columns, and every row that is none counted by kind."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.stages.documents import DocumentReader
from recipes.stages.parquet import ParquetPart
from recipes.stages.rows import LocalFile, RowCounts, RowReader

LIMIT = 1_000


def table(count: int, **columns: object) -> pa.Table:
    texts = [random.Random(k).randbytes(20).hex() for k in range(count)]
    return pa.table({"id": range(count), "text": texts, **columns})


def written(path: Path, content: pa.Table, **options: object) -> LocalFile:
    pq.write_table(content, path, **options)
    return LocalFile(path, "parquet")


def rows_of(file: LocalFile, limit: int = LIMIT) -> tuple[list[dict[str, object]], RowCounts]:
    counts = RowCounts()
    return list(RowReader(limit, counts).read(file)), counts


def test_jsonl_rows_are_objects_and_all_else_is_counted(tmp_path: Path) -> None:
    """Objects come as dicts; a list, a broken line and an empty one are counted by kind."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n[1]\n{"a"\n\n\xff\n{"a": "' + b"x" * LIMIT + b'"}\n{"a": 2}')
    rows, counts = rows_of(LocalFile(path, "jsonl"))
    assert rows == [{"a": 1}, {"a": 2}]
    assert counts.rows_in == 7
    assert counts.filtered == {"empty": 1, "too_long": 1}
    assert counts.errors == {"not_an_object": 1, "broken_json": 1, "undecodable": 1}


def test_parquet_gives_the_wanted_columns_in_order(tmp_path: Path) -> None:
    """Only the columns that are wanted are read, over many row groups, also nested ones."""
    messages = [[{"role": "user", "content": f"{k}"}] for k in range(1_000)]
    content = table(1_000, messages=messages)
    file = written(tmp_path / "t.parquet", content, row_group_size=300)
    part = ParquetPart(columns=("messages", "text", "tools"))
    rows, counts = rows_of(LocalFile(file.path, "parquet", parquet=part))
    assert rows == content.select(["text", "messages"]).to_pylist()
    assert (counts.rows_in, counts.filtered, counts.errors) == (1_000, {}, {})


def test_parquet_without_the_column_has_rows_without_text(tmp_path: Path) -> None:
    """A column that is missing makes each row one that lacks its text."""
    file = written(tmp_path / "t.parquet", table(7))
    part = ParquetPart(columns=("body",))
    reader = DocumentReader("body", LIMIT)
    assert list(reader.read(LocalFile(file.path, "parquet", parquet=part))) == []
    assert (reader.rows_in, reader.errors) == (7, {"missing_text": 7})


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet_texts_are_held_to_the_same_rules(tmp_path: Path, kind: pa.DataType) -> None:
    """A row that is null, empty, too long or no UTF-8 costs no other, and is counted by kind."""
    good = [f"text {k}".encode() for k in range(20)]
    bad = [None, b"", b"x" * (LIMIT + 1), b"x" * 20 * LIMIT, b"\xff"]
    raw = pa.array([*good[:10], *bad, *good[10:]], pa.binary())
    raw = raw.cast(pa.large_binary()) if kind == pa.large_string() else raw
    file = written(tmp_path / "t.parquet", pa.table({"text": raw.view(kind)}))
    reader = DocumentReader("text", LIMIT)
    assert list(reader.read(file)) == [text.decode() for text in good]
    assert reader.rows_in == 25
    assert reader.filtered == {"empty": 1, "too_long": 2}
    assert reader.errors == {"missing_text": 1, "undecodable": 1}


def test_a_damaged_page_costs_its_row_group_alone(tmp_path: Path) -> None:
    """The rows that a damaged page took with it are counted; other row groups are kept."""
    content = table(300)
    file = written(
        tmp_path / "t.parquet",
        content,
        row_group_size=100,
        write_page_checksum=True,
        use_dictionary=False,
        compression="none",
    )
    chunk = pq.read_metadata(file.path).row_group(1).column(1)
    raw = bytearray(file.path.read_bytes())
    raw[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0xFF
    file.path.write_bytes(raw)
    rows, counts = rows_of(file)
    kept = content.to_pylist()
    assert rows == kept[:100] + kept[200:]
    assert (counts.rows_in, counts.errors) == (300, {"corrupt_parquet": 100})


@pytest.mark.parametrize("content", [b"", b"no Parquet at all", b"PAR1" + bytes(20) + b"PAR1"])
def test_a_file_that_is_no_parquet_is_one_error(tmp_path: Path, content: bytes) -> None:
    """How many rows a file without a readable footer held is unknown; one stands for them."""
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    rows, counts = rows_of(LocalFile(path, "parquet"))
    assert (rows, counts.rows_in, counts.errors) == ([], 1, {"corrupt_parquet": 1})


def test_flipped_bytes_never_raise_and_every_row_is_counted(tmp_path: Path) -> None:
    """Whatever byte is wrong: nothing raises, and rows in = kept + left out."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    whole = written(tmp_path / "t.parquet", table(200), row_group_size=50).path.read_bytes()
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(chance.choice((1, 4, 40))):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        path = tmp_path / "damaged.parquet"
        path.write_bytes(raw[: chance.choice((len(raw), chance.randrange(len(raw))))])
        rows, counts = rows_of(LocalFile(path, "parquet"))
        left_out = counts.filtered.total() + counts.errors.total()
        assert counts.rows_in == len(rows) + left_out
        json.dumps(rows)
