"""What is taken from a config: from Hydra's, from OmegaConf's, from a plain dict."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from raywb.nodes.config_facts import ENGINE_KEYS, config_facts

MODEL = {
    "model_source": "org/model",
    "engine_kwargs": {key: index for index, key in enumerate(ENGINE_KEYS)} | {"seed": 1},
    "batch_size": 64,
    "concurrency": [1, 4],
    "api_key": "not taken",
}
RUNTIME = {
    "debug": False,
    "sample_n": None,
    "job_memory_gb": 32,
    "rows_per_block": 1000,
    "streaming_io": True,
    "use_llm_classify": True,
    "use_llm_topic": False,
    "prefilter_mode": "keyword",
    "keyword_buffer_size": 8,
    "max_keyword_rows": 9,
    "secret": "not taken",
}
TAKEN = {
    "model": {
        "model_source": "org/model",
        "engine_kwargs": {key: index for index, key in enumerate(ENGINE_KEYS)},
        "batch_size": 64,
        "concurrency": [1, 4],
    },
    "runtime": {key: value for key, value in RUNTIME.items() if key != "secret"},
}


class Precision(enum.Enum):
    BF16 = "bfloat16"


@dataclass
class Runtime:
    debug: bool = True
    sample_n: int = MISSING
    use_llm_stages: list[str] = field(default_factory=lambda: ["a", "b"])


@dataclass
class Config:
    runtime: Runtime = field(default_factory=Runtime)


def omegaconf_in(value: Any) -> bool:
    if isinstance(value, dict):
        return any(omegaconf_in(inner) for inner in value.values())
    if isinstance(value, list):
        return any(omegaconf_in(inner) for inner in value)
    return isinstance(value, (DictConfig, ListConfig)) or type(value) not in (
        *(str, int, float, bool, type(None)),
    )


@pytest.mark.parametrize("make", [dict, OmegaConf.create])
def test_what_is_taken(make: Any) -> None:
    """The named keys are taken from both sections, as plain values, and nothing else."""
    facts = config_facts(make({"model": MODEL, "runtime": RUNTIME, "wandb": {"project": "p"}}))
    assert facts == TAKEN
    assert not omegaconf_in(facts)


@pytest.mark.parametrize(
    "cfg",
    [
        None,
        {},
        {"model": None, "runtime": {}},
        {"model": "gpt", "runtime": ["debug"]},
        {"model": {"engine_kwargs": {"seed": 1}}, "runtime": {"secret": 1}},
        {"model": {"engine_kwargs": "fast", "other": 1}},
        OmegaConf.create({}),
        OmegaConf.create({"model": "???", "runtime": "${nowhere}"}),
        OmegaConf.create({"model": None}),
        OmegaConf.create([1, 2]),
        DictConfig(None),
        DictConfig("???"),
        ListConfig(None),
        "model",
        7,
        object(),
    ],
)
def test_configs_without_sections(cfg: Any) -> None:
    """Where a section is missing, empty or something else, it is left out."""
    assert config_facts(cfg) == {}


def test_values_that_are_missing_or_fail() -> None:
    """They are left out one by one, wherever they lie; all around them is taken."""
    OmegaConf.register_new_resolver("raywb_fails", lambda: 1 / 0, replace=True)
    model = {
        "model_source": "${nowhere.at.all}",
        "batch_size": "${size}",
        "concurrency": [1, "???", "${oc.env:RAYWB_NOT_SET}", "${size}"],
        "engine_kwargs": {"dtype": "${raywb_fails:}", "max_num_seqs": 4, "max_model_len": "???"},
    }
    runtime = {
        "debug": "???",
        "sample_n": "${.rows_per_block}",
        "rows_per_block": "${.sample_n}",
        "job_memory_gb": "${..size.deeper}",
        "keyword_buffers": {"a": "${nowhere}", "b": {"c": "???", "d": "${model.batch_size}"}},
        "use_llm_a": "${unknown_resolver:1}",
    }
    cfg = OmegaConf.create({"size": 8, "model": model, "runtime": runtime})
    assert config_facts(cfg) == {
        "model": {"batch_size": 8, "concurrency": [1, 8], "engine_kwargs": {"max_num_seqs": 4}},
        "runtime": {"keyword_buffers": {"b": {"d": 8}}},
    }


def test_only_what_is_taken_is_resolved() -> None:
    """No resolver runs for a key that is not taken: it may be slow, or hold a secret."""
    asked: list[str] = []
    OmegaConf.register_new_resolver("raywb_asked", asked.append, replace=True)
    model = {"key": "${raywb_asked:a}", "batch_size": 1}
    cfg = OmegaConf.create({"model": model, "other": "${raywb_asked:b}"})
    assert config_facts(cfg) == {"model": {"batch_size": 1}}
    assert asked == []


def test_structured_and_strict_configs() -> None:
    """A dataclass as config, and one that refuses unknown keys, are read like any other."""
    expected = {"runtime": {"debug": True, "use_llm_stages": ["a", "b"]}}
    cfg = OmegaConf.structured(Config)
    assert config_facts(cfg) == expected
    OmegaConf.set_struct(cfg, True)
    OmegaConf.set_readonly(cfg, True)
    assert config_facts(cfg) == expected


def test_plain_dicts_with_all_kinds_of_values() -> None:
    """Whatever a plain dict holds, the result can be sent: also OmegaConf parts, and itself."""
    runtime: dict[str, Any] = {
        "debug": OmegaConf.create({"a": "${b}", "b": [1, {"c": "???"}]}),
        "job_memory_gb": Path("/x"),
        "sample_n": (1, 2),
        "rows_per_block": 2**70,
        "prefilter_mode": Precision.BF16,
        "use_llm_a": "???",
        "keyword_text": "\udcff",
        7: "a key that is no string",
    }
    runtime["keyword_itself"] = runtime
    facts = config_facts({"runtime": runtime, 3: 4})["runtime"]
    msgspec.msgpack.encode(facts)
    assert not omegaconf_in(facts)
    assert facts["debug"] == {"a": [1, {}], "b": [1, {}]}
    assert facts["job_memory_gb"] == "/x"
    assert facts["sample_n"] == [1, 2]
    assert facts["rows_per_block"] == float(2**70)
    assert facts["prefilter_mode"] == "bfloat16"
    assert facts["keyword_text"] == "?"
    assert "use_llm_a" not in facts


APPLICATION = """
import json
import hydra
import raywb

@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg):
    print(json.dumps(raywb.collect_compute_metadata(cfg)))

main()
"""


def test_a_real_hydra_application(tmp_path: Path) -> None:
    """Groups, defaults and overrides on the command line come out as the application has them."""
    files = {
        "app.py": APPLICATION,
        "conf/config.yaml": "defaults: [model: large]\nruntime:\n  debug: false\n  sample_n: ???",
        "conf/model/large.yaml": "model_source: large\nbatch_size: ${runtime.rows_per_block}",
        "conf/model/small.yaml": "model_source: small\nbatch_size: ${.nothing}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "app.py", "model=small", "+runtime.use_llm_topic=true"]
    done = subprocess.run(
        [*command, "+model.engine_kwargs.dtype=auto", "hydra.run.dir=out"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parent.parent), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == {"model_source": "small", "engine_kwargs": {"dtype": "auto"}}
    assert found["runtime"] == {"debug": False, "use_llm_topic": True}
