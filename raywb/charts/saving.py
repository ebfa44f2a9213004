"""Whose project the charts go to, and the process that saves them, which has a time limit."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

import msgspec

from raywb.charts.panels import DEFAULT_STAGES, recommended_sections
from raywb.charts.views_process import NotSaved, Saved, SaveRequest
from raywb.errors import KeyMissing, RaywbError, SettingsError
from raywb.reports import Status
from raywb.settings import DEFAULT_BASE_URL, Settings, charts_environment, find_api_key

__all__ = ["DEFAULT_TITLE", "save_charts", "stages_of"]

DEFAULT_TITLE = "raywb"

#: Stages that are charted one by one; more would be a page that nobody reads.
MOST_STAGES = 12

#: What stages are called that are charted over their own step.
_CHARTED = ("training/", "validation/", "train", "valid")


def stages_of(status: Status | None) -> list[str]:
    """The training stages of a run, or those of the recipes where nobody knows any."""
    found = {stage for source in (status.sources if status else []) for stage in source.stages}
    charted = sorted(stage for stage in found if stage.startswith(_CHARTED))
    return charted[:MOST_STAGES] or list(DEFAULT_STAGES)


def save_charts(
    settings: Settings,
    environment: Mapping[str, str],
    *,
    stages: Sequence[str] = DEFAULT_STAGES,
    title: str = DEFAULT_TITLE,
    timeout_s: float = 60.0,
) -> Saved:
    """Save the recommended charts as a view of the project; the second time, bring it up to date.

    Args:
        settings: entity, project, server and where the key is.
        environment: the process environment.
        stages: which stages get panels of their own.
        title: the view's.
        timeout_s: longest that W&B may take.

    Raises:
        SettingsError: there is no project, or W&B is offline.
        KeyMissing: there is no key, or it is not accepted.
        RaywbError: W&B's package is missing, or its server did not take the view.
    """
    if settings.mode in ("offline", "disabled"):
        raise SettingsError(
            f"charts are saved at W&B's server, and W&B is {settings.mode} here: `raywb sync DIR` "
            "first, then `WANDB_MODE=online raywb charts`"
        )
    if settings.project is None:
        raise SettingsError(
            "nobody says which project: --project, WANDB_PROJECT, or a cluster with a run"
        )
    base_url = settings.base_url or DEFAULT_BASE_URL
    key = find_api_key(settings, environment)
    if key is None:
        raise KeyMissing(
            f"there is no key for {base_url} here: `wandb login --host {base_url}`, or set "
            "WANDB_API_KEY"
        )
    request = SaveRequest(
        entity=settings.entity,
        project=settings.project,
        title=title,
        sections=recommended_sections(stages),
    )
    answer = _ask(request, environment, key, base_url, timeout_s)
    if isinstance(answer, Saved):
        return answer
    raise _error(answer, request, base_url, key)


def _ask(
    request: SaveRequest,
    environment: Mapping[str, str],
    key: str,
    base_url: str,
    timeout_s: float,
) -> Saved | NotSaved:
    # What W&B's client left running may still write there.
    with tempfile.TemporaryDirectory(prefix="raywb-charts-", ignore_cleanup_errors=True) as home:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "raywb.charts.views_process"],
                input=msgspec.json.encode(request) + b"\n",
                capture_output=True,
                env=charts_environment(environment, home, api_key=key, base_url=base_url),
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return NotSaved(kind="other", text=f"no answer within {timeout_s:g} s")
    lines = done.stdout.splitlines()
    if not lines:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        return NotSaved(kind="other", text=f"the process that saves ended: {said}")
    return msgspec.json.decode(lines[-1], type=Saved | NotSaved)


def _error(answer: NotSaved, request: SaveRequest, base_url: str, key: str) -> RaywbError:
    text = " ".join(answer.text.replace(key, "***").split())
    project = f"{request.entity or '(your own)'}/{request.project}"
    if answer.kind == "package":
        return RaywbError(
            f"charts are saved with W&B's own package: `pip install 'raywb[charts]'` ({text})"
        )
    if answer.kind == "key":
        return KeyMissing(
            f"{base_url} does not let this key in: make a new one on {base_url}/authorize ({text})"
        )
    if answer.kind == "project":
        return SettingsError(
            f"{base_url} has no project {project}, or this key may not see it: log a run to it "
            f"first, or correct --entity and --project ({text})"
        )
    return RaywbError(
        f"the charts are not in {project}: {text}. `raywb doctor` says whether {base_url} answers"
    )
