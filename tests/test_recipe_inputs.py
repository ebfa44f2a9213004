"""Inputs are listed the same every time, cut without losing a line, and every row is counted."""

from __future__ import annotations

import gzip
import json
import os
import random
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.errors import InputError
from recipes.stages.documents import ERROR_KINDS, FILTER_KINDS, DocumentReader, LocalFile
from recipes.stages.scratch import Scratch
from recipes.stages.shards import cut_into_shards
from recipes.stages.sources import InputSettings, list_inputs

LIMIT = 1_000


def input_settings(*paths: object, **changes: object) -> InputSettings:
    defaults = {
        "format": "auto",
        "text_field": "text",
        "exclude": (),
        "limit_bytes": None,
        "shard_bytes": 100,
        "max_document_bytes": LIMIT,
    }
    return InputSettings(paths=tuple(map(str, paths)), **(defaults | changes))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scratch:
    """Scratch space in the test's own directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Scratch.of(tmp_path / "out", LIMIT + 4)


def names(*paths: object, **changes: object) -> list[str]:
    return [file.name for file in list_inputs(input_settings(*paths, **changes))]


def lay_out(root: Path, files: list[str]) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


# ------------------------------------------------------------------------------------- listing


def test_a_directory_gives_what_can_be_read_in_it(tmp_path: Path) -> None:
    """Text, JSONL and Python files at any depth, packed or not; no hidden and no other files."""
    lay_out(
        tmp_path,
        ["b.txt", "a.jsonl", "sub/c.py", "sub/d.md.gz", "x.bin", ".hidden.txt", ".git/e.txt"],
    )
    assert names(tmp_path) == ["a.jsonl", "b.txt", "sub/c.py", "sub/d.md.gz"]


def test_the_order_depends_on_names_only(tmp_path: Path) -> None:
    """Files that were made in another order, elsewhere, are listed in the same order."""
    files = [f"{k:02d}/part-{k}.txt" for k in range(20)]
    shuffled = random.Random(0).sample(files, len(files))
    assert names(lay_out(tmp_path / "one", files)) == names(lay_out(tmp_path / "two", shuffled))


def test_a_glob_finds_files_and_directories(tmp_path: Path) -> None:
    """What a glob matches is read, and a directory that it matches is walked."""
    lay_out(tmp_path, ["part-1/a.txt", "part-2/b.txt", "part-3.txt", "other.txt"])
    assert names(tmp_path / "part-*") == ["part-1/a.txt", "part-2/b.txt", "part-3.txt"]
    assert names(tmp_path / "**" / "b.txt") == ["part-2/b.txt"]


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    """Overlapping paths do not make documents appear twice."""
    lay_out(tmp_path, ["a.txt", "b.txt"])
    assert names(tmp_path / "b.txt", tmp_path, tmp_path / "*.txt") == ["b.txt", "a.txt"]


def test_excluded_names_are_left_out(tmp_path: Path) -> None:
    """A pattern of input.exclude leaves out what it matches."""
    lay_out(tmp_path, ["a.txt", "test/b.txt", "c_test.txt"])
    assert names(tmp_path, exclude=("test/*", "*_test.txt")) == ["a.txt"]


def test_a_named_file_with_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    """A file that was asked for is never left out silently; input.format says how to read it."""
    lay_out(tmp_path, ["table.csv", "packed.parquet.gz", "notes"])
    for name in ("table.csv", "packed.parquet.gz"):
        with pytest.raises(InputError, match=rf"cannot tell how to read .*{name}.*\.jsonl"):
            names(tmp_path / name)
    assert names(tmp_path / "notes", format="text") == ["notes"]
    assert names(tmp_path, format="text") == ["notes", "packed.parquet.gz", "table.csv"]


@pytest.mark.parametrize(
    ("path", "message"),
    [("missing", "nothing to read at"), ("nowhere://bucket/key", "no store for nowhere://")],
)
def test_a_path_that_holds_nothing_is_refused(tmp_path: Path, path: str, message: str) -> None:
    """A typing error in a path does not become an empty dataset."""
    with pytest.raises(InputError, match=message):
        names(path if "://" in path else tmp_path / path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused_before_work_begins(tmp_path: Path) -> None:
    """A file that cannot be read is named at once, not after an hour."""
    lay_out(tmp_path, ["a.txt"])
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(InputError, match=r"no permission to read .*a\.txt"):
        names(tmp_path)


def test_the_standard_library_is_always_there() -> None:
    """stdlib:// lists the library's own sources, and of a package only those."""
    everything, package = names("stdlib://"), names("stdlib://json")
    assert "json/decoder.py" in everything
    assert "decoder.py" in package
    assert len(package) < 20 < len(everything)
    assert not any("site-packages" in name or not name.endswith(".py") for name in everything)


# ------------------------------------------------------------------------------------- cutting


def test_shards_hold_whole_files_up_to_their_size(tmp_path: Path) -> None:
    """Files follow each other into shards of about shard_bytes; a larger file has its own."""
    for name, size in (("a", 60), ("b", 30), ("c", 30), ("d", 500), ("e", 10)):
        (tmp_path / f"{name}.txt").write_text("x" * size)
    shards = cut_into_shards(list_inputs(input_settings(tmp_path)), shard_bytes=100)
    assert [[piece.file.name for piece in shard.slices] for shard in shards] == [
        ["a.txt", "b.txt"],
        ["c.txt"],
        ["d.txt"],
        ["e.txt"],
    ]


def test_a_limit_takes_the_front(tmp_path: Path) -> None:
    """limit_bytes stops before the file that exceeds it, and takes one in any case."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("x" * 40)
    files = list_inputs(input_settings(tmp_path))
    assert sum(len(shard.slices) for shard in cut_into_shards(files, 40, limit_bytes=80)) == 2
    assert sum(len(shard.slices) for shard in cut_into_shards(files, 40, limit_bytes=1)) == 1


def test_a_changed_file_changes_its_shard_alone(tmp_path: Path) -> None:
    """Only the shard that a changed file belongs to is made again."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("x" * 40)

    def fingerprints() -> list[str]:
        shards = cut_into_shards(list_inputs(input_settings(tmp_path)), shard_bytes=40)
        return [shard.input_fingerprint for shard in shards]

    before = fingerprints()
    assert fingerprints() == before
    os.utime(tmp_path / "b.txt", ns=(1, 1))
    assert [old == new for old, new in zip(before, fingerprints(), strict=True)] == [
        True,
        False,
        True,
    ]


lines = st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b""))


@settings(max_examples=150, deadline=None)
@given(st.lists(lines, max_size=30), st.booleans(), st.integers(1, 200))
def test_a_line_belongs_to_exactly_one_slice(
    content: list[bytes], ends_with_newline: bool, shard_bytes: int
) -> None:
    """However a JSONL file is cut, its slices put together are the file, and cut between lines."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        scratch = Scratch.of(Path(folder), LIMIT)
        path = Path(folder, "rows.jsonl")
        whole = b"\n".join(content) + (b"\n" if ends_with_newline else b"")
        path.write_bytes(whole)
        shards = cut_into_shards(list_inputs(input_settings(path)), shard_bytes)
        parts = [file.path.read_bytes() for shard in shards for file in scratch.fetch(shard)]
        assert b"".join(parts) == whole
        assert all(part.endswith(b"\n") for part in list(filter(None, parts))[:-1])
        assert len(shards) == max(1, -(-len(whole) // shard_bytes))


def test_a_line_belongs_to_the_slice_in_which_it_begins(tmp_path: Path, scratch: Scratch) -> None:
    """Lines that end where a slice ends leave the next line to the next slice."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"11\n22\n3333\n5\n")
    shards = cut_into_shards(list_inputs(input_settings(path)), shard_bytes=3)
    parts = [scratch.fetch(shard)[0].path.read_bytes() for shard in shards]
    assert parts == [b"11\n", b"22\n", b"3333\n", b"5\n", b""]


# ------------------------------------------------------------------------------------- fetching


def fetched(scratch: Scratch, path: Path) -> LocalFile:
    (shard,) = cut_into_shards(list_inputs(input_settings(path)), shard_bytes=10**9)
    (file,) = scratch.fetch(shard)
    return file


def test_archives_are_unpacked(tmp_path: Path, scratch: Scratch) -> None:
    """What the reader sees of a .gz is what was packed into it."""
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"hello"))
    file = fetched(scratch, path)
    assert (file.path.read_bytes(), file.corrupt) == (b"hello", False)


def test_no_more_of_a_text_is_fetched_than_may_be_kept(tmp_path: Path, scratch: Scratch) -> None:
    """A small archive that unpacks to a huge text fills neither disk nor memory."""
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"x" * 10_000_000))
    assert fetched(scratch, path).path.stat().st_size == LIMIT + 4


def test_a_file_that_changed_since_the_listing_is_refused(tmp_path: Path, scratch: Scratch) -> None:
    """A shard is never made from another content than its fingerprint stands for."""
    path = tmp_path / "a.txt"
    path.write_text("before")
    (shard,) = cut_into_shards(list_inputs(input_settings(path)), shard_bytes=100)
    path.write_text("afterwards")
    with pytest.raises(InputError, match=r"a\.txt changed since it was listed"):
        scratch.fetch(shard)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot fetch .*a\.txt: No such file"):
        scratch.fetch(shard)


def test_a_shards_scratch_begins_empty_and_ends_empty(tmp_path: Path, scratch: Scratch) -> None:
    """What a killed run left is replaced, and nothing stays behind after the shard is done."""
    path = tmp_path / "a.txt"
    path.write_text("hello")
    (shard,) = cut_into_shards(list_inputs(input_settings(path)), shard_bytes=100)
    left_over = scratch.fetch(shard)[0].path.with_name("left-over")
    left_over.write_text("half")
    (file,) = scratch.fetch(shard)
    assert not left_over.exists()
    scratch.remove(shard)
    assert not file.path.parent.exists()


# ------------------------------------------------------------------------------------- reading


def read(tmp_path: Path, content: bytes, form: str, *, corrupt: bool = False):
    path = tmp_path / "file"
    path.write_bytes(content)
    reader = DocumentReader("text", LIMIT)
    texts = list(reader.read(LocalFile(path, form, corrupt)))
    return SimpleNamespace(
        texts=texts, rows_in=reader.rows_in, left_out=dict(reader.filtered + reader.errors)
    )


def row(text: object, **fields: object) -> bytes:
    return json.dumps({"text": text, **fields}).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"\n", "empty"),
        (b" \t\r\n", "empty"),
        (row(""), "empty"),
        (row(" \n "), "empty"),
        (row("x" * (LIMIT + 1)), "too_long"),
        (row("ä" * LIMIT), "too_long"),
        (b'{"text": "' + b"x" * 20 * LIMIT + b'"}\n', "too_long"),
        (b'{"text": \n', "broken_json"),
        (b"[" * 200_000 + b"\n", "too_long"),
        (b"[" * 7_000 + b"\n", "broken_json"),
        (b"1" * 5_000 + b"\n", "broken_json"),
        (b"[1, 2]\n", "missing_text"),
        (b'{"body": "x"}\n', "missing_text"),
        (row(None), "missing_text"),
        (row(7), "missing_text"),
        (b'{"text": "\xff"}\n', "undecodable"),
        (b'{"text": "\\ud800"}\n', "undecodable"),
    ],
)
def test_a_bad_line_is_counted_and_costs_no_other(tmp_path: Path, line: bytes, kind: str) -> None:
    """Each kind of row that cannot be kept is counted as that kind; its neighbours are kept."""
    found = read(tmp_path, row("before") + line + row("after"), "jsonl")
    assert found.texts == ["before", "after"]
    assert (found.rows_in, found.left_out) == (3, {kind: 1})


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"  \n\n", "empty"),
        (b"x" * (LIMIT + 1), "too_long"),
        (b"\xff\xfe", "undecodable"),
        ("ä".encode("latin-1"), "undecodable"),
    ],
)
def test_a_bad_text_is_counted(tmp_path: Path, content: bytes, kind: str) -> None:
    """A text file that cannot become a document is one row of its kind."""
    found = read(tmp_path, content, "text")
    assert (found.texts, found.rows_in, found.left_out) == ([], 1, {kind: 1})


def test_a_document_may_be_as_long_as_the_limit(tmp_path: Path) -> None:
    """The limit itself is allowed, in bytes of UTF-8, in both formats."""
    text = "ä" * (LIMIT // 2)
    assert read(tmp_path, text.encode(), "text").texts == [text]
    assert read(tmp_path, row(text), "jsonl").texts == [text]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """A mark at the front of a file is left out of the document."""
    assert read(tmp_path, b"\xef\xbb\xbfhello", "text").texts == ["hello"]
    assert read(tmp_path, b"\xef\xbb\xbf" + row("hello"), "jsonl").texts == ["hello"]


def test_a_last_line_needs_no_newline(tmp_path: Path) -> None:
    """The last row counts whether or not a newline follows it."""
    assert read(tmp_path, row("a") + row("b").rstrip(), "jsonl").texts == ["a", "b"]


@pytest.mark.parametrize("cut", [20, 200, 400])
def test_a_broken_archive_keeps_the_rows_before_the_break(
    tmp_path: Path, scratch: Scratch, cut: int
) -> None:
    """Of an archive that breaks off, whole lines are kept and what is lost counts as one error."""
    texts = [random.Random(k).randbytes(20).hex() for k in range(40)]
    packed = gzip.compress(b"".join(map(row, texts)))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(packed[:-cut])
    file = fetched(scratch, path)
    reader = DocumentReader("text", LIMIT)
    kept = list(reader.read(file))
    assert kept == texts[: len(kept)]
    assert reader.errors == Counter(corrupt_gzip=1)
    assert reader.rows_in == len(kept) + 1


def test_a_broken_archive_of_a_text_is_no_document(tmp_path: Path, scratch: Scratch) -> None:
    """Half a text is not kept; a wrong checksum is noticed as well."""
    packed = gzip.compress(b"hello")
    for k, content in enumerate((packed[:-6], packed[:-8] + bytes(8), b"no archive")):
        path = tmp_path / f"{k}.txt.gz"
        path.write_bytes(content)
        reader = DocumentReader("text", LIMIT)
        assert list(reader.read(fetched(scratch, path))) == []
        assert (reader.rows_in, dict(reader.errors)) == (1, {"corrupt_gzip": 1})


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=300)
    | st.lists(st.sampled_from([row("a"), row(""), b"{", b"\n", b"\xff\n", row("x" * 2_000)])).map(
        b"".join
    ),
    st.sampled_from(["text", "jsonl"]),
    st.booleans(),
)
def test_every_row_is_kept_or_counted(content: bytes, form: str, corrupt: bool) -> None:
    """Whatever the bytes: nothing raises, and rows in = kept + filtered + errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(content)
        reader = DocumentReader("text", LIMIT)
        kept = list(reader.read(LocalFile(path, form, corrupt)))
        left_out = reader.filtered.total() + reader.errors.total()
        assert reader.rows_in == len(kept) + left_out
        assert set(reader.filtered) <= set(FILTER_KINDS)
        assert set(reader.errors) <= set(ERROR_KINDS)
        if form == "jsonl" and not corrupt:
            *lines, last = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            assert reader.rows_in == len(lines) + bool(last)
