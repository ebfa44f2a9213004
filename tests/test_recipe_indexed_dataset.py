"""The shards are Megatron indexed datasets, byte for byte, and appear whole or not at all."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.errors import RecipeError
from recipes.pretrain.indexed_dataset import IndexedDataset, IndexedDatasetWriter, token_type

SMALL, LARGE = 16_000, 128_000


def write(prefix: Path, documents: list[list[int]], vocabulary_size: int = SMALL):
    with IndexedDatasetWriter(prefix, token_type(vocabulary_size)) as writer:
        for document in documents:
            writer.add_document(document)
        return writer.finish()


def read_by_the_format(prefix: Path) -> tuple[int, list[list[int]], list[int]]:
    """Read both files as the format is described, with nothing from the code under test."""
    idx = Path(f"{prefix}.idx").read_bytes()
    data = Path(f"{prefix}.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<Q", idx, 9) == (1,)
    code = idx[17]
    sequences, documents = struct.unpack_from("<QQ", idx, 18)
    at = 34
    lengths = struct.unpack_from(f"<{sequences}i", idx, at)
    at += 4 * sequences
    pointers = struct.unpack_from(f"<{sequences}q", idx, at)
    at += 8 * sequences
    document_index = struct.unpack_from(f"<{documents}q", idx, at)
    assert at + 8 * documents == len(idx)
    letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
    found = [
        list(struct.unpack_from(f"<{length}{letter}", data, pointer))
        for pointer, length in zip(pointers, lengths, strict=True)
    ]
    assert sum(lengths) * width == len(data)
    return code, found, list(document_index)


def documents_below(vocabulary_size: int):
    return st.lists(st.lists(st.integers(0, vocabulary_size - 1), min_size=1, max_size=50))


@pytest.mark.parametrize(("vocabulary_size", "code"), [(SMALL, 8), (LARGE, 4)])
def test_documents_come_back_from_the_bytes_on_disk(vocabulary_size: int, code: int) -> None:
    """What was added is what an independent reader finds, in order, one sequence per document."""

    @settings(max_examples=60, deadline=None)
    @given(documents_below(vocabulary_size))
    def holds_for(documents: list[list[int]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prefix = Path(folder, "shard")
            write(prefix, documents, vocabulary_size)
            assert read_by_the_format(prefix) == (
                code,
                documents,
                list(range(len(documents) + 1)),
            )
            ours = IndexedDataset(prefix)
            assert [sequence.tolist() for sequence in ours] == documents
            assert ours.documents == len(ours) == len(documents)
            assert ours.tokens == sum(map(len, documents))

    holds_for()


def test_megatron_opens_the_shards(tmp_path: Path) -> None:
    """Megatron's own reader finds the same documents (where megatron-core is installed)."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for vocabulary_size in (SMALL, LARGE):
        prefix = tmp_path / f"of-{vocabulary_size}"
        write(prefix, [[5, 7, 0], [vocabulary_size - 1, 0]], vocabulary_size)
        dataset = megatron.IndexedDataset(str(prefix))
        assert [dataset[k].tolist() for k in range(2)] == [[5, 7, 0], [vocabulary_size - 1, 0]]
        assert dataset.document_indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("vocabulary_size", "dtype"), [(65_499, "<u2"), (65_500, "<i4")])
def test_ids_take_the_width_that_megatron_chooses(vocabulary_size: int, dtype: str) -> None:
    """Vocabularies below 65,500 are stored in 16 bits, larger ones in 32."""
    assert token_type(vocabulary_size) == np.dtype(dtype)


def test_the_writer_knows_what_it_wrote(tmp_path: Path) -> None:
    """Counts, sizes and hashes are those of the files on disk."""
    written = write(tmp_path / "shard", [[1, 2, 3], [4]])
    assert (written.documents, written.tokens) == (2, 4)
    for part, suffix in ((written.bin, ".bin"), (written.idx, ".idx")):
        content = (tmp_path / f"shard{suffix}").read_bytes()
        assert part.size_bytes == len(content)
        assert part.xxh64 == xxhash.xxh64_hexdigest(content)


def test_an_abandoned_writer_leaves_nothing(tmp_path: Path) -> None:
    """Without finish() there is no file, neither under the shard's name nor under another."""
    with IndexedDatasetWriter(tmp_path / "shard", token_type(SMALL)) as writer:
        writer.add_document([1, 2, 3])
    assert list(tmp_path.iterdir()) == []


def test_an_id_that_does_not_fit_is_no_other_id(tmp_path: Path) -> None:
    """An id beyond the type raises, rather than wrapping around, and leaves nothing behind."""
    with (
        pytest.raises(OverflowError),
        IndexedDatasetWriter(tmp_path / "shard", token_type(SMALL)) as writer,
    ):
        writer.add_document([70_000])
    assert list(tmp_path.iterdir()) == []


def test_a_finished_shard_stays_until_another_is_finished(tmp_path: Path) -> None:
    """Writing a shard anew does not touch the old one before the new one is whole."""
    write(tmp_path / "shard", [[1]])
    with IndexedDatasetWriter(tmp_path / "shard", token_type(SMALL)) as writer:
        writer.add_document([2])
        assert IndexedDataset(tmp_path / "shard")[0].tolist() == [1]
        writer.finish()
    assert IndexedDataset(tmp_path / "shard")[0].tolist() == [2]


def cut_index(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:-1])


def cut_data(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])


def spoil_magic(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(b"X" + path.read_bytes()[1:])


def empty_index(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_index, cut_data, spoil_magic, empty_index])
def test_a_damaged_dataset_is_refused(tmp_path: Path, damage) -> None:
    """A file that was cut or altered is refused by name, never read as other documents."""
    write(tmp_path / "shard", [[1, 2], [3]])
    damage(tmp_path / "shard")
    with pytest.raises(RecipeError, match=r"shard\.idx is no indexed dataset"):
        IndexedDataset(tmp_path / "shard")
