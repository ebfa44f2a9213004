"""EC2's notice that a spot instance will be taken away, from the instance's metadata.

The format is that of "Spot Instance interruption notices" in the EC2 user guide, asked for by
version 2 of the metadata service: a token is fetched with PUT, and sent with every question.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from datetime import UTC, datetime

from raywb.errors import LaunchError

__all__ = ["METADATA_URL", "MetadataUnreachable", "SpotNotice"]

METADATA_URL = "http://169.254.169.254"

#: How long a token is asked for, in seconds: the longest that EC2 gives.
TOKEN_S = 21_600

#: Longest that a question may take, in seconds: the service is on the same machine.
REQUEST_TIMEOUT_S = 2.0

_ACTION = "/latest/meta-data/spot/instance-action"


class MetadataUnreachable(LaunchError):
    """Raised when nothing answers as EC2's metadata service does."""


class SpotNotice:
    """The way to the notice.

    Args:
        url: address of the metadata service.
    """

    def __init__(self, url: str = METADATA_URL) -> None:
        self._url = url.rstrip("/")
        self._token: str | None = None
        # A proxy that the environment names for everything else knows nothing of this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def look(self) -> tuple[str, float] | None:
        """What will happen and when, in seconds since the epoch; None while nothing is announced.

        Raises:
            MetadataUnreachable: there is no such service here, or it gives no sensible answer.
        """
        try:
            return self._ask()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            if error.code != 401:
                raise MetadataUnreachable(f"{self._url} answers {error.code}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MetadataUnreachable(f"{self._url} does not answer: {error}") from error
        self._token = None  # it has expired: the next look fetches another one
        return None

    def _ask(self) -> tuple[str, float] | None:
        if self._token is None:
            header = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
            self._token = self._request("PUT", "/latest/api/token", header)
        notice = json.loads(
            self._request("GET", _ACTION, {"X-aws-ec2-metadata-token": self._token})
        )
        at = datetime.strptime(notice["time"], "%Y-%m-%dT%H:%M:%SZ")
        return str(notice["action"]), at.replace(tzinfo=UTC).timestamp()

    def _request(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(self._url + path, method=method, headers=headers)
        with self._opener.open(request, timeout=REQUEST_TIMEOUT_S) as answer:
            return str(answer.read().decode())
