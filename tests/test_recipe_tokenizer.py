"""A dataset's tokenizer is the same every time, tells every text, and ends documents itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from recipes.errors import TokenizerError
from recipes.stages.layout import OutputLayout
from recipes.stages.scratch import Scratch
from recipes.stages.shards import cut_into_shards
from recipes.stages.sources import InputSettings, list_inputs
from recipes.stages.tokenizer import (
    DocumentEncoder,
    PreparedTokenizer,
    TokenizerMaker,
    TokenizerSettings,
)

EOD = "<|endoftext|>"


def maker(*paths: str | Path, shard_bytes: int = 100_000, **changes: str | int) -> TokenizerMaker:
    """A maker for a small vocabulary."""
    defaults = {"source": "train", "vocab_size": 600, "sample_bytes": 50_000, "eod_token": EOD}
    inputs = InputSettings(
        paths=tuple(map(str, paths)),
        format="auto",
        text_field="text",
        exclude=(),
        limit_bytes=None,
        shard_bytes=shard_bytes,
        max_document_bytes=100_000,
    )
    shards = cut_into_shards(list_inputs(inputs), shard_bytes)
    return TokenizerMaker(TokenizerSettings(**(defaults | changes)), inputs, shards)


def prepare(
    made_by: TokenizerMaker, root: Path, stored_xxh64: str | None = None
) -> tuple[PreparedTokenizer, list[str]]:
    """Prepare the tokenizer of an output directory; also return what was announced."""
    layout = OutputLayout(root)
    layout.create()
    announced: list[str] = []
    scratch = Scratch.of(root, 100_004)
    return made_by.prepare(layout, scratch, stored_xxh64, announced.append), announced


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PreparedTokenizer:
    """A tokenizer trained from a package of the standard library."""
    return prepare(maker("stdlib://json"), tmp_path_factory.mktemp("trained"))[0]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_every_text_can_be_told_in_tokens_and_told_back(
    trained: PreparedTokenizer, texts: list[str]
) -> None:
    """Each document is its text's bytes in tokens, then one end-of-document token."""
    texts = [text.encode("utf-8", "ignore").decode() or "x" for text in texts]
    encoded = list(DocumentEncoder(trained).encode(texts))
    decoder = Tokenizer.from_file(str(trained.path))
    assert [ids[-1] for ids in encoded] == [trained.eod_id] * len(texts)
    told = [decoder.decode(ids[:-1], skip_special_tokens=False) for ids in encoded]
    assert told == texts
    assert max(map(max, encoded)) < trained.vocabulary_size


def test_a_text_that_names_the_end_token_does_not_end_there(trained: PreparedTokenizer) -> None:
    """The end-of-document token stands once in a document: at its end."""
    (ids,) = DocumentEncoder(trained).encode([f"before {EOD} after {EOD}"])
    assert ids.count(trained.eod_id) == 1


def test_many_documents_keep_their_order(trained: PreparedTokenizer) -> None:
    """Batches are an inside matter: what comes out is what one text at a time would give."""
    texts = [f"text number {k}" for k in range(100)]
    encoder = DocumentEncoder(trained)
    assert list(encoder.encode(iter(texts))) == [next(encoder.encode([text])) for text in texts]


TRAIN_ALONE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_recipe_tokenizer import maker, prepare
print(prepare(maker("stdlib://json"), Path(sys.argv[2]))[0].xxh64)
"""


@pytest.mark.parametrize("parallel", ["true", "false"])
def test_training_gives_the_same_tokenizer_every_time(
    trained: PreparedTokenizer, tmp_path: Path, parallel: str
) -> None:
    """Another process, with another number of threads and another hash seed: the same bytes."""
    tests = str(Path(__file__).parent)
    found = subprocess.run(
        [sys.executable, "-c", TRAIN_ALONE, tests, str(tmp_path)],
        env=os.environ | {"TOKENIZERS_PARALLELISM": parallel, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == trained.xxh64


def test_a_stored_tokenizer_is_used_again_if_it_is_unharmed(tmp_path: Path) -> None:
    """A second start neither trains anew nor trusts a file that was altered."""
    made_by = maker("stdlib://json")
    first, announced = prepare(made_by, tmp_path)
    assert announced == ["Training the tokenizer …"]
    again, announced = prepare(made_by, tmp_path, first.xxh64)
    assert (again, announced) == (first, [])
    first.path.write_bytes(first.path.read_bytes()[:-2])
    repaired, announced = prepare(made_by, tmp_path, first.xxh64)
    assert (repaired, announced) == (first, ["Training the tokenizer …"])


def test_the_fingerprint_follows_what_decides_the_tokenizer(tmp_path: Path) -> None:
    """Other settings or another sample mean another tokenizer; the cut of the shards does not."""
    path = tmp_path / "a.txt"
    path.write_text("some text")
    before = maker(path).fingerprint()
    assert maker(path).fingerprint() == before
    assert maker(path, vocab_size=700).fingerprint() != before
    assert maker(path, eod_token="</s>").fingerprint() != before
    os.utime(path, ns=(1, 1))
    assert maker(path).fingerprint() != before


def test_a_large_input_is_sampled_from_many_places(tmp_path: Path) -> None:
    """The sample is bounded in size, and taken from many slices of one large file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {k} " * 20}) + "\n" for k in range(5_000)))
    made_by = maker(path, shard_bytes=10_000, sample_bytes=20_000)
    sample = made_by._sample()
    assert sum(taken_bytes for _, taken_bytes in sample) <= 21_000
    assert len({piece.start for piece, _ in sample}) >= 30
    assert prepare(made_by, tmp_path / "out")[0].vocabulary_size > 257


def test_an_input_without_documents_trains_nothing(tmp_path: Path) -> None:
    """An input in which every row is left out is refused, and says why the rows were."""
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n\n')
    with pytest.raises(TokenizerError, match=r"no document .*: 2 rows read.*missing_text"):
        prepare(maker(tmp_path / "a.jsonl"), tmp_path / "out")


def foreign_tokenizer(path: Path) -> None:
    """One that pads, cuts, and adds tokens in front, as tokenizers for inference do."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))


def test_a_tokenizer_file_is_used_for_its_vocabulary_only(tmp_path: Path) -> None:
    """Padding, truncation and added tokens of a given tokenizer.json do not reach the data."""
    foreign_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("ab")
    source = str(tmp_path / "tokenizer.json")
    made_by = maker(tmp_path / "a.txt", source=source, eod_token="</s>")
    ready, announced = prepare(made_by, tmp_path / "out")
    assert announced == ["Loading the tokenizer …"]
    assert (ready.eod_id, ready.vocabulary_size) == (3, 4)
    assert list(DocumentEncoder(ready).encode(["ababab", "b", "?"])) == [
        [0, 1, 0, 1, 0, 1, 3],
        [1, 3],
        [],
    ]


def test_an_end_token_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    """A tokenizer without the end-of-document token is refused, and its special tokens named."""
    foreign_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("ab")
    made_by = maker(tmp_path / "a.txt", source=str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"eod_token=<\|endoftext\|> is not .*</s>, <s>"):
        prepare(made_by, tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing/tokenizer.json", "no such file; allowed: train, the path of a tokenizer.json"),
        ("broken.json", "is no tokenizer.json"),
        ("nobody/no-such-model", "no such file here, and it cannot be loaded from the Hugging"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    """A wrong path, a wrong file or a hub that does not answer give one line, no traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("broken.json").write_text("{}")
    Path("a.txt").write_text("ab")
    with pytest.raises(TokenizerError, match=message) as refused:
        prepare(maker(tmp_path / "a.txt", source=source), tmp_path / "out")
    assert len(str(refused.value).splitlines()) == 1


def test_nothing_is_left_in_scratch(trained: PreparedTokenizer) -> None:
    """The sample that a tokenizer was trained from does not stay on the node."""
    scratch = Path(tempfile.gettempdir(), f"raywb-recipes-{os.getuid()}")
    assert not list(scratch.glob(f"{Scratch.of(trained.path.parent, 0).key}/*"))
