"""Whatever a command of the user's ends."""

from __future__ import annotations

import subprocess

from raywb.launch.places import EndFailed

__all__ = ["PlainCommand"]


class PlainCommand:
    """A command for the shell; that it ends well is all the confirmation there is."""

    name = "command"
    keeps_disk = False

    def __init__(self, command: str) -> None:
        self._command = command

    @property
    def what(self) -> str:
        return f"what `{self._command}` ends"

    def end(self) -> str:
        """See :class:`raywb.launch.places.Place`."""
        done = subprocess.run(
            ["/bin/sh", "-c", self._command], stdin=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            raise EndFailed(f"`{self._command}` ended with exit code {done.returncode}")
        return f"`{self._command}` ended well"

    def has_ended(self, timeout_s: float) -> bool:
        """See :class:`raywb.launch.places.Place`."""
        return True
