"""What Vast's API accepts in a request: fields, operators and sizes, as its OpenAPI pages say.

Each function returns what is wrong with a request, as the service would say it, or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Characters that ``onstart`` and ``args`` may have together.
MOST_ONSTART = 4048

#: Characters of one variable, of all of them, and of a label.
MOST_VARIABLE, MOST_VARIABLES, MOST_LABEL = 256, 32_768, 256

LEAST_DISK_GB = 8

#: Fields of an offer that can be searched for; the client has many more.
OFFER_FIELDS = {
    *("cpu_arch", "cpu_cores_effective", "cpu_ram", "cuda_max_good", "datacenter"),
    *("direct_port_count", "disk_bw", "disk_space", "dlperf", "dph_total", "duration"),
    *("external", "geolocation", "gpu_arch", "gpu_frac", "gpu_name", "gpu_ram", "inet_down"),
    *("inet_up", "machine_id", "num_gpus", "reliability", "rentable", "rented", "verified"),
}

OPERATORS = {
    "eq": lambda had, wanted: had == wanted,
    "neq": lambda had, wanted: had != wanted,
    "lt": lambda had, wanted: had < float(wanted),
    "lte": lambda had, wanted: had <= float(wanted),
    "gt": lambda had, wanted: had > float(wanted),
    "gte": lambda had, wanted: had >= float(wanted),
    "in": lambda had, wanted: had in wanted,
    "notin": lambda had, wanted: had not in wanted,
}

#: What a search has besides conditions.
_SEARCH_WORDS = {"order", "type", "limit", "allocated_storage", "disable_bundling"}

_CREATE_WORDS = {
    *("client_id", "image", "env", "price", "disk", "label", "extra", "onstart", "image_login"),
    *("python_utf8", "lang_utf8", "use_jupyter_lab", "jupyter_dir", "force", "cancel_unavail"),
    *("template_hash_id", "user", "runtype", "args", "args_str", "volume_info", "target_state"),
}

#: Ways to start a container; the first words are the client's own, the others the pages'.
_RUNTYPES = {
    *("ssh_direc ssh_proxy", "jupyter_direc ssh_direc ssh_proxy", "jupyter_proxy ssh_proxy"),
    *("ssh", "ssh_proxy", "ssh_direct", "jupyter", "jupyter_proxy", "jupyter_direct", "args"),
}


def wrong_search(body: Mapping[str, Any]) -> str | None:
    """What is wrong with the body of a search for offers."""
    for field, conditions in body.items():
        if field in _SEARCH_WORDS:
            continue
        if field not in OFFER_FIELDS:
            return f"unknown field {field}"
        if not isinstance(conditions, Mapping) or not conditions.keys() <= OPERATORS.keys():
            return f"conditions of {field} are {conditions!r}"
    if body.get("type") not in ("on-demand", "ondemand", "bid", "reserved"):
        return f"type is {body.get('type')!r}"
    if not all(len(pair) == 2 and pair[1] in ("asc", "desc") for pair in body.get("order", [])):
        return f"order is {body['order']!r}"
    return None


def matches(offer: Mapping[str, Any], body: Mapping[str, Any]) -> bool:
    """Whether an offer is one that a search asks for; a place matches by its country's letters."""
    for field, conditions in body.items():
        if field in _SEARCH_WORDS:
            continue
        had = offer.get(field)
        if field == "geolocation" and isinstance(had, str):
            had = had[-2:]
        if not all(OPERATORS[name](had, wanted) for name, wanted in conditions.items()):
            return False
    return True


def wrong_creation(body: Mapping[str, Any]) -> str | None:
    """What is wrong with the body that accepts an offer."""
    if unknown := sorted(body.keys() - _CREATE_WORDS):
        return f"unknown fields {unknown}"
    if not isinstance(body.get("image"), str) or not 0 < len(body["image"]) <= 1024:
        return "image is required"
    if body.get("disk", LEAST_DISK_GB) < LEAST_DISK_GB:
        return f"disk is at least {LEAST_DISK_GB}"
    if body.get("runtype", "ssh") not in _RUNTYPES:
        return f"runtype is {body['runtype']!r}"
    if len(body.get("onstart") or "") > MOST_ONSTART:
        return f"onstart has {len(body['onstart'])} characters, {MOST_ONSTART} are allowed"
    if len(body.get("label") or "") > MOST_LABEL:
        return "label is too long"
    return _wrong_variables(body.get("env"))


def _wrong_variables(variables: Any) -> str | None:
    if not isinstance(variables, Mapping):
        return "env is an object"
    for name, value in variables.items():
        if not isinstance(value, str) or len(value) > MOST_VARIABLE:
            return f"env {name} is text of at most {MOST_VARIABLE} characters"
    if sum(len(name) + len(value) for name, value in variables.items()) > MOST_VARIABLES:
        return "env is too large"
    return None
