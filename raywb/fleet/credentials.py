"""Keys and names for a collection: from the environment, else from AWS Secrets Manager.

A key lies in a :class:`Secret` from where it is read to where it is used, so that no repr and no
log line shows it; texts of errors and tracebacks go through :meth:`Credentials.redact`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from raywb.errors import SecretMissing, SettingsError
from raywb.fleet.deadline import Deadline, within
from raywb.settings import DEFAULT_BASE_URL

__all__ = ["DEFAULT_SECRET", "Credentials", "Secret", "find_credentials"]

#: Name of the secret in AWS Secrets Manager.
DEFAULT_SECRET = "dev/datadog/collectors/wandb"

DATADOG_KEY = "DD_API_KEY"
DEFAULT_DATADOG_SITE = "datadoghq.com"

#: Without these there is nothing to read.
REQUIRED = ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT")

#: What is looked for, in the environment and in the secret, under these names.
NAMES = (*REQUIRED, "WANDB_BASE_URL", DATADOG_KEY, "DD_SITE", "DD_URL")

_MASK = "***"


class Secret:
    """A text that shows itself to nobody who does not ask for it by name."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text."""
        return self._text

    def __repr__(self) -> str:
        return f"Secret({_MASK})"

    __str__ = __repr__

    def __bool__(self) -> bool:
        return bool(self._text)

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return Secret, (self._text,)


class Credentials:
    """What a collection needs to be let in, and to know where.

    Args:
        found: values by the names in :data:`NAMES`; those of :data:`REQUIRED` are there.
    """

    def __init__(self, found: Mapping[str, Secret]) -> None:
        self._found = dict(found)

    @property
    def wandb_key(self) -> Secret:
        """The key to W&B."""
        return self._found["WANDB_API_KEY"]

    @property
    def entity(self) -> str:
        """The team or user."""
        return self._found["WANDB_ENTITY"].reveal()

    @property
    def project(self) -> str:
        """The project."""
        return self._found["WANDB_PROJECT"].reveal()

    @property
    def base_url(self) -> str:
        """W&B's server."""
        return self._text("WANDB_BASE_URL") or DEFAULT_BASE_URL

    @property
    def datadog_key(self) -> Secret | None:
        """The key to Datadog."""
        return self._found.get(DATADOG_KEY)

    @property
    def datadog_site(self) -> str:
        """Datadog's site, as in ``datadoghq.eu``."""
        return self._text("DD_SITE") or DEFAULT_DATADOG_SITE

    @property
    def datadog_url(self) -> str | None:
        """An address that stands in for the site's: a proxy's."""
        return self._text("DD_URL")

    def redact(self, text: str) -> str:
        """A text in which the keys are masked, and what addresses carry of users and passwords."""
        keys = [self._found[name] for name in _KEYS if name in self._found]
        addresses = [self._found[name].reveal() for name in _ADDRESSES if name in self._found]
        return redact(text, [*keys, *(part for url in addresses for part in _logins(url))])

    def __repr__(self) -> str:
        return f"Credentials({', '.join(sorted(self._found))})"

    def _text(self, name: str) -> str | None:
        return self._found[name].reveal() if name in self._found else None


_KEYS = ("WANDB_API_KEY", DATADOG_KEY)
_ADDRESSES = ("WANDB_BASE_URL", "DD_URL")


def redact(text: str, secrets: Iterable[Secret]) -> str:
    """A text in which these secrets are masked, wherever they stand, as Python and JSON quote them.

    The longest go first: one that is a part of another would leave the rest of it behind.
    """
    shown = set()
    for secret in filter(None, secrets):
        plain = secret.reveal()
        shown |= {plain, repr(plain)[1:-1], repr(plain.encode())[2:-1], json.dumps(plain)[1:-1]}
    for one in sorted(shown, key=len, reverse=True):
        text = text.replace(one, _MASK)
    return text


def _logins(url: str) -> Iterator[Secret]:
    """What stands before the @ of an address, and the password in it, quoted for URLs or not.

    Nothing is parsed: an address that is none may have a password, too.
    """
    login = url.partition("://")[2].rpartition("@")[0]
    for text in (login, login.partition(":")[2]):
        yield Secret(text)
        yield Secret(unquote(text))


def find_credentials(
    environment: Mapping[str, str],
    deadline: Deadline,
    *,
    secret_name: str = DEFAULT_SECRET,
    datadog: bool = False,
) -> Credentials:
    """Look for what is needed; Secrets Manager is asked only for what the environment lacks.

    Args:
        environment: the process environment.
        deadline: when the time for everything is over.
        secret_name: the secret's name in AWS Secrets Manager: one JSON object whose keys are the
            variables' names, in either case.
        datadog: Datadog's key is needed as well.

    Raises:
        SecretMissing: something is to be had nowhere.
        FleetTimeout: Secrets Manager did not answer in time.
        SettingsError: an address is none.
    """
    found = _secrets(environment)
    needed = (*REQUIRED, DATADOG_KEY) if datadog else REQUIRED
    missing = [name for name in needed if name not in found]
    if missing:
        region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
        asked = f"secret {secret_name!r} of AWS Secrets Manager"
        values = within(
            deadline, f"reading the {asked}", lambda: _ask(secret_name, missing, region)
        )
        found = _secrets(values) | found
        still = [name for name in missing if name not in found]
        if still:
            raise SecretMissing(
                f"{_and(still)} {_is(still)} not set, and the {asked} has no such key: set it in "
                "the environment, or add it to the secret"
            )
    for name in _ADDRESSES:
        if name in found and not _is_address(found[name].reveal()):
            raise SettingsError(
                f"{name} cannot be used: it is an address that starts with http:// or https://"
            )
    return Credentials(found)


def _secrets(values: Mapping[str, str]) -> dict[str, Secret]:
    """What there is of :data:`NAMES`, without the newline that a file or an editor has left."""
    stripped = {name: values.get(name, "").strip() for name in NAMES}
    return {name: Secret(value) for name, value in stripped.items() if value}


def _is_address(text: str) -> bool:
    try:
        address = urlsplit(text)
        # Reading the port checks it, and finds a password with a slash, which ends the host.
        return address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # its text has the address in it
        return False


def _ask(secret_name: str, missing: list[str], region: str | None) -> dict[str, str]:
    """The secret's values, by the names of the variables.

    Args:
        secret_name: the secret's name.
        missing: what is looked for, for the errors' texts.
        region: AWS's region; None leaves it to boto3, which reads AWS_DEFAULT_REGION and its files.

    Raises:
        SecretMissing: it cannot be read, or is no JSON object.
    """
    unset = f"{_and(missing)} {_is(missing)} not set, and"
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise SecretMissing(
            f"{unset} AWS Secrets Manager cannot be asked without boto3: set it in the "
            "environment, or `pip install 'raywb[fleet]'`"
        ) from error
    try:
        client: Any = boto3.client("secretsmanager", region_name=region)
        text = client.get_secret_value(SecretId=secret_name).get("SecretString")
    except (BotoCoreError, ClientError, ValueError) as error:
        raise SecretMissing(
            f"{unset} secret {secret_name!r} of AWS Secrets Manager cannot be read ({error}): set "
            "it in the environment, or let this role do secretsmanager:GetSecretValue on it"
        ) from error
    try:
        values = json.loads(text or "")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        # The text itself must not be part of an error, nor of what led to it.
        raise SecretMissing(f"{unset} secret {secret_name!r} is no JSON object of names and values")
    return {str(name).upper(): str(value) for name, value in values.items() if value is not None}


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _is(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
