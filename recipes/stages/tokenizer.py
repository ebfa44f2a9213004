"""The tokenizer of a dataset: trained from a sample of its input, or loaded; then kept beside it.

``tokenizer.json`` in the output directory is what every worker loads and what a training run will
need. A trained one depends on nothing but the input and the settings.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.errors import TokenizerError
from recipes.settings import AtLeast, Count, Text
from recipes.stages.documents import DocumentReader
from recipes.stages.layout import OutputLayout, write_whole
from recipes.stages.receipts import hash_file
from recipes.stages.rows import LocalFile, RowCounts
from recipes.stages.scratch import Scratch
from recipes.stages.shards import InputSlice, Shard, fingerprint
from recipes.stages.sources import InputSettings

__all__ = [
    "DocumentEncoder",
    "PreparedTokenizer",
    "TextReader",
    "TokenizerMaker",
    "TokenizerSettings",
    "load",
    "load_prepared",
]

#: The trained vocabulary holds the 256 bytes and the end-of-document token at least.
_SMALLEST_VOCABULARY = 257
#: The sample is spread over at least this many slices, where the input has as many.
_SAMPLED_SLICES = 32
#: Documents handed to the tokenizer at once.
_BATCH_DOCUMENTS = 32
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class TokenizerSettings:
    """Where the tokenizer comes from."""

    source: Text
    vocab_size: Annotated[int, AtLeast(_SMALLEST_VOCABULARY)]
    sample_bytes: Count
    eod_token: Text

    @property
    def trained(self) -> bool:
        """Whether the tokenizer is trained here, from the input."""
        return self.source == "train"

    def idle_keys(self) -> dict[str, str]:
        """Return the keys that change nothing beside another, each with the other one."""
        trained_only = ("tokenizer.vocab_size", "tokenizer.sample_bytes")
        return {} if self.trained else dict.fromkeys(trained_only, "tokenizer.source")


@dataclass(frozen=True)
class PreparedTokenizer:
    """A tokenizer that lies ready in the output directory."""

    path: Path
    xxh64: str
    #: One more than the highest token id.
    vocabulary_size: int
    eod_id: int


class TextReader(Protocol):
    """Reads the texts that a tokenizer is trained from."""

    @property
    def counts(self) -> RowCounts:
        """Where the rows went that were read."""
        ...

    def read(self, file: LocalFile) -> Iterator[str]:
        """Yield the texts of a file."""
        ...


class DocumentEncoder:
    """Turns texts into token ids, with the end-of-document token behind each.

    A special token's name that occurs in a text is text: a document that talks about
    ``<|endoftext|>`` does not end there.
    """

    def __init__(self, tokenizer: PreparedTokenizer) -> None:
        # One worker is one core; the library would otherwise take all cores for each of them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._eod_id = tokenizer.eod_id
        self._tokenizer = load_prepared(tokenizer)
        self._tokenizer.encode_special_tokens = True

    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the token ids of each text; a text without any token gives an empty list."""
        batch: list[str] = []
        for text in texts:
            batch.append(text)
            if len(batch) == _BATCH_DOCUMENTS:
                yield from self._encode_batch(batch)
                batch = []
        yield from self._encode_batch(batch)

    def _encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield [*encoding.ids, self._eod_id] if encoding.ids else []


@dataclass(frozen=True)
class TokenizerMaker:
    """Makes the tokenizer of a dataset, the same one from the same input and settings.

    A recipe whose rows are no documents says in a subclass how they are read, and which special
    tokens they need beside the one that ends a document.
    """

    settings: TokenizerSettings
    inputs: InputSettings
    shards: Sequence[Shard]

    def fingerprint(self) -> str:
        """Return what must be the same for a stored tokenizer to be the one that is wanted."""
        if not self.settings.trained:
            path = _tokenizer_file(self.settings.source)
            return fingerprint(
                [self.settings.source, path and hash_file(path).xxh64, *self.special_tokens()]
            )
        return fingerprint(
            [
                self.settings.vocab_size,
                self.settings.eod_token,
                *self.special_tokens(),
                *self.how_texts_are_read(),
                [[piece.identity(), taken_bytes] for piece, taken_bytes in self._sample()],
            ]
        )

    def special_tokens(self) -> tuple[str, ...]:
        """Return the tokens that are made special, or added where the tokenizer lacks them."""
        return ()

    def how_texts_are_read(self) -> list[object]:
        """Return the settings that decide which texts :meth:`text_reader` gives."""
        return [self.inputs.text_field, self.inputs.max_document_bytes]

    def text_reader(self) -> TextReader:
        """Return what reads the texts to train from."""
        return DocumentReader(self.inputs.text_field, self.inputs.max_document_bytes)

    def prepare(
        self,
        layout: OutputLayout,
        scratch: Scratch,
        stored_xxh64: str | None,
        announce: Callable[[str], None],
    ) -> PreparedTokenizer:
        """Lay the tokenizer into the output directory, and return what the workers need to know.

        Args:
            layout: The output directory.
            scratch: Where the sample is fetched to.
            stored_xxh64: The hash of the tokenizer that an earlier start made with the same
                fingerprint; it is used again if it still lies there unharmed.
            announce: Is told what is done where it takes its time.

        Raises:
            TokenizerError: It cannot be loaded, or the input holds nothing to train from.
        """
        path = layout.tokenizer
        if stored_xxh64 is None or not path.is_file() or hash_file(path).xxh64 != stored_xxh64:
            announce(f"{'Training' if self.settings.trained else 'Loading'} the tokenizer …")
            made = self._train(scratch) if self.settings.trained else load(self.settings.source)
            made.add_special_tokens(list(self.special_tokens()))
            write_whole(path, made.to_str(pretty=True).encode())
        tokenizer = load(str(path))
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        eod_id = vocabulary.get(self.settings.eod_token)
        if eod_id is None:
            raise TokenizerError(_no_eod_message(self.settings, tokenizer))
        return PreparedTokenizer(path, hash_file(path).xxh64, max(vocabulary.values()) + 1, eod_id)

    def _train(self, scratch: Scratch) -> Tokenizer:
        """Train a byte-level BPE: every text can be told in its tokens, and told back."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.settings.vocab_size,
            special_tokens=list(dict.fromkeys([self.settings.eod_token, *self.special_tokens()])),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        reader = self.text_reader()
        tokenizer.train_from_iterator(self._sampled_texts(reader, scratch), trainer)
        counts = reader.counts
        left_out = counts.filtered + counts.errors
        if counts.rows_in == left_out.total():
            raise TokenizerError(
                f"the input holds no document to train a tokenizer from: {counts.rows_in} rows "
                f"read, left out: {dict(left_out)}"
            )
        return tokenizer

    def _sampled_texts(self, reader: TextReader, scratch: Scratch) -> Iterator[str]:
        for piece, taken_bytes in self._sample():
            sample = Shard("sample", (piece,))
            for file in scratch.fetch(sample, front_bytes=taken_bytes):
                yield from reader.read(file)
            scratch.remove(sample)

    def _sample(self) -> list[tuple[InputSlice, int]]:
        """Choose slices, in an order that is as good as random but always the same.

        Of a large slice only the front is taken, so that many slices contribute.
        """
        pieces = [piece for shard in self.shards for piece in shard.slices]
        pieces.sort(key=lambda piece: fingerprint([piece.file.name, piece.start]))
        share_bytes = max(self.settings.sample_bytes // min(_SAMPLED_SLICES, len(pieces)), 1)
        chosen: list[tuple[InputSlice, int]] = []
        left_bytes = self.settings.sample_bytes
        for piece in pieces:
            if left_bytes <= 0:
                break
            chosen.append((piece, min(piece.size_bytes, share_bytes)))
            left_bytes -= chosen[-1][1]
        return chosen


def load_prepared(tokenizer: PreparedTokenizer) -> Tokenizer:
    """Load the tokenizer of an output directory, for its tokens alone: no padding, no cutting.

    Raises:
        TokenizerError: It is not the one that was laid there.
    """
    loaded = load(str(tokenizer.path))
    loaded.no_padding()
    loaded.no_truncation()
    if (found := hash_file(tokenizer.path).xxh64) != tokenizer.xxh64:
        raise TokenizerError(
            f"{tokenizer.path} changed while the pipeline ran ({found} ≠ {tokenizer.xxh64})"
        )
    return loaded


def load(source: str) -> Tokenizer:
    """Load a tokenizer from a ``tokenizer.json``, a directory that holds one, or the hub.

    Raises:
        TokenizerError: There is none, or it cannot be read.
    """
    path = _tokenizer_file(source)
    if path is not None:
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:
            raise TokenizerError(f"{path} is no tokenizer.json: {error}") from error
    if not _HUB_ID.fullmatch(source) or source.endswith(".json"):
        raise TokenizerError(
            f"tokenizer.source={source}: no such file; allowed: train, the path of a "
            "tokenizer.json, or the id of a tokenizer on the Hugging Face hub"
        )
    try:
        return Tokenizer.from_pretrained(source)
    except Exception as error:
        raise TokenizerError(
            f"tokenizer.source={source}: no such file here, and it cannot be loaded from the "
            f"Hugging Face hub: {(str(error).splitlines() or [repr(error)])[0]}"
        ) from error


def _tokenizer_file(source: str) -> Path | None:
    path = Path(source).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    return path if path.is_file() else None


def _no_eod_message(settings: TokenizerSettings, tokenizer: Tokenizer) -> str:
    special = sorted(
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    )
    nearest = difflib.get_close_matches(settings.eod_token, special, n=1, cutoff=0)
    hint = (
        f"its special tokens: {', '.join(special[:12])}" if special else "it has no special token"
    )
    example = f"; for example 'tokenizer.eod_token={nearest[0]}'" if nearest else ""
    return f"tokenizer.eod_token={settings.eod_token} is not in the vocabulary; {hint}{example}"
