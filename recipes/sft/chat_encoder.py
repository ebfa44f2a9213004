"""From a conversation to token ids and the mask that says which of them are learnt.

The text is tokenized as a whole, as ``transformers`` would, and a token is learnt if it lies
within the characters that the assistant wrote (``turns.py``). A token that would straddle the edge
of a turn is avoided: the text is then tokenized in two parts that meet there, as they do when a
model is served, where the prompt ends at that edge. Only for a tokenizer whose parts do not join
(SentencePiece puts a space in front of each) it stays one token, and is not learnt, so that nothing
of a prompt ever is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenizers import Tokenizer

from recipes.errors import TemplateError
from recipes.sft.chat_template import ChatTemplate, TemplateRefusal, TemplateSource
from recipes.sft.turns import Conversation, Rendered, TemplateMismatch, render_turns
from recipes.stages.tokenizer import PreparedTokenizer, load_prepared

__all__ = ["ChatEncoder", "EncodedConversation", "special_pattern"]

#: What every template must be able to render.
_TRIAL = ({"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day!"})
#: Token id, begin and end in characters of the text.
_Token = tuple[int, int, int]


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation in tokens."""

    input_ids: list[int]
    #: 1 where the token is to be predicted, otherwise 0; as long as ``input_ids``.
    loss_mask: list[int]


class ChatEncoder:
    """Turns conversations into tokens and masks."""

    def __init__(self, tokenizer: PreparedTokenizer, template: TemplateSource) -> None:
        # One worker is one core; the library would otherwise take all cores for each of them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tokenizer = load_prepared(tokenizer)
        # Why: ByteLevel's cuts spaces off the offsets of tokens that hold them; it adds no tokens
        # that a template does not add itself.
        self._tokenizer.post_processor = None
        self._template = ChatTemplate(template)
        self._special = special_pattern(self._tokenizer)
        self._parts_join = _parts_join(self._tokenizer)

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Return the tokens of a conversation.

        Raises:
            TemplateRefusal: The template has no text for it.
            TemplateMismatch: There is no telling what the assistant wrote, or no keeping a special
                token apart from a text that spells it out.
        """
        rendered = render_turns(self._template, conversation, self._special)
        if rendered.cuts and not self._parts_join:
            raise TemplateMismatch("a message spells out a special token")
        tokens = self._tokens(rendered.text, rendered.cuts)
        edges = _straddled(tokens, rendered)
        if edges and self._parts_join:
            tokens = self._tokens(rendered.text, sorted({*rendered.cuts, *edges}))
        return EncodedConversation([token for token, _, _ in tokens], _mask(tokens, rendered))

    def try_out(self) -> None:
        """Encode a question and an answer.

        Raises:
            TemplateError: The template cannot do even that; nothing would come of the input.
        """
        try:
            encoded = self.encode(Conversation(_TRIAL))
        except (TemplateRefusal, TemplateMismatch) as error:
            raise TemplateError(
                f"the chat template fails over a question and an answer: {error}"
            ) from error
        if not any(encoded.loss_mask):
            raise TemplateError(
                "the chat template cannot be used: of a question and an answer, no token is the "
                "assistant's"
            )

    def _tokens(self, text: str, cuts: Sequence[int]) -> list[_Token]:
        tokens: list[_Token] = []
        for begin, end in pairwise((0, *cuts, len(text))):
            encoding = self._tokenizer.encode(text[begin:end], add_special_tokens=False)
            tokens += [
                (token, begin + first, begin + last)
                for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True)
            ]
        return tokens


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return what matches a tokenizer's special tokens, or None where it has none."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, special))) if special else None


def _parts_join(tokenizer: Tokenizer) -> bool:
    """Say whether two parts of a text give, one behind the other, the text."""
    first, second, whole = (
        tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "b", "ab")
    )
    together: str = tokenizer.decode(first + second, skip_special_tokens=False)
    return together == tokenizer.decode(whole, skip_special_tokens=False)


def _straddled(tokens: Sequence[_Token], rendered: Rendered) -> list[int]:
    """Return the edges of turns that lie inside of a token."""
    edges = sorted({edge for span in rendered.spans for edge in span})
    found, k = [], 0
    for _, begin, end in tokens:
        while k < len(edges) and edges[k] <= begin:
            k += 1
        if k < len(edges) and begin < edges[k] < end:
            found.append(edges[k])
    return sorted(set(found))


def _mask(tokens: Sequence[_Token], rendered: Rendered) -> list[int]:
    """Return 1 for each token that lies within a span; both are in the order of the text."""
    mask, k = [], 0
    spans = rendered.spans
    for _, begin, end in tokens:
        while k < len(spans) and spans[k][1] <= begin:
            k += 1
        mask.append(int(k < len(spans) and spans[k][0] <= begin and end <= spans[k][1]))
    return mask
