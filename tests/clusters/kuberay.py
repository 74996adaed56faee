"""A JSON schema of Kubernetes manifests for KubeRay, as far as the files in clusters/ go.

Written by hand after KubeRay's field reference (ray.io/v1, KubeRay 1.6) and Kubernetes' (1.30), and compared with the
types in KubeRay's source: it is not KubeRay's own schema (a CustomResourceDefinition of more than a megabyte), and
knows fewer fields. What it knows it knows strictly: a key that is not in it is refused, as `kubectl` refuses one that
is not in the cluster's. ``RAYLIT_KUBERAY_CRDS`` names a folder with the real ones, for test_kubernetes.py.

What the schema lets through the operator still may not take: ``complaints`` has its rules, as far as they concern
these files, in words of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}  # Go's int32
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
# Quantities: 500m, 4, 8Gi, 0.5, 1e3; a number without quotes is taken where it is a whole one.
QUANTITY: Schema = {
    "type": ["string", "integer"],
    "pattern": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?$",
}


def record(properties: dict[str, Schema], required: Iterable[str] = ()) -> Schema:
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": False
    }  # fmt: skip


def each(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def mapping(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


ENV = record(
    {"name": TEXT, "value": TEXT, "valueFrom": record({"secretKeyRef": record({"name": TEXT, "key": TEXT}, ["key"])})},
    ["name"],
)
RESOURCES = record({"requests": mapping(QUANTITY), "limits": mapping(QUANTITY)})
SECCOMP = record({"type": one_of("RuntimeDefault", "Unconfined", "Localhost"), "localhostProfile": TEXT}, ["type"])
LOCKS = record(
    {
        "runAsNonRoot": FLAG,
        "runAsUser": COUNT,
        "privileged": FLAG,
        "allowPrivilegeEscalation": FLAG,
        "readOnlyRootFilesystem": FLAG,
        "capabilities": record({"add": each(TEXT), "drop": each(TEXT)}),
        "seccompProfile": SECCOMP,
    }
)
PULL = one_of("Always", "IfNotPresent", "Never")
CONTAINER = record(
    {
        "name": TEXT,
        "image": TEXT,
        "imagePullPolicy": PULL,
        "command": each(TEXT),
        "args": each(TEXT),
        "env": each(ENV),
        "resources": RESOURCES,
        "ports": each(
            record({"containerPort": PORT, "name": TEXT, "protocol": one_of("TCP", "UDP")}, ["containerPort"])
        ),
        "securityContext": LOCKS,
        "volumeMounts": each(
            record({"name": TEXT, "mountPath": TEXT, "subPath": TEXT, "readOnly": FLAG}, ["name", "mountPath"])
        ),
    },
    ["name"],
)
POD = record(
    {
        "containers": each(CONTAINER, least=1),
        "initContainers": each(CONTAINER),
        "restartPolicy": one_of("Always", "OnFailure", "Never"),
        "automountServiceAccountToken": FLAG,
        "serviceAccountName": TEXT,
        "nodeSelector": mapping(TEXT),
        "tolerations": each(record({"key": TEXT, "operator": TEXT, "value": TEXT, "effect": TEXT})),
        "imagePullSecrets": each(record({"name": TEXT}, ["name"])),
        "terminationGracePeriodSeconds": COUNT,
        "securityContext": record(
            {"fsGroup": COUNT, "runAsUser": COUNT, "runAsNonRoot": FLAG, "seccompProfile": SECCOMP}
        ),
        "volumes": each(
            record(
                {
                    "name": TEXT,
                    "persistentVolumeClaim": record({"claimName": TEXT, "readOnly": FLAG}, ["claimName"]),
                    "emptyDir": record({"medium": one_of("", "Memory"), "sizeLimit": QUANTITY}),
                    "secret": record({"secretName": TEXT}),
                },
                ["name"],
            )
        ),
    },
    ["containers"],
)
METADATA = record(
    {"name": TEXT, "generateName": TEXT, "namespace": TEXT, "labels": mapping(TEXT), "annotations": mapping(TEXT)}
)
TEMPLATE = record({"metadata": METADATA, "spec": POD}, ["spec"])
# Of the head and of the workers. `num-cpus: 0` without quotes is refused.
GROUP: dict[str, Schema] = {
    "rayStartParams": mapping(TEXT), "resources": mapping(TEXT), "labels": mapping(TEXT), "template": TEMPLATE
}  # fmt: skip
HEAD = record(
    {
        **GROUP,
        "serviceType": one_of("ClusterIP", "NodePort", "LoadBalancer"),
        "enableIngress": FLAG,
    },
    ["template"],
)
WORKERS = record(
    {
        **GROUP,
        "groupName": TEXT,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "numOfHosts": COUNT,
        "idleTimeoutSeconds": COUNT,
    },
    # minReplicas and maxReplicas are not here: the cluster's server fills in 0 and 2**31 - 1 before it checks.
    ["groupName", "template"],
)
CLUSTER = record(
    {
        "rayVersion": TEXT,
        "authOptions": record({"mode": one_of("token", "disabled"), "secretName": TEXT, "enableK8sTokenAuth": FLAG}),
        "enableInTreeAutoscaling": FLAG,
        "autoscalerOptions": record(
            {
                "version": one_of("v1", "v2"),
                "idleTimeoutSeconds": COUNT,
                "upscalingMode": one_of("Default", "Aggressive", "Conservative"),
                "image": TEXT,
                "imagePullPolicy": PULL,
                "securityContext": LOCKS,
                "resources": RESOURCES,
                "env": each(ENV),
            }
        ),
        "suspend": FLAG,
        "headGroupSpec": HEAD,
        "workerGroupSpecs": each(WORKERS),
    },
    ["headGroupSpec"],
)
JOB = record(
    {
        "entrypoint": TEXT,
        "runtimeEnvYAML": TEXT,
        "jobId": TEXT,
        "submissionMode": one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "entrypointNumCpus": {"type": "number"},
        "entrypointNumGpus": {"type": "number"},
        "submitterPodTemplate": TEMPLATE,
        "submitterConfig": record({"backoffLimit": COUNT}),
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "backoffLimit": COUNT,
        "shutdownAfterJobFinishes": FLAG,
        "ttlSecondsAfterFinished": COUNT,
        "suspend": FLAG,
        "metadata": mapping(TEXT),
        "clusterSelector": mapping(TEXT),
        "rayClusterSpec": CLUSTER,
    }
)
PEER = record(
    {"podSelector": record({"matchLabels": mapping(TEXT)}), "namespaceSelector": record({"matchLabels": mapping(TEXT)})}
)
POLICY = record(
    {
        "podSelector": record({"matchLabels": mapping(TEXT)}),
        "policyTypes": each(one_of("Ingress", "Egress")),
        "ingress": each(
            record(
                {"from": each(PEER, least=1), "ports": each(record({"protocol": one_of("TCP", "UDP"), "port": PORT}))}
            )
        ),
    },
    ["podSelector"],
)
CLAIM = record(
    {
        "accessModes": each(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"), least=1),
        "storageClassName": TEXT,
        "resources": record({"requests": record({"storage": QUANTITY}, ["storage"])}, ["requests"]),
    },
    ["accessModes", "resources"],
)
# By what a manifest says it is.
SPECS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayJob"): JOB,
    ("ray.io/v1", "RayCluster"): CLUSTER,
    ("networking.k8s.io/v1", "NetworkPolicy"): POLICY,
    ("v1", "PersistentVolumeClaim"): CLAIM,
    ("v1", "Pod"): POD,
}


def schema_of(manifest: dict[str, Any]) -> Schema:
    """The schema for a manifest; KeyError for a kind, or a version of one, that is none of these."""
    spec = SPECS[manifest.get("apiVersion", ""), manifest.get("kind", "")]
    named = {**METADATA, "anyOf": [{"required": ["name"]}, {"required": ["generateName"]}]}
    return record({"apiVersion": TEXT, "kind": TEXT, "metadata": named, "spec": spec}, ["metadata", "spec"])


def structural(schema: Schema) -> Schema:
    """A CustomResourceDefinition's schema that refuses keys it does not have, as a cluster's server does."""
    closed = dict(schema)
    if "properties" in schema:
        closed["properties"] = {name: structural(of) for name, of in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            closed[key] = structural(schema[key])
    return closed


def complaints(manifest: dict[str, Any]) -> Iterator[str]:
    """What KubeRay's operator would say against a RayCluster or RayJob that its schema takes."""
    spec = manifest["spec"]
    job = manifest["kind"] == "RayJob"
    name = manifest["metadata"].get("name") or manifest["metadata"]["generateName"] + 5 * "x"
    # Names of services and pods are made of it, and end within 63 characters; of a job's also the cluster's.
    most = 47 if job else 53
    if len(name) > most or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the name is no DNS label of {most} characters"
    if job:
        yield from _of_job(spec)
    if cluster := spec.get("rayClusterSpec") if job else spec:
        yield from _of_cluster(cluster)


def _of_job(spec: dict[str, Any]) -> Iterator[str]:
    mode, again = spec.get("submissionMode", "K8sJobMode"), spec.get("backoffLimit", 0)
    if "rayClusterSpec" not in spec and not spec.get("clusterSelector"):
        yield "no cluster"
    if again and (mode == "InteractiveMode" or spec.get("clusterSelector")):
        yield "no second try where nothing can be handed in again"
    if not spec.get("shutdownAfterJobFinishes") and (spec.get("ttlSecondsAfterFinished") or spec.get("suspend")):
        yield "a cluster that stays has no time to live, and is not suspended"
    if submitter := spec.get("submitterPodTemplate"):
        if mode == "SidecarMode":
            yield "a submitter within the head's pod has no pod of its own"
        if submitter["spec"].get("restartPolicy", "Always") == "Always":
            yield "a Kubernetes Job's pod is not restarted always"  # says Kubernetes, when the operator makes it
    if spec.get("rayClusterSpec", {}).get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "Kubernetes' tokens are not for a RayJob"


def _of_cluster(spec: dict[str, Any]) -> Iterator[str]:
    head, workers = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    options = spec.get("autoscalerOptions", {})
    grows = spec.get("enableInTreeAutoscaling", False)
    second = grows and options.get("version") == "v2"
    for group in (head, *workers):
        start = group.get("rayStartParams", {})
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
            yield "resources twice"
        if "labels" in start:
            yield "labels belong to the group"
        if second and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "the autoscaler v2 makes new pods, and restarts none"
    for group in workers:
        if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31 - 1):
            yield "more workers at least than at most"
        if "idleTimeoutSeconds" in group and not second:
            yield "a group's idle time is the autoscaler v2's"
    env = {each["name"]: each.get("value") for each in head["template"]["spec"]["containers"][0].get("env", [])}
    if "RAY_enable_autoscaler_v2" in env:
        if grows and options.get("version"):
            yield "the autoscaler's version twice"
        if not grows and env["RAY_enable_autoscaler_v2"] in ("1", "true"):
            yield "a version without an autoscaler"
    if {"RAY_REDIS_ADDRESS", "REDIS_USERNAME"} & set(env) or "redis-username" in head.get("rayStartParams", {}):
        yield "Redis belongs to gcsFaultToleranceOptions"
    auth = spec.get("authOptions", {})
    if auth.get("mode") == "token":
        version = re.fullmatch(r"v?(\d+)\.(\d+)(\.\d+.*)?", spec.get("rayVersion", ""))
        if not version or (int(version[1]), int(version[2])) < (2, 52):
            yield "tokens are of Ray 2.52 and later"
        if auth.get("enableK8sTokenAuth") and auth.get("secretName"):
            yield "two kinds of token"
    elif auth.get("enableK8sTokenAuth"):
        yield "Kubernetes' tokens without tokens"
