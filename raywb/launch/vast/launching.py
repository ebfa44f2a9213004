"""One launch from the choice of a commit to an instance that is there, with what is said on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from raywb.errors import LaunchError, NoOffer, VastKeyRefused
from raywb.launch.vast.instances import COMMIT, MOST_IN_A_VARIABLE, RECIPE, create
from raywb.launch.vast.offers import Offer, Wanted, find_offers
from raywb.launch.vast.onstart import OnStart
from raywb.launch.vast.source import pin
from raywb.settings import variables_for_children

__all__ = ["Launch"]

#: What of this environment goes along: where runs go. The key does not, unless a file names it.
_NOT_ALONG = ("RAYWB_JOURNAL_DIR",)

#: Where the recipes write, unless they are told otherwise.
DEFAULT_OUTPUTS = "data"


#: Addresses that name the disk or the memory of the very machine which reads them.
_ON_THE_INSTANCE = ("file", "local", "memory")


def _tell(text: str) -> None:
    click.echo(text, err=True)


@dataclass(frozen=True)
class Launch:
    """What was asked for; the names are those of the options of ``raywb vast launch``."""

    environment: Mapping[str, str] = field(repr=False)
    api_key_file: str | None
    recipe: str
    arguments: Sequence[str]
    gpus: Sequence[str]
    gpu_count: int
    max_price: float
    disk_gb: float
    image: str
    regions: Sequence[str]
    reliability: float
    number: int | None
    auto_shutdown: bool
    grace_s: float
    keep_on_failure: bool
    even_if_undelivered: bool
    outputs: str | None
    upload_to: str | None
    upload_is_elsewhere: bool
    attempts: int
    max_hours: float
    repo: str | None
    commit: str | None
    extras: str
    env: Sequence[str]
    wandb_key_file: str | None
    git_token_file: str | None
    label: str | None
    yes: bool
    dry_run: bool

    def run(self, directory: Path) -> None:
        """Launch, or say what would be launched.

        Raises:
            LaunchError: one of its subclasses; nothing is rented then, unless it says so.
        """
        self._refuse_what_cannot_end()
        token = _read_secret(self.git_token_file)
        variables = self._variables(token)
        pinned = pin(
            directory,
            self.environment,
            repo=self.repo,
            commit=self.commit,
            recipe=self.recipe,
            token=token,
        )
        variables |= {COMMIT: pinned.commit, RECIPE: self.recipe[:MOST_IN_A_VARIABLE]}
        onstart = OnStart(
            repo=pinned.repo,
            commit=pinned.commit,
            recipe=self.recipe,
            arguments=tuple(self.arguments),
            extras=self.extras,
            auto_shutdown=self.auto_shutdown,
            grace_s=self.grace_s,
            keep_on_failure=self.keep_on_failure,
            even_if_undelivered=self.even_if_undelivered,
            outputs=self._outputs(),
            upload_to=self.upload_to,
            upload_is_elsewhere=self.upload_is_elsewhere,
            outputs_if_any=self.outputs is None and not self._told(),
            attempts=self.attempts,
            max_hours=self.max_hours,
            names=sorted({word.partition("=")[0] for word in self.env}),
        )
        packed = onstart.packed()
        wanted = self._wanted()
        _tell(f"runs     {' '.join(onstart.command())}")
        _tell(f"commit   {pinned.commit} of {pinned.repo}")
        _tell(f"image    {self.image}")
        _tell(f"wanted   {wanted.in_words()}")
        _tell(f"then     {self._ending()}")
        _tell(f"sets     {', '.join(sorted(variables))}")
        for warning in self._warnings(variables):
            _tell(f"note     {warning}")
        if self.dry_run:
            self._dry_run(wanted, onstart)
        else:
            self._rent(wanted, packed, variables)

    def _refuse_what_cannot_end(self) -> None:
        """Refuse an instance that could not end itself, or would take results with it.

        Raises:
            LaunchError: what is asked for does not go together.
        """
        extras = [name.strip() for name in self.extras.split(",")]
        if self.auto_shutdown and "vast" not in extras:
            raise LaunchError(
                "--auto-shutdown needs Vast.ai's client on the instance: add vast to --extras"
            )
        if self.upload_to and not self._outputs():
            raise LaunchError("--upload-to says where --outputs go, and there are none")
        if self.upload_to and not self.upload_is_elsewhere:
            scheme, given, _ = self.upload_to.partition("://")
            if not given or scheme.partition("::")[0] in _ON_THE_INSTANCE:
                raise LaunchError(
                    f"--upload-to {self.upload_to} lies on the instance itself, and goes with it: "
                    "name an address as in s3://bucket/name; --upload-is-elsewhere says that it "
                    "is a remote file system, mounted there"
                )
        if self.auto_shutdown and self.outputs is None and not self._told() and self.arguments:
            file = self.arguments[0]
            if "=" not in file and ("/" in file or file.endswith((".yaml", ".yml"))):
                raise LaunchError(
                    f"{file} may say where the results go, which is not read here: name their "
                    "directory with --outputs (or --outputs '' where they may be lost)"
                )

    def _dry_run(self, wanted: Wanted, onstart: OnStart) -> None:
        _tell(f"query    {json.dumps(wanted.query())}")
        try:
            offers = find_offers(self._client(), wanted)
        except (VastKeyRefused, NoOffer) as error:
            _tell(f"price    not to be seen: {error}")
        else:
            for one in offers[:3]:
                _tell(f"price    {one.in_words()}")
        click.echo(onstart.script(), nl=False)

    def _rent(self, wanted: Wanted, script: str, variables: Mapping[str, str]) -> None:
        """Take the cheapest offer that is still there; each is confirmed by itself."""
        client = self._client()
        gone: NoOffer | None = None
        for offer in find_offers(client, wanted):
            self._confirm(offer)
            try:
                number = create(
                    client,
                    offer,
                    wanted,
                    script=script,
                    label=self.label or f"raywb {self.recipe}"[:MOST_IN_A_VARIABLE],
                    variables=variables,
                    warn=_tell,
                )
            except NoOffer as error:
                _tell(f"offer {offer.number} is gone; the next one")
                gone = error
                continue
            click.echo(number)
            _tell(
                f"instance {number} costs {offer.price:.3f} $/h from now on\n"
                f"  raywb vast logs {number} --follow\n"
                f"  raywb vast list\n"
                f"  raywb vast destroy {number}"
            )
            return
        raise NoOffer("all offers were taken by others meanwhile: start again") from gone

    def _confirm(self, offer: Offer) -> None:
        _tell(f"price    {offer.in_words()}")
        if not self.yes:
            click.confirm("Rent it?", abort=True, err=True)

    def _client(self) -> Any:
        from raywb.launch.vast.client import connect

        return connect(self.api_key_file, self.environment)

    def _wanted(self) -> Wanted:
        return Wanted(
            gpu_names=tuple(self.gpus),
            gpu_count=self.gpu_count,
            max_price=self.max_price,
            disk_gb=self.disk_gb,
            image=self.image,
            regions=tuple(self.regions),
            reliability=self.reliability,
            number=self.number,
        )

    def _ending(self) -> str:
        if not self.auto_shutdown:
            return "the instance stays until `raywb vast destroy` (no --auto-shutdown)"
        kept = "it stays if the recipe failed" if self.keep_on_failure else "also if it failed"
        what = (
            "whether all is delivered or not"
            if self.even_if_undelivered
            else ("once all is delivered off it")
        )
        return f"the instance is destroyed {what}, after {self.grace_s:g} s; {kept}"

    def _outputs(self) -> str:
        """The directory of results: the one that is named, or the recipe is told of."""
        if self.outputs is not None:
            return self.outputs
        return self._told() or DEFAULT_OUTPUTS

    def _told(self) -> str:
        told = [word for word in self.arguments if word.startswith("output_dir=")]
        return told[-1].partition("=")[2] if told else ""

    def _warnings(self, variables: Mapping[str, str]) -> Iterator[str]:
        """What would keep an instance that is to end itself."""
        if not self.auto_shutdown or self.even_if_undelivered:
            return
        if "WANDB_API_KEY" not in variables:
            yield (
                "no W&B key goes along: unless the account at Vast.ai has WANDB_API_KEY, the run "
                "is offline, and that keeps the instance (--wandb-key-file)"
            )
        if self.upload_to is None and (outputs := self._outputs()):
            yield (
                f"files in {outputs} would lie on the instance alone, and keep it: name a place "
                "with --upload-to, or say with --outputs '' that they may go"
            )

    def _variables(self, token: str | None) -> dict[str, str]:
        """The environment of the instance, secrets among it."""
        found = variables_for_children(self.environment)
        found = {name: text for name, text in found.items() if name not in _NOT_ALONG}
        for word in self.env:
            name, given, value = word.partition("=")
            if not name.isidentifier():
                raise LaunchError(f"--env {name} is no name of a variable")
            if not given and name not in self.environment:
                raise LaunchError(f"--env {name} has no value, and there is none here")
            found[name] = value if given else self.environment[name]
        if key := _read_secret(self.wandb_key_file):
            found["WANDB_API_KEY"] = key
        if token:
            found["RAYWB_GIT_TOKEN"] = token
        return found


def _read_secret(name: str | None) -> str | None:
    """What a file holds, without the line's end.

    Raises:
        LaunchError: it cannot be read, or holds nothing.
    """
    if name is None:
        return None
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise LaunchError(f"{name} cannot be read: {error}") from error
    if not text:
        raise LaunchError(f"{name} holds nothing")
    return text
