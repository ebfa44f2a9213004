"""What lies where in an output directory, and how a file gets there whole.

    OUTPUT_DIR/
      shards/shard-00000.*             the tokens, in files of the recipe's kind
      receipts/shard-00000.json        what went into the shard; written last: no receipt, no shard
      tokenizer.json                   the tokenizer that made the tokens
      chat_template.jinja              the template of its conversations, where it has any
      manifest.json                    the settings that made this directory
      blend.json                       what a training run reads: finished shards and their weights
      checkpoints/step-00000100/       what a training goes on from (``recipes/training``)
      run.json                         the W&B run of that training, gone on with by the next start
      logs/                            what Ray and cosmos-xenna had to say

Nothing else builds a path in it. A file is written under a temporary name, flushed to the disk and
then renamed, so that under its own name it is either whole or not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.errors import OutputError

__all__ = ["OutputLayout", "replace_file", "temporary_name", "write_json", "write_whole"]

#: Marks a file that is still being written; what is left of it after a kill is swept away.
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class OutputLayout:
    """Names every file of an output directory."""

    root: Path

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that made the tokens."""
        return self.root / "tokenizer.json"

    @property
    def chat_template(self) -> Path:
        """The chat template that the conversations of a fine-tuning dataset went through."""
        return self.root / "chat_template.jinja"

    @property
    def manifest(self) -> Path:
        """The settings that made this directory."""
        return self.root / "manifest.json"

    @property
    def blend(self) -> Path:
        """The finished shards and their weights."""
        return self.root / "blend.json"

    @property
    def checkpoints(self) -> Path:
        """What a training goes on from."""
        return self.root / "checkpoints"

    @property
    def run_record(self) -> Path:
        """Which W&B run the training of this directory belongs to."""
        return self.root / "run.json"

    @property
    def logs(self) -> Path:
        """Where the noise of Ray and cosmos-xenna goes."""
        return self.root / "logs"

    @property
    def shards(self) -> Path:
        """Where the shards lie."""
        return self.root / "shards"

    @property
    def receipts(self) -> Path:
        """Where the receipts lie."""
        return self.root / "receipts"

    def shard_prefix(self, shard: str) -> Path:
        """The path of a shard's files without their endings, as Megatron names a dataset."""
        return self.shards / shard

    def shard_file(self, shard: str, ending: str) -> Path:
        """One file of a shard."""
        return self.shards / f"{shard}{ending}"

    def receipt(self, shard: str) -> Path:
        """The receipt of a shard."""
        return self.receipts / f"{shard}.json"

    def create(self) -> None:
        """Make the directories.

        Raises:
            OutputError: One of them cannot be made.
        """
        try:
            for folder in (self.shards, self.receipts, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"output_dir={self.root} cannot be used: {error.strerror}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; a kill frees it.

        Raises:
            OutputError: Another recipe is writing to it.
        """
        self.create()
        with (self.root / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"another recipe is writing to {self.root}; wait for its end, "
                    "or set another output_dir"
                ) from error
            yield

    def sweep_temporary_files(self) -> int:
        """Remove what a killed run left half-written, and return how many files that were."""
        left_over = [
            path
            for folder in (self.root, self.shards, self.receipts)
            for path in folder.glob(f"*{_TEMPORARY}*")
        ]
        for path in left_over:
            path.unlink(missing_ok=True)
        return len(left_over)

    def shard_names(self) -> set[str]:
        """Return the shards that have a receipt or a data file here."""
        files = [*self.shards.glob("shard-*.*"), *self.receipts.glob("shard-*.json")]
        return {path.name.partition(".")[0] for path in files if _TEMPORARY not in path.name}

    def count_receipts(self) -> int:
        """Return how many shards have a receipt."""
        return sum(1 for _ in self.receipts.glob("shard-*.json"))

    def remove_shard(self, shard: str) -> None:
        """Remove a shard: its receipt first, so that it is never counted as done without data."""
        for path in (self.receipt(shard), *self.shards.glob(f"{shard}.*")):
            path.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return a name beside ``path`` that no other process or attempt uses."""
    return path.with_name(f"{path.name}{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")


def replace_file(temporary: Path, path: Path) -> None:
    """Give a written and flushed file its own name, and make the name last too."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all; the same content gives the same bytes."""
    write_whole(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
