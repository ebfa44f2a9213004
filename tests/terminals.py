"""Real terminals, of a tmux of their own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["Terminals", "real_terminals"]


class Terminals:
    """The terminals of one tmux, by name."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._socket = str(directory / "tmux")
        self._environment = {**environment, "LANG": "C.UTF-8", "TERM": "xterm-256color"}

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-u", "-f", os.devnull, "-S", self._socket, *arguments]
        return subprocess.run(
            command, env=self._environment, check=True, capture_output=True, text=True, timeout=20
        ).stdout

    def open(self, name: str, width: int, height: int, command: str) -> None:
        """Run a command in a terminal; afterwards it shows its exit code."""
        shown = f"trap : INT; {command}; echo exit $?; sleep 1000"
        size = ("-x", str(width), "-y", str(height))
        self._tmux("new-session", "-d", "-s", name, *size, "sh", "-c", shown)

    def screen(self, name: str) -> str:
        return self._tmux("capture-pane", "-p", "-t", name)

    def press(self, name: str, *keys: str) -> None:
        self._tmux("send-keys", "-t", name, *keys)

    def settings(self, name: str) -> str:
        """Whether the alternate screen is shown, and whether the cursor is: two digits."""
        return self._tmux("display", "-p", "-t", name, "#{alternate_on}#{cursor_flag}").strip()

    def until(self, name: str, pattern: str, timeout_s: float = 60.0) -> str:
        """Wait until the screen shows something; returns the screen."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, screen := self.screen(name), re.M):
            assert time.monotonic() < deadline, f"no {pattern!r} in\n{screen}"
            time.sleep(0.1)
        return screen

    def close(self) -> None:
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], check=False, timeout=20)


@contextlib.contextmanager
def real_terminals(environment: dict[str, str]) -> Iterator[Terminals]:
    """A tmux whose terminals have this environment; skips where there is no tmux, but in CI."""
    if shutil.which("tmux") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("tmux is not installed: apt-get install tmux")
        pytest.skip("tmux is not installed")
    directory = Path(tempfile.mkdtemp(prefix="rw", dir="/tmp"))
    found = Terminals(directory, environment)
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(directory, ignore_errors=True)
