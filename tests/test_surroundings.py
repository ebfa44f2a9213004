"""Container and cloud, as far as a machine shows them without being asked over a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recorded_tree import plant

from raywb.nodes.surroundings import cloud_facts, container_facts

DMI = "sys/devices/virtual/dmi/id"

#: What cloud-init leaves for everybody to read, cut down; sensitive parts are redacted in it.
INSTANCE_DATA = {
    "ds": {"meta_data": {"public-keys": "redacted for non-root user"}},
    "v1": {
        "availability_zone": "us-east-1b",
        "cloud_name": "openstack",
        "instance_id": "i-0123456789",
        "region": "us-east-1",
        "variant": "ubuntu",
    },
}


@pytest.mark.parametrize(
    ("environment", "files", "facts"),
    [
        ({}, {}, {}),
        ({}, {".dockerenv": ""}, {"runtime": "docker"}),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "CONTAINER_IMAGE": "ray:2.60"},
            {".dockerenv": ""},
            {"runtime": "kubernetes", "image": "ray:2.60"},
        ),
        (
            {"APPTAINER_CONTAINER": "/images/ray.sif"},
            {},
            {"runtime": "apptainer", "image": "/images/ray.sif"},
        ),
        (
            {},
            {"run/.containerenv": 'engine="podman-4"\nimage="docker.io/ray:1"\nid="ab"\n'},
            {"runtime": "podman", "image": "docker.io/ray:1"},
        ),
        ({}, {"run/.containerenv": b"\xff"}, {"runtime": "podman"}),
        ({"RAYWB_CONTAINER_IMAGE": "mine", "CONTAINER_IMAGE": ""}, {}, {"image": "mine"}),
    ],
)
def test_containers(
    tmp_path: Path, environment: dict[str, str], files: dict[str, str], facts: dict[str, str]
) -> None:
    """What runs the container shows by its marks, the image where somebody wrote it down."""
    assert container_facts(environment, plant(tmp_path, files)) == facts


@pytest.mark.parametrize(
    ("maker", "product", "facts"),
    [
        ("Amazon EC2\n", "p4d.24xlarge\n", {"provider": "aws", "instance_type": "p4d.24xlarge"}),
        ("Google\n", "Google Compute Engine\n", {"provider": "gcp"}),
        ("Microsoft Corporation\n", "Virtual Machine\n", {"provider": "azure"}),
        ("Microsoft Corporation\n", "Surface Laptop\n", {}),
        ("QEMU\n", "Standard PC\n", {}),
        ("Amazon EC2\n", "", {"provider": "aws"}),
    ],
)
def test_the_firmware(tmp_path: Path, maker: str, product: str, facts: dict[str, str]) -> None:
    """The clouds that people rent from write their names into the machine's firmware."""
    files = {f"{DMI}/sys_vendor": maker, f"{DMI}/product_name": product}
    assert cloud_facts({}, plant(tmp_path, files)) == facts


def test_who_is_believed(tmp_path: Path) -> None:
    """The environment goes before cloud-init, and that before the firmware."""
    files = {
        f"{DMI}/sys_vendor": "Amazon EC2",
        f"{DMI}/product_name": "g5.xlarge",
        "run/cloud-init/instance-data.json": json.dumps(INSTANCE_DATA),
    }
    environment = {
        "RAY_CLOUD_INSTANCE_ID": "i-ray",
        "CLOUD_INSTANCE_ID": "i-other",
        "RAY_NODE_TYPE_NAME": "gpu_workers",
        "RAY_NODE_MARKET_TYPE": "spot",
        "CLOUD_REGION": "",
    }
    assert cloud_facts(environment, plant(tmp_path, files)) == {
        "provider": "openstack",
        "instance_id": "i-ray",
        "instance_type": "g5.xlarge",
        "node_type": "gpu_workers",
        "market_type": "spot",
        "region": "us-east-1",
        "zone": "us-east-1b",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a":' * 9_999,
        "[]",
        '{"v1": 7}',
        '{"v1": {"region": 7}}',
        "{}",
        '{"v1": {"region": "unknown"}}',
    ],
)
def test_notes_that_say_nothing(tmp_path: Path, text: str) -> None:
    """A file of cloud-init that is damaged, different or without an answer is passed over."""
    plant(tmp_path, {"run/cloud-init/instance-data.json": text})
    assert cloud_facts({}, tmp_path) == {}


def test_no_secret_by_accident(tmp_path: Path) -> None:
    """Variables are taken by their full names, never for how they begin."""
    environment = {"CLOUD_API_KEY": "secret", "CLOUD_TOKEN": "secret", "RAY_NODE_SECRET": "secret"}
    assert cloud_facts(environment, tmp_path) == {}
    assert container_facts(environment, tmp_path) == {}
