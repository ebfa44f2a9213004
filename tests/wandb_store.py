"""What the loopback W&B server holds: runs, their files, artifacts; and how requests change them.

Nothing here knows of HTTP or GraphQL. The rules are the service's own, as far as they can be seen:
lines of a stream lie at offsets, so a chunk that is sent twice is kept once; a summary or config
replaces the one before; a run without a heartbeat is crashed.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from wandb_file import MetricDefinition

#: How long the real service waits for a run's heartbeat before it shows *crashed*, in seconds.
CRASHED_AFTER_S = 300.0

#: The streams of a run whose lines have offsets.
HISTORY, EVENTS, CONSOLE = "wandb-history.jsonl", "wandb-events.jsonl", "output.log"

#: W&B writes metric definitions into the config, field names and aggregates as protobuf numbers.
AGGREGATES = {1: "min", 2: "max", 3: "mean", 4: "best", 5: "last", 6: "none", 7: "copy", 8: "first"}


@dataclass
class ServerRun:
    """One run, as the server has it; tests read it, only the server writes it."""

    entity: str
    project: str
    run_id: str
    #: The number of the run on this server, from 1.
    number: int
    display_name: str = ""
    group: str = ""
    job_type: str = ""
    notes: str = ""
    tags: tuple[str, ...] = ()
    #: Config as it travels: `{"lr": {"value": 0.1}}`, with W&B's own under `_wandb`.
    raw_config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    #: Lines by stream, each at its offset; None where an offset was passed over.
    streams: dict[str, list[str | None]] = field(default_factory=dict)
    #: Lines that came again for an offset with another content: two writers at once.
    overwritten: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    #: Title and text of each alert.
    alerts: list[tuple[str, str]] = field(default_factory=list)
    #: None until a client says that the run is complete, and again after a resume.
    exit_code: int | None = None
    #: How often a client opened the run or changed it (one opening makes several).
    upserts: int = 0
    heartbeat_at: float = field(default_factory=time.monotonic)
    crashed_after_s: float = CRASHED_AFTER_S
    created_at: str = ""
    #: The id of the sweep that made it.
    sweep_name: str = ""
    #: A state that no client of ours can bring about here (`killed`, `pending`, …).
    told_state: str | None = None
    #: Hand the summary out as a JSON text of a JSON text: seen of crashed runs.
    summary_in_text: bool = False

    @property
    def heartbeat_s(self) -> float:
        """When it was last heard of, as seconds since the epoch."""
        return time.time() - (time.monotonic() - self.heartbeat_at)

    @property
    def path(self) -> str:
        """`entity/project/run_id`."""
        return f"{self.entity}/{self.project}/{self.run_id}"

    @property
    def storage_id(self) -> str:
        """The id by which GraphQL mutations name the run."""
        return f"Run:v1:{self.run_id}:{self.project}:{self.entity}"

    @property
    def lines(self) -> list[str]:
        """The history as it came, one JSON text per row."""
        return [line for line in self.streams.get(HISTORY, []) if line is not None]

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows in the order of their offsets, flat like those of `wandb_file`."""
        return [flat(json.loads(line)) for line in self.lines]

    @property
    def row_count(self) -> int:
        """How many rows there are, without reading them: what to wait for in a long run."""
        return len(self.streams.get(HISTORY, []))

    @property
    def rows(self) -> dict[int, dict[str, Any]]:
        """Rows by W&B's step; compare its length with `history` to see steps that came twice."""
        return {row["_step"]: row for row in self.history}

    @property
    def steps(self) -> list[int]:
        """W&B's step of each row."""
        return [row["_step"] for row in self.history]

    def values(self, key: str) -> list[Any]:
        """The values of one key, in the order of the rows that have it."""
        return [row[key] for row in self.history if key in row]

    @property
    def last_step(self) -> int:
        """The step of the last row, -1 without one."""
        lines = self.lines
        return int(json.loads(lines[-1]).get("_step", -1)) if lines else -1

    @property
    def config(self) -> dict[str, Any]:
        """The user's config."""
        return {
            key: item["value"] if isinstance(item, dict) and "value" in item else item
            for key, item in self.raw_config.items()
            if key != "_wandb"
        }

    @property
    def metrics(self) -> dict[str, MetricDefinition]:
        """Metric definitions by name or glob, read from where W&B hides them in the config."""
        definitions = self.raw_config.get("_wandb", {}).get("value", {}).get("m", [])
        names = [item.get("1") or item.get("2", "") for item in definitions]
        return {
            name: MetricDefinition(
                step_metric=item.get("4") or (names[item["5"] - 1] if "5" in item else None),
                summary=frozenset(AGGREGATES[number] for number in item.get("7", [])),
                hidden=2 in item.get("6", []),
            )
            for name, item in zip(names, definitions, strict=True)
        }

    @property
    def state(self) -> str:
        """`running`, `finished`, `failed`, or `crashed` where the heartbeat stopped."""
        if self.told_state is not None:
            return self.told_state
        if self.exit_code is not None:
            return "failed" if self.exit_code else "finished"
        silent_s = time.monotonic() - self.heartbeat_at
        return "crashed" if silent_s > self.crashed_after_s else "running"

    def stream(self, payload: Mapping[str, Any]) -> None:
        """Take in one request of the file stream."""
        self.heartbeat_at = time.monotonic()
        for name, chunk in payload.get("files", {}).items():
            if name == "wandb-summary.json":
                self.summary = json.loads(chunk["content"][-1])
            else:
                self._splice(self.streams.setdefault(name, []), chunk["offset"], chunk["content"])
        if payload.get("complete"):
            self.exit_code = int(payload.get("exitcode") or 0)

    def _splice(self, lines: list[str | None], offset: int, content: list[str]) -> None:
        lines.extend([None] * (offset - len(lines)))
        before = lines[offset : offset + len(content)]
        self.overwritten += sum(
            old is not None and old != new for old, new in zip(before, content, strict=False)
        )
        lines[offset : offset + len(content)] = content


@dataclass
class ServerView:
    """One saved view of a project, as `upsertView` has it."""

    id: str
    entity: str
    project: str
    name: str
    type: str
    display_name: str
    #: The JSON text of what is shown.
    spec: str
    #: How often it was saved.
    saved: int = 1


@dataclass
class ServerArtifact:
    """One version of an artifact."""

    entity: str
    project: str
    type: str
    name: str
    digest: str
    version: int
    #: The run that logged it.
    run: str = ""
    aliases: tuple[str, ...] = ()
    description: str | None = None
    metadata: str | None = None
    client_ids: set[str] = field(default_factory=set)
    committed: bool = False
    manifest: bytes = b""
    #: Contents by path in the artifact.
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"Artifact:v1:{self.entity}:{self.project}:{self.type}:{self.name}:{self.version}"


class Store:
    """All of it, behind one lock; `changed` is notified after each request."""

    def __init__(self, entity: str = "tester", crashed_after_s: float = CRASHED_AFTER_S) -> None:
        #: The entity of a client that names none.
        self.entity = entity
        self.crashed_after_s = crashed_after_s
        self.changed = threading.Condition(threading.RLock())
        self.runs: dict[str, ServerRun] = {}
        self.artifacts: list[ServerArtifact] = []
        #: Entity and name of projects that are there without a run.
        self.projects: set[tuple[str, str]] = set()
        #: Saved views of projects, in the order in which they came.
        self.views: list[ServerView] = []
        #: What this server does not know: filter keys and orders that it refuses, filter keys
        #: that it passes over, and whether a field of JSON can be asked for some of its keys.
        self.refused: set[str] = set()
        self.passed_over: set[str] = set()
        self.knows_keys = True
        #: Runs of a project, and how many runs there were at all when they were looked for.
        self._of_project: dict[tuple[str, str], tuple[int, list[ServerRun]]] = {}

    def runs_of(self, entity: str, project: str) -> list[ServerRun]:
        """A project's runs in the order in which they came; no run ever goes."""
        known, runs = self._of_project.get((entity, project), (0, []))
        if known != len(self.runs):
            wanted = (entity, project)
            runs = [run for run in self.runs.values() if (run.entity, run.project) == wanted]
            self._of_project[wanted] = (len(self.runs), runs)
        return runs

    def upsert_view(self, given: Mapping[str, Any]) -> tuple[ServerView, bool]:
        """Make a view, or change the one whose id is given; and whether it was made."""
        for one in self.views:
            if one.id == given.get("id"):
                one.name, one.display_name = given["name"], given["displayName"]
                one.spec, one.saved = given["spec"], one.saved + 1
                return one, False
        view = ServerView(
            id=f"View:{len(self.views) + 1}",
            entity=given["entityName"],
            project=given["projectName"],
            name=given["name"],
            type=given["type"],
            display_name=given["displayName"],
            spec=given["spec"],
        )
        self.views.append(view)
        return view, True

    def find_run(self, project: str, entity: str | None, name: str) -> ServerRun | None:
        """The run of this name, the default entity standing in for none."""
        return self.runs.get(f"{entity or self.entity}/{project}/{name}")

    def upsert_run(self, asked: Mapping[str, Any]) -> tuple[ServerRun, bool]:
        """Create a run or change one, as `upsertBucket` does, and say whether it is new."""
        known = next((run for run in self.runs.values() if run.storage_id == asked.get("id")), None)
        entity = asked.get("entityName") or self.entity
        project, name = asked.get("modelName") or "uncategorized", asked.get("name") or ""
        run = known or self.find_run(project, entity, name)
        inserted = run is None
        if run is None:
            number = len(self.runs) + 1
            run = ServerRun(entity, project, name or f"run{number}", number, f"run-{number}")
            run.created_at = iso(time.time())
            self.runs[run.path] = run
        run.upserts += 1
        run.crashed_after_s = self.crashed_after_s
        if known is None:  # a client that logs: it names the run, and opens it again
            run.exit_code = None
            run.heartbeat_at = time.monotonic()
        _change(run, asked)
        return run, inserted

    def create_artifact(self, asked: Mapping[str, Any]) -> ServerArtifact:
        """A new version, or the one that has this digest already."""
        entity = asked.get("entityName") or self.entity
        project, type_ = asked["projectName"], asked["artifactTypeName"]
        names = asked.get("artifactCollectionNames") or [asked["artifactCollectionName"]]
        name, digest = names[0], asked["digest"]
        versions = self.versions(entity, project, name)
        same = [one for one in versions if one.digest == digest]
        artifact = same[0] if same and asked.get("enableDigestDeduplication") else None
        if artifact is None:
            artifact = ServerArtifact(entity, project, type_, name, digest, len(versions))
            artifact.run = asked.get("runName") or ""
            artifact.description, artifact.metadata = (
                asked.get("description"),
                asked.get("metadata"),
            )
            self.artifacts.append(artifact)
        aliases = [alias["alias"] for alias in asked.get("aliases") or ()]
        artifact.aliases = tuple(dict.fromkeys([*artifact.aliases, *aliases]))
        artifact.client_ids.add(asked.get("clientID") or artifact.id)
        return artifact

    def versions(self, entity: str | None, project: str, name: str) -> list[ServerArtifact]:
        """The versions of an artifact, in order."""
        wanted = (entity or self.entity, project, name)
        return [one for one in self.artifacts if (one.entity, one.project, one.name) == wanted]

    def artifact(self, artifact_id: str) -> ServerArtifact | None:
        """The version that has this id."""
        return next((one for one in self.artifacts if one.id == artifact_id), None)

    def put_file(self, path: str, body: bytes) -> bool:
        """Keep an uploaded file, and say whether its address is one that was given out."""
        kind, owner, name = path.split("/", 2)
        with self.changed:
            if kind == "run":
                run = next((one for one in self.runs.values() if one.storage_id == owner), None)
                if run is not None:
                    run.files[name] = body
                return run is not None
            artifact = self.artifact(owner)
            if artifact is None:
                return False
            if kind == "manifest":
                artifact.manifest = body
            else:
                artifact.files[name] = body
            return True

    def get_file(self, path: str) -> bytes | None:
        """The content of a file that was put."""
        kind, owner, name = path.split("/", 2)
        with self.changed:
            artifact = self.artifact(owner)
            if kind == "run":
                run = next((one for one in self.runs.values() if one.storage_id == owner), None)
                return run.files.get(name) if run else None
            if artifact is None:
                return None
            return artifact.manifest if kind == "manifest" else artifact.files.get(name)


def _change(run: ServerRun, asked: Mapping[str, Any]) -> None:
    """Set what a request names; what it leaves out stays."""
    names = {
        "displayName": "display_name",
        "groupName": "group",
        "jobType": "job_type",
        "notes": "notes",
        "sweep": "sweep_name",
    }
    for key, name in names.items():
        if asked.get(key) is not None:
            setattr(run, name, asked[key])
    if asked.get("tags") is not None:
        run.tags = tuple(asked["tags"])
    if asked.get("config") is not None:
        run.raw_config = json.loads(asked["config"])
    if asked.get("summaryMetrics") is not None:
        run.summary = json.loads(asked["summaryMetrics"])


def iso(time_s: float) -> str:
    """Seconds since the epoch as the service writes them."""
    return datetime.fromtimestamp(int(time_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.lru_cache(maxsize=1 << 16)
def seconds(text: str) -> float:
    """The reverse of `iso`; a time without a zone is UTC.

    Raises:
        ValueError: It is no ISO time.
    """
    at = datetime.fromisoformat(text)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row with the paths of nested values joined by dots."""
    result: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
