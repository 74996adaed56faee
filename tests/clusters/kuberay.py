"""A JSON schema of Kubernetes manifests for KubeRay, as far as the files in clusters/ go.

Written by hand after KubeRay's field reference (ray.io/v1, KubeRay 1.6) and Kubernetes' (1.30): it is not KubeRay's own
schema (a CustomResourceDefinition of more than a megabyte), and knows fewer fields. What it knows it knows strictly: a
key that is not in it is refused, as `kubectl` refuses one that is not in the cluster's. ``RAYLIT_KUBERAY_CRDS`` names a
folder with the real ones, for test_kubernetes.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
# Quantities: 500m, 4, 8Gi, 0.5.
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}


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
CONTAINER = record(
    {
        "name": TEXT,
        "image": TEXT,
        "imagePullPolicy": one_of("Always", "IfNotPresent", "Never"),
        "command": each(TEXT),
        "args": each(TEXT),
        "env": each(ENV),
        "resources": RESOURCES,
        "ports": each(
            record({"containerPort": COUNT, "name": TEXT, "protocol": one_of("TCP", "UDP")}, ["containerPort"])
        ),
        "securityContext": record(
            {
                "runAsNonRoot": FLAG,
                "runAsUser": COUNT,
                "privileged": FLAG,
                "allowPrivilegeEscalation": FLAG,
                "readOnlyRootFilesystem": FLAG,
                "capabilities": record({"add": each(TEXT), "drop": each(TEXT)}),
                "seccompProfile": SECCOMP,
            }
        ),
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
HEAD = record(
    {
        "rayStartParams": mapping(TEXT),  # `num-cpus: 0` without quotes is refused
        "serviceType": one_of("ClusterIP", "NodePort", "LoadBalancer"),
        "enableIngress": FLAG,
        "template": TEMPLATE,
    },
    ["template"],
)
WORKERS = record(
    {
        "groupName": TEXT,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "numOfHosts": COUNT,
        "idleTimeoutSeconds": COUNT,
        "rayStartParams": mapping(TEXT),
        "template": TEMPLATE,
    },
    ["groupName", "minReplicas", "maxReplicas", "template"],
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
                {"from": each(PEER, least=1), "ports": each(record({"protocol": one_of("TCP", "UDP"), "port": COUNT}))}
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
}


def schema_of(manifest: dict[str, Any]) -> Schema:
    """The schema for a manifest; KeyError for a kind, or a version of one, that is none of these."""
    spec = SPECS[manifest.get("apiVersion", ""), manifest.get("kind", "")]
    return record({"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, "spec": spec}, ["metadata", "spec"])


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
