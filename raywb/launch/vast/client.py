"""Vast.ai's own client, as raywb uses it: a time limit, and errors that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from raywb.errors import (
    InstanceUnknown,
    LaunchError,
    NoOffer,
    VastKeyRefused,
    VastUnavailable,
)
from raywb.settings import find_vast_key, vast_url

__all__ = ["asking", "connect"]

#: Longest that one request may take, in seconds; the client tries one that fails three times.
REQUEST_TIMEOUT_S = 30.0

KEYS_PAGE = "https://cloud.vast.ai/manage-keys/"


def connect(key_file: str | None, environment: Mapping[str, str]) -> Any:
    """The client of an account, a ``vastai.VastAI``; nothing is sent yet.

    Raises:
        LaunchError: the client is not installed.
        VastKeyRefused: there is no key.
    """
    try:
        from vastai import VastAI
    except ImportError as error:
        raise LaunchError(
            f"Vast.ai's client is not installed: pip install 'raywb[vast]' ({error})"
        ) from error
    key = find_vast_key(key_file, environment)
    if key is None:
        where = f"{key_file} holds none" if key_file else "VAST_API_KEY is not set"
        raise VastKeyRefused(
            f"there is no key of Vast.ai's: {where}; {KEYS_PAGE} makes one, which goes into "
            "VAST_API_KEY, a file that --api-key-file names, or ~/.config/vastai/vast_api_key"
        )
    client = VastAI(api_key=key.text, server_url=vast_url(environment), quiet=True)
    client.client.timeout = REQUEST_TIMEOUT_S
    return client


@contextlib.contextmanager
def asking(what: str, instance: int | None = None) -> Iterator[None]:
    """Turn what the client raises into errors of ours.

    Args:
        what: what is asked for, as a person would say it behind "to".
        instance: whose number the request has; without one, 404 is about an offer.

    Raises:
        VastKeyRefused: the key is not accepted, or may not do this.
        InstanceUnknown: there is no such instance.
        NoOffer: the offer is gone.
        VastUnavailable: all else.
    """
    import requests

    try:
        yield
    except requests.HTTPError as error:
        raise _refusal(what, instance, error.response) from error
    except (requests.Timeout, TimeoutError) as error:
        raise VastUnavailable(
            f"Vast.ai did not answer in time when it was asked to {what}"
        ) from error
    except requests.JSONDecodeError as error:
        raise _nonsense(what) from error
    except requests.RequestException as error:
        raise VastUnavailable(f"Vast.ai cannot be reached to {what}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _nonsense(what) from error


def _nonsense(what: str) -> VastUnavailable:
    return VastUnavailable(
        f"Vast.ai answered what its client cannot read when it was asked to {what}: try again, "
        "or update the client (pip install -U vastai)"
    )


def _refusal(what: str, instance: int | None, response: Any) -> LaunchError:
    """What an HTTP status means; the service's own words go with it."""
    try:
        said = response.json().get("msg") or response.reason
    except (ValueError, AttributeError):
        said = response.reason
    status = response.status_code
    if status in (401, 403):
        return VastKeyRefused(
            f"Vast.ai does not let this key {what} ({status}: {said}): {KEYS_PAGE} shows the keys "
            "and what each may do"
        )
    if status == 404 and instance is not None:
        return InstanceUnknown(f"Vast.ai knows no instance {instance} of this account ({said})")
    if status in (404, 410):
        return NoOffer(f"the offer is gone ({said})")
    return VastUnavailable(f"Vast.ai did not {what} ({status}: {said})")
