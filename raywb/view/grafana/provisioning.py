"""Where Ray keeps what Grafana starts with: its configuration, and the folder of dashboards.

Ray's dashboard process writes it on the head, below ``<session>/metrics`` or where
``RAY_METRICS_OUTPUT_ROOT`` says, whenever the cluster starts. The folder of dashboards is the one
that ``grafana/provisioning/dashboards/default.yml`` names there.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from raywb.errors import DirectoryError
from raywb.settings import process_environment

__all__ = ["RayGrafana", "find_grafana", "nothing_here", "provisioned", "write_dashboard"]


#: The one line of Ray's file that says where dashboards lie.
_FOLDER = re.compile(r"^\s*path:\s*[\"']?(.+?)[\"']?\s*$", re.MULTILINE)


class RayGrafana(NamedTuple):
    """The paths of one cluster, on its head node.

    Attributes:
        dashboards: the folder that Grafana reads dashboards from.
        grafana_config, prometheus_config: what the two are started with.
    """

    dashboards: Path
    grafana_config: Path
    prometheus_config: Path


def find_grafana() -> RayGrafana:
    """What the cluster has that this process is connected to.

    Raises:
        DirectoryError: this machine is not its head, or Ray's dashboard does not run there.
    """
    import ray

    node = ray._private.worker.global_worker.node
    head = next(
        (one for one in ray.nodes() if "node:__internal_head__" in one["Resources"]),
        {"NodeID": "", "NodeManagerAddress": "its head"},
    )
    root = process_environment().get("RAY_METRICS_OUTPUT_ROOT")
    if node is not None:  # else this process is outside of the cluster
        session = Path(node.get_session_dir_path())
        found = provisioned(Path(root) if root else session / "metrics")
        if found is not None:
            return found
    here = ray.get_runtime_context().get_node_id() if node is not None else None
    raise nothing_here(str(head["NodeManagerAddress"]) if here != head["NodeID"] else None)


def nothing_here(head: str | None) -> DirectoryError:
    """Why there is nothing of Ray's for Grafana on this machine.

    Args:
        head: where the head is; None where it is this machine.
    """
    otherwise = "or write the dashboard to a file with --output FILE, and import it in Grafana"
    if head is not None:
        return DirectoryError(
            "this machine is not the head of the Ray cluster, where Grafana's dashboards are kept: "
            f"call `raywb grafana` on {head}, {otherwise}"
        )
    return DirectoryError(
        "Ray keeps no dashboards for Grafana on this head: start it with its dashboard (`ray start "
        "--head --include-dashboard=true`), call this with the RAY_METRICS_OUTPUT_ROOT that Ray "
        f"was started with, if it was, {otherwise}"
    )


def provisioned(root: Path) -> RayGrafana | None:
    """What Ray wrote below a directory; None where it wrote nothing.

    Raises:
        DirectoryError: what lies there cannot be understood.
    """
    provider = root / "grafana" / "provisioning" / "dashboards" / "default.yml"
    try:
        text = provider.read_text()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DirectoryError(f"{provider} cannot be read: {error.strerror or error}") from error
    folder = _FOLDER.search(text)
    if folder is None:
        raise DirectoryError(
            f"{provider} names no folder of dashboards: write the dashboard to a file with "
            "--output FILE and import it in Grafana"
        )
    dashboards = Path(folder[1])
    return RayGrafana(
        dashboards=dashboards,
        grafana_config=root / "grafana" / "grafana.ini",
        prometheus_config=root / "prometheus" / "prometheus.yml",
    )


def write_dashboard(path: Path, text: str) -> str:
    """Write or replace a file whole, so that Grafana never reads a part of it.

    Returns:
        What was done, in a word.

    Raises:
        DirectoryError: it cannot be written.
    """
    # Grafana takes every .json in the folder for a dashboard, so this is none until it is whole.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    what = "replaced" if path.exists() else "wrote"
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DirectoryError(
            f"the dashboard cannot be written to {path}: {error.strerror or error}. "
            "Give another place with --output FILE"
        ) from error
    return what
