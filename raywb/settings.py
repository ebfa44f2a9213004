"""Every setting of raywb, validated; the only place that reads environment variables.

A value comes from the first of: the keyword or :class:`Settings` given to ``raywb.start``, the
``wandb`` section of ``cfg``, the environment, the default.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

import msgspec

from raywb.errors import SettingsError

__all__ = ["Mode", "Settings", "find_api_key", "journal_base", "process_environment", "resolve"]

Mode = Literal["online", "offline", "disabled"]
Fsync = Literal["off", "every_second", "each"]
Ui = Literal["loopback", "network", "off"]

#: Names of variables and what they set, in the order of the README.
ENVIRONMENT = {
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_MODE": "mode",
    "WANDB_NAME": "name",
    "WANDB_RUN_ID": "run_id",
    "WANDB_BASE_URL": "base_url",
    "RAYWB_DIR": "dir",
}

#: What W&B allows in the names that become part of a path or an address.
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")

DEFAULT_PROJECT = "raywb"
DEFAULT_BASE_URL = "https://api.wandb.ai"


#: Settings that are one word of a few.
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "mode": (None, *get_args(Mode)),
    "fsync": get_args(Fsync),
    "ui": get_args(Ui),
}


def _check_choice(key: str, value: Any) -> None:
    if value not in _CHOICES[key]:
        names = ", ".join(str(item) for item in _CHOICES[key] if item is not None)
        raise SettingsError(f"{key}={value!r} cannot be used: allowed are {names}")


def _can_be_exported(text: str) -> bool:
    return "\0" not in text and text == text.encode(errors="replace").decode()


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a run and its service are to be like; ``None`` leaves the choice to raywb.

    Attributes:
        project: W&B project.
        entity: W&B team or user.
        group: W&B group; the empty string means "no group".
        mode: ``online``, ``offline`` or ``disabled``; by default ``WANDB_MODE``, else online
            where a key is to be had, else offline.
        name: the run's name; by default ``<project>-orchestrator-<time>``.
        run_id: the run's id; by default a random one.
        job_type: the run's job type.
        tags: the run's tags.
        notes: the run's notes.
        dir: directory on the head node for the ledger, the outbox and W&B's files; by default
            ``~/raywb/<project>/<run id>``.
        base_url: address of the W&B server.
        api_key_file: file on the head node that holds W&B's key (a mounted secret).
        local_cluster: ``start()`` may start a Ray cluster on this machine when there is none.
        listen_host: address that the service listens on; by default the head node's own.
        fsync: when the ledger is forced to the disk itself: ``off``, ``every_second``, ``each``.
        provisional_wait_s: how long a service that an ``attach()`` made waits for a ``start()``.
        rank_wait_s: longest that the row of a step waits for a rank that is silent; a rank that
            was silent so long is waited for again when it logs.
        sink_deadline_s: longest that W&B's client may take for one step before it is replaced.
        silent_after_s: a process that was not heard for longer may be gone, and what it left on
            its node is brought home.
        node_metrics_interval_s: how often CPU, memory, disk, network and GPU utilization of every
            node are logged; 0 is never.
        ui: who may open the web page: ``loopback``, whoever is on the head node or forwards a
            port of it; ``network``, also who comes by the service's address and shows the token
            that ``raywb ui`` prints; ``off``, nobody.
    """

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    mode: Mode | None = None
    name: str | None = None
    run_id: str | None = None
    job_type: str = "orchestrator"
    tags: tuple[str, ...] = ()
    notes: str | None = None
    dir: str | None = None
    base_url: str | None = None
    api_key_file: str | None = None
    local_cluster: bool = False
    listen_host: str | None = None
    fsync: Fsync = "every_second"
    provisional_wait_s: float = 10.0
    rank_wait_s: float = 15.0
    sink_deadline_s: float = 90.0
    silent_after_s: float = 30.0
    node_metrics_interval_s: float = 15.0
    ui: Ui = "loopback"

    def __post_init__(self) -> None:
        for key in ("project", "entity", "run_id"):
            value = getattr(self, key)
            if value is not None and not _NAME.fullmatch(value):
                raise SettingsError(
                    f"{key}={value!r} cannot be used: it is 1 to 128 letters, digits, "
                    "'-', '_' and '.'"
                )
        for key in _CHOICES:
            _check_choice(key, getattr(self, key))
        for key in ("provisional_wait_s", "rank_wait_s", "sink_deadline_s", "silent_after_s"):
            if not 0 < getattr(self, key) < 86_400:
                raise SettingsError(
                    f"{key}={getattr(self, key)!r} cannot be used: "
                    "it is a number of seconds above 0 and below 86400"
                )
        if self.group is not None and not _can_be_exported(self.group):
            raise SettingsError(
                f"group={self.group!r} cannot be used: it is text without NUL characters, since "
                "it becomes an environment variable"
            )
        if self.node_metrics_interval_s != 0 and not 1 <= self.node_metrics_interval_s < 86_400:
            raise SettingsError(
                f"node_metrics_interval_s={self.node_metrics_interval_s!r} cannot be used: it is 0 "
                "(never), or a number of seconds from 1 and below 86400"
            )
        if self.base_url is not None and urlsplit(self.base_url).scheme not in ("http", "https"):
            raise SettingsError(
                f"base_url={self.base_url!r} cannot be used: it starts with http:// or https://"
            )

    def explicit(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        return {
            key: value
            for key, value in msgspec.structs.asdict(self).items()
            if value != _DEFAULTS[key]
        }


_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in msgspec.structs.fields(Settings)
}


def resolve(
    settings: Settings | None = None,
    *,
    cfg: Any = None,
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Put the settings together from their four sources.

    Args:
        settings: the caller's object; it wins over ``cfg`` and the environment.
        cfg: an OmegaConf or Hydra config, or a mapping, with a ``wandb`` section
            (``enabled``, ``project``, ``entity``, ``group``, ``mode``).
        overrides: single settings by name; they win over everything.
        environment: the process environment by default.

    Raises:
        SettingsError: a name is unknown, or a value cannot be used.
    """
    values: dict[str, Any] = _from_environment(os.environ if environment is None else environment)
    values |= explicit_settings(settings, cfg=cfg, overrides=overrides)
    unknown = sorted(set(values) - set(_DEFAULTS))
    if unknown:
        raise SettingsError(
            f"unknown setting {', '.join(unknown)}: allowed are {', '.join(sorted(_DEFAULTS))}"
        )
    if values.get("dir") is not None:
        values["dir"] = str(Path(values["dir"]).expanduser().absolute())
    for key in _CHOICES.keys() & values.keys():
        _check_choice(key, values[key])
    try:
        return msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"a setting cannot be used: {error}") from error


def explicit_settings(
    settings: Settings | None = None, *, cfg: Any = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the caller asks for by name, which the environment does not count as."""
    values = _from_cfg(cfg)
    values |= settings.explicit() if settings else {}
    return values | {key: value for key, value in (overrides or {}).items() if value is not None}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {
        key: environment[name] for name, key in ENVIRONMENT.items() if environment.get(name)
    }
    # W&B knows further spellings; these are the ones that its own documentation names.
    spellings = {"dryrun": "offline", "run": "online", "shared": "online"}
    if "mode" in values:
        values["mode"] = spellings.get(values["mode"], values["mode"])
    return values


def _from_cfg(cfg: Any) -> dict[str, Any]:
    """The ``wandb`` section of a config, without what is missing or null in it."""
    section = as_mapping(cfg).get("wandb") or {}
    if not isinstance(section, Mapping):
        raise SettingsError(f"cfg.wandb={section!r} cannot be used: it is a section with keys")
    known = ("project", "entity", "group", "mode")
    values = {key: section[key] for key in known if section.get(key) is not None}
    if section.get("enabled") is False:
        values["mode"] = "disabled"
    return values


def as_mapping(cfg: Any) -> Mapping[str, Any]:
    """A plain mapping of an OmegaConf config, a mapping or None; missing values become None."""
    if cfg is None:
        return {}
    if isinstance(cfg, Mapping) and not type(cfg).__module__.startswith("omegaconf"):
        return cfg
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    except (OmegaConfBaseException, ValueError) as error:
        raise SettingsError(f"cfg cannot be read: {error}") from error
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


class FoundKey(NamedTuple):
    """A key, and where it was found; what shows it does not show the key."""

    text: str
    origin: str

    def __repr__(self) -> str:
        return f"FoundKey({self.origin})"


def find_api_key(settings: Settings, environment: Mapping[str, str] | None = None) -> str | None:
    """W&B's key from where W&B's own client looks, or from the file named in the settings.

    The order is ``WANDB_API_KEY``, ``settings.api_key_file``, netrc (``NETRC``, ``~/.netrc``,
    ``~/_netrc``) for the server's host name. The value goes to nothing but W&B's client.
    """
    found = locate_api_key(settings, environment)
    return found.text if found else None


def locate_api_key(
    settings: Settings, environment: Mapping[str, str] | None = None
) -> FoundKey | None:
    """The same, with the place where it was found, as a person would say it."""
    environment = os.environ if environment is None else environment
    if key := environment.get("WANDB_API_KEY"):
        return FoundKey(key, "WANDB_API_KEY")
    if settings.api_key_file:
        path = Path(settings.api_key_file).expanduser()
        text = path.read_text().strip() if path.is_file() else ""
        return FoundKey(text, str(path)) if text else None
    host = urlsplit(settings.base_url or DEFAULT_BASE_URL).hostname or ""
    candidates = [environment.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in candidates if name):
        if not path.is_file():
            continue
        try:
            entry = netrc.netrc(path).authenticators(host)
        except (netrc.NetrcParseError, OSError):
            continue  # W&B's client passes over it in the same way and looks on
        if entry and entry[2]:
            return FoundKey(entry[2], f"{path}, for {host}")
    return None


def find_vast_key(
    key_file: str | None = None, environment: Mapping[str, str] | None = None
) -> FoundKey | None:
    """Vast.ai's key from the file that was named, else from where its own client looks.

    That is ``VAST_API_KEY``, ``vastai/vast_api_key`` below ``XDG_CONFIG_HOME`` or ``~/.config``,
    and ``~/.vast_api_key``. A file that was named is the only place.
    """
    environment = os.environ if environment is None else environment
    if key_file is None and (key := environment.get("VAST_API_KEY", "").strip()):
        return FoundKey(key, "VAST_API_KEY")
    config = Path(environment.get("XDG_CONFIG_HOME") or "~/.config")
    usual = (config / "vastai" / "vast_api_key", Path("~/.vast_api_key"))
    for path in usual if key_file is None else (Path(key_file),):
        path = path.expanduser()
        if path.is_file() and (text := path.read_text().strip()):
            return FoundKey(text, str(path))
    return None


def vast_url(environment: Mapping[str, str] | None = None) -> str | None:
    """Where Vast.ai's API is, if not where its client thinks: ``VAST_URL``."""
    environment = os.environ if environment is None else environment
    return environment.get("VAST_URL") or None


def vast_environment(
    environment: Mapping[str, str], first_process: Path = Path("/proc/1/environ")
) -> Mapping[str, str]:
    """The environment with the number and the key that Vast.ai gave to this container.

    A shell that came over ssh does not have them; the container's first process does.
    """
    names = ("CONTAINER_ID", "CONTAINER_API_KEY")
    try:
        words = first_process.read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return environment  # another user's process, or no such system: nothing to add
    found = dict(word.partition("=")[::2] for word in words)
    number = environment.get(names[0]) or found.get(names[0])
    if not number or number != found.get(names[0]):
        return environment
    given = {name: environment.get(name) or found.get(name, "") for name in names}
    return {**environment, **{name: value for name, value in given.items() if value}}


def default_dir(settings: Settings, run_id: str) -> Path:
    """Where ledger, outbox and W&B's files lie: ``dir``, else ``~/raywb/<project>/<run id>``."""
    if settings.dir:
        return Path(settings.dir)
    return Path.home() / "raywb" / (settings.project or DEFAULT_PROJECT) / run_id


def journal_base(
    session_dir: str | None, cluster_id: str, environment: Mapping[str, str] | None = None
) -> Path:
    """Directory of this user's journals on this machine for one cluster.

    ``RAYWB_JOURNAL_DIR`` overrides; else it lies in Ray's session directory, else in the
    machine's temp directory.
    """
    environment = os.environ if environment is None else environment
    if override := environment.get("RAYWB_JOURNAL_DIR"):
        return Path(override) / cluster_id / str(os.getuid())
    if session_dir and os.access(session_dir, os.W_OK):
        return Path(session_dir) / "raywb" / str(os.getuid())
    return Path(environment.get("TMPDIR") or "/tmp") / f"raywb-{os.getuid()}" / cluster_id


def journal_bases(
    session_dir: str | None, cluster_id: str, environment: Mapping[str, str] | None = None
) -> list[Path]:
    """Directories on this machine where processes of a cluster keep, or kept, their journals."""
    bases = [journal_base(one, cluster_id, environment) for one in (session_dir, None)]
    return list(dict.fromkeys(bases))


def process_environment() -> Mapping[str, str]:
    """The environment of this process, for those who take one as an argument."""
    return os.environ


def set_group_variable(name: str | None) -> None:
    """Set ``WANDB_GROUP`` in this process's environment, the only variable that raywb writes.

    Args:
        name: the group; None removes the variable.
    """
    if name is None:
        os.environ.pop("WANDB_GROUP", None)
    else:
        os.environ["WANDB_GROUP"] = name


#: Variables that say where runs and journals go, for a child as for its parent. Not among them:
#: what belongs to one run (name, id), a service's own directory, which no other service may work
#: in, and W&B's key, since everybody can read a runtime_env in Ray's dashboard.
_FOR_CHILDREN = (
    "WANDB_PROJECT",
    "WANDB_ENTITY",
    "WANDB_MODE",
    "WANDB_BASE_URL",
    "RAYWB_JOURNAL_DIR",
)


def variables_for_children(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process that say where runs and journals go, less the group."""
    return {name: environment[name] for name in _FOR_CHILDREN if environment.get(name)}


#: Variables that would make W&B's client in the sink do something else than the service decided:
#: another run, a group where there is to be none, another mode, or another process's wandb-core.
_NOT_FOR_THE_SINK = (
    "WANDB_SERVICE",
    "WANDB_RUN_ID",
    "WANDB_RUN_GROUP",
    "WANDB_MODE",
    "WANDB_RESUME",
    "WANDB_DIR",
)


def sink_environment(environment: Mapping[str, str], data_dir: str = "") -> dict[str, str]:
    """The environment of a sink's process: ours, with raywb importable, less what misleads W&B.

    ``data_dir`` is where W&B's client puts the contents of tables, to which its offline files
    refer, unless the environment names another place. What W&B's client measures of itself and
    reports home takes an eighth of its time for every row, so it is off unless the environment
    says something of it.
    """
    kept = {key: value for key, value in environment.items() if key not in _NOT_FOR_THE_SINK}
    kept.setdefault("WANDB_ERROR_REPORTING", "false")
    if data_dir:
        kept.setdefault("WANDB_DATA_DIR", data_dir)
    return child_environment(kept)


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process of raywb's own: ours, with raywb importable."""
    package_root = str(Path(__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def charts_environment(
    environment: Mapping[str, str], home: str, *, api_key: str, base_url: str
) -> dict[str, str]:
    """The environment of the process that saves charts: W&B's package takes its key from there.

    W&B's client keeps below ``home`` whatever it writes.
    """
    own = {"WANDB_API_KEY": api_key, "WANDB_BASE_URL": base_url}
    return fleet_reader_environment(environment, home) | own


#: The fleet collector's reader is given its key otherwise, and asks W&B for nothing but runs.
_NOT_FOR_THE_READER = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", *_NOT_FOR_THE_SINK)


def fleet_reader_environment(environment: Mapping[str, str], home: str) -> dict[str, str]:
    """The environment of the process that reads from W&B for the fleet collector.

    It carries no key, and W&B's client keeps below ``home`` whatever it writes.
    """
    kept = {
        key: value
        for key, value in environment.items()
        if key not in _NOT_FOR_THE_READER and not key.startswith(("DD_", "DATADOG_", "AWS_"))
    }
    package_root = str(Path(__file__).resolve().parent.parent)
    places = ("TMPDIR", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
    return {
        **kept,
        **dict.fromkeys(places, home),
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_ERROR_REPORTING": "false",
        "PYTHONPATH": os.pathsep.join([package_root, *filter(None, [kept.get("PYTHONPATH")])]),
    }
