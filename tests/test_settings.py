"""Settings: where each value comes from, and what is said of one that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from raywb.errors import SettingsError
from raywb.groups import resolve_group
from raywb.settings import (
    Settings,
    default_dir,
    explicit_settings,
    find_api_key,
    journal_base,
    resolve,
    sink_environment,
)


def test_the_first_that_speaks_wins() -> None:
    """Keywords beat the object, which beats cfg, which beats the environment."""
    environment = {"WANDB_PROJECT": "env", "WANDB_ENTITY": "env", "WANDB_MODE": "offline"}
    environment |= {"WANDB_NAME": "env"}
    cfg = {"wandb": {"project": "cfg", "entity": "cfg", "mode": None}}
    settings = resolve(
        Settings(project="object", tags=("t",)),
        cfg=cfg,
        overrides={"project": "keyword", "name": None},
        environment=environment,
    )
    assert (settings.project, settings.entity, settings.mode) == ("keyword", "cfg", "offline")
    assert (settings.name, settings.tags) == ("env", ("t",))


def test_the_environment_is_not_explicit() -> None:
    """What only the environment says does not count as asked for by name."""
    assert explicit_settings(Settings(project="p"), cfg={"wandb": {"group": "g"}}) == {
        "project": "p",
        "group": "g",
    }


@pytest.mark.parametrize("make", [dict, OmegaConf.create])
def test_cfg_may_be_a_mapping_or_omegaconf(make: Any) -> None:
    """The wandb section is read from both; disabled wins over a mode; missing values are none."""
    cfg = make({"wandb": {"enabled": False, "project": "p", "mode": "online"}, "x": "???"})
    settings = resolve(cfg=cfg, environment={})
    assert (settings.project, settings.mode) == ("p", "disabled")
    assert resolve(cfg=make({}), environment={}) == Settings()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "shared-ish"}, "mode='shared-ish'.*allowed are online, offline, disabled"),
        ({"project": "a b"}, "project='a b'"),
        ({"project": "../up"}, "project='../up'"),
        ({"run_id": "a/b"}, "run_id='a/b'"),
        ({"fsync": "sometimes"}, "fsync='sometimes'.*allowed are off, every_second, each"),
        ({"provisional_wait_s": 0}, "provisional_wait_s"),
        ({"provisional_wait_s": "soon"}, "provisional_wait_s"),
        ({"base_url": "ftp://x"}, "base_url='ftp://x'"),
        ({"projcet": "typo"}, "unknown setting projcet: allowed are .*project"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    """An error says which setting, what it was, and what is allowed."""
    with pytest.raises(SettingsError, match=message):
        resolve(overrides=values, environment={})


def test_a_bad_cfg_is_named() -> None:
    """A wandb section that is no section, and an interpolation into nothing, are errors."""
    with pytest.raises(SettingsError, match=r"cfg\.wandb='x'"):
        resolve(cfg={"wandb": "x"}, environment={})
    with pytest.raises(SettingsError, match="cfg cannot be read"):
        resolve(cfg=OmegaConf.create({"wandb": {"project": "${nowhere}"}}), environment={})


def test_wandbs_own_spellings_of_a_mode() -> None:
    """`WANDB_MODE=dryrun` is W&B's older word for offline."""
    assert resolve(environment={"WANDB_MODE": "dryrun"}).mode == "offline"


def test_the_key_is_found_where_wandb_looks(tmp_path: Path, monkeypatch: Any) -> None:
    """The environment comes first, then the file of the settings, then netrc for the server."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings()
    assert find_api_key(settings, {}) is None
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password from-netrc\n")
    assert find_api_key(settings, {}) == "from-netrc"
    assert find_api_key(Settings(base_url="http://127.0.0.1:1"), {}) is None
    mounted = tmp_path / "secret"
    mounted.write_text("from-file\n")
    assert find_api_key(Settings(api_key_file=str(mounted)), {}) == "from-file"
    assert find_api_key(settings, {"WANDB_API_KEY": "from-env"}) == "from-env"
    other = tmp_path / "other"
    other.write_text("machine localhost login user password elsewhere\n")
    assert find_api_key(Settings(base_url="http://localhost:1"), {"NETRC": str(other)}) == (
        "elsewhere"
    )


def test_where_files_lie(tmp_path: Path, monkeypatch: Any) -> None:
    """The setting decides, else it is below the home directory by project and run id."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_dir(Settings(project="p"), "id1") == tmp_path / "raywb" / "p" / "id1"
    assert default_dir(Settings(), "id1") == tmp_path / "raywb" / "raywb" / "id1"
    chosen = resolve(environment={"RAYWB_DIR": "~/x"})
    assert default_dir(chosen, "id1") == tmp_path / "x"


def test_where_journals_lie(tmp_path: Path) -> None:
    """The override decides, else Ray's session directory, else the temp directory; per user."""
    uid = str(os.getuid())
    assert journal_base(str(tmp_path), "c", {}) == tmp_path / "raywb" / uid
    assert journal_base(str(tmp_path), "c", {"RAYWB_JOURNAL_DIR": "/j"}) == Path("/j/c") / uid
    assert journal_base(None, "c", {"TMPDIR": "/t"}) == Path(f"/t/raywb-{uid}/c")
    assert journal_base("/nowhere", "c", {"TMPDIR": "/t"}) == Path(f"/t/raywb-{uid}/c")


def test_the_sink_is_not_misled() -> None:
    """Variables that would send W&B's client elsewhere stay out; raywb is importable there."""
    environment = sink_environment(
        {"WANDB_SERVICE": "1", "WANDB_RUN_ID": "2", "WANDB_API_KEY": "k", "PYTHONPATH": "/p"}
    )
    assert "WANDB_SERVICE" not in environment
    assert "WANDB_RUN_ID" not in environment
    assert environment["WANDB_API_KEY"] == "k"
    first, last = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "raywb" / "rows.py").is_file()
    assert last == "/p"


def test_what_the_client_reports_of_itself_costs_the_sink_nothing() -> None:
    """It is off in the sink, unless the environment says that it is to be on."""
    assert sink_environment({})["WANDB_ERROR_REPORTING"] == "false"
    asked = sink_environment({"WANDB_ERROR_REPORTING": "true"})
    assert asked["WANDB_ERROR_REPORTING"] == "true"


RAY_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"job_submission_id": "raysubmit_1"}}'}


@pytest.mark.parametrize(
    ("explicit", "environment", "name", "source"),
    [
        ("mine", {"WANDB_GROUP": "env"}, "mine", "the settings"),
        ("", {"WANDB_GROUP": "env"}, None, "the settings (no group)"),
        (None, {"WANDB_GROUP": "env", "SLURM_JOB_ID": "1"}, "env", "WANDB_GROUP"),
        (None, {"SUBMITIT_JOB_ID": "7", "SLURM_JOB_ID": "1"}, "slurm-7", "SUBMITIT_JOB_ID"),
        (None, {"SLURM_JOB_ID": "1", **RAY_JOB}, "slurm-1", "SLURM_JOB_ID"),
        (None, RAY_JOB, "ray-raysubmit_1", "Ray's job submission id"),
        (None, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{"}, "ray-cluster-abcdefab", "the cluster"),
        (None, {}, "ray-cluster-abcdefab", "the cluster"),
    ],
)
def test_the_group_and_where_it_came_from(
    explicit: str | None, environment: dict[str, str], name: str | None, source: str
) -> None:
    """The first that answers names the group, and is remembered."""
    assert resolve_group(explicit, "abcdefabcdef", environment) == (name, source)
