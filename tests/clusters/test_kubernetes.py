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

from tests.clusters.kuberay import complaints, schema_of, structural
from tests.clusters.pins import CLUSTERS, ROOT, pin

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
    """Ray's pods, the head's first."""
    cluster = cluster_of(path)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def submitter_of(path: Path) -> dict[str, Any]:
    return read(path)["spec"]["submitterPodTemplate"]["spec"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", [RAY_JOB, RAY_CLUSTER, ONCE], ids=lambda path: path.name)
def test_every_manifest_is_one_of_its_kind(path: Path) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        check(manifest)


@pytest.mark.parametrize("path", [RAY_JOB, RAY_CLUSTER, ONCE], ids=lambda path: path.name)
def test_the_namespace_is_the_commands(path: Path) -> None:
    assert not any("namespace" in manifest["metadata"] for manifest in yaml.safe_load_all(path.read_text()))
    # Without -n a command would make these things in another place than the Secret and the claim.
    commands = re.findall(r"^#   (kubectl .*)", path.read_text(), re.MULTILINE)
    assert commands and all(" -n raylit " in each or "create namespace raylit" in each for each in commands)


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
    "more than Go's int32 holds": lambda it: at(it, "spec", "workerGroupSpecs", 0).update(maxReplicas=2**31),
    "fewer workers than none": lambda it: at(it, "spec", "workerGroupSpecs", 0).update(minReplicas=-1),
    "a group without a name": lambda it: at(it, "spec", "workerGroupSpecs", 0).pop("groupName"),
    "no name at all": lambda it: it["metadata"].pop("name"),
    "an autoscaler of the future": lambda it: it["spec"]["autoscalerOptions"].update(version="v3"),
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


def test_what_the_clusters_server_fills_in_may_be_left_out() -> None:
    manifest = read(RAY_CLUSTER)
    (group,) = manifest["spec"]["workerGroupSpecs"]
    for key in ("replicas", "minReplicas", "maxReplicas", "rayStartParams"):
        del group[key]
    check(manifest)


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_kuberays_operator_takes_it(path: Path) -> None:
    assert list(complaints(read(path))) == []


HEAD_SPEC = ("headGroupSpec", "template", "spec")


def environment(name: str, value: str) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda spec, cluster: at(cluster, *HEAD_SPEC, "containers", 0)["env"].append({"name": name, "value": value})


# By what is wrong: the file, and what is done to its spec and to its cluster's.
WRONG_TO_THE_OPERATOR: dict[str, tuple[Path, Callable[[dict[str, Any], dict[str, Any]], Any]]] = {
    "resources twice": (
        RAY_JOB, lambda spec, cluster: cluster["headGroupSpec"].update(resources={"CPU": "0"})
    ),
    "labels belong to the group": (
        RAY_JOB, lambda spec, cluster: cluster["workerGroupSpecs"][0]["rayStartParams"].update(labels="a=b")
    ),
    "the autoscaler v2 makes new pods, and restarts none": (
        RAY_CLUSTER, lambda spec, cluster: at(cluster, *HEAD_SPEC).update(restartPolicy="Always")
    ),
    "more workers at least than at most": (
        RAY_JOB, lambda spec, cluster: cluster["workerGroupSpecs"][0].update(maxReplicas=1)
    ),
    "a group's idle time is the autoscaler v2's": (
        RAY_JOB, lambda spec, cluster: cluster["workerGroupSpecs"][0].update(idleTimeoutSeconds=60)
    ),
    "the autoscaler's version twice": (RAY_CLUSTER, environment("RAY_enable_autoscaler_v2", "1")),
    "a version without an autoscaler": (RAY_JOB, environment("RAY_enable_autoscaler_v2", "1")),
    "Redis belongs to gcsFaultToleranceOptions": (RAY_CLUSTER, environment("RAY_REDIS_ADDRESS", "redis:6379")),
    "tokens are of Ray 2.52 and later": (RAY_CLUSTER, lambda spec, cluster: cluster.pop("rayVersion")),
    "two kinds of token": (RAY_CLUSTER, lambda spec, cluster: cluster["authOptions"].update(enableK8sTokenAuth=True)),
    "Kubernetes' tokens without tokens": (
        RAY_CLUSTER, lambda spec, cluster: cluster.update(authOptions={"enableK8sTokenAuth": True})
    ),
    "no cluster": (RAY_JOB, lambda spec, cluster: spec.pop("rayClusterSpec")),
    "no second try where nothing can be handed in again": (
        RAY_JOB, lambda spec, cluster: spec.update(submissionMode="InteractiveMode")
    ),
    "a cluster that stays has no time to live, and is not suspended": (
        RAY_JOB, lambda spec, cluster: spec.update(shutdownAfterJobFinishes=False)
    ),
    "a submitter within the head's pod has no pod of its own": (
        RAY_JOB, lambda spec, cluster: spec.update(submissionMode="SidecarMode")
    ),
    "a Kubernetes Job's pod is not restarted always": (
        RAY_JOB, lambda spec, cluster: at(spec, "submitterPodTemplate", "spec").pop("restartPolicy")
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_TO_THE_OPERATOR)
def test_what_the_operator_does_not_take_is_refused(what: str) -> None:
    path, spoil = WRONG_TO_THE_OPERATOR[what]
    manifest = copy.deepcopy(read(path))
    spoil(manifest["spec"], manifest["spec"].get("rayClusterSpec", manifest["spec"]))
    check(manifest)  # the schema alone would let it through
    assert list(complaints(manifest)) == [what]


@pytest.mark.parametrize("version", ["2.51.1", "1.13", "latest", ""])
def test_a_ray_without_tokens_is_refused(version: str) -> None:
    manifest = read(RAY_CLUSTER)
    manifest["spec"]["rayVersion"] = version
    assert list(complaints(manifest)) == ["tokens are of Ray 2.52 and later"]


def test_kubernetes_own_tokens_are_not_for_a_job() -> None:
    manifest = read(RAY_JOB)
    manifest["spec"]["rayClusterSpec"]["authOptions"] = {"mode": "token", "enableK8sTokenAuth": True}
    assert list(complaints(manifest)) == ["Kubernetes' tokens are not for a RayJob"]


@pytest.mark.parametrize(
    ("path", "metadata", "most"),
    [
        (RAY_JOB, {"name": "j" * 48}, 47), (RAY_JOB, {"generateName": "j" * 42 + "-"}, 47),
        (RAY_CLUSTER, {"name": "c" * 54}, 53), (RAY_CLUSTER, {"name": "4cores"}, 53),
        (RAY_CLUSTER, {"name": "Raylit"}, 53), (RAY_CLUSTER, {"name": "ray.lit"}, 53),
    ],
)  # fmt: skip
def test_a_name_that_no_service_can_have_is_refused(path: Path, metadata: dict[str, str], most: int) -> None:
    assert list(complaints({**read(path), "metadata": metadata})) == [f"the name is no DNS label of {most} characters"]


def test_a_manifest_of_another_version_is_refused() -> None:
    with pytest.raises(KeyError):
        check({**read(RAY_CLUSTER), "apiVersion": "ray.io/v1alpha1"})


def test_rays_autoscaler_reads_the_cluster_as_it_is_meant() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    manifest = read(RAY_CLUSTER)
    manifest["metadata"]["namespace"] = "raylit"  # as the cluster's server has it, by -n
    derived = _derive_autoscaling_config_from_ray_cr(manifest)  # checks it with Ray's own schema, too
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
    pods = [*pods_of(path), *([submitter_of(path)] if path == RAY_JOB else [])]
    containers = [container for pod in pods for container in pod["containers"]]
    # What KubeRay adds to pods itself: the container that waits for the head has the worker's context, the autoscaler
    # that of its options.
    contexts = [it["securityContext"] for it in containers]
    if cluster.get("enableInTreeAutoscaling"):
        contexts.append(cluster["autoscalerOptions"]["securityContext"])
    for context in contexts:
        assert context["runAsNonRoot"] and context["runAsUser"] > 0 and not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
    for container in containers:
        assert container["resources"]["limits"] == container["resources"]["requests"]
    for pod in pods:
        assert not pod.get("hostNetwork")
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    # Workers get no key to Kubernetes; the head does only where the autoscaler asks for pods.
    head, *workers = pods_of(path)
    assert head["automountServiceAccountToken"] == cluster.get("enableInTreeAutoscaling", False)
    assert not any(pod["automountServiceAccountToken"] for pod in workers)
    assert path != RAY_JOB or not submitter_of(path)["automountServiceAccountToken"]


def test_the_pod_that_copies_runs_out_of_the_claim_is_one() -> None:
    (text,) = re.findall(r"<<'END'\n(.*?)\nEND\n", (ROOT / "docs" / "clusters.md").read_text(), re.DOTALL)
    manifest = yaml.safe_load(text)
    check(manifest)
    pod, (container,) = manifest["spec"], manifest["spec"]["containers"]
    for rays in (pods_of(RAY_JOB)[0], pods_of(RAY_CLUSTER)[0]):
        assert pod["volumes"] == rays["volumes"]
        assert container["volumeMounts"] == [{**rays["containers"][0]["volumeMounts"][0], "readOnly": True}]
        locks, more = rays["containers"][0]["securityContext"], pod["securityContext"]
        assert {**more, **container["securityContext"]} == {**rays["securityContext"], **locks}  # reads what they wrote
        assert container["image"] == rays["containers"][0]["image"].replace("CHANGE-ME", "REGISTRY")


def test_a_job_has_an_end_and_takes_its_cluster_along() -> None:
    spec = read(RAY_JOB)["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] == 600
    assert spec["activeDeadlineSeconds"] == 24 * 3600 and spec["backoffLimit"] == 2
    # No autoscaler there: as many workers as the run has, from the beginning.
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"] == 2
    assert spec["entrypoint"].endswith("--num-workers 2")


def test_a_jobs_script_is_handed_in_by_a_pod_that_reaches_the_dashboard() -> None:
    head, submitter = pods_of(RAY_JOB)[0], submitter_of(RAY_JOB)
    # KubeRay's own command and token go into the first container, which has none of ours and Ray's image.
    (container,) = submitter["containers"]
    assert not {"command", "args", "env"} & set(container) and container["image"] == head["containers"][0]["image"]
    # It is a pod of its own, as the operator is: loopback would shut both out.
    assert cluster_of(RAY_JOB)["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert read(RAY_JOB)["spec"].get("submissionMode", "K8sJobMode") == "K8sJobMode"


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_what_kuberay_sets_itself_is_not_set_here(path: Path) -> None:
    # Ports named here would replace the head service's own, among them the dashboard's.
    for pod in pods_of(path):
        for container in pod["containers"]:
            assert not {"command", "args", "ports", "livenessProbe", "readinessProbe"} & set(container)
            names = {each["name"] for each in container["env"]}
            assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_PORT", "RAY_CLUSTER_NAME"} & names
            # Its volume for /dev/shm is as large as the limit of memory, and Ray's objects have to fit into it.
            assert "/dev/shm" not in {each["mountPath"] for each in container["volumeMounts"]}
    cluster = cluster_of(path)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        start = group["rayStartParams"]
        assert set(start) <= {"num-cpus", "dashboard-host", "object-store-memory"}
        limit = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        assert int(start["object-store-memory"]) <= int(limit.removesuffix("Gi")) * 2**30 / 4


def test_rays_pods_are_reached_by_each_other_and_their_dashboard_by_submitter_and_operator() -> None:
    policy = next(it for it in yaml.safe_load_all(ONCE.read_text()) if it["kind"] == "NetworkPolicy")
    within, dashboard = policy["spec"]["ingress"]
    # KubeRay puts this label on heads and workers, and on no other pod: what else is in the namespace stays as it is.
    ray_pods = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert policy["spec"]["podSelector"] == ray_pods and policy["spec"]["policyTypes"] == ["Ingress"]
    assert within == {"from": [{"podSelector": ray_pods}]}
    assert [port["port"] for port in dashboard["ports"]] == [8265]
    submitter, operator = dashboard["from"]
    labels = read(RAY_JOB)["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert submitter == {"podSelector": {"matchLabels": labels}} and labels  # of this namespace only
    assert operator["namespaceSelector"] == {}
    assert operator["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
    # The dashboard is on loopback where the operator need not ask it.
    assert cluster_of(RAY_CLUSTER)["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


def test_kubernetes_probes_are_answered_without_a_token_and_without_the_dashboard() -> None:
    # KubeRay has every pod asked at this path of Ray's agent, which listens on the pod's address: a pod that said 401
    # would be ended as ill.
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    assert "/api/healthz" in PUBLIC_EXACT_PATHS


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_versions_are_those_of_constraints(path: Path) -> None:
    assert cluster_of(path)["rayVersion"] == pin("ray")
    pods = [*pods_of(path), *([submitter_of(path)] if path == RAY_JOB else [])]
    images = {container["image"] for pod in pods for container in pod["containers"]}
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
