"""The Kubernetes files: what they are to KubeRay and to Ray's autoscaler, and what is refused. No cluster is needed."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.clusters.kuberay import schema_of, structural
from tests.clusters.pins import CLUSTERS, pin

RAY_JOB, RAY_CLUSTER, ONCE = (CLUSTERS / f"kubernetes{rest}.yaml" for rest in ("-rayjob", "-raycluster", "_once"))
BOTH = [RAY_JOB, RAY_CLUSTER]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def check(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, schema_of(manifest), cls=jsonschema.Draft202012Validator)


def cluster_of(path: Path) -> dict[str, Any]:
    spec = read(path)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods_of(path: Path) -> list[dict[str, Any]]:
    cluster = cluster_of(path)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("path", [RAY_JOB, RAY_CLUSTER, ONCE], ids=lambda path: path.name)
def test_every_manifest_is_one_of_its_kind(path: Path) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        check(manifest)


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_it_is_one_to_kuberays_own_definition(path: Path) -> None:
    folder = os.environ.get("RAYLIT_KUBERAY_CRDS")
    if not folder:
        pytest.skip(
            "RAYLIT_KUBERAY_CRDS names no folder with KubeRay's ray.io_rayjobs.yaml and ray.io_rayclusters.yaml"
        )
    manifest = read(path)
    definition = read(Path(folder) / f"ray.io_{manifest['kind'].lower()}s.yaml")
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
    schema = structural(version["schema"]["openAPIV3Schema"])
    schema["properties"].pop("metadata")  # Kubernetes checks that itself
    manifest.pop("metadata")
    jsonschema.validate(manifest, schema, cls=jsonschema.Draft202012Validator)


def at(manifest: Any, *path: Any) -> Any:
    for step in path:
        manifest = manifest[step]
    return manifest


HEAD = ("spec", "headGroupSpec")
WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a typo in a key": lambda it: it["spec"].update(authOption=it["spec"].pop("authOptions")),
    "a key one level too high": lambda it: it["spec"].update(rayStartParams={}),
    "no head": lambda it: it["spec"].pop("headGroupSpec"),
    "a number where text belongs": lambda it: at(it, *HEAD, "rayStartParams").update({"num-cpus": 0}),
    "text where a number belongs": lambda it: at(it, "spec", "workerGroupSpecs", 0).update(maxReplicas="8"),
    "no upper bound": lambda it: at(it, "spec", "workerGroupSpecs", 0).pop("maxReplicas"),
    "an unknown mode": lambda it: it["spec"]["authOptions"].update(mode="tokens"),
    "no containers": lambda it: at(it, *HEAD, "template", "spec").pop("containers"),
    "a size that is none": lambda it: at(it, *HEAD, "template", "spec", "containers", 0, "resources", "limits").update(
        memory="4 GB"
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_one_is_refused(what: str) -> None:
    manifest = copy.deepcopy(read(RAY_CLUSTER))
    WRONG[what](manifest)
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_a_manifest_of_another_version_is_refused() -> None:
    with pytest.raises(KeyError):
        check({**read(RAY_CLUSTER), "apiVersion": "ray.io/v1alpha1"})


def test_rays_autoscaler_reads_the_cluster_as_it_is_meant() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    derived = _derive_autoscaling_config_from_ray_cr(read(RAY_CLUSTER))  # checks it with Ray's own schema, too
    head, worker = (derived["available_node_types"][name] for name in ("headgroup", "worker"))
    assert head["resources"]["CPU"] == 0
    assert (worker["min_workers"], worker["max_workers"]) == (0, 8)
    assert worker["resources"]["CPU"] == 4 and worker["resources"]["memory"] == 8 * 2**30
    assert derived["max_workers"] == 8 and derived["idle_timeout_minutes"] == 10


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_the_token_is_on_and_comes_from_the_secret(path: Path) -> None:
    assert cluster_of(path)["authOptions"] == {"mode": "token", "secretName": "raylit-token"}
    # The header makes this very Secret, with the key that KubeRay reads.
    assert "create secret generic raylit-token --from-file=auth_token=$HOME/.ray/tokens/raylit-k8s" in path.read_text()


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_no_pod_is_root_and_none_is_reached_from_outside(path: Path) -> None:
    cluster = cluster_of(path)
    # No load balancer, node port or ingress: the service is within the cluster, which is KubeRay's default.
    assert not {"serviceType", "enableIngress", "headService"} & set(cluster["headGroupSpec"])
    for pod in pods_of(path):
        assert not pod.get("hostNetwork")
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["runAsNonRoot"] and context["runAsUser"] > 0 and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"] == container["resources"]["requests"]
    # Workers get no key to Kubernetes; the head does only where the autoscaler asks for pods.
    head, *workers = pods_of(path)
    assert head["automountServiceAccountToken"] == cluster.get("enableInTreeAutoscaling", False)
    assert not any(pod["automountServiceAccountToken"] for pod in workers)


def test_only_the_operator_comes_in_from_another_namespace() -> None:
    policy = next(it for it in yaml.safe_load_all(ONCE.read_text()) if it["kind"] == "NetworkPolicy")
    within, operator = policy["spec"]["ingress"]
    assert policy["spec"]["podSelector"] == {} and policy["spec"]["policyTypes"] == ["Ingress"]
    assert within == {"from": [{"podSelector": {}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    (sender,) = operator["from"]
    assert sender["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    # The dashboard is on loopback where the operator need not ask it.
    assert cluster_of(RAY_CLUSTER)["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_versions_are_those_of_constraints(path: Path) -> None:
    assert cluster_of(path)["rayVersion"] == pin("ray")
    images = {container["image"] for pod in pods_of(path) for container in pod["containers"]}
    assert images == {f"CHANGE-ME/raylit:ray{pin('ray')}"}  # all pods have the same
    image = (CLUSTERS / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=(.*)$", image, re.MULTILINE)[1] == f"rayproject/ray:{pin('ray')}-py312"  # type: ignore[index]
    # torch, raylit and the rest: out of constraints.txt itself.
    installs = re.findall(r"pip install [^\n]*", image)
    assert all("-c constraints.txt" in line or '"$torch"' in line for line in installs) and len(installs) == 3


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_storage_is_the_claim_and_health_checks_are_ours(path: Path) -> None:
    claim = next(it for it in yaml.safe_load_all(ONCE.read_text()) if it["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods_of(path):
        assert pod["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}]
        (container,) = pod["containers"]
        assert {"name": "RAYLIT_STORAGE", "value": container["volumeMounts"][0]["mountPath"]} in container["env"]
    given = {each["name"]: each["value"] for each in pods_of(path)[0]["containers"][0]["env"]}
    assert given["RAY_health_check_failure_threshold"] == "3"
    assert given["RAY_health_check_timeout_ms"] == "1000"
    assert given["RAY_health_check_period_ms"] == "1000"
