"""Whatever a command of the user's ends."""

from __future__ import annotations

from raywb.launch.places import EndFailed
from raywb.launch.places.bounded import run_bounded

__all__ = ["PlainCommand"]

#: Longest that the command may take, in seconds.
TIMEOUT_S = 300.0


class PlainCommand:
    """A command for the shell; that it ends well is all the confirmation there is."""

    name = "command"
    keeps_disk = False

    def __init__(self, command: str, timeout_s: float = TIMEOUT_S) -> None:
        self._command = command
        self._timeout_s = timeout_s

    @property
    def what(self) -> str:
        return f"what `{self._command}` ends"

    def end(self) -> str:
        """See :class:`raywb.launch.places.Place`."""
        words = ["/bin/sh", "-c", self._command]
        code, _ = run_bounded(words, self._timeout_s, what=f"`{self._command}`", capture=False)
        if code:
            raise EndFailed(f"`{self._command}` ended with exit code {code}")
        return f"`{self._command}` ended well"

    def has_ended(self, timeout_s: float) -> bool:
        """See :class:`raywb.launch.places.Place`."""
        return True
