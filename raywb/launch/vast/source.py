"""Which commit an instance runs: one that is all there is here, and that the remote has.

What the instance will do is tried first: a fetch of that one commit, without the credentials of
whoever launches.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raywb.errors import SourceNotPinned

__all__ = ["Pinned", "pin", "without_login"]

#: Longest that the remote may take, in seconds.
REMOTE_TIMEOUT_S = 120.0

_WHOLE = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

#: What stands between a login name and a path: ``git@host:owner/name``, ``ssh://git@host/…``.
_SCP_LIKE = re.compile(r"(?:[^/@:]+@)?([^/@:]+):(?!/)([^:]+)")
_SSH = re.compile(r"(?:git\+)?ssh://(?:[^/@]+@)?([^/:]+)(?::\d+)?/(.+)")
#: What a token may not be sent to; what goes to loopback leaves no machine.
_IN_THE_CLEAR = re.compile(r"http://(?!(?:127\.0\.0\.1|localhost|\[::1\])[:/])")
_LOGIN = re.compile(r"(https?://)[^/@]*@")


@dataclass(frozen=True)
class Pinned:
    """One commit at one address, which whoever has ``token``, or nothing, can fetch."""

    repo: str
    commit: str


def pin(
    directory: Path,
    environment: Mapping[str, str],
    *,
    repo: str | None = None,
    commit: str | None = None,
    recipe: str | None = None,
    token: str | None = None,
) -> Pinned:
    """Find the commit that is to run, and see that an instance can fetch it.

    Args:
        directory: in the working tree.
        environment: this process's, for git.
        repo: the address to fetch from; the address of the remote ``origin`` by default.
        commit: which one; by default what is checked out, and the tree must hold nothing else.
            A commit that is named is what runs, whatever the tree holds.
        recipe: a module or file that the commit is to have, as far as that can be seen here.
        token: a password for the address, which goes to git alone, and through its environment.

    Raises:
        SourceNotPinned: there is no such commit, the tree holds more than it, or the remote
            does not have it, or not for an instance.
    """
    git = _Git(directory, environment)
    address = without_login(repo or _origin(git))
    if token and _IN_THE_CLEAR.match(address):
        raise SourceNotPinned(
            f"the token would go to {address} in the clear: name an https address with --repo"
        )
    if commit is None:
        _refuse_a_dirty_tree(git)
    whole = _whole_commit(git, commit or "HEAD")
    if recipe is not None:
        _look_for_recipe(git, whole, recipe)
    _fetch_as_an_instance(address, whole, environment, token)
    return Pinned(address, whole)


def without_login(address: str) -> str:
    """The https form of an address of git's, which needs no key of whoever launches.

    Raises:
        SourceNotPinned: it has a login in it, which would be seen, or is on this machine.
    """
    if found := _SSH.fullmatch(address):
        return f"https://{found[1]}/{found[2]}"
    if found := _SCP_LIKE.fullmatch(address):
        return f"https://{found[1]}/{found[2]}"
    if found := _LOGIN.match(address):
        raise SourceNotPinned(
            f"the address of the repository at {_LOGIN.sub(found[1], address)} has a login in it, "
            "which everybody would see: name it without with --repo, and the token with "
            "--git-token-file"
        )
    if not address.startswith(("https://", "http://", "git://")):
        raise SourceNotPinned(
            f"an instance cannot read {address}, which lies on this machine: push to a server, "
            "and name its https address with --repo"
        )
    return address


class _Git:
    """Git in one directory, without its terminal."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._environment = {**environment, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}

    def ask(self, *words: str) -> str | None:
        """What git prints, or None where it fails."""
        done = self.run(*words)
        return done.stdout.strip() if done.returncode == 0 else None

    def run(
        self, *words: str, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                ["git", *words],
                cwd=self._directory,
                env={**self._environment, **(more or {})},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=REMOTE_TIMEOUT_S,
            )
        except FileNotFoundError as error:
            raise SourceNotPinned("git is needed to see which commit is to run") from error
        except subprocess.TimeoutExpired as error:
            raise SourceNotPinned(
                f"git {words[0]} did not answer within {REMOTE_TIMEOUT_S:g} s"
            ) from error


def _origin(git: _Git) -> str:
    origin = git.ask("remote", "get-url", "origin")
    if not origin:
        raise SourceNotPinned(
            "this is no working tree with a remote called origin: start from one, or name the "
            "address that the instance is to fetch from with --repo, and --commit"
        )
    return origin


def _refuse_a_dirty_tree(git: _Git) -> None:
    changed = git.ask("status", "--porcelain", "--untracked-files=all")
    if changed:
        lines = changed.splitlines()
        names = ", ".join(line.strip().split(maxsplit=1)[-1] for line in lines[:5])
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise SourceNotPinned(
            f"the tree has changes that no commit has, and the instance would not get: {names}"
            f"{more}; commit and push them, or name what is to run with --commit (--commit HEAD "
            "leaves them out)"
        )


def _whole_commit(git: _Git, name: str) -> str:
    """All characters of a commit's name; one that is not here has to be given whole."""
    found = git.ask("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if found:
        return found.splitlines()[-1]
    if _WHOLE.fullmatch(name):
        return name
    raise SourceNotPinned(
        f"there is no commit {name} here: give all of its name, or fetch it first"
    )


def _look_for_recipe(git: _Git, commit: str, recipe: str) -> None:
    """A recipe of the repository's own has to be in the commit; others may be installed."""
    path = recipe.replace(".", "/")
    forms = [recipe] if recipe.endswith(".py") else [f"{path}/__main__.py", f"{path}.py"]
    top = forms[0].split("/")[0]
    has_any = git.ask("cat-file", "-e", f"{commit}:{top}") is not None
    if not has_any and not recipe.endswith(".py"):
        return
    if git.ask("cat-file", "-e", f"{commit}^{{commit}}") is None:
        return
    if all(git.ask("cat-file", "-e", f"{commit}:{form}") is None for form in forms):
        raise SourceNotPinned(
            f"commit {commit[:12]} has no recipe {recipe}: it would be in {' or '.join(forms)}"
        )


def _fetch_as_an_instance(
    address: str, commit: str, environment: Mapping[str, str], token: str | None
) -> None:
    """Fetch the commit into an empty repository, with the token or nothing.

    Raises:
        SourceNotPinned: that fails.
    """
    with tempfile.TemporaryDirectory(prefix="raywb-") as name:
        root = Path(name)
        git = _Git(root, environment)
        git.run("init", "-q", "--bare", ".")
        answers = root / "askpass"
        # As on the instance: the token is in the environment of git's own child alone.
        answers.write_text(
            "#!/bin/sh\ncase $1 in Username*) echo x-access-token ;; "
            '*) echo "$RAYWB_GIT_TOKEN" ;; esac\n'
        )
        answers.chmod(0o700)
        # Neither this person's logins nor the rewriting of addresses are known to the instance.
        more = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
        more |= {"GIT_ASKPASS": str(answers if token else "/bin/false")}
        more |= {"RAYWB_GIT_TOKEN": token} if token else {}
        done = git.run(
            *("fetch", "-q", "--depth=1", "--filter=tree:0", "--", address, commit),
            more=more,
        )
        if done.returncode == 0:
            return
        reached = git.run("ls-remote", "--", address, more=more)
    if reached.returncode != 0:
        raise SourceNotPinned(
            f"an instance could not read {address}: {_last_line(reached.stderr)}; name an address "
            "that it can with --repo, and for a private repository give a token that may only "
            "read it with --git-token-file"
        )
    raise SourceNotPinned(
        f"{address} does not have commit {commit[:12]} ({_last_line(done.stderr)}): push it first"
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "git says nothing"
