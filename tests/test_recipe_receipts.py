"""A shard is finished only if its receipt says so and both files are as they were written."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.errors import CountsError, OutputError
from recipes.pretrain.blend import write_blend
from recipes.pretrain.indexed_dataset import IndexedDatasetWriter, token_type
from recipes.stages.layout import OutputLayout, temporary_name, write_whole
from recipes.stages.manifest import Manifest, claim
from recipes.stages.receipts import (
    Receipt,
    SplitCounts,
    add_up,
    matching_receipt,
    write_receipt,
)


@pytest.fixture
def layout(tmp_path: Path) -> OutputLayout:
    layout = OutputLayout(tmp_path / "out")
    layout.create()
    return layout


def make_shard(layout: OutputLayout, name: str, documents: list[list[int]]) -> Receipt:
    with IndexedDatasetWriter(layout.shard_prefix(name), token_type(16_000)) as writer:
        for document in documents:
            writer.add_document(document)
        written = writer.finish()
    receipt = Receipt(
        shard=name,
        settings_fingerprint="settings",
        input_fingerprint="input",
        rows_in=written.documents + 3,
        rows_kept=written.documents,
        rows_filtered={"empty": 2},
        rows_errors={"broken_json": 1},
        tokens=written.tokens,
        files={".bin": written.bin, ".idx": written.idx},
    )
    write_receipt(layout, receipt)
    return receipt


def found(layout: OutputLayout, settings: str = "settings", inputs: str = "input"):
    return matching_receipt(layout, "shard-00000", settings, inputs)


def test_a_finished_shard_is_found_again(layout: OutputLayout) -> None:
    """The receipt that was written is the receipt that is read."""
    receipt = make_shard(layout, "shard-00000", [[1, 2], [3]])
    assert found(layout) == receipt


def test_other_settings_or_input_mean_another_shard(layout: OutputLayout) -> None:
    """A receipt counts only for the settings and the input that it was written for."""
    make_shard(layout, "shard-00000", [[1, 2]])
    assert found(layout, settings="other") is None
    assert found(layout, inputs="other") is None


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, Path.unlink])
def test_a_shard_with_a_damaged_file_is_not_finished(
    layout: OutputLayout, suffix: str, damage
) -> None:
    """One bit, one byte or a whole file less: the shard has to be made again."""
    make_shard(layout, "shard-00000", [[1, 2], [3]])
    damage(Path(f"{layout.shard_prefix('shard-00000')}{suffix}"))
    assert found(layout) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": 1}', b'{"version": 99}', b"\xff\xfe"]
)
def test_a_damaged_receipt_is_no_receipt(layout: OutputLayout, content: bytes) -> None:
    """A receipt that cannot be understood counts as not there, and raises nothing."""
    make_shard(layout, "shard-00000", [[1, 2]])
    layout.receipt("shard-00000").write_bytes(content)
    assert found(layout) is None


def test_a_receipt_of_version_1_still_counts(layout: OutputLayout) -> None:
    """A shard that was finished before receipts had a list of files is finished."""
    receipt = make_shard(layout, "shard-00000", [[1, 2]])
    path = layout.receipt("shard-00000")
    older = json.loads(path.read_text())
    files = older.pop("files")
    del older["splits"], older["packing_efficiency"]
    older |= {"version": 1, "bin": files[".bin"], "idx": files[".idx"]}
    path.write_text(json.dumps(older))
    assert found(layout) == receipt
    cut_off(Path(f"{layout.shard_prefix('shard-00000')}.idx"))
    assert found(layout) is None


def test_splits_hold_every_row_that_was_kept(layout: OutputLayout) -> None:
    """A conversation that is in no split, or in two, is an error of the recipe."""
    receipt = make_shard(layout, "shard-00000", [[1], [2]])
    halves = {"train": SplitCounts(1, 1, 1), "test": SplitCounts(1, 1, 1)}
    write_receipt(layout, dataclasses.replace(receipt, splits=halves))
    assert found(layout).splits == halves
    assert add_up([found(layout)] * 2).splits["train"] == SplitCounts(2, 2, 2)
    wrong = dataclasses.replace(receipt, splits={**halves, "valid": SplitCounts(1, 1, 1)})
    with pytest.raises(CountsError, match="2 rows kept, but 1 in train, 1 in test, 1 in valid"):
        write_receipt(layout, wrong)


def test_rows_that_do_not_add_up_get_no_receipt(layout: OutputLayout) -> None:
    """A row that was lost is an error of the recipe, said aloud, and never a finished shard."""
    receipt = make_shard(layout, "shard-00000", [[1]])
    layout.receipt("shard-00000").unlink()
    wrong = dataclasses.replace(receipt, rows_in=receipt.rows_in + 1)
    with pytest.raises(CountsError, match=r"shard-00000: 5 rows in, but 1 kept \+ 2 filtered \+ 1"):
        write_receipt(layout, wrong)
    assert not layout.receipt("shard-00000").exists()


def test_totals_are_sums_by_kind(layout: OutputLayout) -> None:
    """Totals add up rows, tokens and every kind of row that was left out."""
    receipts = [make_shard(layout, f"shard-0000{k}", [[1, 2]] * (k + 1)) for k in range(3)]
    totals = add_up(receipts)
    assert (totals.shards, totals.rows_in, totals.rows_kept, totals.tokens) == (3, 15, 6, 12)
    assert totals.rows_filtered == {"empty": 6}
    assert totals.rows_errors == {"broken_json": 3}


def test_the_blend_lists_filled_shards_with_their_tokens(layout: OutputLayout) -> None:
    """An empty shard is left out, others are weighted by tokens, in whatever order they come."""
    receipts = [
        make_shard(layout, "shard-00002", [[1, 2, 3]]),
        make_shard(layout, "shard-00001", []),
        make_shard(layout, "shard-00000", [[1], [2]]),
    ]
    write_blend(layout, receipts, "abc")
    first = layout.blend.read_bytes()
    blend = json.loads(first)
    assert blend["blend"] == ["2", "shards/shard-00000", "3", "shards/shard-00002"]
    assert (blend["tokens"], blend["documents"]) == (5, 3)
    write_blend(layout, reversed(receipts), "abc")
    assert layout.blend.read_bytes() == first


def test_a_file_is_whole_or_not_there(layout: OutputLayout, monkeypatch) -> None:
    """A write that fails in the middle leaves the old file as it was, and no other."""
    path = layout.root / "file.json"
    write_whole(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [file.name for file in layout.root.iterdir() if file.is_file()] == ["file.json"]


def test_what_a_killed_run_left_half_written_is_swept(layout: OutputLayout) -> None:
    """Temporary files go, finished ones and those of others stay."""
    make_shard(layout, "shard-00000", [[1]])
    half = temporary_name(layout.shards / "shard-00001.bin")
    half.write_bytes(b"half")
    (layout.root / "notes.txt").write_text("mine")
    assert layout.sweep_temporary_files() == 1
    assert not half.exists()
    assert layout.shard_names() == {"shard-00000"}
    assert (layout.root / "notes.txt").exists()


def manifest(**changes) -> Manifest:
    settings = {"input": {"paths": ["a"], "shard_bytes": 10}, "tokenizer": {"vocab_size": 500}}
    for key, value in changes.items():
        section = "tokenizer" if key == "vocab_size" else "input"
        settings[section][key] = value
    return Manifest(settings, "tokenizer-1")


def test_the_same_settings_go_on_in_their_directory(layout: OutputLayout) -> None:
    """A start with the settings of the last one is given its manifest, and keeps its shards."""
    dataclasses.replace(manifest(), tokenizer_xxh64="abc").write(layout)
    make_shard(layout, "shard-00000", [[1]])
    assert claim(layout, manifest(), overwrite=False).tokenizer_xxh64 == "abc"
    assert layout.shard_names() == {"shard-00000"}


def test_other_settings_do_not_replace_a_dataset(layout: OutputLayout) -> None:
    """A start with other settings is refused, naming each of them before and now."""
    manifest().write(layout)
    make_shard(layout, "shard-00000", [[1]])
    with pytest.raises(OutputError) as refused:
        claim(layout, manifest(vocab_size=900, paths=["b"]), overwrite=False)
    assert "tokenizer.vocab_size was 500, now 900" in str(refused.value)
    assert "input.paths was ['a'], now ['b']" in str(refused.value)
    assert "overwrite=true" in str(refused.value)
    assert layout.shard_names() == {"shard-00000"}


def test_overwriting_allows_other_settings_and_removes_nothing_yet(layout: OutputLayout) -> None:
    """overwrite=true lets other settings in; old shards stay until new ones take their place."""
    manifest().write(layout)
    receipt = make_shard(layout, "shard-00000", [[1]])
    wanted = manifest(vocab_size=900)
    assert claim(layout, wanted, overwrite=True) == wanted
    assert found(layout) == receipt


def test_a_tokenizer_that_would_be_another_is_refused(layout: OutputLayout) -> None:
    """Shards of one tokenizer are never joined by shards of another."""
    manifest().write(layout)
    make_shard(layout, "shard-00000", [[1]])
    wanted = dataclasses.replace(manifest(), tokenizer_fingerprint="tokenizer-2")
    with pytest.raises(OutputError, match="the input or the tokenizer's file changed"):
        claim(layout, wanted, overwrite=False)


def test_shards_of_unknown_origin_are_not_touched(layout: OutputLayout) -> None:
    """Shards without a manifest are somebody's data, and a start beside them is refused."""
    make_shard(layout, "shard-00000", [[1]])
    with pytest.raises(OutputError, match=r"no manifest\.json"):
        claim(layout, manifest(), overwrite=False)


def test_a_directory_without_shards_takes_any_settings(layout: OutputLayout) -> None:
    """A start that was ended before its first shard binds nobody."""
    manifest().write(layout)
    wanted = manifest(vocab_size=900)
    assert claim(layout, wanted, overwrite=False) == wanted


def test_there_is_no_blend_while_a_recipe_works(layout: OutputLayout) -> None:
    """A blend stands for a finished directory, so it goes when work begins."""
    write_blend(layout, [make_shard(layout, "shard-00000", [[1]])], "abc")
    manifest().write(layout)
    claim(layout, manifest(), overwrite=False)
    assert not layout.blend.exists()


def test_a_directory_has_one_writer_at_a_time(layout: OutputLayout) -> None:
    """A second recipe is refused while the first one lives, and let in when it was killed."""
    hold = (
        "import sys; from pathlib import Path; from recipes.stages.layout import OutputLayout\n"
        "with OutputLayout(Path(sys.argv[1])).locked():\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(layout.root)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match="another recipe is writing to"), layout.locked():
            pass
        other.kill()
    with layout.locked():
        pass
