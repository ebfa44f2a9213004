"""``raywb recover``: the cluster is gone; bring home what it left, and end its runs."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from raywb.errors import DirectoryError, SettingsError
from raywb.reports import RecoveryReport, UnconfirmedSource
from raywb.service.left import Homecoming, LeftDirectory, Step, Tell
from raywb.service.state import RunState, save_state
from raywb.settings import DEFAULT_BASE_URL, Settings, find_api_key, journal_bases

__all__ = ["check_api_key", "recover"]

_SOURCE_ID = re.compile(r"[0-9a-f]{32}")

#: Exit code that is written down for a run that nobody ended.
CRASHED = 1


def recover(
    directory: Path,
    *,
    exit_code: int | None = None,
    journals: Sequence[Path] = (),
    timeout_s: float = 600.0,
    tell: Tell,
) -> RecoveryReport:
    """Bring every unfinished run of a directory to W&B, with what journals still hold.

    A run that ``finish()`` was called for keeps its exit code. A second call finds nothing to do.

    Args:
        directory: the service's directory.
        exit_code: how a run that nobody finished ended; None leaves it as crashed.
        journals: further directories in which journals lie at any depth, for instance copies
            from other nodes; they are read and left as they are.
        timeout_s: longest that W&B is waited for.
        tell: is told how far it is.

    Raises:
        DirectoryError: the directory is not a service's, or cannot be worked in.
        SettingsError: a run is online, and there is no key for W&B's server.
    """
    return asyncio.run(_recover(directory, exit_code, journals, timeout_s, tell))


async def _recover(
    directory: Path,
    exit_code: int | None,
    journals: Sequence[Path],
    timeout_s: float,
    tell: Tell,
) -> RecoveryReport:
    tell(Step("Reading ledger and outbox"))
    left = LeftDirectory(directory)
    try:
        for run in left.state.all_runs:
            if run.report is None and run.info.mode == "online":
                check_api_key(run.info.name, msgspec.convert(run.settings, Settings))
        rows_before = _ledger_rows(left)
        homecoming = _bring_home(left, journals, tell)
        tell(Step("Merging what is outstanding"))
        runs = _end_runs(left, exit_code)
        report = RecoveryReport(
            directory=str(directory),
            runs=await left.deliver(runs, time.monotonic() + timeout_s, tell),
            ledger_rows=_ledger_rows(left),
            new_rows=_ledger_rows(left) - rows_before,
            after_finish_rows=left.delivery.waiting_rows(),
            journals=homecoming.journals,
            foreign_journals=homecoming.foreign,
            failed=homecoming.failed,
            damage=_damage(left),
            unconfirmed=left.runs.last.unconfirmed if left.runs.last else [],
        )
    except OSError as error:
        raise DirectoryError(f"{directory} cannot be worked in: {error}") from error
    finally:
        await left.close()
    return report


def check_api_key(name: str, settings: Settings) -> None:
    """Make sure that there is a key for the server that a run is to go to.

    Raises:
        SettingsError: there is none.
    """
    if not find_api_key(settings):
        raise SettingsError(
            f"run {name} cannot be sent to {settings.base_url or DEFAULT_BASE_URL}: no W&B key is "
            "to be had here. Set WANDB_API_KEY, or log in with `wandb login`"
        )


def _ledger_rows(left: LeftDirectory) -> int:
    consumed = sum(source.rows for source in left.delivery.merge.sources.values())
    return consumed + left.delivery.waiting_rows()


def _bring_home(left: LeftDirectory, further: Sequence[Path], tell: Tell) -> Homecoming:
    cluster_id = left.state.cluster_id
    homecoming = Homecoming(left.delivery, cluster_id)
    origin = left.state.origin
    for base in journal_bases(origin.session_dir if origin else None, cluster_id):
        tell(Step(f"Looking for journals in {base}"))
        list(homecoming.sweep(base, remove=True))
    for directory in further:
        if not directory.is_dir():
            raise DirectoryError(f"there is no directory {directory} in which journals could lie")
        tell(Step(f"Looking for journals in {directory}"))
        locks = (path for path in directory.rglob("lock") if _SOURCE_ID.fullmatch(path.parent.name))
        for base in sorted({path.parent.parent for path in locks}):
            list(homecoming.sweep(base, remove=False))
    return homecoming


def _end_runs(left: LeftDirectory, exit_code: int | None) -> list[RunState]:
    """Have every run ended that W&B has not all of; returns these runs.

    The last run is gone on with when something of it was missing before: what journals brought
    since belongs to it.
    """
    runs = left.runs
    origin = left.state.origin
    if runs.last is None and left.delivery.waiting_rows() and origin is not None:
        # Its cluster was gone before anybody's start(), so it opens as it would have by itself.
        settings = msgspec.convert(origin.settings, Settings)
        runs.begin(settings, origin.group, origin.run_id, provisional=True)
    else:
        runs.resume()
    last = runs.last
    if last is not None and (last.report is None or not last.report.complete or last.unconfirmed):
        runs.end(last, CRASHED if exit_code is None else exit_code, crashed=exit_code is None)
        last.unconfirmed = _unconfirmed(left, last)
        save_state(left.directory, left.state)
    return [run for run in left.state.all_runs if run.report is None]


def _damage(left: LeftDirectory) -> dict[str, int]:
    delivery = left.delivery
    found = {
        "ledger records": delivery.ledger.damaged,
        "ledger bytes missing": sum(delivery.ledger.missing_bytes.values()),
        "ledger bytes torn at the end": delivery.ledger.torn_bytes,
        "outbox records": delivery.outbox.damaged,
        "outbox bytes torn at the end": delivery.outbox.torn_bytes,
        "journal frames": delivery.merge.damaged,
    }
    return {kind: count for kind, count in found.items() if count}


def _unconfirmed(left: LeftDirectory, run: RunState) -> list[UnconfirmedSource]:
    """Sources of the run whose end is not in the ledger: nobody knows what else they logged."""
    return [
        UnconfirmedSource(
            source_id=source_id,
            node_id=source.hello.node_id if source.hello else "",
            hostname=source.hello.hostname if source.hello else "",
            pid=source.hello.pid if source.hello else 0,
            acknowledged_bytes=left.delivery.ledger.end_of(source_id),
            received_rows=source.rows,
            reason="its journal is not on this machine, or its process still lives",
        )
        for source_id, source in left.delivery.merge.sources.items()
        if source.run == run.number and not source.ended
    ]
