"""Settings of a recipe: YAML plus ``key=value`` words, checked into frozen dataclasses.

    default.yaml  ←  tiny.yaml or FILE.yaml  ←  key=value …      the later one wins

``default.yaml`` names every key, so it is the one place where a default is written down.
A dataclass per section says what each key may hold; :func:`load_settings` refuses everything
else by its full name: an unknown key with the nearest one that exists, a wrong value with what
is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from recipes.errors import SettingsError

__all__ = [
    "AtLeast",
    "Count",
    "NotEmpty",
    "Text",
    "load_settings",
    "settings_as_dict",
    "switched_off",
]

SettingsT = TypeVar("SettingsT")

#: How alike two keys must be (0–1) for one to be offered in place of the other.
_SIMILAR_ENOUGH = 0.6


@dataclass(frozen=True)
class AtLeast:
    """A number must not be lower than this."""

    lowest: int

    def allows(self, value: Any) -> bool:
        """Say whether the value may be used."""
        return bool(value >= self.lowest)

    def __str__(self) -> str:
        return f"{self.lowest} or more"


@dataclass(frozen=True)
class NotEmpty:
    """A text or a list must hold something."""

    def allows(self, value: Any) -> bool:
        """Say whether the value may be used."""
        return len(value) > 0

    def __str__(self) -> str:
        return "not empty"


Count = Annotated[int, AtLeast(1)]
Text = Annotated[str, NotEmpty()]


def load_settings(
    kind: type[SettingsT], folder: Path, config: str, overrides: Sequence[str] = ()
) -> SettingsT:
    """Read a recipe's settings and return them checked.

    Args:
        kind: The dataclass of the whole recipe.
        folder: Where the recipe's ``default.yaml`` and its other named files lie.
        config: The name of a YAML file in that folder (``default``, ``tiny``), or the path of one.
        overrides: ``key=value`` words, dotted for nested keys.

    Raises:
        SettingsError: Something is unknown, missing, or cannot be used; the message says what.
    """
    known = dict(_leaves(kind))
    layers = [_read_yaml(folder / "default.yaml", kind)]
    given: dict[str, int] = {}
    if config != "default":
        path = _find(folder, config)
        layers.append(_read_yaml(path, kind))
        if path.parent != folder:
            given = dict.fromkeys(_dotted(OmegaConf.to_container(layers[-1], resolve=False)), 1)
    merged = OmegaConf.merge(*layers)
    for word in overrides:
        key, value = _parse_override(word, known)
        OmegaConf.update(merged, key, value)
        given[key] = 2
    try:
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SettingsError(f"{error.full_key or config}: {_first_line(error)}") from error
    settings: SettingsT = _convert(plain, kind, "")
    _refuse_idle_keys(settings, given)
    return settings


def settings_as_dict(settings: Any) -> dict[str, Any]:
    """Return the settings as nested dicts and lists, for ``run.config`` and for manifests."""
    plain: dict[str, Any] = dataclasses.asdict(settings)
    return _lists_for_tuples(plain)  # type: ignore[no-any-return]


def switched_off(name: str, section: Any) -> dict[str, str]:
    """Return the keys of a section whose ``enabled`` is false: they change nothing beside it.

    Args:
        name: The section's.
        section: Its dataclass.
    """
    switch = f"{name}.enabled"
    keys = dict(_leaves(type(section), f"{name}."))
    return {key: switch for key in keys if key != switch}


def _find(folder: Path, config: str) -> Path:
    """Return the file that is meant by a name or a path."""
    if "/" in config or config.endswith((".yaml", ".yml")):
        return Path(config)
    path = folder / f"{config}.yaml"
    if not path.is_file():
        choices = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise SettingsError(
            f"there is no configuration called {config!r}; "
            f"allowed: {choices}, or the path of a YAML file"
        )
    return path


def _read_yaml(path: Path, kind: type) -> DictConfig:
    """Read one YAML file, refusing keys that the recipe does not know."""
    try:
        loaded = OmegaConf.load(path)
        plain = OmegaConf.to_container(loaded, resolve=False)
    except (OSError, YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise SettingsError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(plain, dict) or not isinstance(loaded, DictConfig):
        raise SettingsError(f"{path} must hold keys and values, not a list")
    _refuse_unknown(plain, kind, "", where=str(path))
    return loaded


def _parse_override(word: str, known: Mapping[str, Any]) -> tuple[str, Any]:
    """Split ``key=value``; the key's type decides how the value is read.

    A key that holds text takes the value as it stands, so that ``wandb.group=007`` is not seven.
    """
    key, equals, raw = word.partition("=")
    if not equals:
        raise SettingsError(f"{word!r} is no setting; write key=value, for example output_dir=out")
    if key not in known:
        raise SettingsError(_unknown_message(key, known, where="on the command line"))
    if _takes_text(known[key]) and raw not in ("null", "~") and not raw.startswith("${"):
        return key, raw
    try:
        return key, OmegaConf.from_dotlist([f"value={raw}"]).value
    except (YAMLError, OmegaConfBaseException) as error:
        raise SettingsError(
            f"{key}: cannot read the value {raw!r}: {_first_line(error)}"
        ) from error


def _refuse_unknown(plain: Mapping[Any, Any], kind: type, prefix: str, where: str) -> None:
    """Refuse the first key, at any depth, that the dataclass does not have."""
    hints = get_type_hints(kind, include_extras=True)
    for name, value in plain.items():
        key = f"{prefix}{name}"
        if name not in hints:
            known = dict(_leaves(kind, prefix))
            raise SettingsError(_unknown_message(key, known, where=f"in {where}"))
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            _refuse_unknown(value, hints[name], f"{key}.", where)


def _unknown_message(key: str, known: Mapping[str, Any], where: str) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=_SIMILAR_ENOUGH)
    if not nearest:  # a key given without its section, or in the wrong one
        last = key.rpartition(".")[2]
        by_name = {name.rpartition(".")[2]: name for name in known}
        nearest = [
            by_name[near] for near in difflib.get_close_matches(last, by_name, 1, _SIMILAR_ENOUGH)
        ]
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"allowed: {', '.join(sorted(known))}"
    return f"unknown key {key!r} {where}; {hint}"


def _refuse_idle_keys(settings: Any, given: Mapping[str, int]) -> None:
    """Refuse a key that was set on purpose and changes nothing beside another one.

    Not so where the other one was set later: ``my.yaml tokenizer.source=t.json`` may well replace
    the training that ``my.yaml`` describes in detail.

    Args:
        settings: May have ``idle_keys()``: which keys change nothing, each with the cause.
        given: The keys that were set on purpose, each with its layer: 1 the file, 2 the words.
    """
    idle: Mapping[str, str] = settings.idle_keys() if hasattr(settings, "idle_keys") else {}
    for key, cause in sorted(idle.items()):
        if given.get(key, 0) >= max(given.get(cause, 0), 1):
            value = functools.reduce(getattr, cause.split("."), settings)
            raise SettingsError(f"{key} has no effect beside {cause}={value}; leave it out")


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Return the value as the type says, or refuse it by name."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _convert_section(value, hint, key)
    try:
        return _convert_value(value, hint)
    except ValueError as error:
        raise SettingsError(f"{key}={value!r} cannot be used; allowed: {_allowed(hint)}") from error


def _convert_value(value: Any, hint: Any) -> Any:
    """Return the value as the type says; anything else is a ValueError."""
    if get_origin(hint) is Annotated:
        base, *rules = get_args(hint)
        converted = _convert_value(value, base)
        if all(rule.allows(converted) for rule in rules):
            return converted
    elif get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not types.NoneType]
        return None if value is None else _convert_value(value, options[0])
    elif get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) and item for item in items):
            return tuple(items)
    elif get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
    elif type(value) is hint or (hint is float and type(value) is int):
        return hint(value)
    raise ValueError(value)


def _convert_section(value: Any, kind: type, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise SettingsError(f"{key}={value!r} cannot be used; allowed: {_allowed(kind)}")
    prefix = f"{key}." if key else ""
    hints = get_type_hints(kind, include_extras=True)
    return kind(
        **{name: _convert(value[name], hint, prefix + name) for name, hint in hints.items()}
    )


def _allowed(hint: Any) -> str:
    """Say in words what a key may hold."""
    if get_origin(hint) is Annotated:
        base, *rules = get_args(hint)
        return ", ".join([_allowed(base), *map(str, rules)])
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not types.NoneType]
        return f"{_allowed(options[0])}, or null"
    if get_origin(hint) is Literal:
        return ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return "a text or a list of texts"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint, "a section with keys of its own")


def _takes_text(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _takes_text(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return any(_takes_text(option) for option in get_args(hint))
    return hint is str


def _leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key that holds a value, dotted, with its type."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _leaves(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def _dotted(plain: Any, prefix: str = "") -> Iterator[str]:
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _lists_for_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists_for_tuples(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
