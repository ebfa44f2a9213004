"""The loopback server does what the real client expects, and misbehaves as it is told."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from wandb_client import API_KEY, run_client, start_client, sync
from wandb_file import MetricDefinition, read_runs
from wandb_server import CONFIRM_QUERY, WandbServer
from wandb_store import ServerRun


class RowClient:
    """A client process that logs a row whenever it is told to, as run `tester/p/r`."""

    SCRIPT = """
        import sys, wandb
        settings = wandb.Settings(x_file_stream_transmit_interval=1)
        run = wandb.init(project="p", id="r", resume="allow", settings=settings)
        for x, _ in enumerate(sys.stdin):
            run.log({"x": x})
        run.finish()
    """

    def __init__(self, server: WandbServer, home: Path) -> None:
        self.server = server
        self.process = start_client(self.SCRIPT, home, server.url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def log(self) -> None:
        """Log a row."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def wait_for_rows(self, count: int) -> None:
        """Wait until the server has so many rows."""
        self.server.wait_until(lambda: len(self.seen.steps) == count)

    @property
    def seen(self) -> ServerRun:
        """The run as the server has it, an empty one before it is there."""
        return self.server.runs.get("tester/p/r") or ServerRun("", "", "", 0)

    def finish(self) -> None:
        """End it well."""
        _, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err


@pytest.fixture
def server() -> Iterator[WandbServer]:
    """A server that was asked nothing it does not know."""
    with WandbServer() as server:
        yield server
        assert server.errors == []


def run(script: str, home: Path, server: WandbServer) -> str:
    """Run a client to its good end and return what it printed."""
    ended = run_client(script, home, server.url)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def ask(server: WandbServer, run_id: str, key: str = API_KEY) -> dict[str, Any]:
    """Send the confirming query as a sink would."""
    variables = {"entity": server.store.entity, "project": "p", "run": run_id}
    request = urllib.request.Request(
        f"{server.url}/graphql",
        data=json.dumps({"query": CONFIRM_QUERY, "variables": variables}).encode(),
        headers={"Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode()},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)["data"]


def test_online_run(server: WandbServer, tmp_path: Path) -> None:
    """Rows, names, config, definitions, summary, alerts and the key arrive."""
    run(
        """
        import wandb
        with wandb.init(
            entity="team", project="p", id="r", group="g", job_type="j", name="n", tags=["t"],
            config={"a": 1}, notes="why",
        ) as run:
            run.define_metric("step")
            run.define_metric("loss", step_metric="step", summary="min")
            run.define_metric("t/*", step_metric="step", hidden=True)
            for i in range(3):
                run.log({"step": 10 * i, "loss": 1.5 * i, "deep": {"er": i}, "inf": float("inf")})
            run.config.update({"b": {"c": 2}})
            run.summary["best"] = 7
            run.alert("Hot", "GPU 3")
        """,
        tmp_path,
        server,
    )
    (seen,) = server.runs.values()
    assert seen.path == "team/p/r"
    assert (seen.group, seen.job_type, seen.display_name) == ("g", "j", "n")
    assert (seen.tags, seen.notes) == (("t",), "why")
    assert seen.config == {"a": 1, "b": {"c": 2}}
    assert seen.steps == [0, 1, 2]
    assert seen.rows[2]["loss"] == 3.0
    assert seen.values("deep.er") == [0, 1, 2]
    assert seen.values("inf") == [float("inf")] * 3
    assert seen.summary["best"] == 7
    assert seen.summary["loss"] == {"min": 0}
    assert seen.metrics == {
        "step": MetricDefinition(),
        "loss": MetricDefinition("step", frozenset({"min"})),
        "t/*": MetricDefinition("step", hidden=True),
    }
    assert seen.alerts == [("Hot", "GPU 3")]
    assert (seen.state, seen.exit_code, seen.overwritten) == ("finished", 0, 0)
    assert "config.yaml" in seen.files
    assert server.api_keys == {API_KEY}
    assert server.requests["graphql:UpsertBucket"] >= 1


def test_failed_run(server: WandbServer, tmp_path: Path) -> None:
    """A run that ends with an exit code is failed."""
    run("import wandb; wandb.init(project='p', id='r').finish(exit_code=3)", tmp_path, server)
    seen = server.runs["tester/p/r"]
    assert (seen.state, seen.exit_code) == ("failed", 3)


def test_killed_run_and_confirmation(tmp_path: Path) -> None:
    """A killed run crashes when its heartbeat is missed; the confirming query says what arrived."""
    with WandbServer(crashed_after_s=2.0) as server, RowClient(server, tmp_path) as client:
        assert ask(server, "r") == {"model": None}
        for count in (1, 2):
            client.log()
            client.wait_for_rows(count)
        client.process.kill()
        server.wait_until(lambda: client.seen.state == "crashed")
        bucket = ask(server, "r")["model"]["bucket"]
        assert bucket["historyLineCount"] == 2
        assert json.loads(json.loads(bucket["historyTail"])[-1])["_step"] == 1
        assert ask(server, "other") == {"model": {"bucket": None}}


def test_resume(server: WandbServer, tmp_path: Path) -> None:
    """A resumed run goes on after the last step, gaps and NaN included, and keeps its config."""
    run(
        """
        import wandb
        with wandb.init(project="p", id="r", config={"a": 1}) as run:
            run.log({"x": float("nan")})
            run.log({"x": 2}, step=5, commit=True)
        """,
        tmp_path,
        server,
    )
    printed = run(
        """
        import wandb
        with wandb.init(project="p", id="r", resume="allow", config={"b": 2}) as run:
            print(run.starting_step, run.config["a"], run.summary["x"])
            run.log({"x": 3})
        """,
        tmp_path,
        server,
    )
    assert printed.split() == ["6", "1", "2"]
    seen = server.runs["tester/p/r"]
    assert seen.steps == [0, 5, 6]
    assert seen.config == {"a": 1, "b": 2}
    assert (seen.state, seen.overwritten) == ("finished", 0)


def test_artifacts_and_tables(server: WandbServer, tmp_path: Path) -> None:
    """Artifacts arrive with their files, the same content once, another one as a new version."""
    printed = run(
        """
        import pathlib, wandb
        with wandb.init(project="p", id="r") as run:
            for text in ("one", "one", "two"):
                pathlib.Path("a b.txt").write_text(text)
                artifact = wandb.Artifact("numbers", "dataset", metadata={"n": 1})
                artifact.add_file("a b.txt")
                print(run.log_artifact(artifact).wait().version)
            run.log({"table": wandb.Table(columns=["c"], data=[[1], [2]])})
        """,
        tmp_path,
        server,
    )
    assert printed.split() == ["v0", "v0", "v1"]
    one, two, table = server.artifacts
    assert (one.name, one.type, one.files) == ("numbers", "dataset", {"a b.txt": b"one"})
    assert (two.version, two.files, two.committed) == (1, {"a b.txt": b"two"}, True)
    assert (table.type, list(table.files)) == ("run_table", ["table.table.json"])
    seen = server.runs["tester/p/r"]
    (row,) = seen.history
    assert json.loads(seen.files[row["table.path"]])["data"] == [[1], [2]]


def test_burst_of_500(server: WandbServer, tmp_path: Path) -> None:
    """The client outlasts server errors: every row arrives, once."""
    with RowClient(server, tmp_path) as client:
        client.log()
        client.wait_for_rows(1)
        server.misbehave("file_stream", status=500, times=1)
        client.log()
        server.wait_until(lambda: server.disturbed["file_stream"] == 1)
        client.log()
        client.wait_for_rows(3)
        client.finish()
    assert client.seen.values("x") == [0, 1, 2]
    assert (client.seen.state, client.seen.overwritten) == ("finished", 0)


def test_single_403(server: WandbServer, tmp_path: Path) -> None:
    """One 403 ends the real client's file stream for good, and `finish` says nothing of it."""
    with RowClient(server, tmp_path) as client:
        client.log()
        client.wait_for_rows(1)
        server.misbehave("file_stream", status=403, times=1)
        client.log()
        server.wait_until(lambda: server.disturbed["file_stream"] == 1)
        client.log()
        client.finish()
    assert client.seen.steps == [0]
    assert client.seen.exit_code is None


def test_hang(server: WandbServer, tmp_path: Path) -> None:
    """Requests that hang go on when the server behaves again."""
    with RowClient(server, tmp_path) as client:
        client.log()
        client.wait_for_rows(1)
        server.hang("file_stream")
        client.log()
        server.wait_until(lambda: server.disturbed["file_stream"] == 1)
        assert client.seen.steps == [0]
        server.behave()
        client.wait_for_rows(2)
        client.finish()
    assert client.seen.state == "finished"


def test_refuse(server: WandbServer, tmp_path: Path) -> None:
    """A server that goes and comes back on its port gets what was logged meanwhile."""
    with RowClient(server, tmp_path) as client:
        client.log()
        client.wait_for_rows(1)
        server.refuse()
        with pytest.raises(urllib.error.URLError):
            ask(server, "r")
        client.log()
        server.listen_again()
        client.wait_for_rows(2)
        client.finish()
    assert client.seen.state == "finished"


def test_sync_of_segments(server: WandbServer, tmp_path: Path) -> None:
    """Offline segments of one run, synced in order, make one run that equals the files."""
    for begin in (0, 3):
        ended = run_client(
            """
            import sys, wandb
            begin = int(sys.argv[1])
            with wandb.init(project="p", id="r", group="g", config={"begin": begin}) as run:
                run.define_metric("x", summary="max")
                for i in range(begin, begin + 3):
                    run.log({"x": i, "deep": {"er": i / 2}}, step=i, commit=True)
            """,
            tmp_path,
            None,
            str(begin),
        )
        assert ended.returncode == 0, ended.stderr
    (offline,) = read_runs(tmp_path).values()
    assert len(offline.segments) == 2
    for path in offline.segments:
        synced = sync(path.parent, tmp_path, server.url)
        assert synced.returncode == 0, synced.stderr
    seen = server.runs["tester/p/r"]
    assert seen.steps == [0, 1, 2, 3, 4, 5]
    assert seen.history == offline.history
    assert seen.metrics == offline.metrics
    assert (seen.group, seen.state, seen.overwritten) == ("g", "finished", 0)
    # The last segment's config and summary stand alone: each must be given the whole.
    assert seen.config == {"begin": 3}
    assert seen.summary["x"] == {"max": 5}


def test_api(server: WandbServer, tmp_path: Path) -> None:
    """W&B's public API reads runs back: state, config, summary, history, filters, artifacts."""
    printed = run(
        """
        import json, wandb
        for i, group in enumerate("hgg"):
            with wandb.init(project="p", id=f"r{i}", group=group, config={"i": i}) as run:
                run.log({"x": i, "y": 1})
                run.log({"x": i + 1})
        api = wandb.Api()
        run = api.run("tester/p/r1")
        print(json.dumps([
            [run.state, run.group, run.config, run.summary["x"], run.lastHistoryStep],
            [row["x"] for row in run.history(pandas=False)],
            run.history(keys=["y"], pandas=False),
            [row["x"] for row in run.scan_history()],
            sorted(run.id for run in api.runs("tester/p", filters={"group": "g"})),
            [run.id for run in api.runs("tester/p", filters={"$and": [{"config.i": {"$lt": 1}}]})],
            [artifact.name for artifact in run.logged_artifacts()],
        ]))
        """,
        tmp_path,
        server,
    )
    assert json.loads(printed) == [
        ["finished", "g", {"i": 1}, 2, 1],
        [1, 2],
        [{"_step": 0, "y": 1}],
        [1, 2],
        ["r1", "r2"],
        ["r0"],
        [],
    ]


def test_wrong_key(tmp_path: Path) -> None:
    """A server that wants a key lets no other in."""
    with WandbServer(api_key="f" * 40) as server:
        ended = run_client("import wandb; wandb.init(project='p')", tmp_path, server.url)
        assert ended.returncode != 0
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(server, "r")
        assert ask(server, "r", key="f" * 40) == {"model": None}
        assert server.api_keys == {API_KEY, "f" * 40}
        assert server.runs == {}


def test_misbehaviour(server: WandbServer) -> None:
    """Errors strike as often as told, with the headers told, and end when told."""
    server.misbehave("graphql", status=429, times=2, retry_after_s=7)
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(server, "r")
        assert (caught.value.code, caught.value.headers["Retry-After"]) == (429, "7")
    assert ask(server, "r") == {"model": None}
    server.misbehave(status=500)
    with pytest.raises(urllib.error.HTTPError, match="500"):
        ask(server, "r")
    server.behave()
    assert ask(server, "r") == {"model": None}
    server.misbehave(status=500, for_s=0.0)
    assert ask(server, "r") == {"model": None}
    assert (server.requests["graphql"], server.disturbed["graphql"]) == (6, 3)
    with pytest.raises(ValueError, match="file_stream"):
        server.misbehave("filestream", status=500)
