"""What the list of actors shows of the service: the run that it is for, and where that is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from local_service import LocalService

from raywb.service import shown_name as module
from raywb.service.actor import RaywbService
from raywb.service.shown_name import shown_name
from raywb.service.state import FILE_NAME
from raywb.settings import Settings


def test_a_new_service_shows_the_run_that_it_is_made_for(tmp_path: Path) -> None:
    """Project, id and name, and the page where it is known; else the directory."""
    settings = Settings(project="demo", name="tidy", mode="offline")
    assert shown_name(tmp_path, settings, "abc") == f"raywb demo/abc tidy offline {tmp_path}"
    settings = Settings(project="demo", run_id="own", entity="team")
    shown = shown_name(tmp_path, settings, "abc")
    assert shown == "raywb demo/own https://wandb.ai/team/demo/runs/own"
    settings = Settings(project="demo", entity="team", base_url="https://wandb.corp.net/")
    shown = shown_name(tmp_path, settings, "abc")
    assert shown == "raywb demo/abc https://wandb.corp.net/team/demo/runs/abc"
    assert shown_name(tmp_path, Settings(project="demo"), "abc") == f"raywb demo/abc {tmp_path}"


def test_a_restarted_service_shows_the_present_run(service: LocalService) -> None:
    """Not the first one, when another was begun since; that is read from the disk."""
    service.up(project="demo")
    service.start(project="demo", name="first", mode="disabled")
    assert service.service is not None
    service.service.finish(60.0, 0)
    second, _ = service.start(project="demo", name="second", mode="disabled")
    service.down()
    again = service.up(project="demo")
    assert repr(again) == f"raywb demo/{second.id} second disabled {service.directory}"
    settings = Settings(project="other", mode="offline")
    shown = shown_name(service.directory, settings, "new00001")
    assert shown.startswith(f"raywb demo/{second.id} second"), "an open run goes on"
    again.finish(60.0, 0)
    shown = shown_name(service.directory, settings, "new00001")
    assert shown == f"raywb other/new00001 offline {service.directory}"
    assert repr(again).startswith(f"raywb demo/{second.id} second")


def test_a_service_that_was_never_begun_has_a_name() -> None:
    """Ray asks for it when it tells that the actor cannot be made; it must not ask in vain."""
    assert repr(RaywbService.__new__(RaywbService)) == "raywb"


def test_nothing_on_the_disk_keeps_the_service_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage is passed over, and a disk that hangs is not waited for: Ray calls this at the start,
    and an exception would end the actor for good."""
    (tmp_path / FILE_NAME).write_bytes(b"\xff{")
    expected = f"raywb demo/abc offline {tmp_path}"
    settings = Settings(project="demo", mode="offline")
    assert shown_name(tmp_path, settings, "abc") == expected
    assert shown_name(tmp_path / "nowhere", settings, "abc") == expected + "/nowhere"
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    (tmp_path / FILE_NAME).unlink()
    os.mkfifo(tmp_path / FILE_NAME)
    began = time.monotonic()
    assert shown_name(tmp_path, settings, "abc") == expected
    assert time.monotonic() - began < 5
    os.close(os.open(tmp_path / FILE_NAME, os.O_RDWR))  # the reader's thread goes on and ends
