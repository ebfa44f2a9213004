"""Every setting changes something or is refused by name, and the message says what is allowed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

import recipes.pretrain
from raywb.xenna import XennaObservabilityConfig
from recipes.errors import SettingsError
from recipes.pretrain.data_prep import PretrainSettings
from recipes.settings import Count, NotEmpty, Text, load_settings, settings_as_dict
from recipes.tracking import ObservabilitySettings

PRETRAIN = Path(recipes.pretrain.__file__).parent


def load(config: str = "default", *overrides: str) -> PretrainSettings:
    return load_settings(PretrainSettings, PRETRAIN, config, overrides)


@pytest.fixture
def refused(tmp_path: Path):
    """Returns the message with which settings are refused."""

    def message(*overrides: str, file: str | None = None) -> str:
        config = "default"
        if file is not None:
            (tmp_path / "my.yaml").write_text(file)
            config = str(tmp_path / "my.yaml")
        with pytest.raises(SettingsError) as error:
            load(config, *overrides)
        return str(error.value)

    return message


def test_the_default_file_names_every_key() -> None:
    """default.yaml is the one place of defaults: it holds all keys, and no other."""
    file = OmegaConf.to_container(OmegaConf.load(PRETRAIN / "default.yaml"), resolve=False)
    assert _keys(file) == _keys(settings_as_dict(load()))


def _keys(plain: dict) -> set[str]:
    return {
        f"{name}.{key}" if key else name
        for name, value in plain.items()
        for key in (_keys(value) if isinstance(value, dict) else {""})
    }


def test_the_observability_section_is_raywbs() -> None:
    """The section's fields are those of raywb's config, no more and no fewer."""
    ours = [field.name for field in dataclasses.fields(ObservabilitySettings)]
    theirs = getattr(XennaObservabilityConfig, "__struct_fields__", None) or [
        field.name for field in dataclasses.fields(XennaObservabilityConfig)
    ]
    assert ours == list(theirs)


def test_later_layers_win(tmp_path: Path) -> None:
    """A file changes single keys of the default, and the command line single keys of the file."""
    path = tmp_path / "my.yaml"
    path.write_text("input: {shard_bytes: 7, text_field: body}\n")
    settings = load(str(path), "input.shard_bytes=8")
    assert (settings.input.shard_bytes, settings.input.text_field) == (8, "body")
    assert settings.input.format == "auto"


def test_tiny_is_smaller_than_the_default() -> None:
    """A name finds the recipe's own file."""
    assert load("tiny").input.limit_bytes is not None
    assert load("tiny").output_dir != load().output_dir


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("input.shard_byte=5", "did you mean 'input.shard_bytes'?"),
        ("shard_bytes=5", "did you mean 'input.shard_bytes'?"),
        ("tokenizer.vocabsize=5", "did you mean 'tokenizer.vocab_size'?"),
        ("nonsense=5", "allowed: input.exclude"),
        ("inptu.paths=x", "did you mean 'input.paths'?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(refused, word: str, hint: str) -> None:
    """A key that does not exist on the command line is named, with the one that was meant."""
    message = refused(word)
    assert message.startswith(f"unknown key {word.partition('=')[0]!r} on the command line")
    assert hint in message


def test_an_unknown_key_in_a_file_is_refused_at_any_depth(refused) -> None:
    """A key that does not exist in a file is named in full, with the file."""
    message = refused(file="input:\n  shard_byte: 5\n")
    assert "unknown key 'input.shard_byte' in " in message
    assert "my.yaml; did you mean 'input.shard_bytes'?" in message
    assert "unknown key 'inputs'" in refused(file="inputs: {}\n")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "input.shard_bytes=0",
            "input.shard_bytes=0 cannot be used; allowed: a whole number, 1 or",
        ),
        ("input.shard_bytes=many", "='many' cannot be used; allowed: a whole number, 1 or more"),
        ("input.shard_bytes=1.5", "=1.5 cannot be used; allowed: a whole number, 1 or more"),
        ("input.shard_bytes=true", "=True cannot be used; allowed: a whole number, 1 or more"),
        ("input.limit_bytes=-1", "allowed: a whole number, 1 or more, or null"),
        ("input.format=csv", "='csv' cannot be used; allowed: auto, text, jsonl, parquet"),
        (
            "input.paths=[]",
            "input.paths=[] cannot be used; allowed: a text or a list of texts, not",
        ),
        ("input.paths=[1]", "input.paths=[1] cannot be used; allowed: a text or a list of texts"),
        ("overwrite=1", "overwrite=1 cannot be used; allowed: true or false"),
        ("tokenizer.vocab_size=256", "allowed: a whole number, 257 or more"),
        ("wandb.mode=onlin", "allowed: online, offline, disabled, or null"),
        ("output_dir=", "output_dir='' cannot be used; allowed: text, not empty"),
        ("output_dir=null", "output_dir=None cannot be used"),
        ("workers.plan=0", "allowed: a whole number, 1 or more, or null"),
        ("input.paths=[a", "input.paths: cannot read the value '[a'"),
        ("tiny", "'tiny' is no setting; write key=value"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(refused, word: str, message: str) -> None:
    """The message names the key, the value and what is allowed."""
    assert message in refused(word)


def test_a_section_must_stay_a_section(refused) -> None:
    """A value in the place of a section, or a list in the place of the file, is refused."""
    assert "input=5 cannot be used; allowed: a section" in refused(file="input: 5\n")
    assert "must hold keys and values" in refused(file="- 5\n")


@pytest.mark.parametrize("file", ["input: [\n", "a: 1\na: 2\n", "output_dir: ${nowhere}\n"])
def test_a_file_that_cannot_be_understood_is_refused(refused, file: str) -> None:
    """Broken YAML, a key given twice, a reference to nothing: one sentence each."""
    assert refused(file=file)


def test_a_configuration_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    """An unknown name lists those that exist; a missing file is named."""
    with pytest.raises(SettingsError, match="called 'tinny'; allowed: default, tiny, or the path"):
        load("tinny")
    with pytest.raises(SettingsError, match=r"cannot read the configuration .*my\.yaml"):
        load(str(tmp_path / "my.yaml"))


def test_text_on_the_command_line_is_taken_as_it_stands() -> None:
    """What looks like a number, a truth or a list is text where text is wanted."""
    assert load("default", "wandb.group=007").wandb.group == "007"
    assert load("default", "output_dir=1e3").output_dir == "1e3"
    assert load("default", "wandb.entity=no").wandb.entity == "no"
    assert load("default", "tokenizer.eod_token=[END]").tokenizer.eod_token == "[END]"
    assert load("default", "output_dir=a=b").output_dir == "a=b"


def test_nothing_and_the_empty_group_are_different() -> None:
    """null leaves the group to the environment, an empty text means no group."""
    assert load("default", "wandb.group=null").wandb.group is None
    assert load("default", "wandb.group=").wandb.group == ""


def test_one_path_needs_no_brackets() -> None:
    """A single path and a list of paths are both taken."""
    assert load("default", "input.paths=/data").input.paths == ("/data",)
    assert load("default", "input.paths=[/a, /b]").input.paths == ("/a", "/b")


def test_a_key_that_would_change_nothing_is_refused(refused, tmp_path: Path) -> None:
    """A setting that another one makes idle is refused, unless the other one came later."""
    idle = "tokenizer.vocab_size has no effect beside tokenizer.source=t.json; leave it out"
    trained, loaded = "tokenizer: {vocab_size: 900}\n", "tokenizer: {source: t.json}\n"
    assert refused("tokenizer.source=t.json", "tokenizer.vocab_size=900") == idle
    assert refused("tokenizer.vocab_size=900", file=loaded) == idle
    assert refused(file="tokenizer: {source: t.json, vocab_size: 900}\n") == idle
    (tmp_path / "trained.yaml").write_text(trained)
    for config in (str(tmp_path / "trained.yaml"), "tiny", "default"):
        assert load(config, "tokenizer.source=t.json").tokenizer.source == "t.json"


@dataclass(frozen=True)
class Inner:
    """A section of a recipe that exists in this test only."""

    rate: float
    mode: Literal["a", "b"] | None


@dataclass(frozen=True)
class Outer:
    """Settings of another recipe: the loader knows no recipe by name."""

    inner: Inner
    count: Count
    note: Text | None


def test_any_recipe_may_use_the_loader(tmp_path: Path) -> None:
    """Settings are described by dataclasses alone."""
    (tmp_path / "default.yaml").write_text("{inner: {rate: 1, mode: null}, count: 2, note: x}")
    assert load_settings(Outer, tmp_path, "default", ["inner.rate=0.5", "inner.mode=b"]) == Outer(
        Inner(0.5, "b"), 2, "x"
    )
    assert str(NotEmpty()) == "not empty"
