"""The part of W&B's GraphQL schema that clients use, as nodes over a `Store`.

A node is a dictionary for `wandb_graphql.execute`. What costs something is a function, called
only when it is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote

from wandb_filters import Filters
from wandb_graphql import QueryError
from wandb_store import EVENTS, ServerArtifact, ServerRun, Store, iso

Node = dict[str, Any]

#: How many lines a tail holds; what the client reads is the last one.
TAIL_LINES = 2

#: Most runs on one page, whatever is asked for, and how many where nothing is.
MOST_PER_PAGE, PER_PAGE = 1000, 50


class Schema:
    """The roots of queries and mutations on one store."""

    def __init__(self, store: Store, base_url: Callable[[], str]) -> None:
        self._store = store
        self._base_url = base_url
        self._filters = Filters(store)

    def roots(self, kind: str) -> Node:
        """The fields at the top of a query or a mutation."""
        return self._mutations() if kind == "mutation" else self._queries()

    # -- queries ---------------------------------------------------------------------------------

    def _queries(self) -> Node:
        store = self._store
        return {
            "serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None},
            "viewer": lambda: self._user(),
            "entity": lambda name: self._entity(name),
            "project": lambda name, entityName=None: self._project(name, entityName),
            "model": lambda name, entityName=None: self._project(name, entityName),
            "artifact": lambda id: self._artifact(store.artifact(id)),
            "clientIDMapping": self._client_id,
        }

    def _user(self) -> Node:
        name = self._store.entity
        edges = [{"node": {"name": name}}]
        return {
            "__typename": "User",
            "id": "User:1",
            "name": name,
            "username": name,
            "entity": name,
            "email": f"{name}@localhost",
            "admin": False,
            "flags": "{}",
            "deletedAt": None,
            "apiKeys": {"edges": []},
            "teams": {"edges": edges},
        }

    def _entity(self, name: str) -> Node:
        return {
            "__typename": "Entity",
            "id": f"Entity:{name}",
            "name": name,
            "organization": None,
            "xxhashDigestsEnabled": False,
        }

    def _project(self, name: str, entity: str | None) -> Node | None:
        entity, project = entity or self._store.entity, name
        runs = self._store.runs_of(entity, project)
        if not runs and (entity, project) not in self._store.projects:
            return None

        def run(name: str, missingOk: bool = False) -> Node | None:
            return self._run(self._store.find_run(project, entity, name))

        def matching(filters: str | None = None, order: str | None = None) -> list[ServerRun]:
            return self._filters.matching(runs, json.loads(filters or "{}"), order)

        def page_of_runs(first: int | None = None, after: str | None = None, **asked: Any) -> Node:
            size, begin = min(first or PER_PAGE, MOST_PER_PAGE), int(after or 0)
            found = matching(**asked)
            nodes = [self._run(run) for run in found[begin : begin + size]]
            return _page(nodes, begin, more=begin + size < len(found))

        return self._project_stub(name, entity) | {
            "entityName": entity,
            "createdAt": runs[0].created_at if runs else iso(0),
            "isBenchmark": False,
            "readOnly": False,
            "user": self._user,
            "run": run,
            "bucket": run,
            "runCount": lambda filters=None: len(
                self._filters.fitting(runs, json.loads(filters or "{}"))
            ),
            "runs": page_of_runs,
            "artifact": lambda name: self._artifact(self._named(entity, project, name)),
            "allViews": lambda **asked: _page(self._views(entity, project, **asked)),
            "artifactType": lambda name: None,
            "artifactCollectionMembership": lambda name: None,
        }

    def _project_stub(self, name: str, entity: str) -> Node:
        return {
            "__typename": "Project",
            "id": f"Project:v1:{name}:{entity}",
            "internalId": "1",
            "name": name,
            "entity": self._entity(entity),
        }

    def _named(self, entity: str, project: str, name: str) -> ServerArtifact | None:
        """`name:v3`, `name:latest` or `name:alias`, committed."""
        name, _, alias = name.partition(":")
        versions = [one for one in self._store.versions(entity, project, name) if one.committed]
        wanted = [one for one in versions if alias in (f"v{one.version}", *one.aliases)]
        return next(reversed(wanted), None)

    def _client_id(self, clientID: str) -> Node | None:
        found = (one for one in self._store.artifacts if clientID in one.client_ids)
        return next(({"serverID": one.id} for one in found), None)

    def _run(self, run: ServerRun | None) -> Node | None:
        if run is None:
            return None
        return {
            "__typename": "Run",
            "id": run.storage_id,
            "name": run.run_id,
            "projectId": "1",
            "displayName": run.display_name,
            "description": None,
            "notes": run.notes,
            "tags": list(run.tags),
            "group": run.group,
            "jobType": run.job_type,
            "state": run.state,
            "sweepName": run.sweep_name or None,
            "commit": None,
            "readOnly": False,
            "createdAt": run.created_at,
            "heartbeatAt": lambda: iso(run.heartbeat_s),
            "user": self._user,
            "project": lambda: self._project_stub(run.project, run.entity),
            "config": lambda **asked: _text(self._some(run.raw_config, **asked)),
            "wandbConfig": lambda keys: _wandb_config(run, keys),
            "summaryMetrics": lambda **asked: self._summary(run, **asked),
            "systemMetrics": "{}",
            "historyLineCount": lambda: run.row_count,
            "historyTail": lambda: _text(_readable(run.lines[-TAIL_LINES:])),
            "historyKeys": lambda: _history_keys(run),
            "eventsLineCount": lambda: len(run.streams.get(EVENTS, [])),
            "eventsTail": lambda: _text(run.streams.get(EVENTS, [])[-TAIL_LINES:]),
            "logLineCount": lambda: len(run.streams.get("output.log", [])),
            "history": lambda **asked: _readable(_between(run, **asked)),
            "events": lambda **_: run.streams.get(EVENTS, []),
            "sampledHistory": lambda specs: [_sampled(run, json.loads(spec)) for spec in specs],
            "parquetHistory": lambda liveKeys: {
                "parquetUrls": [],
                "liveData": [plain(json.loads(line)) for line in run.lines],
            },
            "outputArtifacts": lambda **_: self._output_artifacts(run),
        }

    def _some(self, values: Mapping[str, Any], **asked: list[str]) -> Mapping[str, Any]:
        """All of a JSON field, or the top-level keys that are asked for."""
        unknown = asked.keys() - ({"keys"} if self._store.knows_keys else set())
        if unknown:
            raise QueryError(f"Unknown argument {sorted(unknown)}")
        wanted = asked.get("keys")
        return values if wanted is None else {k: values[k] for k in wanted if k in values}

    def _summary(self, run: ServerRun, **asked: list[str]) -> str:
        text = _text(self._some(run.summary, **asked))
        return json.dumps(text) if run.summary_in_text else text

    def _output_artifacts(self, run: ServerRun) -> Node:
        logged = [one for one in self._store.artifacts if one.run == run.run_id]
        return _page([self._artifact(one) for one in logged]) | {"totalCount": len(logged)}

    def _artifact(self, artifact: ServerArtifact | None) -> Node | None:
        if artifact is None:
            return None
        siblings = self._store.versions(artifact.entity, artifact.project, artifact.name)
        latest = next((one for one in reversed(siblings) if one.committed), None)
        sequence = {
            "__typename": "ArtifactSequence",
            "id": f"ArtifactSequence:{artifact.entity}:{artifact.project}:{artifact.name}",
            "name": artifact.name,
            "project": self._project_stub(artifact.project, artifact.entity),
            "latestArtifact": latest and {"id": latest.id, "versionIndex": latest.version},
        }
        aliases = [
            {
                "__typename": "ArtifactAlias",
                "id": alias,
                "alias": alias,
                "artifactCollection": sequence,
            }
            for alias in artifact.aliases
        ]
        return {
            "__typename": "Artifact",
            "id": artifact.id,
            "state": "COMMITTED" if artifact.committed else "PENDING",
            "digest": artifact.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "artifactSequence": sequence,
            "artifactType": {"name": artifact.type},
            "versionIndex": artifact.version,
            "description": artifact.description,
            "metadata": artifact.metadata,
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "aliases": aliases,
            "historyStep": None,
            "size": sum(map(len, artifact.files.values())),
            "commitHash": artifact.id,
            "fileCount": len(artifact.files),
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "currentManifest": lambda: self._manifest(artifact),
        }

    # -- mutations -------------------------------------------------------------------------------

    def _mutations(self) -> Node:
        return {
            "upsertBucket": self._upsert_run,
            "createRunFiles": self._create_run_files,
            "markRunFilesUploaded": lambda input: {"success": True},
            "notifyScriptableRunAlert": self._alert,
            "createArtifact": lambda input: {
                "__typename": "CreateArtifactPayload",
                "artifact": self._artifact(self._store.create_artifact(input)),
            },
            "createArtifactManifest": lambda input: {
                "artifactManifest": self._manifest(self._known(input["artifactID"]))
            },
            "updateArtifactManifest": lambda input: {
                "artifactManifest": self._manifest(self._known(input["artifactManifestID"]))
            },
            "createArtifactFiles": self._create_artifact_files,
            "commitArtifact": self._commit,
            "updateArtifact": lambda input: {"artifact": {"id": input["artifactID"]}},
            "useArtifact": lambda input: {"artifact": {"id": input["artifactID"]}},
            "stopRun": lambda input: {"success": True},
            "upsertView": self._upsert_view,
        }

    def _upsert_run(self, input: Mapping[str, Any]) -> Node:
        run, inserted = self._store.upsert_run(input)
        return {"bucket": self._run(run), "inserted": inserted}

    def _views(
        self,
        entity: str,
        project: str,
        viewType: str = "runs",
        viewName: str | None = None,
        userName: str | None = None,
    ) -> list[Node]:
        return [
            {
                "id": one.id,
                "name": one.name,
                "displayName": one.display_name,
                "spec": one.spec,
            }
            for one in self._store.views
            if (one.entity, one.project, one.type) == (entity, project, viewType)
            and viewName in (None, one.name)
        ]

    def _upsert_view(self, input: Mapping[str, Any]) -> Node:
        if self._project(input["projectName"], input["entityName"]) is None:
            raise QueryError(f"project {input['projectName']} not found")
        view, inserted = self._store.upsert_view(input)
        return {"view": {"id": view.id, "name": view.name}, "inserted": inserted}

    def _create_run_files(self, input: Mapping[str, Any]) -> Node:
        run = self._store.find_run(input["projectName"], input["entityName"], input["runName"])
        if run is None:
            raise QueryError(f"run {input['runName']} not found")
        files = [
            {"name": name, "uploadUrl": self._address("run", run.storage_id, name)}
            for name in input["files"]
        ]
        return {"runID": run.storage_id, "uploadHeaders": [], "files": files}

    def _alert(self, input: Mapping[str, Any]) -> Node:
        run = self._store.find_run(input["projectName"], input["entityName"], input["runName"])
        if run is not None:
            run.alerts.append((input["title"], input["text"]))
        return {"success": run is not None}

    def _known(self, artifact_id: str) -> ServerArtifact:
        artifact = self._store.artifact(artifact_id)
        if artifact is None:
            raise QueryError(f"artifact {artifact_id} not found")
        return artifact

    def _manifest(self, artifact: ServerArtifact) -> Node:
        address = self._address("manifest", artifact.id, "manifest.json")
        file = {"id": artifact.id, "uploadUrl": address, "uploadHeaders": [], "directUrl": address}
        return {"id": artifact.id, "file": file}

    def _create_artifact_files(self, input: Mapping[str, Any]) -> Node:
        nodes = []
        for asked in input["artifactFiles"]:
            artifact = self._known(asked["artifactID"])
            nodes.append(
                {
                    "name": asked["name"],
                    "storagePath": f"artifact/{artifact.id}/{asked['name']}",
                    "uploadUrl": self._address("artifact", artifact.id, asked["name"]),
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": artifact.id},
                }
            )
        return {"files": _page(nodes)}

    def _commit(self, input: Mapping[str, Any]) -> Node:
        artifact = self._known(input["artifactID"])
        artifact.committed = True
        return {"artifact": self._artifact(artifact)}

    def _address(self, kind: str, owner: str, name: str) -> str:
        return f"{self._base_url()}/storage/{kind}/{quote(owner)}/{quote(name)}"


# ----------------------------------------------------------------------------------------------
# Values


def plain(value: Any) -> Any:
    """A value that strict JSON can carry: NaN and infinities as words, as the service does."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _text(value: Any) -> str:
    """A JSONString of the schema."""
    return json.dumps(plain(value))


def _readable(lines: Iterable[str]) -> list[str]:
    return [_text(json.loads(line)) for line in lines]


def _page(nodes: list[Any], begin: int = 0, *, more: bool = False) -> Node:
    """One page of a connection; a cursor says how many nodes lie up to its own."""
    edges = [{"node": node, "cursor": str(index)} for index, node in enumerate(nodes, begin + 1)]
    return {
        "edges": edges,
        "pageInfo": {
            "__typename": "PageInfo",
            "endCursor": edges[-1]["cursor"] if edges else None,
            "hasNextPage": more,
        },
    }


def _wandb_config(run: ServerRun, keys: list[str]) -> str:
    internal = run.raw_config.get("_wandb", {}).get("value", {})
    return _text({key: internal[key] for key in keys if key in internal})


def _history_keys(run: ServerRun) -> Node:
    rows = run.history
    keys = {key: None for row in rows for key in row}
    return {
        "sets": [],
        "keys": {
            key: {"typeCounts": [], "monotonic": False, "previousValue": None} for key in keys
        },
        "lastStep": run.last_step,
    }


def _between(
    run: ServerRun,
    minStep: int = 0,
    maxStep: float = math.inf,
    samples: int | None = None,
) -> list[str]:
    lines = [line for line in run.lines if minStep <= json.loads(line)["_step"] < maxStep]
    return lines[: samples or len(lines)]


def _sampled(run: ServerRun, spec: Mapping[str, Any]) -> list[Node]:
    """All rows that have all the keys asked for; nothing is thinned out here."""
    keys = spec.get("keys") or []
    rows = [row for row in run.history if all(key in row for key in keys)]
    return [plain({key: row[key] for key in keys} if keys else row) for row in rows]
