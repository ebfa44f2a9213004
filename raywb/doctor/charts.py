"""Why charts are empty: the wrong project, no rows at W&B, a stage that has no speed yet."""

from __future__ import annotations

from collections.abc import Mapping

from raywb.doctor.findings import Finding, counted, trouble, warning, well
from raywb.doctor.look import RunAtServer
from raywb.reports import Status

__all__ = ["check_charts"]

CHECK = "charts"

_AXES = (
    "each stage is charted over its own `<stage>/step`; a panel whose x-axis is set to Step shows "
    "the run's row numbers. `raywb charts` makes the recommended panels"
)


def check_charts(
    status: Status, at_server: RunAtServer | None, environment: Mapping[str, str]
) -> list[Finding]:
    """What W&B has of the present run, and where it is to be looked at.

    Args:
        status: the service's.
        at_server: what W&B's server has of the run; None where it was not asked.
        environment: this process's; whoever looks may look at its project.
    """
    run = status.run
    page = run.url or f"{run.entity or '(your own)'}/{run.project}/{run.id}"
    findings = []
    for name, has in (("WANDB_PROJECT", run.project), ("WANDB_ENTITY", run.entity)):
        wanted = environment.get(name)
        if wanted and has and wanted != has:
            findings.append(
                warning(
                    CHECK,
                    f"{name} is {wanted} here, and the cluster's run is in {has}",
                    f"look at {page}; the driver whose start() opened the run decides, and "
                    "`raywb finish` lets the next start() open one elsewhere",
                )
            )
    if run.provisional and not status.finished:
        findings.append(
            warning(
                CHECK,
                f"an attach() came before any start(), so the run has the defaults: {page}",
                'call `raywb.start(project="…")` in the driver before anything attaches',
            )
        )
    if at_server is not None:
        findings += _at_server(status, at_server, page)
    if not findings and run.mode == "online" and status.received_rows:
        findings.append(well(CHECK, f"at {page}", _AXES))
    return findings


def _at_server(status: Status, at_server: RunAtServer, page: str) -> list[Finding]:
    if not at_server.known:
        if not status.received_rows:
            return []
        return [
            trouble(
                CHECK,
                f"W&B's server knows no run {page}",
                "it was deleted there, or this key may not see it: `raywb finish`, then start() "
                "opens another; rows are in `raywb sync`'s reach on the head node",
            )
        ]
    if not at_server.rows and status.received_rows:
        return [
            warning(
                CHECK,
                f"W&B's server has none of {counted(status.received_rows, 'row')} yet: {page}",
                "it has them within a minute, or `delivery` above says why not",
            )
        ]
    if at_server.stages_without_speed:
        stages = ", ".join(
            f"{stage} ({counted(count, 'task')} done)"
            for stage, count in sorted(at_server.stages_without_speed.items())
        )
        return [
            warning(
                CHECK,
                f"no speed_tasks_per_s of {stages}",
                "cosmos-xenna knows a stage's speed only once it has finished enough tasks; until "
                "then raywb leaves it out rather than log a 0. A stage that stays at 0 tasks waits "
                "for input (`queue_in`) or for CPUs (`actors_pending`)",
            )
        ]
    return []
