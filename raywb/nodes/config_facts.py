"""What a run's metadata takes from its own config: the model, and how the job runs.

The config may be OmegaConf's, with interpolations that fail and values that are missing
(``???``): those are left out, and only what is taken is looked at, so that no other resolver
runs. The result holds plain dicts, lists and scalars only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raywb.values import MAX_CONFIG_DEPTH, plain

__all__ = ["config_facts"]

#: Keys of ``cfg.model`` that are taken as they are; ``engine_kwargs`` is taken in part.
MODEL_KEYS = ("model_source", "engine_kwargs", "batch_size", "concurrency")

#: Keys of ``cfg.model.engine_kwargs`` that decide speed and memory of the engine.
ENGINE_KEYS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "dtype",
    "kv_cache_dtype",
)

#: Keys of ``cfg.runtime`` that are taken, beside every ``use_llm_*`` and every ``*keyword*``.
RUNTIME_KEYS = (
    "debug",
    "sample_n",
    "job_memory_gb",
    "rows_per_block",
    "streaming_io",
    "prefilter_mode",
)

#: What OmegaConf writes for a mandatory value that nobody gave.
_MISSING = "???"

#: In the place of a value that is missing, or that failed.
_ABSENT = object()


def config_facts(cfg: Any) -> dict[str, dict[str, Any]]:
    """The sections ``model`` and ``runtime`` of a run's metadata; only what is there.

    Args:
        cfg: an OmegaConf or Hydra config, a mapping, or None; anything else has no sections.
    """
    model = _taken(_get(cfg, "model"), MODEL_KEYS.__contains__)
    engine = _taken(model.pop("engine_kwargs", None), ENGINE_KEYS.__contains__)
    if engine:
        model["engine_kwargs"] = engine
    runtime = _taken(_get(cfg, "runtime"), _is_runtime_key)
    sections = {"model": model, "runtime": runtime}
    return {name: plain(section) for name, section in sections.items() if section}


def _is_runtime_key(key: str) -> bool:
    return key in RUNTIME_KEYS or key.startswith("use_llm_") or "keyword" in key


def _taken(section: Any, is_taken: Callable[[str], bool]) -> dict[str, Any]:
    """A section's own keys that are taken, with resolved values."""
    return dict(_entries(section, is_taken, 0)) if isinstance(section, Mapping) else {}


def _entries(
    section: Mapping[Any, Any], is_taken: Callable[[str], bool], depth: int
) -> Iterator[tuple[str, Any]]:
    for key in _keys(section):
        if is_taken(str(key)):
            value = _resolved(_get(section, key), depth + 1)
            if value is not _ABSENT:
                yield str(key), value


def _resolved(value: Any, depth: int) -> Any:
    """The value with its own missing and failing parts left out."""
    if depth > MAX_CONFIG_DEPTH or (isinstance(value, str) and value == _MISSING):
        return _ABSENT
    if isinstance(value, Mapping):
        return dict(_entries(value, lambda key: True, depth))
    if isinstance(value, (list, tuple)) or _is_omegaconf(value):
        items = (_resolved(_get(value, place), depth + 1) for place in range(_length(value)))
        return [item for item in items if item is not _ABSENT]
    return value


def _get(node: Any, key: Any) -> Any:
    if not isinstance(node, (Mapping, list, tuple)) and not _is_omegaconf(node):
        return _ABSENT
    try:
        return node[key]
    except _failures(node):
        return _ABSENT


def _keys(node: Mapping[Any, Any]) -> list[Any]:
    try:
        return list(node)
    except _failures(node):
        return []


def _length(node: Any) -> int:
    try:
        return len(node)
    except _failures(node):
        return 0


def _is_omegaconf(node: Any) -> bool:
    return type(node).__module__.partition(".")[0] == "omegaconf"


def _failures(node: Any) -> tuple[type[Exception], ...]:
    """What asking a node for a key may raise: it has none, it is missing, it cannot be resolved."""
    if not _is_omegaconf(node):
        return (LookupError,)
    from omegaconf.errors import OmegaConfBaseException

    # A config that is null or missing as a whole is no container, and OmegaConf's own message for
    # that fails with an AttributeError.
    return (OmegaConfBaseException, LookupError, TypeError, ValueError, AttributeError)
