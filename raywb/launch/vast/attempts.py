"""What the on-start script runs once the project is installed: the job, begun or gone on with.

usage: python -m raywb.launch.vast.attempts [OPTIONS] -- WORDS_FOR_PYTHON…

It ends well when the file ``exit_code`` says how the job ended. Any other end means that Ray did
not start or did not take the job: that is no failure of the job, and the same call tries again.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from raywb.errors import LaunchError
from raywb.launch.vast.job import Job, Look

__all__ = ["main"]

#: Longest that `ray start` may take, and the dashboard to answer after it, in seconds.
RAY_START_TIMEOUT_S = 300.0
DASHBOARD_TIMEOUT_S = 60.0

#: Longest that the last lines of an ended job are waited for, in seconds.
LAST_LINES_S = 30.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--dir", "directory", type=click.Path(path_type=Path), required=True)
@click.option("--attempts", type=int, required=True)
@click.option("--max-hours", type=float, default=0.0)
@click.option("--gcs-port", type=int, required=True)
@click.option("--dashboard-port", type=int, required=True)
@click.option("--ray-options", default="")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def main(
    directory: Path,
    attempts: int,
    max_hours: float,
    gcs_port: int,
    dashboard_port: int,
    ray_options: str,
    command: Sequence[str],
) -> None:
    """Run the job to its end, whatever was begun on this disk before."""
    parent = os.getppid()
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    attempt = _number(directory / "attempt")

    def job(number: int) -> Job:
        return Job(dashboard, gcs_port, f"job-{number}", directory / f"ended-{number}")

    seen = job(attempt).look().look if attempt else Look.GONE
    if seen in (Look.UNKNOWN, Look.GONE):
        if attempt >= attempts:
            _say(f"begun and interrupted {attempt} x: that is enough")
            _write(directory / "exit_code", 1)
            return
        if attempt:
            _say(f"attempt {attempt} was interrupted: the same command goes on")
        if seen is Look.GONE:
            _start_ray(directory, job(attempt + 1), dashboard_port, ray_options)
        attempt += 1
        _submit(directory, job(attempt), attempt, command)
    else:
        _say(f"attempt {attempt} is on this Ray: following it")
    with _shown(dashboard, f"job-{attempt}"):
        until_s = _number(directory / "begun") + max_hours * 3600 if max_hours else None
        code = job(attempt).wait(until_s=until_s, say=_say, go_on=lambda: os.getppid() == parent)
    if code is None:
        sys.exit("the on-start script is gone")
    _say(f"the job has ended with exit code {code}")
    _write(directory / "exit_code", code)


def _start_ray(directory: Path, job: Job, port: int, options: str) -> None:
    if job.answers():
        return  # from a try whose answer came too late
    _say("starting Ray")
    words = ["ray", "start", "--head", "--disable-usage-stats", f"--port={job.gcs_port}"]
    words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", *shlex.split(options)]
    log = directory / "ray.log"
    try:
        with log.open("wb") as output:
            code = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=RAY_START_TIMEOUT_S,
            ).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        _fail(f"Ray did not start: {error}")
    if code:
        sys.stdout.write(log.read_text(errors="replace"))
        _fail(f"Ray did not start: exit code {code}")
    deadline = time.monotonic() + DASHBOARD_TIMEOUT_S
    while not job.answers():
        if time.monotonic() >= deadline:
            _fail(f"Ray's dashboard does not answer within {DASHBOARD_TIMEOUT_S:g} s")
        time.sleep(0.2)


def _submit(directory: Path, job: Job, attempt: int, command: Sequence[str]) -> None:
    """Count the attempt, and submit it; what Ray did not take is not counted."""
    shown = " ".join(word.partition("=")[0] for word in command)  # a value may be a secret
    _say(f"attempt {attempt}: {shown}")
    if not (directory / "begun").exists():
        _write(directory / "begun", int(time.time()))
    _write(directory / "attempt", attempt)
    try:
        job.submit(directory / "source", [sys.executable, *command])
    except LaunchError as error:
        if attempt > 1:
            _write(directory / "attempt", attempt - 1)
        else:
            (directory / "attempt").unlink()
        _fail(str(error))
    _say(f"Job '{job.name}' submitted successfully")


@contextlib.contextmanager
def _shown(dashboard: str, name: str) -> Iterator[None]:
    """Show what the job prints; whether that works says nothing of the job."""
    words = ["ray", "job", "logs", "--address", dashboard, "--follow", name]
    showing = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    try:
        yield
        with contextlib.suppress(subprocess.TimeoutExpired):
            showing.wait(LAST_LINES_S)
    finally:
        showing.kill()
        showing.wait()


def _fail(text: str) -> None:
    _say(text)
    sys.exit(3)


def _say(text: str) -> None:
    click.echo(f"[raywb] {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}")


def _number(path: Path) -> int:
    return int(path.read_text()) if path.exists() else 0


def _write(path: Path, number: int) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(f"{number}\n")
    new.replace(path)


if __name__ == "__main__":
    main()
