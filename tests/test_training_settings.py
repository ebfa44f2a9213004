"""What does not fit together is refused before any work, and a missing torch is told in time."""

from __future__ import annotations

import dataclasses
import inspect
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from training_case import settings

from recipes.errors import SettingsError, TrackingError
from recipes.pretrain.data_prep import PretrainSettings
from recipes.run_record import RunFile, RunRecord
from recipes.settings import load_settings, settings_as_dict
from recipes.sft.data_prep import SftSettings
from recipes.stages.layout import write_json
from recipes.training.settings import PretrainTrainSettings, is_training_wanted


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that Python finds, whatever is installed here; a test may take some away."""
    import importlib.util

    there = {"torch", "pandas", "pyarrow", "pydantic", "fsspec", "requests"}
    spec = importlib.util.find_spec("json")

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return spec if name in there else None

    monkeypatch.setattr("recipes.training.settings.importlib.util.find_spec", find_spec)
    return there


def test_without_torch_training_is_left_out_and_told(installed: set[str]) -> None:
    """Left to the recipe, one sentence says what to install; asked for by name, it is an error."""
    installed.remove("torch")
    said: list[str] = []
    assert not is_training_wanted(settings(enabled=None), said.append)
    assert len(said) == 1
    assert "torch cannot be imported here" in said[0]
    assert "pip install 'raywb[train]'" in said[0]
    with pytest.raises(SettingsError, match=r"train.enabled=true needs torch.*raywb\[train\]"):
        is_training_wanted(settings(enabled=True), said.append)
    assert not is_training_wanted(settings(enabled=False), said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"heads": 3}}, r"hidden_size=32 must be a multiple of twice .*heads=3"),
        ({"model": {"heads": 32}}, r"hidden_size=32 must be a multiple of twice"),
        (
            {"checkpoints": {"artifacts": "best"}, "validation": {"every_steps": None}},
            r"artifacts=best needs validation, which .*every_steps=null turns off",
        ),
        (
            {"optimizer": {"min_learning_rate": 0.02}},
            r"min_learning_rate=0.02 is higher than train.optimizer.learning_rate=0.01",
        ),
        ({"steps": 4}, r"warmup_steps=4 must be fewer than train.steps=4"),
        ({"batch_size": 9}, r"batch_size=9 must be a multiple of the number of workers.* 2"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(changes: dict, message: str) -> None:
    """Both keys are named with their values."""
    with pytest.raises(SettingsError, match=message):
        is_training_wanted(settings(**changes), print)


@pytest.mark.parametrize("kind", [PretrainSettings, SftSettings])
def test_the_recipes_own_settings_can_be_used(
    kind: type[PretrainSettings] | type[SftSettings],
) -> None:
    """What the YAML files of both recipes ask for fits together, and tiny asks for less."""
    folder = Path(str(inspect.getfile(kind))).parent
    default, tiny = (load_settings(kind, folder, name).train for name in ("default", "tiny"))
    for wanted in (default, tiny):
        assert is_training_wanted(wanted, print)
        assert wanted.idle_keys() == {}
    assert default.steps > tiny.steps
    words = ["train.validation.every_steps=null", "train.validation.batches=3"]
    with pytest.raises(SettingsError, match=r"train.validation.batches has no effect"):
        load_settings(kind, folder, "default", words)


def test_values_out_of_range_are_refused_by_name(tmp_path: Path) -> None:
    """Rates are above 0, shares at most a half; the message says what is allowed."""

    def refused(**changes: object) -> str:
        section = settings_as_dict(settings()) | changes
        write_json(tmp_path / "default.yaml", section)
        with pytest.raises(SettingsError) as error:
            load_settings(PretrainTrainSettings, tmp_path, "default")
        return str(error.value)

    assert "validation_share=0.6" in (said := refused(validation_share=0.6))
    assert "from 0 to 0.5" in said
    assert "seed=9223372036854775808" in (said := refused(seed=2**63))
    assert "from 0 to 2**63 - 1" in said
    assert "seed=-1" in refused(seed=-1)
    rates = settings_as_dict(settings().optimizer)
    assert "optimizer.learning_rate=0" in (
        said := refused(optimizer={**rates, "learning_rate": 0.0})
    )
    assert "above 0" in said
    assert "checkpoints.artifacts" in refused(
        checkpoints={"every_steps": 1, "keep_last": 1, "artifacts": "some"}
    )


RECORD = RunRecord("p", "r1", "p-orchestrator", "offline", "/nowhere", group="g")


def test_a_run_file_that_others_settings_contradict_is_told(tmp_path: Path) -> None:
    """Another project, mode or group than the training's run has: refused, with both values."""
    file = RunFile(tmp_path / "run.json", resume=True)
    assert file.settings_for({"project": "p"}, None, print) == {"project": "p"}
    write_json(file.path, dataclasses.asdict(RECORD))
    for chosen, told in (
        ({"project": "q"}, "project is 'p', not 'q'"),
        ({"mode": "online"}, "mode is 'offline', not 'online'"),
        ({"group": ""}, "group is 'g', not ''"),
    ):
        with pytest.raises(TrackingError, match=told):
            file.settings_for(chosen, None, print)
    anew = dataclasses.replace(file, resume=False)
    assert anew.settings_for({"project": "q"}, None, print) == {"project": "q"}
    assert file.settings_for({"mode": "disabled"}, None, print) == {"mode": "disabled"}
    file.path.write_text("{")
    with pytest.raises(TrackingError, match=r"run\.json cannot be read"):
        file.settings_for({}, None, print)
