"""The script that an instance runs at every start, and the form in which Vast.ai takes it."""

from __future__ import annotations

import base64
import gzip
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePosixPath

from raywb.errors import LaunchError

__all__ = ["MOST_CHARACTERS", "OnStart"]

#: Most characters that Vast.ai takes as an on-start script; its pages say 4048, and that longer
#: ones are to be compressed.
MOST_CHARACTERS = 4048

#: Stands for the outputs' directory until that is written for bash.
OUTPUTS = "RAYWB-OUTPUTS"

#: A second start may come while the first one's bash still reads its file: that is replaced.
_UNPACK = """#!/usr/bin/env bash
# raywb's on-start script, compressed as Vast.ai asks; `raywb vast launch --dry-run` shows it.
set -eu
dir=${{RAYWB_LAUNCH_DIR:-${{HOME:-/root}}/raywb-launch}}
mkdir -p "$dir"
base64 -d <<'END' | gzip -d >"$dir/onstart.$$"
{text}
END
mv "$dir/onstart.$$" "$dir/onstart.sh"
exec bash "$dir/onstart.sh"
"""


@dataclass(frozen=True)
class OnStart:
    """What one launch's script is to do.

    Attributes:
        repo: where the instance fetches from, by https.
        commit: what it fetches, whole.
        recipe: a module, as for ``python -m``, or a file that ends with ``.py``.
        arguments: the recipe's own.
        extras: of the project, for pip; empty for none.
        auto_shutdown: the instance is destroyed once all is delivered.
        grace_s: how long it waits before.
        keep_on_failure: it stays when the recipe failed.
        even_if_undelivered: it is destroyed though data are on it alone.
        outputs: directory of results, seen from the root of the project; empty for none.
        upload_to: where these go; without it they lie on the instance alone, which keeps it.
        upload_is_elsewhere: a path there is a remote file system, mounted on the instance.
        outputs_if_any: a job that ended well may have made none.
        attempts: how often the job is begun; it is begun again when the instance was restarted
            under it, and for nothing else.
        max_hours: the job is ended so long after it was first begun, and counts as failed; 0 for
            no limit.
        names: variables that were set for the instance, besides those of raywb, W&B and Vast.ai.
    """

    repo: str
    commit: str
    recipe: str
    arguments: Sequence[str] = ()
    extras: str = "train,vast"
    auto_shutdown: bool = False
    grace_s: float = 10.0
    keep_on_failure: bool = False
    even_if_undelivered: bool = False
    outputs: str = ""
    upload_to: str | None = None
    upload_is_elsewhere: bool = False
    outputs_if_any: bool = False
    attempts: int = 5
    max_hours: float = 0.0
    names: Sequence[str] = ()

    def command(self) -> list[str]:
        """What Python is given to run."""
        module = [] if self.recipe.endswith(".py") else ["-m"]
        return [*module, self.recipe, *self.arguments]

    def _head(self) -> str:
        """What one launch differs in from another."""
        shutdown = ["--grace-s", f"{self.grace_s:g}"]
        shutdown += ["--keep-on-failure"] if self.keep_on_failure else []
        shutdown += ["--even-if-undelivered"] if self.even_if_undelivered else []
        if self.outputs:
            shutdown += ["--outputs", OUTPUTS]
            shutdown += ["--upload-to", self.upload_to] if self.upload_to else []
            shutdown += ["--outputs-if-any"] if self.outputs_if_any else []
            shutdown += ["--upload-is-elsewhere"] if self.upload_is_elsewhere else []
        chosen = {
            "repo": shlex.quote(self.repo),
            "commit": shlex.quote(self.commit),
            "extras": shlex.quote(f"[{self.extras}]" if self.extras else ""),
            "command": f"({shlex.join(self.command())})",
            "auto_shutdown": _yes(self.auto_shutdown),
            "keep_on_failure": _yes(self.keep_on_failure),
            "shutdown": f"({shlex.join(shutdown).replace(OUTPUTS, self._outputs())})",
            "attempts": str(self.attempts),
            "max_hours": f"{self.max_hours:g}",
            "names": shlex.quote("|".join(self.names) or "-"),
        }
        head = ["#!/usr/bin/env bash", "# Written by `raywb vast launch`.", "set -euo pipefail", ""]
        return "\n".join([*head, *(f"{name}={value}" for name, value in chosen.items())]) + "\n"

    def _outputs(self) -> str:
        """The directory of results as a word for bash, seen from the script's directory."""
        if self.outputs == "~" or self.outputs.startswith("~/"):
            return '"${HOME:-/root}"' + shlex.quote(self.outputs[1:] or "/.")
        return shlex.quote(str(PurePosixPath("source") / self.outputs))

    def script(self) -> str:
        """The script, for people and for bash; it holds no secret."""
        return f"{self._head()}\n{_body()}"

    def packed(self) -> str:
        """The same script in the form in which Vast.ai takes it, which unpacks and runs it.

        Comments and indentation of the part that is always the same are left out.

        Raises:
            LaunchError: it is too long even so.
        """
        lines = (line.strip() for line in _body().splitlines())
        body = "\n".join(line for line in lines if line and line[0] != "#")
        script = f"{self._head()}{body}\n".encode()
        sent = _UNPACK.format(text=base64.b64encode(gzip.compress(script, 9, mtime=0)).decode())
        if len(sent) > MOST_CHARACTERS:
            raise LaunchError(
                f"the on-start script has {len(sent)} characters, and Vast.ai takes "
                f"{MOST_CHARACTERS}: put what the recipe is told into a file of the repository"
            )
        return sent


def _body() -> str:
    return files("raywb.launch.vast").joinpath("onstart.sh").read_text(encoding="utf-8")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
