"""`raywb vast launch`: one commit, one machine, and keys that nobody sees."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from git_remote import GitRemote, git_remote
from vast_server import VastServer, offer

from raywb.cli import main
from raywb.errors import LaunchError, SourceNotPinned
from raywb.launch.vast.onstart import MOST_CHARACTERS, OnStart
from raywb.launch.vast.source import without_login

if not os.environ.get("CI"):
    pytest.importorskip("vastai", reason="vastai is not installed")

WANDB_KEY = "w" * 40
GIT_TOKEN = "ghp_" + "t" * 36

Raywb = Callable[..., Result]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GitRemote]:
    with git_remote(tmp_path_factory.mktemp("git")) as remote:
        remote.write("recipes/demo.py", "print('well')\n")
        remote.commit()
        remote.push()
        yield remote


@pytest.fixture
def remote(served: GitRemote, monkeypatch: pytest.MonkeyPatch) -> Iterator[GitRemote]:
    """The tree as the remote has it, and this process in it."""
    monkeypatch.chdir(served.tree)
    yield served
    served.git("fetch", "-q", str(served.bare), "main")
    served.git("reset", "-q", "--hard", "FETCH_HEAD")
    served.git("clean", "-qfdx")


@pytest.fixture
def raywb(vast: VastServer, remote: GitRemote, monkeypatch: pytest.MonkeyPatch) -> Raywb:
    """Run the command in the tree, with the account's key in the environment."""
    monkeypatch.setenv("VAST_URL", vast.url)
    monkeypatch.setenv("VAST_API_KEY", vast.api_key)
    monkeypatch.setenv("WANDB_PROJECT", "robots")

    def run(*words: str, said: str = "") -> Result:
        return CliRunner().invoke(main, ["vast", *words], input=said)

    return run


def unpacked(sent: str) -> str:
    """What an instance makes of the script that was sent."""
    found = re.search(r"<<'END'.*\n(.*)\nEND\n", sent)
    assert found is not None
    return gzip.decompress(base64.b64decode(found[1])).decode()


def test_a_launch_rents_the_cheapest_machine_for_one_commit(
    raywb: Raywb, vast: VastServer, remote: GitRemote, tmp_path: Path
) -> None:
    """What is asked of Vast.ai is what the options say, and the script names the whole commit."""
    (tmp_path / "wandb").write_text(WANDB_KEY + "\n")
    vast.offers += [
        offer(21, dph_total=0.2, geolocation="Texas, US"),
        offer(22, dph_total=0.3, cuda_max_good=12.4),
        offer(23, dph_total=0.35, disk_space=20.0),
        offer(24, dph_total=0.1, reliability=0.7),
        offer(25, dph_total=0.38, gpu_name="RTX 3090"),
    ]
    done = raywb(
        *("launch", "--region", "se", "--gpu", "RTX_3090", "--gpu", "RTX 4090", "--disk-gb", "80"),
        *("--auto-shutdown", "--grace-s", "30", "--keep-on-failure", "--env", "A=b c"),
        *("--wandb-key-file", str(tmp_path / "wandb"), "--label", "mine", "recipes.demo"),
        *("--", "tiny", "name=it's", "--flag"),
        said="y\n",
    )
    assert done.exit_code == 0, done.output
    (search,), (create,) = vast.of_kind("search"), vast.of_kind("create")
    assert search.body["allocated_storage"] == 80
    assert search.body["order"] == [["dph_total", "asc"]]
    assert search.body["dph_total"] == {"lte": 1.0}
    assert search.key == create.key == vast.api_key
    assert create.path == "/api/v0/asks/25/"
    number = int(done.stdout)
    assert f"raywb vast destroy {number}" in done.stderr
    body = create.body
    commit = remote.git("rev-parse", "HEAD")
    assert (body["disk"], body["label"], body["cancel_unavail"]) == (80, "mine", True)
    assert body["runtype"] == "ssh_direc ssh_proxy"
    assert body["env"].pop("RAYWB_LAUNCH")
    assert body["env"] == {
        **{"WANDB_PROJECT": "robots", "WANDB_API_KEY": WANDB_KEY, "A": "b c"},
        **{"RAYWB_COMMIT": commit, "RAYWB_RECIPE": "recipes.demo"},
    }
    script = unpacked(body["onstart"])
    assert len(body["onstart"]) <= MOST_CHARACTERS
    assert f"commit={commit}\n" in script
    assert f"repo={remote.url}\n" in script
    assert "command=(-m recipes.demo tiny 'name=it'\"'\"'s' --flag)\n" in script
    assert (
        "shutdown=(--grace-s 30 --keep-on-failure --outputs source/data --outputs-if-any)\n"
        in script
    )
    assert "files in data would lie on the instance alone" in done.stderr
    assert "no W&B key" not in done.stderr


def test_a_dry_run_rents_nothing_and_needs_no_key(
    raywb: Raywb, vast: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints the query, the price where a key shows it, and a script that bash can read."""
    priced = raywb("launch", "--dry-run", "recipes.demo")
    assert "price    offer 11, 1 x RTX 4090" in priced.stderr
    assert "0.400 $/h, 9.60 $ a day" in priced.stderr
    monkeypatch.delenv("VAST_API_KEY")
    done = raywb("launch", "--dry-run", "recipes.demo")
    assert done.exit_code == priced.exit_code == 0
    assert done.stdout == priced.stdout
    assert "not to be seen: there is no key" in done.stderr
    query = next(line for line in done.stderr.splitlines() if line.startswith("query"))
    assert json.loads(query.removeprefix("query"))["cuda_max_good"] == {"gte": 12.8}
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    assert "auto_shutdown=no\n" in done.stdout
    assert {request.kind for request in vast.requests} == {"search"}


def test_nothing_is_rented_without_a_yes(raywb: Raywb, vast: VastServer) -> None:
    """The price is shown and confirmed; no, and no answer at all, rent nothing."""
    for said in ("n\n", ""):
        done = raywb("launch", "recipes.demo", said=said)
        assert done.exit_code == 1
        assert "0.400 $/h" in done.stderr
    assert not vast.instances


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("changed", "changes that no commit has.* README"),
        ("new file", "changes that no commit has.* new.yaml"),
        ("not pushed", r"does not have commit [0-9a-f]{12} .*push it first"),
        ("no recipe", "has no recipe recipes.other: .* recipes/other/__main__.py"),
        ("no remote", r"could not read git://127.0.0.1:1/.*--git-token-file"),
        ("not known", "no commit abc123 here"),
    ],
)
def test_what_an_instance_would_not_get_is_refused(
    raywb: Raywb, vast: VastServer, remote: GitRemote, change: str, says: str
) -> None:
    """A dirty tree and a commit that the remote lacks are refused before anything is asked."""
    words = ["launch", "--yes", "recipes.demo"]
    if change == "changed":
        remote.write("README", "other\n")
    elif change == "new file":
        remote.write("new.yaml", "a: 1\n")
    elif change == "not pushed":
        remote.commit()
    elif change == "no recipe":
        words[-1] = "recipes.other"
    elif change == "no remote":
        words[1:1] = ["--repo", "git://127.0.0.1:1/robots.git"]
    else:
        words[1:1] = ["--commit", "abc123"]
    done = raywb(*words)
    assert done.exit_code == 30, done.output
    assert re.search(says, done.stderr), done.stderr
    assert vast.requests == []


def test_a_commit_that_is_named_runs_whatever_the_tree_holds(
    raywb: Raywb, vast: VastServer, remote: GitRemote
) -> None:
    """An older commit, by a short name, from a tree with changes."""
    older = remote.git("rev-parse", "HEAD~1")
    remote.write("README", "other\n")
    done = raywb("launch", "--yes", "--commit", older[:10], "http.server")
    assert done.exit_code == 0, done.output
    assert vast.of_kind("create")[0].body["env"]["RAYWB_COMMIT"] == older


@pytest.mark.parametrize(
    ("address", "form"),
    [
        ("git@github.com:acme/robots.git", "https://github.com/acme/robots.git"),
        ("ssh://git@git.acme.org:2222/a/b.git", "https://git.acme.org/a/b.git"),
        ("https://github.com/acme/robots", "https://github.com/acme/robots"),
    ],
)
def test_an_address_is_one_that_needs_no_key_of_ours(address: str, form: str) -> None:
    """Forms of ssh become https."""
    assert without_login(address) == form


@pytest.mark.parametrize("address", ["https://me:SECRET@github.com/a/b", "/srv/a.git", "../b"])
def test_an_address_with_a_login_or_on_this_machine_is_refused(address: str) -> None:
    """And the password is not repeated."""
    with pytest.raises(SourceNotPinned) as error:
        without_login(address)
    assert "--repo" in str(error.value)
    assert "SECRET" not in str(error.value)


def test_a_script_too_long_for_vast_is_refused(raywb: Raywb, vast: VastServer) -> None:
    """Vast.ai takes 4048 characters; what does not compress well may not fit."""
    import random

    words = [f"key{random.Random(n).getrandbits(256):x}=1" for n in range(60)]
    done = raywb("launch", "--yes", "recipes.demo", "--", *words)
    assert done.exit_code == 1
    assert re.search(r"has \d+ characters, and Vast.ai takes 4048", done.stderr)
    long = raywb("launch", "--yes", "--env", f"A={'x' * 257}", "recipes.demo")
    assert "A has 257 characters, and Vast.ai takes 256" in long.stderr
    assert not vast.instances


def test_arguments_reach_the_recipe_as_they_are() -> None:
    """Quotes, dollars, blanks and lines that look like comments pass bash and the packing."""
    words = ["a b", "it's", "$HOME", "`id`", "one\n# two\n  three", "", "*"]
    sent = OnStart("https://x.example/r", "a" * 40, "train.py", words).packed()
    head = unpacked(sent).split("export HOME", 1)[0]
    shown = subprocess.run(
        ["bash", "-c", head + "printf '%s\\0' \"${command[@]}\""],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split("\0")[:-1] == ["train.py", *words]
    with pytest.raises(LaunchError, match="4048"):
        OnStart("x", "a" * 40, "train.py", [os.urandom(3000).hex()]).packed()


def test_an_offer_that_others_took_is_followed_by_the_next(raywb: Raywb, vast: VastServer) -> None:
    """The next one is confirmed by itself; when all are gone, that is said."""
    vast.misbehave("create", 410)
    done = raywb("launch", "recipes.demo", said="y\ny\n")
    assert done.exit_code == 32, done.output
    assert "offer 11 is gone" in done.stderr
    assert "0.550 $/h" in done.stderr
    assert "all offers were taken" in done.stderr
    none = raywb("launch", "--yes", "--max-price", "0.01", "recipes.demo")
    assert none.exit_code == 32
    assert "at most 0.01 $/h" in none.stderr


@pytest.mark.parametrize(
    ("kind", "fault", "code", "says"),
    [
        ("search", 401, 31, "does not let this key search.*Invalid|401"),
        ("search", 500, 33, "did not search for offers .500"),
        ("search", "nonsense", 33, "client cannot read"),
        ("search", "hang up", 33, "cannot be reached to search"),
        ("create", 500, 33, "did not rent offer 11"),
        ("create", 403, 31, "does not let this key rent"),
        ("create", "refuse", 33, "did not rent offer 11: as the test"),
        ("create", "pretend", 33, "says that it made instance"),
    ],
)
def test_each_trouble_of_vast_has_its_code_and_sentence(
    raywb: Raywb, vast: VastServer, kind: str, fault: int | str, code: int, says: str
) -> None:
    """No trouble is taken for a launch."""
    vast.misbehave(kind, fault)
    done = raywb("launch", "--yes", "recipes.demo")
    assert done.exit_code == code, done.output
    assert re.search(says, done.stderr), done.stderr
    assert done.stdout == ""
    assert vast.api_key not in done.output


def test_an_instance_that_was_made_is_not_hidden(raywb: Raywb, vast: VastServer) -> None:
    """Vast.ai rents it, and fails when it is looked at: its number is printed, with a warning."""
    vast.misbehave("show", 500)
    done = raywb("launch", "--yes", "recipes.demo")
    assert done.exit_code == 0, done.output
    assert [int(done.stdout)] == list(vast.instances)
    assert "was made, and could not be looked at" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--auto-shutdown --extras train recipes.demo", 1, "add vast to --extras"),
        ("--grace-s -1 recipes.demo", 2, "-1"),
        ("--upload-to /mnt/results recipes.demo", 1, "lies on the instance itself"),
        ("--upload-to file:///mnt/results recipes.demo", 1, "--upload-is-elsewhere"),
        ("--upload-to memory://results recipes.demo", 1, "lies on the instance itself"),
        ("--upload-to s3://a/b --outputs= recipes.demo", 1, "and there are none"),
        ("--auto-shutdown recipes.demo -- small.yaml a=1", 1, "--outputs"),
    ],
)
def test_what_could_lose_results_or_never_end_is_refused(
    raywb: Raywb, vast: VastServer, words: str, code: int, says: str
) -> None:
    """Before anything is asked of Vast.ai."""
    done = raywb("launch", "--yes", *words.split())
    assert done.exit_code == code, done.output
    assert says in done.stderr
    assert vast.requests == []


@pytest.mark.parametrize(
    "words",
    [
        "--upload-to file:///mnt/x --upload-is-elsewhere recipes.demo",
        "--auto-shutdown --outputs out recipes.demo -- small.yaml",
        "--auto-shutdown recipes.demo -- small.yaml output_dir=out",
        "--auto-shutdown recipes.demo -- tiny",
    ],
)
def test_what_says_where_results_go_is_launched(raywb: Raywb, vast: VastServer, words: str) -> None:
    """The same with what was missing."""
    assert raywb("launch", "--dry-run", *words.split()).exit_code == 0


@pytest.mark.parametrize(
    ("outputs", "there"),
    [
        ("data/a b", "source/data/a b"),
        ("/mnt/it's", "/mnt/it's"),
        ("~/out $x", "/home/me/out $x"),
        ("~", "/home/me/."),
    ],
)
def test_the_outputs_are_where_the_recipe_writes_them(outputs: str, there: str) -> None:
    """A path of its own, one of the project's, and one of the instance's home."""
    head = unpacked(OnStart("x", "a" * 40, "train.py", outputs=outputs).packed())
    shown = subprocess.run(
        ["bash", "-c", head.split("export HOME", 1)[0] + 'echo "${shutdown[-1]}"'],
        env={"HOME": "/home/me", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == there + "\n"


def test_a_token_is_not_sent_in_the_clear(raywb: Raywb, vast: VastServer, tmp_path: Path) -> None:
    """Over http it would be everybody's on the way."""
    (tmp_path / "token").write_text(GIT_TOKEN)
    words = ["--git-token-file", str(tmp_path / "token"), "--repo", "http://git.example/a.git"]
    done = raywb("launch", "--yes", *words, "recipes.demo")
    assert done.exit_code == 30
    assert "in the clear" in done.stderr


def test_an_instance_that_was_made_without_an_answer_is_found(
    raywb: Raywb, vast: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks behind a creation, and the second try finds the offer gone."""
    vast.drops_after_creation = True
    done = raywb("launch", "--yes", "recipes.demo")
    assert done.exit_code == 0, done.output
    assert [int(done.stdout)] == list(vast.instances)


def test_the_key_is_found_where_vast_keeps_it(
    raywb: Raywb, vast: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is named, the client's own file; with none, it is said where to get one."""
    monkeypatch.delenv("VAST_API_KEY")
    missing = raywb("launch", "--yes", "recipes.demo")
    assert missing.exit_code == 31
    assert "https://cloud.vast.ai/manage-keys/" in missing.stderr
    usual = Path.home() / ".config/vastai/vast_api_key"
    usual.parent.mkdir(parents=True)
    usual.write_text(vast.api_key + "\n")
    assert raywb("launch", "--yes", "recipes.demo").exit_code == 0
    usual.write_text("another")
    assert raywb("list").exit_code == 31
    named = Path.home() / "key"
    named.write_text(vast.api_key)
    assert raywb("--api-key-file", str(named), "list").exit_code == 0


def test_without_the_client_the_extra_is_named(
    raywb: Raywb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence."""
    monkeypatch.setitem(sys.modules, "vastai", None)
    done = raywb("list")
    assert done.exit_code == 1
    assert "pip install 'raywb[vast]'" in done.stderr


def test_keys_are_in_no_command_line_and_no_output(
    vast: VastServer, remote: GitRemote, tmp_path: Path
) -> None:
    """What git is started with is written down, each time; what is sent in secret arrives."""
    files = {"vast": vast.api_key, "wandb": WANDB_KEY, "git": GIT_TOKEN}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    root = Path(__file__).parents[1]
    kept = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(root)}
    words = ["vast", "--api-key-file", str(tmp_path / "vast"), "launch", "--yes"]
    words += ["--wandb-key-file", str(tmp_path / "wandb"), "--auto-shutdown"]
    words += ["--git-token-file", str(tmp_path / "git"), "recipes.demo"]
    real = shutil.which("git")
    log = tmp_path / "argv"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(
        f'#!/bin/sh\nprintf \'%s \' "$@" >>{log}\necho >>{log}\nexec {real} "$@"\n'
    )
    (tmp_path / "bin" / "git").chmod(0o755)
    kept["PATH"] = f"{tmp_path / 'bin'}:{kept['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "raywb", *words],
        cwd=remote.tree,
        env={**kept, "VAST_URL": vast.url},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (instance,) = vast.instances.values()
    assert instance.environment["WANDB_API_KEY"] == WANDB_KEY
    assert instance.environment["RAYWB_GIT_TOKEN"] == GIT_TOKEN
    argv = log.read_text()
    assert re.search(r"^fetch .*robots\.git [0-9a-f]{40} $", argv, re.MULTILINE), argv
    open_text = [done.stdout, done.stderr, instance.body["onstart"]]
    open_text += [unpacked(instance.body["onstart"]), argv]
    for secret in files.values():
        assert not any(secret in text for text in open_text)
