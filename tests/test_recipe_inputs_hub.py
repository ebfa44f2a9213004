"""Datasets of the Hugging Face hub, read by its real client, are the same input as their files."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Dataset, HubServer, hub_server
from recipe_inputs import CORPUS_NAMES, corpus, jsonl, lay_out, read_input, texts

from recipes.stages.scratch import Scratch

TESTS = Path(__file__).parent

Reader = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """A hub for the module."""
    with hub_server() as server:
        yield server


def _reader(hub: HubServer, home: Path, **environment: str) -> Iterator[Reader]:
    with subprocess.Popen(
        [sys.executable, TESTS / "recipe_input_reader.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
            "HOME": str(home),
            "TMPDIR": str(home),
            "HF_ENDPOINT": hub.url,
            **environment,
        },
    ) as process:

        def read(*paths: str) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(paths) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield read


@pytest.fixture(scope="module")
def with_token(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Reads as somebody who has a token."""
    yield from _reader(hub, tmp_path_factory.mktemp("home"), HF_TOKEN=TOKEN)


@pytest.fixture(scope="module")
def without_token(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Reads as nobody in particular."""
    yield from _reader(hub, tmp_path_factory.mktemp("home"))


@pytest.fixture
def dataset(hub: HubServer) -> Iterator[Dataset]:
    """A dataset ``org/corpus`` without any commit."""
    hub.datasets["org/corpus"] = Dataset()
    yield hub.datasets["org/corpus"]
    hub.datasets.clear()


@pytest.mark.parametrize("location", ["hf://datasets/org/corpus", "hf://org/corpus@main"])
def test_the_hub_gives_the_same_documents_as_a_directory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: Dataset,
    with_token: Reader,
    location: str,
) -> None:
    """All data files of a private dataset; its card and its script are none."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch = Scratch.of(tmp_path / "out", 10_004)
    local = read_input(scratch, lay_out(tmp_path / "in", corpus()))
    dataset.private = True
    commit = dataset.push(
        corpus() | {"README.md": b"# Card", "corpus.py": b"script", ".gitattributes": b"x"}
    )
    found = with_token(location)
    assert found["names"] == CORPUS_NAMES
    counts = local.counts
    assert found["texts"] == local.texts
    assert found["counts"] == [counts.rows_in, counts.filtered, counts.errors]
    assert found["urls"][0] == f"hf://datasets/org/corpus@{commit}/a-large.jsonl"


def test_a_path_a_folder_or_a_glob_of_a_dataset(dataset: Dataset, with_token: Reader) -> None:
    """Part of a dataset may be named, at a branch or at a commit, and then also its card."""
    files = {f"data/{split}-{k}.jsonl": jsonl([f"{split}{k}"]) for split in "ab" for k in (1, 2)}
    old = dataset.push(files | {"README.md": b"# Card"})
    dataset.push({"default/train/0.jsonl": jsonl(["converted"])}, branch="refs/convert/parquet")
    dataset.push({})
    at = f"hf://datasets/org/corpus@{old}"
    assert with_token(f"{at}/data/a-*.jsonl")["names"] == ["a-1.jsonl", "a-2.jsonl"]
    assert with_token(f"{at}/data")["texts"] == ["a1", "a2", "b1", "b2"]
    assert with_token(f"{at}/README.md")["texts"] == ["# Card"]
    assert with_token("hf://org/corpus@refs/convert/parquet/default")["texts"] == ["converted"]


def test_what_is_pushed_meanwhile_is_not_read(dataset: Dataset, with_token: Reader) -> None:
    """From the listing on, one commit is read; a new one changes the files that it touches."""
    dataset.push({"a.jsonl": jsonl(texts(3, 1)), "b.jsonl": jsonl(texts(3, 2))})
    before = with_token("hf://org/corpus")
    dataset.push({"a.jsonl": jsonl(texts(3, 1)), "b.jsonl": jsonl(texts(3, 3))})
    assert with_token("again") == before
    after = with_token("hf://org/corpus")
    assert after["texts"] == texts(3, 1) + texts(3, 3)
    assert after["versions"][0] == before["versions"][0]
    assert after["versions"][1] != before["versions"][1]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("hf://org/private", "there is no such dataset, or it is private; set HF_TOKEN"),
        ("hf://org/gated", "access was refused (403); set HF_TOKEN to a token that may read it, "),
        ("hf://org/corpus@other", "there is no such file"),
        ("hf://org/corpus/other.jsonl", "input.paths: nothing to read at hf://org/corpus/other"),
        ("hf://spaces/org/name", "input.paths: hf://spaces/org/name is no dataset; write hf://dat"),
        ("hf://org", "input.paths: hf://org is no dataset"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: HubServer, dataset: Dataset, without_token: Reader, location: str, message: str
) -> None:
    """The message names the dataset, and what gives access to it."""
    dataset.push({"a.jsonl": jsonl(["a"])})
    hub.datasets["org/private"] = Dataset(private=True)
    hub.datasets["org/gated"] = Dataset(gated=True)
    hub.datasets["org/gated"].push({"a.jsonl": jsonl(["a"])})
    error = without_token(location)["error"]
    assert message in error
    assert location.removeprefix("hf://") in error
    assert "\n" not in error
