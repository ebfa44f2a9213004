"""Packed files are unpacked, Parquet is cut between row groups, and damage is counted."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from recipe_inputs import (
    CORPUS_NAMES,
    corpus,
    input_settings,
    jsonl,
    lay_out,
    parquet,
    read_input,
    texts,
)

from recipes.stages.rows import RowCounts, RowReader
from recipes.stages.scratch import Scratch
from recipes.stages.shards import cut_into_shards
from recipes.stages.sources import list_inputs


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scratch:
    """Scratch space in the test's own directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Scratch.of(tmp_path / "out", 10_004)


def test_every_format_is_read_by_its_ending(tmp_path: Path, scratch: Scratch) -> None:
    """JSONL, Parquet and text, packed or not, come out whole; bad rows are counted by kind."""
    found = read_input(scratch, lay_out(tmp_path / "in", corpus()))
    assert found.names == CORPUS_NAMES
    wanted = [(100, 1), (60, 2), (20, 3), (20, 4), (200, 5)]
    expected = [text for count, seed in wanted for text in texts(count, seed)]
    expected += ["A text with a ß.", *texts(3, 7)]
    assert found.texts == expected
    assert found.counts.filtered == {"empty": 1}
    assert found.counts.errors == {"broken_json": 1, "missing_text": 1, "corrupt_zstd": 1}
    assert len(found.shards) > 8


# ---------------------------------------------------------------------------------------- zstd


def test_a_zstd_of_a_text_is_unpacked(tmp_path: Path, scratch: Scratch) -> None:
    """A text may be packed, also into many frames and with skippable ones between them."""
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"other"
    frames = [zstandard.compress(b"one "), skipped, zstandard.compress(b"two"), skipped]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert read_input(scratch, tmp_path / "a.txt.zst").texts == ["one two"]


def test_a_zstd_with_a_large_window_is_unpacked(tmp_path: Path, scratch: Scratch) -> None:
    """Archives of ``zstd --long=31``, in which large dumps come, are read."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = packer.compress(jsonl(["far"])) + packer.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert read_input(scratch, tmp_path / "a.jsonl.zst").texts == ["far"]


def test_a_zstd_bomb_fills_nothing(tmp_path: Path, scratch: Scratch) -> None:
    """No more of a text is unpacked than may be kept."""
    path = tmp_path / "bomb.txt.zst"
    path.write_bytes(zstandard.compress(bytes(200_000_000)))
    (shard,) = cut_into_shards(list_inputs(input_settings(path)), 10**9)
    assert scratch.fetch(shard)[0].path.stat().st_size == 10_004


@pytest.mark.parametrize("cut", [1, 40, 3_000])
def test_a_broken_zstd_keeps_the_rows_before_the_break(
    tmp_path: Path, scratch: Scratch, cut: int
) -> None:
    """Of an archive that breaks off, whole lines are kept and what is lost counts as one error."""
    rows = texts(400, seed=0)
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    packed = b""
    for k in range(0, 400, 20):  # a block of the frame for every twenty rows
        packed += packer.compress(jsonl(rows[k : k + 20]))
        packed += packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    packed += packer.flush()
    (tmp_path / "rows.jsonl.zst").write_bytes(packed[:-cut])
    found = read_input(scratch, tmp_path / "rows.jsonl.zst")
    assert len(found.texts) >= 320
    assert found.texts == rows[: len(found.texts)]
    assert found.counts.errors == {"corrupt_zstd": 1}
    assert found.counts.rows_in == len(found.texts) + 1


CHECKED = zstandard.ZstdCompressor(write_checksum=True).compress(b"hello")


@pytest.mark.parametrize("content", [b"no archive", CHECKED[:-1] + b"!"])
def test_a_broken_zstd_of_a_text_is_no_document(
    tmp_path: Path, scratch: Scratch, content: bytes
) -> None:
    """Something else, or an archive with a wrong byte, is one error."""
    (tmp_path / "a.txt.zst").write_bytes(content)
    found = read_input(scratch, tmp_path / "a.txt.zst")
    assert (found.texts, found.counts.rows_in) == ([], 1)
    assert found.counts.errors == {"corrupt_zstd": 1}


# ------------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize("shard_bytes", [100, 3_000, 10_000, 10**9])
def test_a_row_belongs_to_exactly_one_slice(
    tmp_path: Path, scratch: Scratch, shard_bytes: int
) -> None:
    """However a Parquet file is cut, its slices together hold each row once, in order."""
    rows = texts(200, seed=1)
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet(rows, row_group_size=17))
    found = read_input(scratch, path, shard_bytes=shard_bytes)
    assert found.texts == rows
    assert len(found.shards) == -(-path.stat().st_size // shard_bytes)


def test_only_the_wanted_columns_are_brought(tmp_path: Path, scratch: Scratch) -> None:
    """Of a row group, what lies here is the wanted columns: the rest of the file is a hole."""
    wide = pa.table({"wide": [random.Random(k).randbytes(50_000) for k in range(100)]})
    table = wide.append_column("text", [texts(100, seed=1)])
    table = table.append_column("tools", [[[{"name": text}] for text in texts(100, seed=2)]])
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=10)
    files = list_inputs(input_settings(path), columns=("text", "tools"))
    shards = cut_into_shards(files, 1_000_000)
    assert len(shards) == 6
    rows = []
    for shard in shards:
        (file,) = scratch.fetch(shard)
        assert file.path.stat().st_blocks * 512 < 60_000
        rows += RowReader(10_000, RowCounts()).read(file)
    assert rows == table.select(["text", "tools"]).to_pylist()


def test_the_front_of_a_slice_is_a_share_of_its_rows(tmp_path: Path, scratch: Scratch) -> None:
    """A sample of a tenth takes about a tenth of the rows, from as few row groups as needed."""
    rows = texts(1_000, seed=1)
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet(rows, row_group_size=300))
    (shard,) = cut_into_shards(list_inputs(input_settings(path)), 10**9)
    for share, groups in ((10, (0,)), (2, (0, 1)), (1, (0, 1, 2, 3))):
        (file,) = scratch.fetch(shard, front_bytes=path.stat().st_size // share)
        assert file.parquet.row_groups == groups
        found = [row["text"] for row in RowReader(10_000, RowCounts()).read(file)]
        assert found == rows[: len(found)]
        assert len(found) == pytest.approx(1_000 / share, abs=2)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet" * 2_000, None])
def test_a_file_that_is_no_parquet_is_one_error(
    tmp_path: Path, scratch: Scratch, content: bytes | None
) -> None:
    """However many slices it is cut into, a file without its footer counts once."""
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet(texts(200, 1), 20)[:-3] if content is None else content)
    found = read_input(scratch, path)
    assert (found.texts, found.counts.rows_in) == ([], 1)
    assert found.counts.errors == {"corrupt_parquet": 1}


def test_a_column_that_is_missing_is_told_by_the_counts(tmp_path: Path, scratch: Scratch) -> None:
    """Each row of a file without the text's column is counted as one without text."""
    (tmp_path / "t.parquet").write_bytes(parquet(texts(200, 1), 20))
    found = read_input(scratch, tmp_path / "t.parquet", text_field="body")
    assert (found.texts, found.counts.errors) == ([], {"missing_text": 200})


def test_flipped_bytes_never_raise_in_slices_either(tmp_path: Path, scratch: Scratch) -> None:
    """Whatever byte is wrong: bringing and reading never raise, and all rows are counted."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    whole = parquet(texts(60, 1), 10)
    for _ in range(60):
        raw = bytearray(whole)
        for _ in range(chance.choice((1, 4, 40))):
            raw[chance.randrange(len(raw) * 3 // 4, len(raw))] = chance.randrange(256)
        (tmp_path / "t.parquet").write_bytes(raw)
        found = read_input(scratch, tmp_path / "t.parquet")
        counts = found.counts
        left_out = counts.filtered.total() + counts.errors.total()
        assert counts.rows_in == len(found.texts) + left_out
