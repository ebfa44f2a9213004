"""Python's logging in the run: counted, in a table, as alerts; bounded, and never in the way."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device_stand_in
import pytest
from local_service import LocalService
from wandb_file import WandbRun, read_runs

from raywb import log_handler
from raywb.client import Client
from raywb.log_handler import RaywbHandler

HOST = socket.gethostname().partition(".")[0]


@pytest.fixture
def client(service: LocalService) -> Client:
    service.up()
    service.start()
    return service.client("train")


@pytest.fixture
def log(client: Client) -> Iterator[logging.Logger]:
    """A logger of the user's, with the handler on it."""
    logger = logging.getLogger("user.code")
    handler = RaywbHandler(client)
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)
    handler.close()


def close(log: logging.Logger) -> None:
    for handler in list(log.handlers):
        handler.close()


def written(service: LocalService, client: Client) -> WandbRun:
    """The run as W&B's file has it."""
    assert client.flush()
    assert service.service is not None
    assert service.service.finish(60.0, 0).complete
    return read_runs(service.directory)["run00001"]


def records(service: LocalService, run: WandbRun, key: str = "train/log/records") -> list[dict]:
    """The rows of the last table."""
    media = run.values(f"{key}.path") or [value["path"] for value in run.values(key)]
    (path,) = service.directory.rglob(Path(media[-1]).name)
    table = json.loads(path.read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_records_reach_the_run(service: LocalService, client: Client, log: logging.Logger) -> None:
    """Counts, the table with its tracebacks, the last error, and one alert for one place."""
    log.info("not this one")
    log.warning("disk %d is %s", 3, "slow")
    for number in (1, 2):
        try:
            secret = "a value that nobody logged"
            raise ValueError(f"bad batch {number}")
        except ValueError:
            log.exception("step %d failed", number)
    del secret
    close(log)
    run = written(service, client)
    assert (run.values("train/log/warnings")[-1], run.values("train/log/errors")[-1]) == (1, 2)
    assert run.metrics["train/log/*"].step_metric == "train/log/time_s"
    assert run.summary["train/log/last_error"] == "step 2 failed"
    errors, warnings = records(service, run)
    assert (errors["level"], errors["count"], errors["message"]) == ("ERROR", 2, "step 2 failed")
    assert "ValueError: bad batch" in errors["traceback"]
    assert (
        "a value that nobody logged" not in errors["traceback"].replace("secret = ", "", 1)[-200:]
    )
    assert errors["where"].startswith(__file__)
    assert (warnings["message"], warnings["logger"]) == ("disk 3 is slow", "user.code")
    ((title, text),) = run.alerts
    assert title == "ERROR in train: step 1 failed"
    assert "bad batch 1" in text


def test_a_million_warnings_are_one_row(
    service: LocalService, client: Client, log: logging.Logger
) -> None:
    """A loop that warns fills neither journal nor run, and every warning is counted."""
    count = 20_000
    before = client.stats
    began = time.perf_counter()
    for number in range(count):
        log.warning("slow batch %d", number)
    per_call_us = (time.perf_counter() - began) / count * 1e6
    close(log)
    journal = client._connection.journal
    assert journal is not None
    print(f"{per_call_us:.1f} us a record; journal {journal.end} bytes")
    assert client.stats.logged - before.logged < 15
    assert journal.end < 20_000
    run = written(service, client)
    assert run.values("train/log/warnings")[-1] == count
    (row,) = records(service, run)
    assert (row["count"], row["message"]) == (count, f"slow batch {count - 1}")


def test_many_places_and_alerts_are_bounded(
    service: LocalService,
    client: Client,
    log: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond a number of places they are counted together, and so are alerts beyond a few."""
    monkeypatch.setattr(log_handler, "MOST_PLACES", 10)
    for line in range(30):
        record = log.makeRecord(log.name, logging.ERROR, "f.py", line, "x" * 5000, (), None)
        log.handle(record)
    close(log)
    run = written(service, client)
    rows = records(service, run)
    assert (len(rows), rows[-1]["message"], rows[-1]["count"]) == (11, "other places", 20)
    assert len(rows[0]["message"]) == log_handler.MESSAGE_CHARACTERS
    assert len(run.alerts) == log_handler.ALERTS_BURST
    assert run.values("train/log/errors")[-1] == 30


def test_nothing_of_a_record_raises(
    client: Client, log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments that do not fit, objects without a text, a client that is closed."""

    class Bad:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    monkeypatch.setattr(logging, "raiseExceptions", False)
    log.warning("two %s %s", 1)
    log.error(Bad())
    log.error("%s", Bad())
    client.close()
    log.error("after the end")
    (handler,) = log.handlers
    assert isinstance(handler, RaywbHandler)
    assert (handler.warnings, handler.errors) == (1, 3)
    assert [row["message"] for row in handler._rows()][:2] == [
        "after the end",
        "%s (its text cannot be made: RuntimeError)",
    ]


def test_what_raywb_says_itself_is_passed_over(client: Client) -> None:
    """On the root logger, also from a thread that holds a lock which the handler would want."""
    root, handler = logging.getLogger(), RaywbHandler(client)
    root.addHandler(handler)
    try:
        ours = logging.getLogger("raywb.connection")
        with handler.lock:  # type: ignore[union-attr]
            said = threading.Thread(target=ours.warning, args=("no journal can be made",))
            said.start()
            said.join(5.0)
            assert not said.is_alive()
        client.log({"bad": object()})  # warns, by raywb's logger
        logging.getLogger("other").warning("yes")
    finally:
        root.removeHandler(handler)
        handler.close()
    assert handler.warnings == 1


def test_ranks_have_keys_of_their_own(service: LocalService) -> None:
    """Counts of several processes of a stage do not mix."""
    service.up()
    service.start()
    clients = [service.client("train", rank=rank, world_size=2) for rank in range(2)]
    handlers = [RaywbHandler(client) for client in clients]
    record = logging.makeLogRecord({"name": "x", "levelno": logging.WARNING, "msg": "m"})
    for number, handler in enumerate(handlers):
        for _ in range(number + 1):
            handler.handle(record)
        handler.close()
    assert clients[0].flush()
    run = written(service, clients[1])
    found: list[Any] = [run.values(f"train/log/rank_{rank}/warnings")[-1] for rank in range(2)]
    assert found == [1, 2]


def test_processes_without_ranks_have_keys_of_their_own(service: LocalService) -> None:
    """No counter goes up and down between the counts of several processes."""
    service.up()
    service.start()
    clients = [service.client("train") for _ in range(3)]
    handlers = [RaywbHandler(client) for client in clients]
    record = logging.makeLogRecord({"name": "x", "levelno": logging.ERROR, "msg": "m"})
    for number, handler in enumerate(handlers):
        for _ in range(number + 1):
            handler.handle(record)
        handler.close()
        assert clients[number].flush()
    run = written(service, clients[0])
    for prefix, count in (("", 1), ("process_2/", 2), ("process_3/", 3)):
        counts = run.values(f"train/log/{prefix}errors")
        assert counts == sorted(counts)
        assert counts[-1] == count
        assert run.metrics[f"train/log/{prefix}*"].step_metric == f"train/log/{prefix}time_s"
        assert run.summary[f"train/log/{prefix}last_error"] == "m"
        assert records(service, run, f"train/log/{prefix}records")[0]["count"] == count


def test_a_rank_is_handed_on(monkeypatch: pytest.MonkeyPatch, client: Client) -> None:
    """A handler that attaches itself does so as the rank that it is given."""
    asked: dict[str, Any] = {}

    def attach(stage: str | None, **ranks: Any) -> Client:
        asked.update(ranks, stage=stage)
        return client

    monkeypatch.setattr("raywb.lifecycle.attach", attach)
    RaywbHandler(stage="train", rank=1, world_size=4).close()
    assert asked == {"stage": "train", "rank": 1, "world_size": 4}


def test_in_an_own_run_the_process_is_in_the_key(client: Client) -> None:
    """The service names no series there: host and pid do, unless a rank does."""
    connection = client._connection
    for rank, name in ((None, f"log/{HOST}_{os.getpid()}/"), (1, "log/rank_1/")):
        ranks = (rank, None if rank is None else 2)
        channel = connection.open_channel("own", *ranks, own_run=(1000, 1))
        handler = RaywbHandler(Client(connection, channel, "own", client.run))
        assert handler._series._prefix == name
        handler.close()


def test_a_closed_client_makes_no_losses(client: Client, log: logging.Logger) -> None:
    """Records that come after the client's end are in nobody's way, and none is counted lost."""
    (handler,) = log.handlers
    assert isinstance(handler, RaywbHandler)
    client.close()
    log.error("after the end")
    close(log)
    assert client.stats.lost == {}
    assert handler._series._client.stats.logged == 0
    assert len(client._connection._unsaid) == 0


def test_records_wait_for_no_device(client: Client) -> None:
    """A row of the client's that waits for a GPU keeps no warning from the journal."""
    handler = RaywbHandler(client)
    client.log({"loss": device_stand_in.Tensor(1.0)}, step=1)
    handler.handle(logging.makeLogRecord({"name": "x", "levelno": logging.WARNING, "msg": "m"}))
    assert (client.stats.logged, client.stats.waiting_on_device) == (0, 1)
    assert handler._series._client.stats.logged == 2
    handler.close()
    client.close(0.1)


def test_a_forked_child_counts_from_its_start(client: Client) -> None:
    """What the parent logged is told by the parent alone."""
    handler = RaywbHandler(client)
    record = logging.makeLogRecord({"name": "x", "levelno": logging.WARNING, "msg": "m"})
    handler.handle(record)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            client._connection.after_fork_in_child()
            handler.handle(record)
            os.write(write, str(handler.warnings).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 10) == b"1"
    handler.close()
