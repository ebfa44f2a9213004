"""What a recipe's command tells, and what it keeps to itself."""

from __future__ import annotations

import time
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

import recipes.pretrain
from recipes.command import _words_to_go_on
from recipes.errors import InputError, SettingsError
from recipes.pretrain.data_prep import PretrainSettings
from recipes.run_record import with_default_project
from recipes.settings import load_settings
from recipes.stages.layout import OutputLayout
from recipes.stages.store_errors import shown, shown_settings, told_clearly
from recipes.training.checkpoints import CheckpointFolder

FOLDER = Path(recipes.pretrain.__file__).parent
SIGNED = "https://store.example/data/x.jsonl?X-Signature=SECRET"


def test_signatures_and_logins_are_shown_to_nobody() -> None:
    """Neither in settings nor in what a library says of an address; patterns stay as they are."""
    assert shown(SIGNED) == "https://store.example/data/x.jsonl?…"
    assert shown("https://me:SECRET@store.example/x") == "https://store.example/x"
    for location in ("s3://bucket/part-?.parquet", "/data/part-?.jsonl", "stdlib://"):
        assert shown(location) == location
    plain = {"input": {"paths": [SIGNED, "/data"], "format": "auto"}, "overwrite": False}
    assert shown_settings(plain)["input"] == {
        "paths": ["https://store.example/data/x.jsonl?…", "/data"],
        "format": "auto",
    }
    asked = aiohttp.RequestInfo(URL(SIGNED), "GET", {}, URL(SIGNED))  # type: ignore[arg-type]
    refusal = aiohttp.ClientResponseError(asked, (), status=400, message="Bad")
    with pytest.raises(InputError) as error, told_clearly("read", SIGNED):
        raise refusal
    assert "SECRET" in str(refusal)
    assert "SECRET" not in str(error.value)


def test_the_way_on_does_not_begin_anew_twice(tmp_path: Path) -> None:
    """Once checkpoints were removed, the command that goes on keeps those that came since."""
    layout = OutputLayout(tmp_path)
    words = ["tiny", "train.resume=false", "train.steps=9"]
    anew = load_settings(PretrainSettings, FOLDER, "tiny", words[1:])
    began_at_s = time.time() - 1.0
    assert _words_to_go_on(anew, layout, words, began_at_s) == words
    layout.checkpoints.mkdir(parents=True)
    assert _words_to_go_on(anew, layout, words, began_at_s) == words
    CheckpointFolder(layout.checkpoints).tell_progress(3)
    assert _words_to_go_on(anew, layout, words, began_at_s + 3600) == words
    on = _words_to_go_on(anew, layout, words, began_at_s)
    assert on == ["tiny", "train.steps=9", "train.resume=true"]


def test_a_project_that_nobody_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's own project stands behind the settings and the environment."""
    assert with_default_project({"mode": "offline"}, "p") == {"mode": "offline", "project": "p"}
    assert with_default_project({"project": "mine"}, "p") == {"project": "mine"}
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert with_default_project({}, "p") == {}


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train.enabled=false", "train.model.layers=3"], "train.model.layers"),
        (["wandb.enabled=false", "wandb.project=x"], "wandb.project"),
    ],
)
def test_keys_of_what_is_switched_off_are_refused(words: list[str], key: str) -> None:
    """They would change nothing."""
    with pytest.raises(SettingsError, match=rf"{key} has no effect beside .*enabled=False"):
        load_settings(PretrainSettings, FOLDER, "default", words)
