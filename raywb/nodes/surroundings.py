"""The container that a node runs in, and the cloud that it was rented from.

Only what lies open on the machine is read, no metadata server is asked. Variables are named one
by one, never by a pattern: who knows what else begins with ``CLOUD_``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from raywb.nodes.files import exists, read_text

__all__ = ["cloud_facts", "container_facts"]

#: Variables that hold the image of the container: set by whoever starts it, by Apptainer and
#: Singularity, by Slurm's container support.
IMAGE_VARIABLES = (
    "RAYWB_CONTAINER_IMAGE",
    "CONTAINER_IMAGE",
    "APPTAINER_CONTAINER",
    "SINGULARITY_CONTAINER",
    "SLURM_CONTAINER",
)

#: Each fact's variables, the first that is set wins: Ray's autoscaler, Ray's own labels on
#: Kubernetes, and the plain names that people write into their clusters' configuration.
CLOUD_VARIABLES = {
    "provider": ("CLOUD_PROVIDER",),
    "instance_id": ("RAY_CLOUD_INSTANCE_ID", "CLOUD_INSTANCE_ID"),
    "instance_type": ("RAY_CLOUD_INSTANCE_TYPE_NAME", "CLOUD_INSTANCE_TYPE"),
    "node_type": ("RAY_NODE_TYPE_NAME",),
    "market_type": ("RAY_NODE_MARKET_TYPE",),
    "region": ("RAY_NODE_REGION", "CLOUD_REGION"),
    "zone": ("RAY_NODE_ZONE", "CLOUD_ZONE"),
}

#: Makers of virtual machines as their firmware calls them, and whether the product's name is the
#: instance's type.
_MAKERS = {
    "Amazon EC2": ("aws", True),
    "Google": ("gcp", False),
    "Microsoft Corporation": ("azure", False),
    "Alibaba Cloud": ("alibaba", False),
    "DigitalOcean": ("digitalocean", False),
    "Hetzner": ("hetzner", False),
    "OracleCloud.com": ("oci", False),
}

_IMAGE_LINE = re.compile(r'^image="([^"\n]+)"$', re.MULTILINE)


def container_facts(environment: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """``runtime`` and ``image`` of the container, as far as they show; empty outside of one."""
    podman = read_text(root / "run/.containerenv")
    image = next((environment[name] for name in IMAGE_VARIABLES if environment.get(name)), None)
    if image is None and (found := _IMAGE_LINE.search(podman or "")):
        image = found[1]
    runtime = next(_runtimes(environment, root, podman is not None), None)
    return {key: value for key, value in (("runtime", runtime), ("image", image)) if value}


def _runtimes(environment: Mapping[str, str], root: Path, podman: bool) -> Iterator[str]:
    """What runs the container, the most particular first."""
    if environment.get("KUBERNETES_SERVICE_HOST"):
        yield "kubernetes"
    if environment.get("APPTAINER_CONTAINER") or environment.get("SINGULARITY_CONTAINER"):
        yield "apptainer"
    if podman:
        yield "podman"
    if exists(root / ".dockerenv"):
        yield "docker"


def cloud_facts(environment: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """Where the machine was rented: the keys of ``CLOUD_VARIABLES``, as far as they are known.

    The environment goes before what cloud-init noted at boot, and that before the firmware.
    """
    facts = _from_firmware(root) | _from_cloud_init(root)
    for fact, variables in CLOUD_VARIABLES.items():
        if name := next((name for name in variables if environment.get(name)), None):
            facts[fact] = environment[name]
    return facts


def _from_firmware(root: Path) -> dict[str, str]:
    """What a virtual machine's maker wrote into its DMI tables (``/sys/devices/virtual/dmi``)."""
    folder = root / "sys/devices/virtual/dmi/id"
    maker = (read_text(folder / "sys_vendor") or "").strip()
    product = (read_text(folder / "product_name") or "").strip()
    provider, product_is_type = _MAKERS.get(maker, (None, False))
    if provider is None or (provider == "azure" and product != "Virtual Machine"):
        return {}  # Microsoft's name is on laptops, too
    return {"provider": provider} | (
        {"instance_type": product} if product and product_is_type else {}
    )


def _from_cloud_init(root: Path) -> dict[str, str]:
    """What cloud-init noted for everybody to read, in its keys that are the same in all clouds."""
    text = read_text(root / "run/cloud-init/instance-data.json")
    if text is None:
        return {}
    try:
        noted = msgspec.json.decode(text, type=_InstanceData).v1
    except (msgspec.DecodeError, RecursionError):
        return {}
    facts: dict[str, Any] = {
        "provider": noted.cloud_name,
        "instance_id": noted.instance_id,
        "region": noted.region,
        "zone": noted.availability_zone,
    }
    return {key: value for key, value in facts.items() if value and value != "unknown"}


class _Noted(msgspec.Struct):
    cloud_name: str | None = None
    instance_id: str | None = None
    region: str | None = None
    availability_zone: str | None = None


class _InstanceData(msgspec.Struct):
    v1: _Noted
