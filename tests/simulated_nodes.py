"""Nodes that Ray's autoscaler starts and ends on this machine, for a cluster description's types.

Ray's own autoscaler (version 2), its scheduler and its raylets are real; only the machines are
not. ``prepare_head`` makes a head of them::

    with RayCluster.start(num_cpus=1, prepare_head=simulate(description, idle_timeout_s=6)) as c:

A node has a disk of its own for journals, which is gone with it, as an ended instance's is.
The autoscaler imports this module, by a copy of it, into its process.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

__all__ = ["SimulatedNodes", "simulate"]

#: What of a node type is the autoscaler's business; the rest is the cloud's.
_SCALING = ("resources", "min_workers", "max_workers", "labels")

#: Enough for a test; by default Ray takes a third of the machine for each node.
_OBJECT_STORE_BYTES = 80_000_000


class SimulatedNodes(FakeMultiNodeProvider):
    """Ray's provider of simulated nodes, with the description's own name for the head's type."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        head = self._nodes[self._head_node_id]
        head["tags"][TAG_RAY_USER_NODE_TYPE] = provider_config["head_type"]
        self._disks = Path(provider_config["disks"])

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:
            before = set(self._nodes)
            name = f"node_{self._next_node_id + 1}"
            disk = self._disks / name
            os.environ["RAYWB_JOURNAL_DIR"] = str(disk)  # the node's processes inherit it
            # Else all nodes unpack the working directories of jobs over one another.
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"runtime_resources_{name}"
            super()._create_node_with_resources_and_labels(*arguments)
            (node_id,) = set(self._nodes) - before
            self._nodes[node_id]["disk"] = disk

    def _terminate_node(self, node: dict[str, Any]) -> None:
        super()._terminate_node(node)
        shutil.rmtree(node["disk"], ignore_errors=True)


def simulate(
    description: Mapping[str, Any], *, idle_timeout_s: float, environment: Mapping[str, str]
) -> Callable[[Path], tuple[list[str], dict[str, str]]]:
    """Make the head of a cluster whose nodes are of a description's types.

    Args:
        description: A cluster description for ``ray up``, read.
        idle_timeout_s: In place of its ``idle_timeout_minutes``, which a test cannot wait for.
        environment: Variables of all nodes' processes.
    """

    def prepare(root: Path) -> tuple[list[str], dict[str, str]]:
        shutil.copy(__file__, root / "simulated_nodes_of_the_head.py")
        port = _free_port()
        head_type = description["head_node_type"]
        node_types = {
            name: {key: one[key] for key in _SCALING if key in one} | {"node_config": {}}
            for name, one in description["available_node_types"].items()
        }
        for one in node_types.values():
            one["resources"] = {**one["resources"], "object_store_memory": _OBJECT_STORE_BYTES}
        empty = ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        configuration = {
            **{f"{name}_commands": [] for name in (*empty, "initialization")},
            **{key: {} for key in ("auth", "docker", "file_mounts")},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "cluster_name": description["cluster_name"],
            "max_workers": description["max_workers"],
            "upscaling_speed": description["upscaling_speed"],
            "idle_timeout_minutes": idle_timeout_s / 60,
            "head_node_type": head_type,
            "available_node_types": node_types,
            "provider": {
                "type": "external",
                "module": "simulated_nodes_of_the_head.SimulatedNodes",
                "gcs_address": f"{_own_address()}:{port}",
                "head_node_id": FAKE_HEAD_NODE_ID,
                "head_type": head_type,
                "disks": str(root / "journals"),
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "launch_multiple": True,
            },
        }
        path = root / "autoscaling.json"
        path.write_text(json.dumps(configuration))
        variables = {
            # This module alone: what else a job imports comes from its working directory.
            "PYTHONPATH": str(root),
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_NODE_TYPE_NAME": head_type,
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAYWB_JOURNAL_DIR": str(root / "journals" / "head"),
            **environment,
        }
        return [f"--port={port}", f"--autoscaling-config={path}"], variables

    return prepare


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
