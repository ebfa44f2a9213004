"""What the nodes of a cluster amount to: totals, versions that differ, a table."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest

from raywb.nodes.records import (
    MOST_LISTED,
    TABLE_COLUMNS,
    NodeRecord,
    SeenNode,
    series_name,
    summarize,
    table_rows,
    version_skew,
)

H100 = "NVIDIA H100 80GB HBM3"


def record(
    number: int,
    facts: dict[str, Any] | None = None,
    *,
    left_s: float | None = None,
    **resources: Any,
) -> NodeRecord:
    seen = SeenNode(
        node_id=f"{number:056x}",
        hostname=f"host-{number}",
        ip=f"10.0.{number // 256}.{number % 256}",
        resources={"CPU": 4.0, "memory": 2.0**33, f"node:10.0.0.{number}": 1.0, **resources},
        labels={"ray.io/node-id": f"{number:056x}", "zone": "b"},
    )
    return NodeRecord(name=seen.hostname, seen=seen, joined_s=0.0, left_s=left_s, facts=facts)


def gpu_node(number: int, gpus: int = 8, name: str = H100) -> NodeRecord:
    facts = {
        "cpu_count": 96,
        "memory_gb": 1024.0,
        "gpu_count": gpus,
        "gpu_type": name,
        "gpus": [{"index": index, "name": name} for index in range(gpus)],
    }
    return record(number, facts, GPU=float(gpus))


def test_totals_are_those_of_the_nodes_that_are_there() -> None:
    """Containers count with their limits, unprobed nodes with what Ray says, left ones not."""
    limited = {"cpu_count": 96, "cpu_limit": 8.0, "memory_gb": 512.0, "memory_limit_gb": 32.0}
    nodes = [
        gpu_node(0),
        gpu_node(1, 4, "NVIDIA L4"),
        record(2, {**limited, "gpu_count": 0}, GPU=2.0),
        record(3, None, GPU=1.0),
        record(4, {"cpu_count": 96, "gpu_count": 8, "gpu_type": H100}, left_s=1.0),
    ]
    found = summarize(nodes)
    assert found["node_count"] == 4
    assert found["cpu_count"] == 96 + 96 + 8 + 4
    assert found["memory_gb"] == 1024 + 1024 + 32 + 8
    assert found["gpu_count"] == 8 + 4 + 0 + 1
    assert found["gpus"] == {H100: 8, "NVIDIA L4": 4, "unknown": 1}
    assert (found["nodes_left"], found["nodes_unprobed"]) == (1, 1)
    assert found["ray"] == {"cpu_count": 16.0, "gpu_count": 15.0, "memory_gb": 32.0}


def test_nodes_whose_driver_says_nothing_count_with_what_ray_hands_out() -> None:
    """A probe that could not look at the GPUs leaves their number out; Ray's holds then."""
    found = summarize([record(0, {"cpu_count": 2}, GPU=2.0)])
    assert (found["gpu_count"], found["gpus"]) == (2, {"unknown": 2})


def test_a_thousand_nodes_make_a_small_config() -> None:
    """However many nodes, types and versions there are, the config stays a few kilobytes."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    nodes = []
    for number in range(1000):
        node = gpu_node(number, 8, f"NVIDIA model {chance.randrange(200)}")
        assert node.facts is not None
        node.facts["versions"] = {
            name: f"{chance.randrange(30)}.{chance.randrange(30)}.0+cu{number}"
            for name in ("python", "ray", "raywb", "torch", "wandb")
        }
        nodes.append(node)
    found = summarize(nodes) | {"version_skew": version_skew(nodes)}
    assert len(msgspec.json.encode(found)) < 8_000
    assert (found["node_count"], found["gpu_count"]) == (1000, 8000)
    assert sum(found["gpus"].values()) == 8000
    assert len(found["gpus"]) == len(found["versions"]["ray"]) == MOST_LISTED + 1
    rows = table_rows(nodes)
    assert len(rows) == 1000
    assert {len(row) for row in rows} == {len(TABLE_COLUMNS)}


def versions(number: int, **found: str) -> NodeRecord:
    return record(number, {"versions": found})


def test_versions_that_differ_are_named_with_the_nodes_that_have_them() -> None:
    """The usual version is that of most nodes; how torch was built and who left do not count."""
    nodes = [
        versions(0, python="3.11.7", torch="2.13.0+cpu", ray="2.60.0"),
        versions(1, python="3.11.7", torch="2.13.0+cu128", ray="2.60.0"),
        versions(2, python="3.12.1", ray="2.60.0"),
        record(3),
    ]
    nodes.append(record(4, {"versions": {"ray": "2.50.0"}}, left_s=1.0))
    assert version_skew(nodes) == {
        "python": "nodes differ in python: 3.11.7 on 2 nodes, 3.12.1 on 1 node (host-2)"
    }
    assert summarize(nodes)["versions"] == {
        "python": {"3.11.7": 2, "3.12.1": 1},
        "ray": "2.60.0",
        "torch": "2.13.0",
    }
    many = [versions(n, ray="2.60.0") for n in range(20)]
    many += [versions(n, ray="2.59.0") for n in range(20, 30)]
    assert version_skew(many)["ray"].endswith("(host-20, host-21, host-22 and 7 more)")
    assert version_skew([]) == {}


def test_a_table_says_of_each_node_what_it_is() -> None:
    """Facts, Ray's resources and labels, and when it left; what is not known is empty."""
    facts = {
        "cpu_count": 8,
        "gpu_count": 0,
        "cloud": {"instance_type": "m5.2xlarge", "market_type": "spot", "zone": "eu-1b"},
        "container": {"runtime": "docker"},
        "versions": {"python": "3.11.7"},
    }
    nodes = [record(1, facts, left_s=86_400.0), record(2, None)]
    nodes[1].error = "the probe failed"
    there, left = (dict(zip(TABLE_COLUMNS, row, strict=True)) for row in table_rows(nodes))
    assert (there["node"], there["state"], there["cpus"]) == ("host-2", "worker", None)
    assert there["problem"] == "the probe failed"
    assert there["resources"] == "CPU=4, memory=8.58993e+09"
    assert there["labels"] == "zone=b"
    assert (left["state"], left["left"]) == ("left", "1970-01-02T00:00:00Z")
    assert (left["instance_type"], left["market_type"], left["zone"]) == (
        "m5.2xlarge",
        "spot",
        "eu-1b",
    )
    assert (left["container"], left["python"], left["torch"]) == ("docker", "3.11.7", None)
    assert json.loads(msgspec.json.encode([there, left]))


@pytest.mark.parametrize(
    ("hostname", "taken", "name"),
    [
        ("a", set(), "a"),
        ("a", {"a"}, "a-01234567"),
        ("mean", set(), "mean-01234567"),
        ("a/b c", set(), "a_b_c"),
        ("", set(), "10.0.0.1"),
    ],
)
def test_names_of_series_tell_nodes_apart(hostname: str, taken: set[str], name: str) -> None:
    """The hostname, unless another living node or a series of all nodes is called so."""
    seen = SeenNode(node_id="0123456789abcdef", hostname=hostname, ip="10.0.0.1")
    assert series_name(seen, taken) == name
