"""Runs for the fleet collector to find, put into the loopback W&B server, and its command."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wandb_client import API_KEY
from wandb_server import WandbServer
from wandb_store import ServerRun, Store, iso

HOUR_S = 3600.0

ENTITY, PROJECT = "robots", "sky"


def put_run(
    store: Store,
    run_id: str,
    *,
    state: str = "finished",
    created_ago_s: float = 2 * HOUR_S,
    heartbeat_ago_s: float = HOUR_S,
    name: str | None = None,
    summary: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    sweep: str = "",
    project: str = PROJECT,
) -> ServerRun:
    """Put a run into the store as if it had been written at that time."""
    run = ServerRun(ENTITY, project, run_id, len(store.runs) + 1, name or run_id)
    run.told_state = state
    run.created_at = iso(time.time() - created_ago_s)
    run.heartbeat_at = time.monotonic() - heartbeat_ago_s
    run.summary = dict(summary or {})
    run.raw_config = {key: {"value": value} for key, value in (config or {}).items()}
    run.sweep_name = sweep
    store.runs[run.path] = run
    return run


def fleet_environment(
    home: Path, server: WandbServer | None, **further: str | None
) -> dict[str, str]:
    """The environment of the command: nothing but what it is given here."""
    given: dict[str, str | None] = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "COLUMNS": "120",
        "AWS_EC2_METADATA_DISABLED": "true",
        "WANDB_ERROR_REPORTING": "false",
    }
    if server is not None:
        given |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
        given |= {"WANDB_ENTITY": ENTITY, "WANDB_PROJECT": PROJECT}
    given |= further
    return {name: value for name, value in given.items() if value is not None}


def start_fleet(environment: Mapping[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Start `raywb fleet`."""
    return subprocess.Popen(
        [sys.executable, "-m", "raywb", "fleet", *arguments],
        env=dict(environment),
        cwd=environment["HOME"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_fleet(
    environment: Mapping[str, str], *arguments: str, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run `raywb fleet` to its end."""
    process = start_fleet(environment, *arguments)
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
