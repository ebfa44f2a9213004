"""The on-start script where no Ray is needed: what it does when it comes again, or cannot begin."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from git_remote import GitRemote, git_remote, private_address
from ray_cluster import until
from vast_sandbox import Sandbox, sandbox
from vast_server import VastServer

from raywb.errors import SourceNotPinned
from raywb.launch.vast import job
from raywb.launch.vast.onstart import OnStart
from raywb.launch.vast.source import pin

if not os.environ.get("CI"):
    pytest.importorskip("vastai", reason="vastai is not installed")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def vast() -> Iterator[VastServer]:
    with VastServer() as server:
        yield server
        assert server.unexpected == []


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GitRemote]:
    with git_remote(tmp_path_factory.mktemp("git")) as remote:
        yield remote


def inside(vast: VastServer, remote: GitRemote, **differences: Any) -> Any:
    """An instance that was launched with these differences."""
    asked: dict[str, Any] = {
        **{"repo": remote.url, "commit": remote.git("rev-parse", "HEAD"), "recipe": "recipes.demo"},
        **{"auto_shutdown": True, "grace_s": 0.0, **differences},
    }
    return sandbox(vast, vast.launch(onstart=OnStart(**asked).packed()))


def has_ended(box: Sandbox, code: int) -> dict[str, str]:
    """As if the job had ended on this disk before; returns what imports raywb then."""
    box.state.mkdir()
    (box.state / "exit_code").write_text(f"{code}\n")
    (box.state / "attempt").write_text("1\n")
    return {"PYTHONPATH": str(ROOT)}


def test_a_job_that_has_ended_is_not_run_again(vast: VastServer, remote: GitRemote) -> None:
    """At the next start only the end is made up for; nothing is fetched, no Ray is started."""
    with inside(vast, remote) as box:
        assert box.run(has_ended(box, 0)) == 0
        assert "has ended before, with exit code 0: it is not run again" in box.log
        assert "raywb shutdown: exit code 0" in box.log
        assert vast.destroyed == [box.instance.id]
        assert not (box.state / "source").exists()
        assert (box.state / "onstart.log").read_text() == box.log


def test_an_instance_that_is_to_stay_stays(vast: VastServer, remote: GitRemote) -> None:
    """Without --auto-shutdown, and with a file `stay`; the code is the job's."""
    for how in ("no", "stay"):
        with inside(vast, remote, auto_shutdown=how != "no") as box:
            more = has_ended(box, 3)
            if how == "stay":
                (box.state / "stay").touch()
            assert box.run(more) == 3
            assert f"raywb vast destroy {box.instance.id} ends it" in box.log
    assert vast.of_kind("destroy") == []


def test_two_scripts_at_a_time_are_one(vast: VastServer, remote: GitRemote) -> None:
    """A start while another one is at work leaves it alone."""
    with inside(vast, remote, grace_s=60.0) as box:
        more = has_ended(box, 0)
        first = box.start(more)
        until("the first script", lambda: "has ended before" in box.log)
        assert box.run(more) == 0
        assert (box.root / "output").read_text() == "[raywb] this script is at work already\n"
        assert first.is_running()
        assert vast.of_kind("destroy") == []


def test_a_machine_that_restarts_for_ever_comes_to_an_end(
    vast: VastServer, remote: GitRemote
) -> None:
    """Behind the last attempt allowed, the job counts as failed, and is not run again."""
    with inside(vast, remote, attempts=2, auto_shutdown=False) as box:
        box.state.mkdir()
        (box.state / "attempt").write_text("2\n")
        assert box.run({"PYTHONPATH": str(ROOT)}) == 1
        assert "interrupted 2 x: that is enough" in box.log
        assert box.run() == 1
        assert "has ended before, with exit code 1" in box.log


#: Makes an environment without a package index: what is installed there is what is here.
PYTHON3 = """#!/bin/sh
mkdir -p "$3/bin"
printf '#!/bin/sh\\n' >"$3/bin/pip"
printf '#!/bin/sh\\nexec {python} -c "from vastai.cli.main import main; main()" "$@"\\n' \\
    >"$3/bin/vastai"
chmod +x "$3/bin/pip" "$3/bin/vastai"
"""


@pytest.mark.parametrize("why", ["nothing", "asked for", "an earlier attempt"])
def test_what_cannot_begin_does_not_cost_on(
    vast: VastServer, remote: GitRemote, tmp_path: Path, why: str
) -> None:
    """A commit that is gone by now is tried again; then the instance ends, unless kept."""
    (tmp_path / "python3").write_text(PYTHON3.format(python=sys.executable))
    (tmp_path / "python3").chmod(0o755)
    with inside(vast, remote, commit="1" * 40, keep_on_failure=why == "asked for") as box:
        if why == "an earlier attempt":
            box.state.mkdir()
            (box.state / "attempt").write_text("1\n")
        (box.root / "venv" / "bin").mkdir(parents=True)  # it has no raywb
        search = f"{tmp_path}:{box.environment['PATH']}"
        # Nothing but the stand-in is called python in it.
        (box.root / "venv" / "bin" / "python").symlink_to("/bin/false")
        assert box.run({"RAYWB_VENV": str(box.root / "venv"), "PATH": search}) == 1
        assert "failed; again in 0 s: fetch" in box.log
        assert f"has no commit {'1' * 40} for this machine; nothing was run now" in box.log
        assert vast.destroyed == ([box.instance.id] if why == "nothing" else [])
        assert ("the instance stays" in box.log) is (why != "nothing")
        assert {one.key for one in vast.of_kind("destroy")} <= {box.instance.key}


def test_a_private_repository_is_read_with_a_token(vast: VastServer, remote: GitRemote) -> None:
    """Over HTTP, by git's own program: without the token not, and no file keeps it."""
    token = "t" * 40
    commit = remote.git("rev-parse", "HEAD")
    with private_address(remote, token) as address:
        with pytest.raises(SourceNotPinned, match="--git-token-file"):
            pin(remote.tree, os.environ, repo=address)
        assert pin(remote.tree, os.environ, repo=address, token=token).commit == commit
        # Behind the last attempt, the script fetches and begins nothing.
        with inside(vast, remote, repo=address, auto_shutdown=False, attempts=1) as box:
            box.state.mkdir()
            (box.state / "attempt").write_text("1\n")
            more = {"PYTHONPATH": str(ROOT)}
            assert box.run(more) == 1
            assert "has no commit" in box.log
            assert box.run({**more, "RAYWB_GIT_TOKEN": token}) == 1
            assert "interrupted 1 x" in box.log
            assert (box.state / "source" / "README").exists()
            kept = [path for path in box.state.rglob("*") if path.is_file()]
            assert not any(token.encode() in path.read_bytes() for path in kept)


def test_where_no_ray_answers_nothing_is_known_of_a_job() -> None:
    """That is told apart from a job which Ray does not know."""
    assert job.main(["http://127.0.0.1:1", "job-1"]) == job.EXIT_NO_RAY
