"""W&B's key and its server, as the process sees them that asks: which is to be the head's.

The server is asked who the key belongs to, with a query that W&B's own client sends at a login,
and what it has of the run. The key goes nowhere else, and what comes back is told without it.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import msgspec

from raywb.doctor.look import KeyLook, RunAtServer, ServerLook, WandbLook, WandbRequest
from raywb.errors import FleetTimeout
from raywb.fleet.deadline import Deadline, within
from raywb.settings import DEFAULT_BASE_URL, Settings, locate_api_key, process_environment

__all__ = ["key_problem", "look_at_wandb", "look_from_here"]

#: What W&B's client takes for a key: an own server's has a prefix and a dash before it.
_KEY = re.compile(r"[\w-]{40,}")

_VIEWER = """
query RaywbDoctor { viewer { username entity teams { edges { node { name } } } } }
"""

_RUN = """
query RaywbDoctorRun($entity: String, $project: String, $run: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $run, missingOk: true) { historyLineCount state summaryMetrics }
  }
}
"""

#: What a stage of a pipeline has in the summary as long as it has no speed.
_STAGE_TASKS = re.compile(r"(xenna/(?:[^/]+/)?stage/([^/]+)/)tasks_completed")


def look_from_here(request: dict[str, Any]) -> dict[str, Any]:
    """:func:`look_at_wandb` of and into plain values, as a task carries them."""
    found = look_at_wandb(msgspec.convert(request, WandbRequest))
    plain: dict[str, Any] = msgspec.to_builtins(found)
    return plain


def look_at_wandb(request: WandbRequest, environment: Mapping[str, str] | None = None) -> WandbLook:
    """Find the key as the service would find it in this process, and ask the server.

    Args:
        request: what is asked.
        environment: the process environment by default.

    Raises:
        SettingsError: the server's address is none.
    """
    environment = process_environment() if environment is None else environment
    named = request.base_url or environment.get("WANDB_BASE_URL") or None
    settings = Settings(base_url=named, api_key_file=request.api_key_file)
    found = locate_api_key(settings, environment)
    key = KeyLook(origin=found.origin, problem=key_problem(found.text)) if found else None
    base_url = settings.base_url or DEFAULT_BASE_URL
    if not request.ask_server:
        return WandbLook(base_url=base_url, key=key, server=None)
    text = found.text if found else None
    try:
        server = within(
            Deadline(request.limit_s),
            "asking W&B's server",
            lambda: _ask_server(base_url, text, request),
        )
    except FleetTimeout:
        server = ServerLook(error=f"it did not answer within {request.limit_s:g} s")
    return WandbLook(base_url=base_url, key=key, server=server)


def key_problem(key: str) -> str | None:
    """What W&B's client would find fault with in a key, or None."""
    if key != key.strip():
        return "it has blanks or line ends around it"
    if key.count(".") == 2:  # an identity token, which says for itself what it is
        return None
    if not re.fullmatch(r"[\w-]+", key):
        return "it has characters that no key has"
    return None if _KEY.fullmatch(key) else f"it has {len(key)} characters, and a key at least 40"


def _ask_server(base_url: str, key: str | None, request: WandbRequest) -> ServerLook:
    try:
        answer = _post(base_url, key, _VIEWER, {}, request.limit_s)
        viewer = (answer.get("data") or {}).get("viewer")
        if viewer is None:
            return ServerLook(reached=True, accepted=False, error="it knows nobody by this key")
        teams = (viewer.get("teams") or {}).get("edges") or []
        names = [viewer.get("entity"), *(edge["node"]["name"] for edge in teams)]
        entities = sorted({str(name) for name in names if name})
        return ServerLook(
            reached=True,
            accepted=True,
            username=viewer.get("username"),
            entities=entities,
            run=_ask_run(base_url, key, request) if request.run_id else None,
        )
    except urllib.error.HTTPError as error:
        with error:
            refused = error.code in (401, 403)
        return ServerLook(
            reached=True, accepted=False if refused else None, error=f"it answered {error.code}"
        )
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        return ServerLook(error=str(reason) or type(error).__name__)
    except (ValueError, AttributeError, KeyError, TypeError, http.client.HTTPException) as error:
        text = f"it does not answer as W&B's server does ({type(error).__name__})"
        return ServerLook(reached=True, error=text)


def _ask_run(base_url: str, key: str | None, request: WandbRequest) -> RunAtServer:
    variables = {"entity": request.entity, "project": request.project, "run": request.run_id}
    answer = _post(base_url, key, _RUN, variables, request.limit_s)
    run = ((answer.get("data") or {}).get("model") or {}).get("bucket")
    if run is None:
        return RunAtServer(known=False)
    summary = json.loads(run.get("summaryMetrics") or "{}")
    slow = {}
    for key_, value in summary.items():
        stage = _STAGE_TASKS.fullmatch(key_)
        if stage and f"{stage[1]}speed_tasks_per_s" not in summary:
            slow[stage[2]] = int(value)
    return RunAtServer(
        known=True,
        rows=int(run.get("historyLineCount") or 0),
        state=run.get("state"),
        stages_without_speed=slow,
    )


def _post(
    base_url: str, key: str | None, query: str, variables: dict[str, Any], timeout_s: float
) -> dict[str, Any]:
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{base_url.rstrip('/')}/graphql", body)
    request.add_header("Content-Type", "application/json")
    if key:
        login = base64.b64encode(f"api:{key}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
    # This one holds between two bytes only; whoever asks has a limit for the whole, which is to
    # strike first.
    with urllib.request.urlopen(request, timeout=2 * timeout_s) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
