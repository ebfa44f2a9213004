"""The manifest says with which settings an output directory was made.

A start with other settings is refused by naming them, so that a typing error never replaces a
dataset. ``overwrite=true`` says that it shall be replaced: shard by shard, as the new ones are
finished, and without a blend until all of them are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.errors import OutputError
from recipes.stages.layout import OutputLayout, write_json

__all__ = ["Manifest", "claim"]

_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What made an output directory."""

    #: Every setting that decides what the output holds, by section.
    settings: dict[str, Any]
    tokenizer_fingerprint: str
    tokenizer_xxh64: str | None = None
    version: int = _VERSION

    def write(self, layout: OutputLayout) -> None:
        """Write the manifest."""
        write_json(layout.manifest, dataclasses.asdict(self))


def claim(layout: OutputLayout, wanted: Manifest, overwrite: bool) -> Manifest:
    """Return the manifest to go on with: the stored one if it fits, otherwise the wanted one.

    Args:
        layout: The output directory; the caller holds its lock.
        wanted: What this start asks for.
        overwrite: Replace what is there, whatever made it.

    Raises:
        OutputError: The directory holds shards that were made in another way.
    """
    layout.sweep_temporary_files()
    stored = _read(layout)
    fits = stored is not None and _differences(stored, wanted) == []
    if not fits and not overwrite and layout.shard_names():
        raise OutputError(_refusal(layout, stored, wanted))
    layout.blend.unlink(missing_ok=True)  # it stands for a finished directory
    return stored if fits and stored is not None else wanted


def _read(layout: OutputLayout) -> Manifest | None:
    try:
        raw = json.loads(layout.manifest.read_bytes())
        manifest = Manifest(**raw)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    known = manifest.version == _VERSION and isinstance(manifest.settings, dict)
    return manifest if known else None


def _differences(stored: Manifest, wanted: Manifest) -> list[str]:
    before, after = dict(_flat(stored.settings)), dict(_flat(wanted.settings))
    changed = [
        f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if not changed and stored.tokenizer_fingerprint != wanted.tokenizer_fingerprint:
        changed = [
            "its tokenizer would now be another, as the input or the tokenizer's file changed"
        ]
    return changed


def _refusal(layout: OutputLayout, stored: Manifest | None, wanted: Manifest) -> str:
    if stored is None:
        why = "holds shards, but no manifest.json that says how they were made"
    else:
        why = "was made differently: " + "; ".join(_differences(stored, wanted))
    return (
        f"{layout.root} {why}. Set another output_dir, or overwrite=true to replace what is there"
    )


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
