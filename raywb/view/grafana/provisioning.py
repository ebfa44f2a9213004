"""Where Ray keeps what Grafana starts with: its configuration, and the folder of dashboards.

Ray's dashboard process writes it on the head, below ``<session>/metrics`` or where
``RAY_METRICS_OUTPUT_ROOT`` says, whenever the cluster starts. The folder of dashboards is the one
that ``grafana/provisioning/dashboards/default.yml`` names there.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from raywb.errors import DirectoryError
from raywb.settings import process_environment

__all__ = ["RayGrafana", "find_grafana", "provisioned", "write_dashboard"]


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
    here = ray.get_runtime_context().get_node_id()
    head = next(
        (one for one in ray.nodes() if "node:__internal_head__" in one["Resources"]),
        {"NodeID": "", "NodeManagerAddress": "unknown"},
    )
    if node is not None:
        root = process_environment().get("RAY_METRICS_OUTPUT_ROOT")
        session = Path(node.get_session_dir_path())
        found = provisioned(Path(root) if root else session / "metrics")
        if found is not None:
            return found
    if node is None or here != head["NodeID"]:
        raise DirectoryError(
            "this machine is not the head of the Ray cluster, where Grafana's dashboards are kept: "
            f"call `raywb grafana` on {head['NodeManagerAddress']}, or write the dashboard to a "
            "file with --output FILE and import it in Grafana"
        )
    raise DirectoryError(
        f"Ray keeps no dashboards for Grafana in {session}: its dashboard does not run (`ray "
        "start --head --include-dashboard=true`), or it writes elsewhere (RAY_METRICS_OUTPUT_ROOT "
        "of the head). With --output FILE the dashboard is written where you say"
    )


def provisioned(root: Path) -> RayGrafana | None:
    """What Ray wrote below a directory; None where it wrote nothing.

    Raises:
        DirectoryError: what lies there cannot be understood.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    provider = root / "grafana" / "provisioning" / "dashboards" / "default.yml"
    try:
        configured: Any = OmegaConf.to_container(OmegaConf.load(provider))
        dashboards = Path(configured["providers"][0]["options"]["path"])
    except FileNotFoundError:
        return None
    except (OSError, YAMLError, LookupError, TypeError) as error:
        raise DirectoryError(
            f"{provider} does not name a folder of dashboards ({error}): write the dashboard to a "
            "file with --output FILE and import it in Grafana"
        ) from error
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
