"""A command of the system's that ends a place: bounded in time, and ended whole."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence

from raywb.launch.places import EndFailed

__all__ = ["run_bounded"]


def run_bounded(
    words: Sequence[str], timeout_s: float, *, what: str, capture: bool
) -> tuple[int, str]:
    """Run it in a session of its own, which is killed when it takes too long or is cut off.

    Args:
        words: the command.
        timeout_s: longest that it may take.
        what: its name, for a sentence.
        capture: keep what it says, else that goes where this process's goes.

    Returns:
        Its exit code, and what it said.

    Raises:
        EndFailed: it could not be run, or took too long.
    """
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=said if capture else None,
                stderr=subprocess.STDOUT if capture else None,
                start_new_session=True,
            )
        except OSError as error:
            raise EndFailed(f"{what} could not be run: {error}") from error
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise EndFailed(f"{what} took longer than {timeout_s:g} s, and was cut off") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        return code, said.read().decode(errors="replace")
