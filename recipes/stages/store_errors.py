"""What went wrong with a store, in one sentence, whatever library it was that failed.

Every store has a library of its own, and each has its own errors; here alone they are told apart.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from recipes.errors import InputError

__all__ = ["missing_package", "shown", "shown_settings", "told_clearly"]

#: The extra of this package that brings what a store needs.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}

#: Where a store's own credentials come from.
_REMEDIES = {
    "s3": "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to what may read it, "
    "or FSSPEC_S3_ANON=true for a public bucket",
    "gs": "run 'gcloud auth application-default login' as somebody who may read it, or set "
    "GOOGLE_APPLICATION_CREDENTIALS to a key file",
    "hf": "set HF_TOKEN to a token that may read it, and accept the dataset's terms on its page "
    "if it has any",
    "https": "use an address that may be read without a login, such as a signed one, or put the "
    "login into ~/.netrc",
}
_REMEDIES |= {"s3a": _REMEDIES["s3"], "gcs": _REMEDIES["gs"], "http": _REMEDIES["https"]}

#: Whose errors are about the store, beside those of the operating system.
_LIBRARIES = frozenset(
    {
        *("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpx"),
        *("httpx2", "huggingface_hub", "requests", "s3fs", "urllib3"),
    }
)
_NO_CREDENTIALS = re.compile(r"NoCredentials|PartialCredentials|DefaultCredentials|NoAuthToken")
_QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")
_REFUSED_STATUS = (401, 403)


def shown(location: str) -> str:
    """Return a location without what may be a secret: a password, or the words of a signature."""
    scheme, separator, rest = location.partition("://")
    host, slash, path = rest.partition("/")
    if not separator:
        return location
    if scheme in ("http", "https"):  # elsewhere a question mark is part of a pattern
        path, mark, _ = path.partition("?")
        path += "?…" if mark else ""
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings as anybody may see them: without what signs an input's address.

    Args:
        settings: As ``settings_as_dict`` returns them.
    """
    inputs = settings["input"]
    return {**settings, "input": {**inputs, "paths": [shown(path) for path in inputs["paths"]]}}


def missing_package(scheme: str, error: ImportError) -> InputError:
    """Return the error for a store whose package is not installed."""
    if scheme in _EXTRAS:
        return InputError(
            f"reading {scheme}:// needs a package that is not installed: "
            f"pip install 'raywb[{_EXTRAS[scheme]}]'"
        )
    return InputError(f"reading {scheme}:// needs a package that is not installed: {error}")


@contextlib.contextmanager
def told_clearly(doing: str, location: str) -> Iterator[None]:
    """Turn what a store's library raises into one sentence that names the location.

    Args:
        doing: What was tried: ``list``, ``read``.
        location: Of what.

    Raises:
        InputError: The store refused, does not have it, or did not answer.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        causes = list(_causes(error))
        if not any(_is_of_a_store(cause) for cause in causes):
            raise
        scheme = location.partition("://")[0]
        where = shown(location)
        raise InputError(f"cannot {doing} {where}: {_sentence(causes, scheme)}") from error


def _sentence(causes: list[BaseException], scheme: str) -> str:
    """Say what happened, and where it helps, what to do."""
    remedy = _REMEDIES.get(scheme, "give it credentials in the way of its fsspec package")
    statuses = [status for status in map(_status, causes) if status is not None]
    text = " ".join(map(_first_line, causes))
    if any(_NO_CREDENTIALS.search(type(cause).__name__) for cause in causes):
        return f"there are no credentials; {remedy}"
    if any(type(cause).__name__ == "RepositoryNotFoundError" for cause in causes):
        return f"there is no such dataset, or it is private; {remedy}"
    refused = any(isinstance(cause, PermissionError) for cause in causes) or "Forbidden" in text
    if refused or any(status in _REFUSED_STATUS for status in statuses):
        status = next((f" ({found})" for found in statuses if found in _REFUSED_STATUS), "")
        return f"access was refused{status}; {remedy}"
    if any("Timeout" in type(cause).__name__ for cause in causes):
        return "the store did not answer in time"
    if any(isinstance(cause, FileNotFoundError) for cause in causes) or 404 in statuses:
        return "there is no such file"
    return _first_line(causes[-1])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_a_store(error: BaseException) -> bool:
    return isinstance(error, OSError | TimeoutError) or any(
        kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(error).__mro__
    )


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries, whatever its library calls it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(response, "status_code", response)
    for name in ("status", "code"):  # aiohttp's, and gcsfs'
        if not isinstance(status, int):
            status = getattr(error, name, None)
    return status if isinstance(status, int) else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    # Libraries quote the whole address, signature and all.
    return _QUERY.sub(r"\1?…", lines[0].strip()) if lines else type(error).__name__
