"""From rows to conversations; what cannot become one is counted by kind, and nothing raises.

    row          a JSONL line, or a row of a Parquet file, with ``messages`` and perhaps ``tools``
    kept         its tokens go into a pack
    filtered     empty · too_long
    errors       broken_json · broken_tools · corrupt_… · missing_content · no_assistant_turn ·
                 no_messages · template_mismatch · template_refused · undecodable · unknown_role

rows in = kept + filtered + errors, for every shard. ``too_long`` are rows that are too large to be
read, and conversations that do not fit into a pack; ``empty`` are those in which no assistant says
anything. A template refuses a conversation, or leaves no telling what the assistant wrote, only
when it is encoded, and is counted there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes.sft.turns import Conversation
from recipes.stages.rows import LocalFile, RowCounts, RowReader

__all__ = ["ROLES", "ConversationReader", "ConversationTexts"]

#: Who may speak.
ROLES = ("assistant", "developer", "system", "tool", "user")


class _Unusable(Exception):
    """Says as which kind a row is counted."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass
class ConversationReader:
    """Reads the conversations of one shard, and keeps count of its rows.

    Args:
        messages_field: Which field of a row holds the messages.
        tools_field: Which field holds the tools, where a row has any.
        max_row_bytes: Longer rows are left out unparsed.
    """

    messages_field: str
    tools_field: str
    max_row_bytes: int
    counts: RowCounts = field(default_factory=RowCounts)

    def read(self, file: LocalFile) -> Iterator[Conversation]:
        """Yield the conversations of a file."""
        rows = RowReader(self.max_row_bytes, self.counts, not_an_object="no_messages")
        for row in rows.read(file):
            try:
                yield self._conversation(row)
            except _Unusable as reason:
                if reason.kind == "empty":
                    self.counts.filtered["empty"] += 1
                else:
                    self.counts.errors[reason.kind] += 1

    def _conversation(self, row: Mapping[str, Any]) -> Conversation:
        messages = _parsed(row.get(self.messages_field), "no_messages")
        if not isinstance(messages, list) or not messages:
            raise _Unusable("no_messages")
        tools = _parsed(row.get(self.tools_field), "broken_tools") or []
        if not isinstance(tools, list):
            raise _Unusable("broken_tools")
        checked = tuple(_message(message) for message in messages)
        answers = [message for message in checked if message["role"] == "assistant"]
        if not answers:
            raise _Unusable("no_assistant_turn")
        if not any(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
            raise _Unusable("empty")
        try:
            json.dumps([checked, tools], ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:  # half a surrogate pair: valid JSON, but no text
            raise _Unusable("undecodable") from error
        except (TypeError, ValueError, RecursionError) as error:  # a Parquet column of other types
            raise _Unusable("undecodable") from error
        return Conversation(checked, tuple(tools))


@dataclass(frozen=True)
class ConversationTexts:
    """Everything that is said in conversations, for a tokenizer to be trained from."""

    conversations: ConversationReader

    @property
    def counts(self) -> RowCounts:
        """Where the rows went that were read."""
        return self.conversations.counts

    def read(self, file: LocalFile) -> Iterator[str]:
        """Yield the contents of a file's messages."""
        for conversation in self.conversations.read(file):
            for message in conversation.messages:
                yield message["content"]


def _parsed(value: Any, kind: str) -> Any:
    """Return a field's value; one that was stored as JSON in a text is parsed."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _Unusable(kind) from error


def _message(message: Any) -> dict[str, Any]:
    """Return a message with its content as one text, or say what is wrong with it."""
    if not isinstance(message, Mapping):
        raise _Unusable("no_messages")
    if message.get("role") not in ROLES:
        raise _Unusable("unknown_role")
    content = _text(message.get("content"))
    if content is None and message.get("tool_calls"):
        content = ""
    if content is None:
        raise _Unusable("missing_content")
    # A Parquet file has every key in every message: one without a value is not there.
    there = {key: value for key, value in message.items() if value is not None}
    return {**there, "content": content}


def _text(content: Any) -> str | None:
    """Return a content's text: it is one, or a list of parts that are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type") != "text":
            return None
        texts.append(text)
    return "".join(texts)
