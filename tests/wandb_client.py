"""Run a script with the real W&B client in a process and a home of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

#: Forty hexadecimal characters: what the client takes for an API key.
API_KEY = "0123456789abcdef" * 2 + "01234567"


def client_environment(home: Path, base_url: str | None = None) -> dict[str, str]:
    """The environment in which the real client writes below `home` and talks to nobody else.

    Args:
        home: The directory for all that the client keeps; runs lie in `home/wandb`.
        base_url: W&B's server; without one the client is offline.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    kept |= {
        "HOME": str(home),
        "WANDB_DIR": str(home),
        "WANDB_CACHE_DIR": str(home / "cache"),
        "WANDB_CONFIG_DIR": str(home / "config"),
        "WANDB_DATA_DIR": str(home / "data"),
        "WANDB_MODE": "online" if base_url else "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_X_DISABLE_STATS": "true",
        "WANDB_X_DISABLE_MACHINE_INFO": "true",
    }
    if base_url:
        kept |= {"WANDB_BASE_URL": base_url, "WANDB_API_KEY": API_KEY}
    return kept


def start_client(
    script: str, home: Path, base_url: str | None = None, *arguments: str
) -> subprocess.Popen[str]:
    """Start a Python script in which `wandb` is the real client.

    Args:
        script: Its source; common indentation is taken off.
        home: Its home and working directory.
        base_url: W&B's server; without one the client is offline.
        arguments: What it finds in `sys.argv[1:]`.
    """
    return _start(["-c", textwrap.dedent(script), *arguments], home, base_url)


def run_client(
    script: str, home: Path, base_url: str | None = None, *arguments: str, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run such a script to its end, and return how it ended."""
    return _finish(start_client(script, home, base_url, *arguments), timeout_s)


def sync(
    directory: Path, home: Path, base_url: str, *, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run `wandb sync` on a run's directory."""
    return _finish(_start(["-m", "wandb", "sync", str(directory)], home, base_url), timeout_s)


def _start(command: list[str], home: Path, base_url: str | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        env=client_environment(home, base_url),
        cwd=home,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Wait for the end; a process that takes too long is killed, and `TimeoutExpired` raised."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
