"""Every row becomes a conversation or is counted by kind; every conversation has its split."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_cases import chat

from recipes.errors import InputError
from recipes.sft.conversations import ConversationReader, ConversationTexts
from recipes.sft.packed_parquet import CompactConversation, write_packs
from recipes.sft.packing import pack
from recipes.sft.splits import SplitSettings, split_of
from recipes.sft.turns import Conversation
from recipes.stages.questions import questions_about
from recipes.stages.rows import LocalFile
from recipes.stages.scratch import Scratch
from recipes.stages.shards import cut_into_shards
from recipes.stages.sources import InputSettings, list_inputs, source_of

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
PARTS = [{"type": "text", "text": "Be"}, {"type": "text", "text": "cause."}]
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]


def reader() -> ConversationReader:
    return ConversationReader("messages", "tools", 1_000)


def read(path: Path, rows: list[bytes]) -> tuple[list[Conversation], ConversationReader]:
    path.write_bytes(b"\n".join(rows) + b"\n")
    reading = reader()
    return list(reading.read(LocalFile(path, "jsonl"))), reading


def row(*messages: object, **fields: object) -> bytes:
    return json.dumps({"messages": list(messages), **fields}).encode()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"{", "broken_json"),
        (b'{"messages": "\xff"}', "undecodable"),
        (row(USER, {"role": "assistant", "content": "\ud800"}), "undecodable"),
        (row(USER, {"role": "assistant", "content": "x" * 2_000}), "too_long"),
        (b"[]", "no_messages"),
        (b"{}", "no_messages"),
        (b'{"messages": {}}', "no_messages"),
        (b'{"messages": "{"}', "no_messages"),
        (row(), "no_messages"),
        (row("Why?"), "no_messages"),
        (row({"content": "Why?"}, ANSWER), "unknown_role"),
        (row({"role": "narrator", "content": "Why?"}, ANSWER), "unknown_role"),
        (row({"role": ["user"], "content": "Why?"}, ANSWER), "unknown_role"),
        (row({"role": "user"}, ANSWER), "missing_content"),
        (row({"role": "user", "content": 7}, ANSWER), "missing_content"),
        (row({"role": "user", "content": []}, ANSWER), "missing_content"),
        (row({"role": "user", "content": [*PARTS, *IMAGE]}, ANSWER), "missing_content"),
        (row(USER), "no_assistant_turn"),
        (row(USER, {"role": "assistant", "content": " \n"}), "empty"),
        (row(USER, ANSWER, tools="{"), "broken_tools"),
        (row(USER, ANSWER, tools={"a": 1}), "broken_tools"),
    ],
)
def test_what_is_no_conversation_is_counted(tmp_path: Path, content: bytes, kind: str) -> None:
    """One kind for each thing that can be wrong, and the good row behind it is read."""
    conversations, reading = read(tmp_path / "a.jsonl", [content, row(USER, ANSWER)])
    assert conversations == [Conversation((USER, ANSWER))]
    counts = reading.counts
    assert counts.rows_in == 2
    assert counts.filtered + counts.errors == Counter({kind: 1})
    assert ("empty" in counts.filtered or "too_long" in counts.filtered) == (
        kind in ("empty", "too_long")
    )


@pytest.mark.parametrize(
    ("messages", "contents"),
    [
        ([USER, ANSWER], ["Why?", "Because."]),
        ([USER, {"role": "assistant", "content": PARTS}], ["Why?", "Because."]),
        ([USER, CALL], ["Why?", ""]),
        ([{"role": "developer", "content": "x"}, USER, ANSWER], ["x", "Why?", "Because."]),
    ],
)
def test_contents_are_texts(tmp_path: Path, messages: list, contents: list[str]) -> None:
    """A list of text parts is one text, and a call needs none."""
    rows = [row(*messages, tools=[{"name": "f"}]), row(*messages, tools=None)]
    rows.append(json.dumps({"messages": json.dumps(messages)}).encode())
    conversations, reading = read(tmp_path / "a.jsonl", rows)
    assert [[m["content"] for m in c.messages] for c in conversations] == [contents] * 3
    assert [c.tools for c in conversations] == [({"name": "f"},), (), ()]
    texts = ConversationTexts(reader())
    assert list(texts.read(LocalFile(tmp_path / "a.jsonl", "jsonl"))) == contents * 3
    assert texts.counts.rows_in == reading.counts.rows_in == 3


def test_parquet_and_jsonl_hold_the_same_conversations(tmp_path: Path) -> None:
    """Where Parquet has every key in every message, those without a value are not there."""
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, CALL, {**USER, "name": "Ann"}]}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    from_parquet = list(reader().read(LocalFile(path, "parquet")))
    lines = [json.dumps(one).encode() for one in rows]
    assert from_parquet == read(tmp_path / "a.jsonl", lines)[0]


def splits(conversations: list[Conversation], **shares: float) -> list[str]:
    chosen = {"train": 8.0, "valid": 1.0, "test": 1.0, "seed": 0} | shares
    return [split_of(one, SplitSettings(**chosen)) for one in conversations]


def test_splits_have_their_shares_and_keep_their_conversations() -> None:
    """About the ratio that is asked for, by the words alone; another seed draws anew."""
    conversations = [Conversation(chat(f"question {k}", "answer")) for k in range(2_000)]
    drawn = splits(conversations)
    assert splits(conversations[1_000:]) == drawn[1_000:]
    counts = Counter(drawn)
    assert {name: round(counts[name] / 2_000, 1) for name in counts} == {
        "train": 0.8,
        "valid": 0.1,
        "test": 0.1,
    }
    assert splits(conversations, seed=1) != drawn
    assert set(splits(conversations, train=0, valid=0)) == {"test"}
    wider = splits(conversations, valid=2.0)
    assert all(new in (old, "valid") for old, new in zip(drawn, wider, strict=True))


def compact(*lengths: int) -> list[CompactConversation]:
    return [
        CompactConversation(
            np.arange(100 * k, 100 * k + length, dtype=np.int32), np.ones(length, dtype=np.uint8)
        )
        for k, length in enumerate(lengths)
    ]


def test_packs_are_written_as_they_are(tmp_path: Path) -> None:
    """Tokens end to end, where each conversation begins, and no first token is ever learnt."""
    path = tmp_path / "a.parquet"
    write_packs(path, pack([3, 6, 1], 4, "concatenative"), compact(3, 6, 1), 4)
    assert pq.read_table(path).to_pylist() == [
        {"input_ids": [0, 1, 2, 100], "loss_mask": [0, 1, 1, 0], "seq_start_id": [0, 3]},
        {"input_ids": [101, 102, 103, 104], "loss_mask": [0, 1, 1, 1], "seq_start_id": [0]},
        {"input_ids": [105, 200], "loss_mask": [0, 0], "seq_start_id": [0, 1]},
    ]
    schema = pq.read_schema(path)
    assert [str(field.type.value_type) for field in schema] == ["int32", "uint8", "int32"]
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_many_packs_make_row_groups(tmp_path: Path) -> None:
    """A file of many packs is read back in parts, and in order."""
    lengths = [4_096] * 300
    path = tmp_path / "a.parquet"
    written = write_packs(path, pack(lengths, 4_096, "concatenative"), compact(*lengths), 4_096)
    file = pq.ParquetFile(path)
    assert (file.metadata.num_row_groups, file.metadata.num_rows) == (2, 300)
    assert written.size_bytes == path.stat().st_size
    firsts = [ids[0] for ids in file.read(["input_ids"]).column(0).to_pylist()]
    assert firsts == [100 * k for k in range(300)]


# ------------------------------------------------------------------------------------- questions

MODULE = '''
"""Not asked about."""

def shown(a, *, b: int = 2) -> str:
    """Return a text that shows both."""

def _hidden():
    """Nobody asks about what is private."""

def short():
    """Short."""

class Box:
    """Hold one thing, and give it back.

    And more about it.
    """

    async def open(self):
        """Take the thing out of the box."""
'''


def test_questions_are_about_what_is_documented() -> None:
    """Public functions, classes and methods with a docstring, in order, the same every time."""
    rows = [json.loads(line) for line in questions_about(MODULE.encode(), "m").splitlines()]
    answers = [one["messages"][-1]["content"] for one in rows]
    assert answers == [
        "Return a text that shows both.",
        "Hold one thing, and give it back.\n\nAnd more about it.",
        "Take the thing out of the box.",
    ]
    asked = [" ".join(m["content"] for m in one["messages"]) for one in rows]
    for name, words in zip(("`m.shown`", "`m.Box`", "`m.Box.open`"), asked, strict=True):
        assert name in words
    assert questions_about(MODULE.encode(), "m") == questions_about(MODULE.encode(), "m")
    assert questions_about(b"def broken(:", "m") == b""


def settings(*paths: str) -> InputSettings:
    return InputSettings(
        paths=paths,
        format="auto",
        text_field="messages",
        exclude=(),
        limit_bytes=None,
        shard_bytes=200_000,
        max_document_bytes=1_000_000,
    )


def test_the_standard_library_gives_conversations_of_all_kinds(tmp_path: Path) -> None:
    """With and without a system message, of one turn and of two, nothing malformed, all read."""
    shards = cut_into_shards(list_inputs(settings("stdlib-qa://email", "stdlib-qa://os")), 200_000)
    scratch = Scratch.of(tmp_path, 1_000_000)
    reading = ConversationReader("messages", "tools", 1_000_000)
    conversations = [
        conversation
        for shard in shards
        for file in scratch.fetch(shard)
        for conversation in reading.read(file)
    ]
    scratch.remove_all()
    assert reading.counts.rows_in == len(conversations) > 100
    kinds = Counter(
        (conversation.messages[0]["role"], len(conversation.messages))
        for conversation in conversations
    )
    assert set(kinds) == {("system", 3), ("system", 5), ("user", 2), ("user", 4)}
    said = [message["content"] for one in conversations for message in one.messages]
    assert any("`email.message.Message.get_payload`" in words for words in said)
    assert any("`os.makedirs`" in words for words in said)


def test_a_package_that_is_not_there_is_refused() -> None:
    """A typing error in stdlib-qa:// does not become an empty dataset."""
    with pytest.raises(InputError, match="nothing to read at stdlib-qa://jsn"):
        list_inputs(settings("stdlib-qa://jsn"))


def test_listing_the_questions_makes_none() -> None:
    """A module's size is that of its source, so that listing the library parses nothing."""
    files = list_inputs(settings("stdlib-qa://"))
    assert len(files) > 150
    parts = {part for file in files for part in file.name.removesuffix(".py.jsonl.gz").split("/")}
    assert not {part for part in parts if part.startswith("_")} - {"__init__"}
    assert not parts & {"test", "tests", "site-packages"}
    file = next(file for file in files if file.name == "json/decoder.py.jsonl.gz")
    assert source_of(file.url).stat(file.url) == (file.size_bytes, file.version)
