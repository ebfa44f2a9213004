"""The Vast.ai instance that this process runs on, ended with the official client.

It is the ``vastai`` package's Python client and not its command: that one ends well after an error
of HTTP's, and having asked a terminal that is not there. Vast gives an instance its own number
and key in ``CONTAINER_ID`` and ``CONTAINER_API_KEY``; the key opens that instance alone. It goes
from the environment into a header, never into an argument.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from raywb.launch.places import EndFailed

__all__ = ["VastInstance"]

#: Longest that one request may take, in seconds; it is tried three times.
REQUEST_TIMEOUT_S = 20.0

#: Pause between two looks whether the instance is gone, in seconds.
LOOK_PAUSE_S = 1.0


class VastInstance:
    """One instance.

    Args:
        environment: has ``CONTAINER_ID`` and ``CONTAINER_API_KEY``, and ``VAST_URL`` where Vast's
            server is another one. Without the instance's key the client looks for the account's
            where it always does.

    Raises:
        EndFailed: ``CONTAINER_ID`` is no instance's number.
    """

    name = "vast"
    keeps_disk = False

    def __init__(self, environment: Mapping[str, str]) -> None:
        number = environment["CONTAINER_ID"]
        if not (number.isascii() and number.isdigit()):
            raise EndFailed(f"CONTAINER_ID={number!r} is not the number of a Vast.ai instance")
        self._id = int(number)
        self._key = environment.get("CONTAINER_API_KEY") or None
        self._url = environment.get("VAST_URL") or None
        #: Whether the key was seen to open the instance: a refusal later is then an answer.
        self._was_seen = False

    @property
    def what(self) -> str:
        return f"Vast.ai instance {self._id}"

    def end(self) -> str:
        """See :class:`raywb.launch.places.Place`."""
        import requests

        client = self._client()
        seen = self._look(client)
        if seen == "gone":
            raise EndFailed(f"Vast.ai knows no instance {self._id} of this key's")
        self._was_seen = seen == "there"
        try:
            answer = client.destroy_instance(self._id)
        except (requests.RequestException, ValueError) as error:
            if self._is_gone(client):
                return f"Vast.ai has destroyed instance {self._id}; its answer was lost"
            raise EndFailed(f"Vast.ai did not destroy instance {self._id}: {error}") from error
        if not (isinstance(answer, dict) and answer.get("success") is True):
            said = answer.get("msg") or answer if isinstance(answer, dict) else answer
            raise EndFailed(f"Vast.ai refused to destroy instance {self._id}: {said}")
        return f"Vast.ai has accepted to destroy instance {self._id}"

    def has_ended(self, timeout_s: float) -> bool:
        """See :class:`raywb.launch.places.Place`."""
        client = self._client()
        deadline = time.monotonic() + timeout_s
        while True:
            if self._is_gone(client):
                return True
            if time.monotonic() + LOOK_PAUSE_S > deadline:
                return False
            time.sleep(LOOK_PAUSE_S)

    def _client(self) -> Any:
        try:
            from vastai import VastAI
        except ImportError as error:
            raise EndFailed(
                f"{self.what} cannot be destroyed without Vast's client: "
                f"pip install 'raywb[vast]' ({error})"
            ) from error
        try:
            vast = VastAI(api_key=self._key, server_url=self._url)
        except RuntimeError as error:
            raise EndFailed(
                f"{self.what} cannot be destroyed without a key: CONTAINER_API_KEY is not set, "
                "and the client finds none of the account's"
            ) from error
        vast.client.timeout = REQUEST_TIMEOUT_S
        return vast

    def _is_gone(self, client: Any) -> bool:
        """Whether Vast shows that it is gone.

        The key of an instance is gone with it: where it was let in before, its refusal says the
        same as "no such instance".
        """
        seen = self._look(client)
        return seen == "gone" or (seen == "refused" and self._was_seen)

    def _look(self, client: Any) -> Literal["there", "gone", "refused", "unknown"]:
        """How the instance is, as far as Vast tells this key; never raises."""
        import requests

        try:
            return "gone" if client.show_instance(self._id) is None else "there"
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            return {401: "refused", 403: "refused", 404: "gone"}.get(status, "unknown")  # type: ignore[return-value]
        except requests.RequestException:
            return "unknown"  # no answer, or one that is no JSON: the next look may get one
        except (KeyError, TypeError, AttributeError, ValueError):
            return "there"  # an instance in a form that the client cannot read
