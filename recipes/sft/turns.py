"""Where in a rendered conversation the assistant speaks: characters, before there are tokens.

What is learnt is what the model would have to write: from where the template's generation prompt
ends, up to and with the special token that ends the turn. White space that a template puts behind
that token is not learnt, as nobody generates it. Found, in this order:

1. by ``{% generation %}`` in the template: exactly what the template says;
2. by rendering step by step: the conversation up to the turn with the generation prompt, then with
   the turn; both must be the beginning of the whole text;
3. by sentinels around the turn's content, where a template rewrites what came before (Qwen3 leaves
   out earlier thoughts) or has a generation prompt that is in no finished conversation: then the
   content is learnt, and a special token behind it.

Where none of them holds, there is no mask that could be vouched for: :class:`TemplateMismatch`.

Only the template's own special tokens are special. One that a message spells out is text, and stays
text: the rendering names the places at which the tokenizer must not read on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.sft.chat_template import ChatTemplate, Message, TemplateRefusal

__all__ = ["Conversation", "Rendered", "TemplateMismatch", "render_turns"]

#: Signs that Unicode keeps free for uses like this one: no text should hold them, and no filter of
#: a template changes them.
_OPEN, _CLOSE, _GUARD, _BEGIN, _END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"


class TemplateMismatch(Exception):
    """Raised where it cannot be told which part of the text the assistant wrote."""


@dataclass(frozen=True)
class Conversation:
    """Messages with string contents, at least one of them an assistant's."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, in characters."""

    text: str
    #: Begin and end of each part to be learnt, in order, apart from each other.
    spans: tuple[tuple[int, int], ...]
    #: Places inside of words that only look like special tokens.
    cuts: tuple[int, ...] = ()


def render_turns(
    template: ChatTemplate, conversation: Conversation, special: re.Pattern[str] | None
) -> Rendered:
    """Render a conversation and find what is to be learnt of it.

    Args:
        template: The chat template.
        conversation: What was said.
        special: Matches the tokenizer's special tokens; None where it has none.

    Raises:
        TemplateRefusal: The template has no text for it.
        TemplateMismatch: It cannot be told which part of the text the assistant wrote.
    """
    strings = list(_strings([conversation.messages, conversation.tools]))
    guard, begin, end = _unused_marks(strings)
    if special is not None and any(special.search(text) for text in strings):
        conversation = Conversation(
            _mapped(conversation.messages, lambda text: _guarded(text, special, guard)),
            _mapped(conversation.tools, lambda text: _guarded(text, special, guard)),
        )
    turns = _Turns(template, conversation, special, (begin, end))
    text, spans = turns.marked() if template.marks_turns else turns.found()
    rendered = _unguarded(text, spans, guard)
    if guard.removesuffix(f"{_GUARD}{_CLOSE}") in rendered.text:
        raise TemplateMismatch("the template cut a message in a word that looks like special")
    return rendered


@dataclass(frozen=True)
class _Turns:
    """One conversation, rendered as often as it takes."""

    template: ChatTemplate
    conversation: Conversation
    special: re.Pattern[str] | None
    marks: tuple[str, str]

    def marked(self) -> tuple[str, list[tuple[int, int]]]:
        """Find the turns by the template's own marks."""
        text, spans = self._without_marks(self._render(marks=self.marks))
        if not spans:
            raise TemplateMismatch("the template's {% generation %} blocks hold nothing")
        return text, spans

    def found(self) -> tuple[str, list[tuple[int, int]]]:
        """Find the turns by rendering in parts, and where that does not do, by sentinels."""
        whole = self._render()
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(self.conversation.messages):
            if message["role"] == "assistant":
                span = self._added(whole, number) or self._enclosed(whole, number)
                if span is None or (spans and span[0] < spans[-1][1]):
                    raise TemplateMismatch(f"message {number} is not where it should be")
                spans.append(span)
        return whole, spans

    def _render(self, messages: Sequence[Message] | None = None, **options: Any) -> str:
        chosen = self.conversation.messages if messages is None else messages
        return self.template.render(list(chosen), list(self.conversation.tools), **options)

    def _added(self, whole: str, number: int) -> tuple[int, int] | None:
        """Return what a turn adds to the conversation before it."""
        messages = self.conversation.messages
        try:
            before = self._render(messages[:number], add_generation_prompt=True)
            after = whole
            if number + 1 < len(messages):
                after = self._render(messages[: number + 1])
        except TemplateRefusal:  # of a conversation that nobody had: its beginning alone
            return None
        if not (whole.startswith(after) and after.startswith(before)):
            return None
        end = len(after)
        if self.special is not None:
            *_, last = [None, *self.special.finditer(whole, len(before), end)]
            if last is not None and not whole[last.end() : end].strip():
                end = last.end()
        return (len(before), end) if end > len(before) else None

    def _enclosed(self, whole: str, number: int) -> tuple[int, int] | None:
        """Return where a turn's content is, and the special token behind it."""
        message = self.conversation.messages[number]
        content = str(message["content"])
        if message.get("tool_calls"):  # they are no part of the content
            return None
        begin, end = self.marks
        inside = content.strip()
        lead, inside_and_trail = content[: content.find(inside)], content[content.find(inside) :]
        trail = inside_and_trail[len(inside) :]
        candidates = [f"{begin}{content}{end}"]
        if lead or trail:  # a template that strips contents would take signs for the content's end
            candidates.append(f"{lead}{begin}{inside}{end}{trail}")
        for candidate in candidates:
            messages = list(self.conversation.messages)
            messages[number] = {**message, "content": candidate}
            try:
                text, spans = self._without_marks(self._render(messages))
            except (TemplateRefusal, TemplateMismatch):
                continue
            if text == whole and len(spans) == 1:
                return spans[0][0], self._end_of_turn(whole, spans[0][1])
        return None

    def _end_of_turn(self, whole: str, end: int) -> int:
        """Return where the special token behind a content ends, or the content if there is none."""
        spaces = len(whole[end:]) - len(whole[end:].lstrip())
        match = self.special.match(whole, end + spaces) if self.special is not None else None
        return match.end() if match is not None else end

    def _without_marks(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """Take the marks out of a text, and say where each pair of them was."""
        begin, end = self.marks
        first, *others = text.split(begin)
        plain, length = [first], len(first)
        spans = []
        for other in others:
            inside, found, behind = other.partition(end)
            if not found or end in behind:
                raise TemplateMismatch("the template moved the marks of a turn")
            spans.append((length, length + len(inside)))
            plain += [inside, behind]
            length += len(inside) + len(behind)
        if end in first:
            raise TemplateMismatch("the template moved the marks of a turn")
        return "".join(plain), spans


def _guarded(text: str, special: re.Pattern[str], guard: str) -> str:
    """Break every special token that a text spells out, behind its first character."""
    while special.search(text):
        text = special.sub(lambda found: f"{found[0][0]}{guard}{found[0][1:]}", text)
    return text


def _unguarded(text: str, spans: Sequence[tuple[int, int]], guard: str) -> Rendered:
    """Take the guards out of a text and remember where they were."""
    pieces = text.split(guard)
    cuts, length = [], 0
    for piece in pieces[:-1]:
        length += len(piece)
        cuts.append(length)

    def moved(place: int) -> int:
        return place - len(guard) * text.count(guard, 0, place)

    return Rendered(
        "".join(pieces), tuple((moved(begin), moved(end)) for begin, end in spans), tuple(cuts)
    )


def _unused_marks(strings: Sequence[str]) -> tuple[str, str, str]:
    """Return three marks that occur in none of the strings."""
    number = 0
    while any(f"{_OPEN}{number}" in text for text in strings):
        number += 1
    return (
        f"{_OPEN}{number}{_GUARD}{_CLOSE}",
        f"{_OPEN}{number}{_BEGIN}{_CLOSE}",
        f"{_OPEN}{number}{_END}{_CLOSE}",
    )


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in a nest of lists and mappings, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a nest of lists and mappings with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value
