"""All checks in their order; each in bounds of its own, and one that fails stops no other."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from raywb import __version__
from raywb.doctor import charts, disks, nodes, ray_address, ray_environment, service, wandb_key
from raywb.doctor.cluster_look import LIMIT_S, look_at_cluster
from raywb.doctor.findings import Diagnosis, Finding, trouble, warning
from raywb.doctor.look import (
    ClusterLook,
    ClusterRequest,
    DiskLook,
    Imported,
    NodeLook,
    WandbLook,
    WandbRequest,
)
from raywb.doctor.on_node import PACKAGES, look_at_disk, try_imports
from raywb.doctor.wandb_access import look_at_wandb
from raywb.errors import RaywbError, SettingsError
from raywb.settings import Settings, child_environment, resolve

__all__ = ["examine"]

#: Modules that workers import.
MODULES = ("raywb", "wandb", "cosmos_xenna.pipelines.v1")

#: What the recipes' workers import.
RECIPES = "recipes.pipeline"

_T = TypeVar("_T")


class _Findings:
    """What has been found; a check that fails is a finding, too."""

    def __init__(self) -> None:
        self.found: list[Finding] = []

    def add(self, check: str, look: Callable[[], Iterable[Finding]]) -> None:
        """Add a check's findings."""
        self.found += self.attempt(check, look) or ()

    def attempt(self, check: str, look: Callable[[], _T]) -> _T | None:
        """What ``look`` returns; None where it failed, which is told."""
        try:
            return look()
        except SettingsError as error:
            self.found.append(trouble(check, str(error), "correct it where it is set"))
        except RaywbError as error:
            self.found.append(warning(check, str(error), _AGAIN))
        except Exception as error:  # noqa: BLE001 - told as a finding; the other checks go on
            text = f"this check itself failed: {type(error).__name__}: {error}"
            self.found.append(warning(check, text, _AGAIN))
        return None


_AGAIN = "the other checks do not depend on it; run `raywb doctor` again, and report it if it stays"


def examine(
    option: str | None,
    environment: Mapping[str, str],
    *,
    home: Path | None = None,
    directory: Path | None = None,
    api_key_file: str | None = None,
    limit_s: float = LIMIT_S,
) -> Diagnosis:
    """Look at this machine, at the cluster, and at W&B.

    Args:
        option: the cluster's address, where the command names one.
        environment: the process environment.
        home: the user's home directory.
        directory: the working directory: its recipes are to be importable, where it has any.
        api_key_file: file that holds W&B's key, as in :class:`raywb.Settings`.
        limit_s: longest that the cluster may take.
    """
    findings = _Findings()
    home, directory = home or Path.home(), directory or Path.cwd()
    settings = findings.attempt("settings", lambda: resolve(environment=environment)) or Settings()
    offline = settings.mode in ("offline", "disabled")
    wandb = WandbRequest(
        base_url=settings.base_url,
        api_key_file=api_key_file,
        ask_server=not offline,
        entity=settings.entity,
    )
    address = ray_address.name_address(option, environment)
    look = _cluster(findings, address, wandb, environment, home, directory, limit_s)
    if look.connected is not None:
        _check_nodes(findings, look)
    else:
        findings.add("imports", lambda: nodes.check_imports(_imports_here(directory)))
        findings.add("disk", lambda: disks.check_disks({"here": _disks_here(settings)}))
    _check_wandb(findings, look, wandb, settings, environment)
    _check_service(findings, look, environment)
    cluster = look.connected.address if look.connected else None
    return Diagnosis(version=__version__, cluster=cluster, findings=findings.found)


def _cluster(
    findings: _Findings,
    address: ray_address.Address,
    wandb: WandbRequest,
    environment: Mapping[str, str],
    home: Path,
    directory: Path,
    limit_s: float,
) -> ClusterLook:
    if (finding := ray_address.unreachable(address)) is not None:
        findings.found.append(finding)
        return ClusterLook()
    request = ClusterRequest(
        address=address.text,
        variables=[variable.name for variable in ray_environment.VARIABLES],
        modules=_modules(directory),
        wandb=wandb,
        nodes_limit_s=limit_s / 2,
    )
    own = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
    look = findings.attempt(
        ray_address.CHECK,
        lambda: look_at_cluster(request, child_environment(own), limit_s=limit_s),
    )
    if look is None:
        return ClusterLook()
    findings.add(
        ray_address.CHECK, lambda: ray_address.check_address(address, look, environment, home)
    )
    return look


def _check_nodes(findings: _Findings, look: ClusterLook) -> None:
    findings.add("nodes", lambda: nodes.check_answers(look))
    findings.add(ray_environment.CHECK, lambda: ray_environment.check_environment(look))
    findings.add("state API", lambda: ray_environment.check_state_api(look))
    findings.add("CPUs", lambda: nodes.check_cpus(look))
    findings.add("versions", lambda: nodes.check_versions(look, _versions_here()))
    findings.add("imports", lambda: nodes.check_imports(look))
    places = dict(zip(nodes.names_of(look.nodes), (one.disks for one in look.nodes), strict=True))
    findings.add("disk", lambda: disks.check_disks(places))
    findings.add("clocks", lambda: nodes.check_clocks(look))


def _check_wandb(
    findings: _Findings,
    look: ClusterLook,
    wandb: WandbRequest,
    settings: Settings,
    environment: Mapping[str, str],
) -> None:
    run = look.status.run if look.status else None
    head = look.head.wandb if look.head else None
    if look.head is not None and "wandb" in look.head.failed:
        text = f"the head node could not look: {look.head.failed['wandb']}"
        findings.found.append(warning(wandb_key.KEY, text, "see the check of imports above"))
    asked = wandb
    if head is not None or (run is not None and run.mode != "online"):
        asked = msgspec.structs.replace(wandb, ask_server=False)
    here = findings.attempt(wandb_key.KEY, lambda: look_at_wandb(asked, environment))
    if here is None:
        return
    mode = run.mode if run is not None else settings.mode
    handed_over = bool(
        look.status and mode == "online" and look.status.sink.state not in ("no key", "waiting")
    )
    findings.add(
        wandb_key.KEY, lambda: wandb_key.check_key(here, head, mode, handed_over=handed_over)
    )
    seen: WandbLook = head or here
    place = "from the head node" if head else "from here"
    entity = run.entity if run is not None else settings.entity
    findings.add(wandb_key.SERVER, lambda: wandb_key.check_server(seen, entity, place, mode))


def _check_service(findings: _Findings, look: ClusterLook, environment: Mapping[str, str]) -> None:
    answer, status = look.service, look.status
    if answer is not None:
        findings.add(service.SERVICE, lambda: service.check_service(answer))
    if status is not None:
        seen = look.head.wandb if look.head else None
        at_server = seen.server.run if seen and seen.server else None
        findings.add(charts.CHECK, lambda: charts.check_charts(status, at_server, environment))


def _modules(directory: Path) -> list[str]:
    """What workers are to import: the recipes too, where they would be started from."""
    is_there = (directory / RECIPES.replace(".", "/")).with_suffix(".py").is_file()
    return [*MODULES, *([RECIPES] if is_there else [])]


def _imports_here(directory: Path) -> ClusterLook:
    imports = msgspec.convert(try_imports(_modules(directory)), dict[str, Imported])
    here = NodeLook(node_id="", name="here", is_head=False, cpus=0, gpus=0, imports=imports)
    return ClusterLook(nodes=[here])


def _disks_here(settings: Settings) -> list[DiskLook]:
    found = look_at_disk("raywb's directory", settings.dir or "~/raywb")
    return [msgspec.convert(found, DiskLook)]


def _versions_here() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a checkout is not installed, and torch is not needed
    return found
