"""The Kubernetes manifests: what KubeRay and Ray make of them, and that they are cluster.yaml."""

from __future__ import annotations

import copy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)

from raywb.cli import main
from recipes.local_ray import XENNA_ENVIRONMENT
from recipes.pretrain.data_prep import PretrainSettings
from recipes.settings import load_settings

REPOSITORY = Path(__file__).parents[1]
LAUNCH = REPOSITORY / "raywb" / "launch"

#: The fields of KubeRay's ray.io/v1, as far as a manifest may want them.
CLUSTER_FIELDS = {
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "headServiceAnnotations",
    "managedBy",
    "rayVersion",
    "suspend",
    "workerGroupSpecs",
}
HEAD_FIELDS = {
    "enableIngress",
    "headService",
    "labels",
    "rayStartParams",
    "resources",
    "serviceType",
    "template",
}
GROUP_FIELDS = {
    "groupName",
    "idleTimeoutSeconds",
    "labels",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "rayStartParams",
    "replicas",
    "resources",
    "scaleStrategy",
    "suspend",
    "template",
}
AUTOSCALER_FIELDS = {
    "env",
    "envFrom",
    "idleTimeoutSeconds",
    "image",
    "imagePullPolicy",
    "resources",
    "securityContext",
    "upscalingMode",
    "version",
    "volumeMounts",
}
JOB_FIELDS = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "deletionStrategy",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "managedBy",
    "metadata",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}


def manifest(name: str, kind: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((LAUNCH / name).read_text())
    (found,) = [one for one in documents if one["kind"] == kind]
    return dict(found)


@pytest.fixture
def cluster() -> dict[str, Any]:
    return manifest("raycluster.yaml", "RayCluster")


@pytest.fixture
def description() -> dict[str, Any]:
    """cluster.yaml, read."""
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return loaded


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    workers = {one["groupName"]: one for one in cluster["spec"]["workerGroupSpecs"]}
    return {"head": cluster["spec"]["headGroupSpec"], **workers}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return dict(only)


def test_both_clusters_are_one(cluster: dict[str, Any], description: dict[str, Any]) -> None:
    """Ray's own reading of the manifest has the types, limits and idle time of cluster.yaml."""
    named = copy.deepcopy(cluster)
    named["metadata"]["namespace"] = "default"
    on_kubernetes = _derive_autoscaling_config_from_ray_cr(named)

    def scaling(types: dict[str, Any], head: str) -> dict[str, Any]:
        return {
            "head" if name == head else name: (
                {key: one["resources"].get(key, 0) for key in ("CPU", "GPU")},
                one.get("min_workers", 0),
                one.get("max_workers", 0),
            )
            for name, one in types.items()
        }

    assert scaling(on_kubernetes["available_node_types"], "headgroup") == scaling(
        description["available_node_types"], "head"
    )
    for key in ("max_workers", "idle_timeout_minutes", "upscaling_speed"):
        assert on_kubernetes[key] == description[key]
    assert cluster["metadata"]["name"] == description["cluster_name"]


def test_images_are_of_one_version(cluster: dict[str, Any], description: dict[str, Any]) -> None:
    """Every node has the Ray and the Python that cluster.yaml's has; GPU nodes have CUDA, too."""

    def tag(image: str) -> str:
        return image.rpartition(":")[2]

    everywhere = description["docker"]["image"]
    for name, group in groups(cluster).items():
        docker = description["available_node_types"][name].get("docker", {})
        assert tag(container(group)["image"]) == tag(docker.get("worker_image", everywhere))
    assert tag(everywhere).startswith(f"{cluster['spec']['rayVersion']}-py3")
    gpu = tag(description["available_node_types"]["training"]["docker"]["worker_image"])
    assert gpu == f"{tag(everywhere)}-gpu"
    assert f"FROM {everywhere}" in (LAUNCH / "raycluster.yaml").read_text()


def test_the_environment_and_the_key(cluster: dict[str, Any]) -> None:
    """Every container has what Ray's processes need; the head alone has W&B's key, by reference."""
    for name, group in groups(cluster).items():
        variables = {one["name"]: one for one in container(group)["env"]}
        key = variables.pop("WANDB_API_KEY", None)
        assert {one: variables[one]["value"] for one in variables} == XENNA_ENVIRONMENT
        if name == "head":
            assert key is not None
            assert set(key) == {"name", "valueFrom"}
            assert set(key["valueFrom"]) == {"secretKeyRef"}
        else:
            assert key is None
    assert "env" not in cluster["spec"]["autoscalerOptions"]


def test_pods_follow_the_schema_of_kubernetes(cluster: dict[str, Any]) -> None:
    """Each group's pod, and the claim, are valid in the newest version; a misspelt field is not."""
    version = kubernetes_validate.latest_version()
    claim = manifest("raycluster.yaml", "PersistentVolumeClaim")
    kubernetes_validate.validate(claim, version, strict=True)
    for name, group in groups(cluster).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
        pod |= {"spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, version, strict=True)
        assert pod["spec"]["restartPolicy"] == "Never", "the autoscaler's version 2 wants it"
        mounts = {one["name"] for one in container(group)["volumeMounts"]}
        assert mounts == {one["name"] for one in pod["spec"]["volumes"]}
        paths = [one["mountPath"] for one in container(group)["volumeMounts"]]
        assert "/shared" in paths
        broken = copy.deepcopy(pod)
        broken["spec"]["containers"][0]["volumeMount"] = []
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, version, strict=True)
        claims = [
            one["persistentVolumeClaim"]["claimName"]
            for one in pod["spec"]["volumes"]
            if "persistentVolumeClaim" in one
        ]
        assert claims == [claim["metadata"]["name"]]


def test_the_fields_are_those_of_kuberay(cluster: dict[str, Any]) -> None:
    """No field is one that KubeRay does not have; what it requires is there."""
    spec = cluster["spec"]
    assert cluster["apiVersion"] == "ray.io/v1"
    assert set(spec) <= CLUSTER_FIELDS
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER_FIELDS
    assert set(spec["headGroupSpec"]) <= HEAD_FIELDS
    for name, group in groups(cluster).items():
        assert {"rayStartParams", "template"} <= set(group)
        assert all(isinstance(one, str) for one in group["rayStartParams"].values())
        if name != "head":
            assert set(group) <= GROUP_FIELDS
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert spec["enableInTreeAutoscaling"] is True


def test_the_job_runs_a_recipe_on_that_cluster(
    cluster: dict[str, Any], description: dict[str, Any]
) -> None:
    """It selects the cluster, its settings are ones that the recipe has, and its CPUs can come."""
    job = manifest("rayjob.yaml", "RayJob")
    spec = job["spec"]
    assert job["apiVersion"] == "ray.io/v1"
    assert set(spec) <= JOB_FIELDS
    assert spec["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    python, module, recipe, *words = shlex.split(spec["entrypoint"])
    assert (python, module, recipe) == ("python", "-m", "recipes.pretrain")
    settings = load_settings(
        PretrainSettings, REPOSITORY / "recipes" / "pretrain", "default", words
    )
    assert settings.output_dir.startswith("/shared/")
    data_prep = description["available_node_types"]["data-prep"]
    assert settings.ray.num_cpus is not None
    assert settings.ray.num_cpus <= data_prep["max_workers"] * data_prep["resources"]["CPU"]
    training = description["available_node_types"]["training"]
    assert settings.train.use_gpu is True
    assert settings.train.workers is not None
    assert settings.train.workers <= training["max_workers"] * training["resources"]["GPU"]
    # Nodes of data preparation have no torch, and the driver, on the head, needs it.
    (on_head,) = description["head_setup_commands"]
    assert "checkout[train]" in on_head


def test_a_job_has_a_cluster_of_its_own(cluster: dict[str, Any]) -> None:
    """Its cluster is raycluster.yaml's, but for the drain at the head's end, and is deleted when
    the entrypoint has ended, whose last command delivers everything; the head's pod is valid."""
    job = manifest("rayjob-alone.yaml", "RayJob")
    spec = job["spec"]
    assert set(spec) <= JOB_FIELDS
    assert "clusterSelector" not in spec, "KubeRay does not delete a cluster that others use"
    assert spec["shutdownAfterJobFinishes"] is True
    own = spec["rayClusterSpec"]
    pod = own["headGroupSpec"]["template"]["spec"]
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "head"}, "spec": pod},
        kubernetes_validate.latest_version(),
        strict=True,
    )
    hook = pod["containers"][0].pop("lifecycle")["preStop"]["exec"]["command"]
    words = shlex.split(hook[-1])
    assert hook[:2] == ["bash", "-c"]
    assert words[:2] == ["raywb", "drain"]
    context = main.commands["drain"].make_context("drain", words[2:], obj="auto")
    limit_s = context.params["timeout_s"]
    assert limit_s < pod.pop("terminationGracePeriodSeconds")
    assert own == cluster["spec"]

    shell, option, script = shlex.split(spec["entrypoint"])
    assert (shell, option) == ("bash", "-c")
    last = shlex.split(script.partition("raywb shutdown")[2].partition("||")[0])
    command = main.commands["shutdown"]
    given = command.make_context("shutdown", [*last[:-1], "7"], obj="auto").params
    assert (given["place"], given["job_exit_code"]) == ("kuberay", 7)


@pytest.mark.parametrize(("recipe", "end", "code"), [(0, 0, 0), (3, 0, 3), (0, 5, 5), (3, 5, 5)])
def test_the_job_fails_where_it_should(tmp_path: Path, recipe: int, end: int, code: int) -> None:
    """The entrypoint ends as the recipe did, and as `raywb shutdown` where that is not well."""
    for name, status in (("python", recipe), ("raywb", end)):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {name} $@\nexit {status}\n")
        program.chmod(0o755)
    entrypoint = manifest("rayjob-alone.yaml", "RayJob")["spec"]["entrypoint"]
    done = subprocess.run(
        shlex.split(entrypoint),
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert f"--job-exit-code {recipe}" in done.stdout
