"""cluster.yaml as `ray up` takes it: Ray's own launcher, on an AWS that is on loopback.

The launcher, its schema, its AWS provider and boto3 are real; the cloud is moto's server, and
`ssh` and `rsync` are programs that note what they were given, since there is no machine behind it.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.util import prepare_config, validate_config

from recipes.local_ray import XENNA_ENVIRONMENT

REPOSITORY = Path(__file__).parents[1]
CLUSTER_YAML = REPOSITORY / "cluster.yaml"
KEY = "5ec7e7" * 7

#: Notes each call as a line of JSON, and what files it was to copy; says what a healthy machine
#: with Docker would say.
ANYBODY = """#!{python}
import json, os, re, sys
words = sys.argv
copied = {{}}
if words[0].endswith("rsync"):
    source = words[-2]
    if os.path.isfile(source):
        copied = {{source: open(source).read(), "mode": oct(os.stat(source).st_mode & 0o777)}}
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([os.path.basename(words[0]), words[1:], copied]) + "\\n")
command = words[-1]
if "command -v docker" in command:
    print("/usr/bin/docker")
elif ".Config.Env" in command:
    print(json.dumps(["HOME=/home/ray"]))
elif "printenv HOME" in command:
    print("/home/ray")
elif "State.Running" in command:
    print("true" if os.path.exists({running!r}) else "false")
elif "docker run" in command:
    open({running!r}, "w").close()
"""


@dataclass(frozen=True)
class Launch:
    """What `ray up` and `ray rsync-up` did."""

    output: str
    calls: list[tuple[str, list[str], dict[str, str]]]
    instances: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    root: Path

    def commands(self) -> list[str]:
        """What was run on the head."""
        return [words[-1] for program, words, _ in self.calls if program == "ssh"]


def description() -> dict[str, Any]:
    """cluster.yaml, read."""
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER_YAML.read_text())
    return loaded


@pytest.fixture(scope="module")
def aws() -> Iterator[dict[str, str]]:
    """AWS on loopback, in an account on which Ray has been used before."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-west-2",
    }
    iam = client("iam", variables)
    name = "ray-autoscaler-v1"
    iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName=name)
    iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    yield variables
    server.stop()


def client(service: str, aws: dict[str, str]) -> Any:
    return boto3.client(
        service,
        endpoint_url=aws["AWS_ENDPOINT_URL"],
        region_name=aws["AWS_DEFAULT_REGION"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


@pytest.fixture(scope="module")
def launch(aws: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """`ray up`, and the key's way to the head, from a shell that has the key."""
    root = tmp_path_factory.mktemp("launch")
    programs, calls = root / "bin", root / "calls.jsonl"
    for directory in (root / "home", root / "tmp", programs):
        directory.mkdir()
    noting = ANYBODY.format(
        python=sys.executable, calls=str(calls), running=str(root / "container")
    )
    ray = f"#!{sys.executable}\nfrom ray.scripts.scripts import main\nmain()\n"
    for name, text in {"ssh": noting, "rsync": noting, "ray": ray}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-euxc", f"ray up -y cluster.yaml\n{commands_for_the_key()}"],
        cwd=REPOSITORY,
        env={
            **os.environ,
            **aws,
            "WANDB_API_KEY": KEY,
            "HOME": str(root / "home"),
            "TMPDIR": str(root / "tmp"),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ec2 = client("ec2", aws)
    return Launch(
        # What -x shows of the shell's own printf is no part of it.
        output=done.stdout + re.sub(r"^\++ printf .*$", "", done.stderr, flags=re.MULTILINE),
        calls=[tuple(json.loads(line)) for line in calls.read_text().splitlines()],
        instances=[
            instance
            for reservation in ec2.describe_instances()["Reservations"]
            for instance in reservation["Instances"]
        ],
        groups=ec2.describe_security_groups()["SecurityGroups"],
        root=root,
    )


def commands_for_the_key() -> str:
    """The commands of cluster.yaml's first comment that bring the key to the head."""
    comment = CLUSTER_YAML.read_text().partition("\n\n")[0]
    lines = [line.removeprefix("#") for line in comment.splitlines()]
    begin = next(n for n, line in enumerate(lines) if "umask" in line)
    end = next(n for n, line in enumerate(lines) if "rm ~" in line)
    return "\n".join(lines[begin : end + 1])


@pytest.mark.timeout(240)
def test_ray_up_starts_the_head(launch: Launch) -> None:
    """The launcher accepts the file, starts one instance, sets it up, and starts Ray on it."""
    (head,) = launch.instances
    node_types = description()["available_node_types"]
    assert head["InstanceType"] == node_types["head"]["node_config"]["InstanceType"]
    assert "InstanceLifecycle" not in head
    ran = launch.commands()
    (container,) = [command for command in ran if "docker run" in command]
    for name, value in XENNA_ENVIRONMENT.items():
        assert f"--env={name}={value} " in container
    assert "--net=host rayproject/ray:2.60.0-py312 bash" in container
    assert any("pip install" in command and "checkout[train]" in command for command in ran)
    starts = [re.sub(r"[\\'\"]", "", command) for command in ran if "ray start" in command]
    assert len(starts) == 1
    for part in ("RAY_OVERRIDE_RESOURCES={CPU:1};", "docker exec", "--dashboard-host=127.0.0.1"):
        assert part in starts[0]
    checkouts = [
        words for program, words, _ in launch.calls if program == "rsync" and "./" in words
    ]
    assert checkouts
    for words in checkouts:
        assert words[words.index("--exclude") + 1] == ".git"
        assert words[words.index("--filter") + 1] == "dir-merge,- .gitignore"


def test_nothing_but_ssh_is_open(launch: Launch) -> None:
    """From outside the cluster's group only port 22 is reached."""
    (group,) = [group for group in launch.groups if group["GroupName"] == "raywb"]
    (head,) = launch.instances
    assert [one["GroupId"] for one in head["SecurityGroups"]] == [group["GroupId"]]
    open_ports = [
        (rule["FromPort"], rule["ToPort"]) for rule in group["IpPermissions"] if rule["IpRanges"]
    ]
    assert open_ports == [(22, 22)]
    within = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    assert [one["GroupId"] for rule in within for one in rule["UserIdGroupPairs"]] == [
        group["GroupId"]
    ]


def test_the_key_goes_to_the_head_alone(launch: Launch) -> None:
    """W&B's key is in no command, no cache, no copied file but one, which only its owner reads."""
    assert KEY not in launch.output
    carried = []
    for program, words, copied in launch.calls:
        assert KEY not in json.dumps(words)
        if KEY in json.dumps(copied):
            carried.append((program, words[-1].rpartition(":")[2], copied["mode"]))
    assert carried == [("rsync", "/tmp/ray_tmp_mount/raywb/home/ray/.netrc", "0o600")]
    into_container = [command for command in launch.commands() if ".netrc raywb:" in command]
    assert len(into_container) == 1
    for path in launch.root.rglob("*"):
        if path.is_file() and path.name != "calls.jsonl":
            assert KEY.encode() not in path.read_bytes(), path
    mounts = [
        words[-1]
        for program, words, copied in launch.calls
        if program == "rsync" and any("bootstrap" in name for name in copied)
    ]
    assert mounts, "Ray's own copy of the configuration was seen, and has no key"


def test_the_file_has_no_place_for_a_secret() -> None:
    """No variable of the launching shell, and nothing that looks like a key, is in the file."""
    text = "\n".join(
        line for line in CLUSTER_YAML.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    assert set(re.findall(r"\$\{?(\w+)", text)) == {"RAY_HEAD_IP"}
    assert not re.findall(r"(?i)api_?key|token|password|secret|credential", text)
    assert not re.findall(r"\b[0-9a-fA-F]{32,}\b|AKIA\w{16}", text)


def test_workers_of_each_type_are_what_they_say(aws: dict[str, str], launch: Launch) -> None:
    """What Ray's provider starts for a type is that machine; data preparation runs on spot."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    resolved = yaml.safe_load(bootstrapped(launch))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in aws.items():
            patch.setenv(name, value)
        provider = AWSNodeProvider(resolved["provider"], "workers")
        for name in ("data-prep", "training"):
            config = resolved["available_node_types"][name]["node_config"]
            provider.create_node(config, {"ray-user-node-type": name}, 1)
    ec2 = client("ec2", aws)
    found = {}
    for reservation in ec2.describe_instances(
        Filters=[{"Name": "tag:ray-cluster-name", "Values": ["workers"]}]
    )["Reservations"]:
        for one in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in one["Tags"]}
            lifecycle = one.get("InstanceLifecycle", "on demand")
            found[tags["ray-user-node-type"]] = (one["InstanceType"], lifecycle)
    assert found == {"data-prep": ("m5.4xlarge", "spot"), "training": ("g5.12xlarge", "on demand")}
    cpus = {
        one["InstanceType"]: one["VCpuInfo"]["DefaultVCpus"]
        for one in ec2.describe_instance_types(InstanceTypes=["m5.4xlarge", "g5.12xlarge"])[
            "InstanceTypes"
        ]
    }
    for name, (instance_type, _) in found.items():
        assert (
            description()["available_node_types"][name]["resources"]["CPU"] == cpus[instance_type]
        )
    gpus = ec2.describe_instance_types(InstanceTypes=["g5.12xlarge"])["InstanceTypes"][0]["GpuInfo"]
    assert sum(one["Count"] for one in gpus["Gpus"]) == 4


def bootstrapped(launch: Launch) -> str:
    """The configuration that the head's autoscaler works from."""
    (text,) = {
        content
        for program, _, copied in launch.calls
        if program == "rsync"
        for name, content in copied.items()
        if "ray-bootstrap-" in name
    }
    return text


def test_the_schema_is_strict() -> None:
    """The file follows Ray's schema, and the check sees a misspelt key and a wrong type."""
    whole = description()
    validate_config(prepare_config(copy.deepcopy(whole)))
    for change in ({"idle_timeout": 5}, {"max_workers": "ten"}, {"head_node_type": "nobody"}):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            validate_config(prepare_config(copy.deepcopy(whole) | change))
    workers = {name: one for name, one in whole["available_node_types"].items() if name != "head"}
    assert sum(one["max_workers"] for one in workers.values()) == whole["max_workers"]
    assert [one["min_workers"] for one in workers.values()] == [0, 0]
