"""The service: does it run, does it keep up, does anybody log, was anything lost?"""

from __future__ import annotations

from raywb import __version__
from raywb.doctor.findings import Finding, counted, trouble, warning, well
from raywb.doctor.look import ServiceLook
from raywb.reports import SourceStatus, Status

__all__ = ["check_service"]

SERVICE, DELIVERY, SOURCES, LOST = "service", "delivery", "who logs", "losses"

#: Sources that are named one by one.
NAMED_SOURCES = 3


def check_service(look: ServiceLook) -> list[Finding]:
    """The service and what it says of itself."""
    if look.error is not None:
        return [
            trouble(
                SERVICE,
                f"it runs and gives no status: {look.error}",
                "`raywb status` asks again; if its versions differ, install the same raywb on "
                "every node; `raywb finish --stop` ends it. Rows are safe on disk meanwhile",
            )
        ]
    status = look.status
    if status is None:
        return [
            warning(
                SERVICE,
                "none runs on this cluster, so nothing is logged",
                'call `raywb.start(project="…")` once in the driver, or `raywb.attach()` in any '
                "task or actor: it is made then, and stays",
            )
        ]
    return [
        _version(status),
        *_problems(status),
        _delivery(status),
        *_after_finish(status),
        *_sources(status),
        _losses(status),
    ]


def _version(status: Status) -> Finding:
    if status.version == __version__:
        found = f"raywb {status.version} at {status.address}"
        if status.incarnation > 1:
            found += f", started {status.incarnation} times"
        return well(SERVICE, found)
    return trouble(
        SERVICE,
        f"it is raywb {status.version}, this process has {__version__}",
        "install one version on every node, then `raywb finish --stop`; the next raywb.start() "
        "makes a service of the new one",
    )


def _problems(status: Status) -> list[Finding]:
    told = [trouble(SERVICE, text, _AS_IT_SAYS) for text in status.problems]
    return told + [warning(SERVICE, text, _AS_IT_SAYS) for text in status.warnings]


_AS_IT_SAYS = "the service says so itself; `raywb status` shows when it is over"


def _delivery(status: Status) -> Finding:
    sink, mode = status.sink, status.run.mode
    rows = f"{counted(status.received_rows, 'row')} received"
    found = f"{rows}, {status.backlog_rows} on the way to W&B"
    if mode == "disabled":
        return well(DELIVERY, f"{rows}; the run is disabled, so nothing goes to W&B")
    if mode == "offline":
        return warning(
            DELIVERY,
            f"{rows}; the run is offline, so W&B has no chart of it",
            f"`raywb sync {status.run.dir}` sends it. With a key on the head node, and WANDB_MODE "
            "not set to offline, the next run is online",
        )
    if sink.state in ("retrying", "no key") or (status.backlog_rows and sink.last_error):
        return trouble(
            DELIVERY,
            f"{found}; W&B's side is {sink.state}: {sink.last_error}",
            "rows are safe on disk and go on their way as soon as W&B takes them: see the checks "
            "of W&B's key and server above",
        )
    if status.undelivered_updates:
        return warning(
            DELIVERY,
            f"{found}; {status.undelivered_updates[0]}",
            "`raywb status` names all that is not with W&B, and why",
        )
    return well(DELIVERY, f"{found}, {sink.confirmed_rows} shown by its server")


def _after_finish(status: Status) -> list[Finding]:
    if not status.after_finish_rows:
        return []
    return [
        warning(
            DELIVERY,
            f"{counted(status.after_finish_rows, 'row')} came after finish(), and belong to no run",
            "the next raywb.start() opens a run that takes them",
        )
    ]


def _sources(status: Status) -> list[Finding]:
    living = [source for source in status.sources if not source.ended]
    silent = [
        source
        for source in living
        if source.heard_ago_s is not None and source.heard_ago_s > status.silence_s
    ]
    findings = []
    if silent:
        worst = max(source.heard_ago_s or 0.0 for source in silent)
        findings.append(
            warning(
                SOURCES,
                f"{counted(len(silent), 'process')} of {len(living)} silent for up to "
                f"{worst:.0f} s: {_names(silent)}".replace("processs", "processes"),
                "a rank that hangs holds up the others: `py-spy dump --pid PID` on that host shows "
                "where; of one that was killed the journal is brought home by itself",
            )
        )
    if status.unconfirmed:
        one = status.unconfirmed[0]
        findings.append(
            warning(
                SOURCES,
                f"what {len(status.unconfirmed)} processes had logged last could not be had: "
                f"{one.hostname or one.node_id[:8]} pid {one.pid}: {one.reason}",
                f"copy their journals from the node's disk, if it is still there, and run `raywb "
                f"recover {status.run.dir} --journals COPY` when the cluster is gone",
            )
        )
    if not status.sources:
        findings.append(
            warning(
                SOURCES,
                "nobody has attached, so there is nothing to chart",
                '`raywb.attach("stage")` in the task, actor or driver that has the metrics, then '
                "`client.log({...}, step=step)`",
            )
        )
    elif not findings:
        stages = sorted({stage for source in status.sources for stage in source.stages})
        found = f"{len(living)} of {counted(len(status.sources), 'source')} alive"
        findings.append(well(SOURCES, f"{found}, stages: {', '.join(stages) or 'none'}"))
    return findings


def _names(sources: list[SourceStatus]) -> str:
    shown = [
        f"{one.hostname} pid {one.pid} ({', '.join(one.stages) or 'no stage'})"
        for one in sources[:NAMED_SOURCES]
    ]
    return ", ".join(shown) + (", …" if len(sources) > NAMED_SOURCES else "")


def _losses(status: Status) -> Finding:
    parts = [f"{count} {reason}" for reason, count in sorted(status.lost.items()) if count]
    if parts:
        return warning(
            LOST,
            f"lost: {', '.join(parts)}",
            "they are gone, and counted in the run as `raywb/lost/<reason>`: disk_full asks for "
            "room on the worker's disk, backlog_full for W&B to be reached within 4 GB of rows",
        )
    if status.rejected:
        return warning(
            LOST,
            f"{counted(status.rejected, 'value')} rejected, which W&B cannot chart",
            "the process that logged them warned once for each key; "
            "`raywb.attach(…, strict=True)` raises where it happens",
        )
    return well(LOST, "none")
