"""The on-start script where no Ray is needed: what it does when it comes again, or cannot begin."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from git_remote import GitRemote, git_remote, private_address
from ray_cluster import until
from ray_dashboard import RayDashboard
from vast_sandbox import Sandbox, sandbox
from vast_server import VastServer

from raywb.errors import SourceNotPinned
from raywb.launch.vast.onstart import OnStart
from raywb.launch.vast.source import pin

if not os.environ.get("CI"):
    pytest.importorskip("vastai", reason="vastai is not installed")

ROOT = Path(__file__).parents[1]


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


#: Shows the arguments of a program, one line for each call, and runs it.
SHOWING = """#!/bin/sh
printf '%s ' "$@" >>{log}
echo >>{log}
exec {program} "$@"
"""


def without_raywb(box: Sandbox, tmp_path: Path) -> dict[str, str]:
    """An image in which nothing but a shell and curl is of use; returns what changes."""
    programs = box.root / "venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "python3"):
        (programs / name).symlink_to("/bin/false")
    curl = shutil.which("curl")
    assert curl is not None
    (programs / "curl").write_text(SHOWING.format(log=tmp_path / "argv", program=curl))
    (programs / "curl").chmod(0o755)
    return {"RAYWB_VENV": str(box.root / "venv")}


@pytest.mark.parametrize("why", ["nothing", "asked for", "an earlier attempt"])
def test_what_cannot_begin_does_not_cost_on(
    vast: VastServer, remote: GitRemote, tmp_path: Path, why: str
) -> None:
    """A commit that is gone by now is tried again; then the instance ends, unless kept.

    That needs neither Python nor a package index, is tried again, and shows the key to nobody.
    """
    vast.misbehave("destroy", 500, times=1)
    with inside(vast, remote, commit="1" * 40, keep_on_failure=why == "asked for") as box:
        more = without_raywb(box, tmp_path)
        if why == "an earlier attempt":
            box.state.mkdir()
            (box.state / "attempt").write_text("1\n")
        assert box.run(more) == 1
        assert "failed; again in 0 s: fetch" in box.log
        assert f"has no commit {'1' * 40} for this machine; nothing was run now" in box.log
        assert vast.destroyed == ([box.instance.id] if why == "nothing" else [])
        assert ("the instance stays" in box.log.lower()) is (why != "nothing")
        if why == "nothing":
            assert "failed; again in 0 s: destroy" in box.log
            assert box.log.endswith("the instance is gone\n")
            assert "-X DELETE" in (tmp_path / "argv").read_text()
            assert box.instance.key not in (tmp_path / "argv").read_text() + box.log
        assert {one.key for one in vast.of_kind("destroy")} <= {box.instance.key}


@pytest.mark.parametrize("fault", [500, "refuse"])
def test_an_instance_that_cannot_be_ended_says_so(
    vast: VastServer, remote: GitRemote, tmp_path: Path, fault: int | str
) -> None:
    """The last words are that it stays, what it does, and how to end it."""
    vast.misbehave("destroy", fault)
    with inside(vast, remote, commit="1" * 40) as box:
        more = without_raywb(box, tmp_path)
        assert box.run(more) == 1
        last = box.log.splitlines()[-1]
        assert last.endswith(
            f"THE INSTANCE STAYS AND COSTS: raywb vast destroy {box.instance.id} ends it"
        )
        assert vast.destroyed == []


def test_what_could_not_end_does_not_begin(vast: VastServer, remote: GitRemote) -> None:
    """A store whose client is not installed is found out before the job, not behind it."""
    with inside(vast, remote, outputs="data", upload_to="s9://bucket/run") as box:
        assert box.run({"PYTHONPATH": str(ROOT)}) == 1
        assert "Protocol not known: s9" in box.log
        assert "the project could not end this instance; nothing was run now" in box.log
        assert not (box.state / "attempt").exists()
        assert vast.destroyed == [box.instance.id]


#: Fails at first, and begins then what the test serves.
RAY = """#!/bin/sh
case $1 in start) ;; *) echo "lines of $6"; exit 0 ;; esac
[ -e {root}/tried ] || { touch {root}/tried; echo "no port is free" >&2; exit 1; }
env -0 >{root}/env
touch {root}/up
"""

DEMO = """import os, sys
print(os.environ["ONLY_THERE"], os.environ.get("NOT_NAMED"), file=open("seen", "w"))
sys.exit(3)
"""


def test_trouble_around_a_job_is_not_the_jobs(
    vast: VastServer, remote: GitRemote, tmp_path: Path
) -> None:
    """Ray that does not start, a submission that fails, a dashboard that hangs, an end refused.

    All are tried again, and the code is the job's own. Of the variables that the image hides, the
    job has those that were given with --env.
    """
    remote.write("demo.py", DEMO)
    asked: dict[str, Any] = {"commit": remote.commit(), "recipe": "demo.py"}
    remote.push()
    asked |= {"names": ["ONLY_THERE"], "arguments": ["token=SECRET"]}
    vast.misbehave("destroy", "refuse", times=1)
    with inside(vast, remote, **asked) as box:
        hidden = {"CONTAINER_ID": "", "CONTAINER_API_KEY": "", "PYTHONPATH": str(ROOT)}
        pairs = {
            **{"CONTAINER_ID": str(box.instance.id), "CONTAINER_API_KEY": box.instance.key},
            **{"ONLY_THERE": "here", "NOT_NAMED": "there"},
        }
        (tmp_path / "init").write_text("".join(f"{name}={one}\0" for name, one in pairs.items()))
        programs = box.root / "venv" / "bin"
        programs.mkdir(parents=True)
        (programs / "ray").write_text(RAY.replace("{root}", str(tmp_path)))
        (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        for name in ("ray", "python"):
            (programs / name).chmod(0o755)
        port = int(box.environment["RAYWB_DASHBOARD_PORT"])
        with RayDashboard(port) as dashboard:
            dashboard.up = (tmp_path / "up").exists
            dashboard.environment = lambda: dict(
                pair.split("=", 1) for pair in (tmp_path / "env").read_text().split("\0")[:-1]
            )
            dashboard.refusals += [500]
            dashboard.after_submission += [500, "reset"]
            more = {"RAYWB_VENV": str(box.root / "venv"), "RAYWB_PAUSES_S": "0 0"}
            assert box.run({**hidden, **more, "RAYWB_INIT_ENVIRON": str(tmp_path / "init")}) == 0
        assert (box.state / "source" / "seen").read_text() == "here None\n"
        log = box.log
        assert "no port is free" in log
        assert "Ray did not take the job: 500" in log
        assert log.count("failed; again in 0 s: run_job") == 2
        assert "the job has ended with exit code 3" in log
        assert (box.state / "attempt").read_text() == "1\n"
        assert "attempt 1: demo.py token\n" in log
        assert "SECRET" not in log
        assert "failed; again in 0 s: shut_down" in log
        assert "raywb shutdown: exit code 0" in log
        assert vast.destroyed == [box.instance.id]


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
