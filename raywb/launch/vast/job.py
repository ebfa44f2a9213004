"""One submitted job, asked over Ray's job API by a watcher that a sick dashboard does not deceive.

A dashboard that fails, hangs or is gone says nothing of the job. The job's command leaves its
exit code in a file, which counts where the dashboard does not answer; and the job is lost only
when Ray's own server (GCS) takes no connection either, for a while, or Ray knows no such job.
"""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from raywb.errors import LaunchError

__all__ = ["STOPPED_AT_LIMIT", "Job", "Look", "Seen"]

#: Exit code of a job that was ended at its time limit, as of ``timeout``.
STOPPED_AT_LIMIT = 124

#: Longest that Ray may take to connect and to answer, in seconds.
REQUEST_TIMEOUT_S = (5.0, 60.0)

#: Ray is gone when neither its dashboard nor its GCS took a connection for so long, in seconds.
LOST_AFTER_S = 120.0

#: A job is unknown when Ray said so this many times, one after the other.
UNKNOWN_LOOKS = 3

#: A dashboard that says nothing of the job is told of so often, in seconds.
TELL_EVERY_S = 600.0

_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")

#: Leaves the exit code of the command, in one piece, and ends with it.
_RECORDING = (
    'cd "$0" || exit; record=$1; shift; "$@"; code=$?; '
    'echo "$code" >"$record.new" && mv "$record.new" "$record"; exit "$code"'
)


class Look(Enum):
    """What one look at a job can show."""

    RUNNING = "running"
    ENDED = "ended"
    #: Ray answers, and has no such job.
    UNKNOWN = "unknown"
    #: Something listens, and says nothing of the job.
    UNCLEAR = "unclear"
    #: Neither the dashboard nor Ray itself listens.
    GONE = "gone"


@dataclass(frozen=True)
class Seen:
    """One look; ``code`` is the exit code of a job that has ended, ``why`` what was wrong."""

    look: Look
    code: int = 0
    why: str = ""


@dataclass(frozen=True)
class Job:
    """A job of one name.

    Attributes:
        dashboard: address of Ray's dashboard.
        gcs_port: of Ray's own server, on loopback.
        name: submission id.
        record: where its command leaves its exit code.
    """

    dashboard: str
    gcs_port: int
    name: str
    record: Path

    def look(self) -> Seen:
        """Look once; never raises for what Ray does."""
        import requests

        try:
            answer = self._ask("GET", f"/api/jobs/{self.name}")
            if answer.status_code == 404:
                return Seen(Look.UNKNOWN, why=answer.text.strip())
            answer.raise_for_status()
            told = answer.json()
            status, code = told["status"], told.get("driver_exit_code")
        except (
            requests.RequestException,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            return self._without_dashboard(f"{type(error).__name__}: {error}")
        if status not in _ENDED:
            return Seen(Look.RUNNING)
        if status == "SUCCEEDED":
            return Seen(Look.ENDED, 0)
        return Seen(Look.ENDED, _as_shells_count(code or self._recorded() or 1))

    def submit(self, directory: Path, command: Sequence[str]) -> None:
        """Submit the job, once whatever happens to the answer.

        Args:
            directory: where the command runs.
            command: a program and its arguments.

        Raises:
            LaunchError: Ray does not have the job afterwards.
        """
        import requests

        self.record.unlink(missing_ok=True)
        words = ["bash", "-c", _RECORDING, str(directory), str(self.record), *command]
        asked = {"entrypoint": shlex.join(words), "submission_id": self.name}
        try:
            answer = self._ask("POST", "/api/jobs/", json=asked)
            if answer.status_code == 200:
                return
            why = f"{answer.status_code} {answer.text.strip()[-2000:]}"
        except requests.RequestException as error:
            why = f"{type(error).__name__}: {error}"
        if self.look().look in (Look.RUNNING, Look.ENDED):
            return
        raise LaunchError(f"Ray did not take the job: {why}")

    def wait(
        self,
        *,
        until_s: float | None,
        say: Callable[[str], None],
        go_on: Callable[[], bool] = lambda: True,
        pause_s: float = 1.0,
    ) -> int | None:
        """The exit code of the job once it has ended; of a job that is lost, 1.

        Args:
            until_s: the job is stopped then, in seconds since the epoch; None for never.
            say: told what is wrong, and when it is well again.
            go_on: asked before each look.
            pause_s: between two looks.

        Returns:
            The code, or None when ``go_on`` said no.
        """
        unknown = 0
        gone_since = unclear_since = told_s = None
        while go_on():
            if until_s is not None and time.time() >= until_s:
                say(f"{self.name} is at its time limit: it is stopped, and counts as failed")
                self._stop(say)
                return STOPPED_AT_LIMIT
            seen, now = self.look(), time.monotonic()
            if seen.look is Look.ENDED:
                return seen.code
            unknown = unknown + 1 if seen.look is Look.UNKNOWN else 0
            gone_since = (gone_since or now) if seen.look is Look.GONE else None
            if unknown >= UNKNOWN_LOOKS or (gone_since and now - gone_since >= LOST_AFTER_S):
                say(f"Ray was lost, and {self.name} with it: {seen.why}")
                return 1
            if seen.look is Look.RUNNING:
                if told_s is not None:
                    say("Ray's dashboard answers again")
                unclear_since = told_s = None
            else:
                unclear_since = unclear_since or now
                if told_s is None or now - told_s >= TELL_EVERY_S:
                    told_s = now
                    say(
                        f"Ray's dashboard has said nothing of {self.name} for "
                        f"{now - unclear_since:.0f} s ({seen.why}): waiting, the job may well run"
                    )
            time.sleep(pause_s)
        return None

    def answers(self) -> bool:
        """Whether the dashboard answers at all."""
        import requests

        try:
            return bool(self._ask("GET", "/api/version").ok)
        except requests.RequestException:
            return False

    def _stop(self, say: Callable[[str], None]) -> None:
        import requests

        try:
            self._ask("POST", f"/api/jobs/{self.name}/stop").raise_for_status()
        except requests.RequestException as error:
            say(f"Ray did not stop {self.name}: {error}")
            return
        deadline = time.monotonic() + REQUEST_TIMEOUT_S[1]
        while self.look().look is Look.RUNNING and time.monotonic() < deadline:
            time.sleep(0.2)

    def _ask(self, method: str, path: str, **more: Any) -> Any:
        import requests

        with requests.Session() as session:
            session.trust_env = False  # no proxy stands before loopback
            return session.request(method, self.dashboard + path, timeout=REQUEST_TIMEOUT_S, **more)

    def _without_dashboard(self, why: str) -> Seen:
        code = self._recorded()
        if code is not None:
            return Seen(Look.ENDED, code, why)
        try:
            socket.create_connection(("127.0.0.1", self.gcs_port), REQUEST_TIMEOUT_S[0]).close()
        except ConnectionRefusedError:
            return Seen(Look.GONE, why=why)
        except OSError as error:
            why = f"{why}; Ray itself: {error}"
        return Seen(Look.UNCLEAR, why=why)

    def _recorded(self) -> int | None:
        try:
            return int(self.record.read_text())
        except (OSError, ValueError):
            return None


def _as_shells_count(code: int) -> int:
    """A driver that a signal ended has its number below 0; shells count such ends from 128."""
    return code if code >= 0 else 128 - code
