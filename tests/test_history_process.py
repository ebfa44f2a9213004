"""The process that reads a run's history: it answers, says why it cannot, and ends when unused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from raywb.errors import ServiceUnavailable
from raywb.reports import RunInfo
from raywb.service.outbox import Batch, Outbox, OutRow
from raywb.service.state import RunState, ServiceState, lock_directory, save_state
from raywb.view.history.directory import is_worked_in
from raywb.view.history.history_process import HistoryProcess
from raywb.view.history.requests import DirectoryRequest, SeriesRequest


def one_run(directory: Path, rows: int = 1) -> Path:
    """A service's directory that was left, with a run of some rows; returns its outbox."""
    outbox = Outbox(directory / "outbox")
    outbox.append(Batch(1, 0, [], [OutRow(1, 1e9 + n, {"a/x": float(n)}) for n in range(rows)]))
    outbox.close()
    info = RunInfo(project="p", id="abcd0001", name="n", mode="offline", dir=str(directory))
    run = RunState(number=1, info=info, settings={})
    save_state(directory, ServiceState(cluster_id="c" * 56, token="t", runs=[run]))
    return directory / "outbox"


@pytest.mark.parametrize("listed", [True, False])
def test_a_service_at_work_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """Also one whose lock the kernel does not list here; to look takes no lock away."""
    if not listed:
        monkeypatch.setattr("raywb.view.history.directory.LOCKS", tmp_path / "nothing")
    assert not is_worked_in(tmp_path)
    held = lock_directory(tmp_path)
    assert is_worked_in(tmp_path)
    os.close(held)
    assert not is_worked_in(tmp_path)
    os.close(lock_directory(tmp_path))


def test_an_outbox_that_cannot_be_read_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    """The same process says why, in the overview too, and goes on when it can be read again."""
    (segment,) = one_run(tmp_path).glob("*.log")
    kept = segment.rename(tmp_path / "kept")
    segment.mkdir()

    async def ask() -> None:
        process = HistoryProcess(tmp_path)
        for _ in range(3):
            with pytest.raises(ServiceUnavailable, match=r"outbox cannot be read.*directory"):
                await process.ask(SeriesRequest(1))
        pid = process.pid
        (problem, _) = (await process.tell(DirectoryRequest()))["status"]["problems"]
        assert "outbox cannot be read" in problem
        segment.rmdir()
        kept.rename(segment)
        async with asyncio.timeout(10):
            while "outbox" in (await process.tell(DirectoryRequest()))["status"]["problems"][0]:
                await asyncio.sleep(0.05)
        assert (await process.tell(SeriesRequest(1)))["rows_read"] == 1
        for file in segment.parent.iterdir():
            file.unlink()
        # What was read may be gone as a whole, too.
        async with asyncio.timeout(10):
            while (await process.tell(DirectoryRequest()))["runs"][0]["rows"]:
                await asyncio.sleep(0.05)
        assert process.pid == pid is not None
        await process.close()

    asyncio.run(ask())


def test_a_process_that_dies_at_once_is_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second time on there is a pause, and whoever asks is told how it ended."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho >> {tmp_path}/starts\nexit 3\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))

    async def ask() -> list[str]:
        process = HistoryProcess(tmp_path)
        said = []
        for _ in range(5):
            with pytest.raises(ServiceUnavailable) as caught:
                await process.ask(SeriesRequest(1))
            said.append(str(caught.value))
        await process.close()
        return said

    said = asyncio.run(ask())
    assert (tmp_path / "starts").read_text() == "\n\n"
    assert "ended with code 3" in said[0]
    assert all("again and again" in one for one in said[2:])


def test_the_historys_process_is_replaced_and_ends_when_unused(tmp_path: Path) -> None:
    """Killed it is started again, unused it ends, and nobody who asks meanwhile is let down."""
    one_run(tmp_path)

    async def ask() -> None:
        process = HistoryProcess(tmp_path, idle_s=0.5)
        first = json.loads(await process.ask(SeriesRequest(1)))
        assert first["series"]
        pid = process.pid
        assert pid is not None
        asked = [asyncio.create_task(process.ask(SeriesRequest(1))) for _ in range(3)]
        assert all(json.loads(answer)["series"] for answer in await asyncio.gather(*asked))
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ServiceUnavailable):
            await process.ask(SeriesRequest(1))
        assert json.loads(await process.ask(SeriesRequest(1)))["series"]
        assert process.pid not in (None, pid)
        async with asyncio.timeout(10):
            while process.pid is not None:
                await asyncio.sleep(0.05)
        assert json.loads(await process.ask(SeriesRequest(1)))["series"]
        asking = asyncio.create_task(process.ask(SeriesRequest(1)))
        await asyncio.sleep(0)
        asking.cancel()
        assert json.loads(await process.ask(SeriesRequest(1)))["run"] == 1
        await process.close()

    asyncio.run(ask())


def test_the_historys_process_does_not_end_while_it_answers(tmp_path: Path) -> None:
    """An answer that takes longer than it may be unused does not end it."""
    one_run(tmp_path)

    async def ask() -> None:
        process = HistoryProcess(tmp_path, idle_s=0.3)
        await process.ask(SeriesRequest(1))
        pid = process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        asking = asyncio.create_task(process.ask(SeriesRequest(1)))
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGCONT)
        await asking
        await process.ask(SeriesRequest(1))
        assert process.pid == pid
        async with asyncio.timeout(10):
            while process.pid is not None:
                await asyncio.sleep(0.05)
        await process.close()

    asyncio.run(ask())


def test_an_answer_that_comes_late_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is not ended for it, and nobody gets the answer to another question."""
    monkeypatch.setattr("raywb.view.history.history_process.ANSWER_S", 0.3)
    one_run(tmp_path)

    async def ask() -> None:
        process = HistoryProcess(tmp_path)
        await process.start()
        pid = process.pid
        assert pid is not None
        while True:
            with contextlib.suppress(ServiceUnavailable):  # until it has loaded what it needs
                await process.ask(SeriesRequest(2))
                break
        for again in (SeriesRequest(1), SeriesRequest(3)):
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(ServiceUnavailable, match="ask again"):
                await process.ask(SeriesRequest(1))
            os.kill(pid, signal.SIGCONT)
            assert (await process.tell(again))["run"] == again.run
        assert process.pid == pid
        monkeypatch.setattr("raywb.view.history.history_process.STUCK_S", 0.5)
        os.kill(pid, signal.SIGSTOP)
        for _ in range(2):
            with pytest.raises(ServiceUnavailable):
                await process.ask(SeriesRequest(1))
        assert process.pid is None
        await process.close()

    asyncio.run(ask())
