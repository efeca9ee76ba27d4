"""The objects of one workload, and those that all share."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from . import pod
from .options import Options
from .workload import Workload

CLIENT = {"llama-pipeline/client": "true"}  # the label of pods and namespaces with access
UNKNOWN = 100 * pod.GIB  # of disk
SPARE = 1.1
# What an autoscaler looks at: `llamacpp:requests_processing` and so on in /metrics, which the
# cluster's metrics adapter passes on under names without a colon (docs/kubernetes.md has its rule).
LLAMA_METRICS = ("llamacpp_requests_processing", "llamacpp_requests_deferred")
VLLM_METRICS = ("vllm_num_requests_running", "vllm_num_requests_waiting")
SCALE_DOWN_SECONDS = 600  # of less work before a pod is removed: a new one has to load first
PULLING = 600  # seconds for pulling the image, before a rollout counts as stuck


def objects(workload: Workload, options: Options) -> list[dict[str, Any]]:
    """Its objects, in the order in which they are needed."""
    documents = [_claim(workload, options)]
    if workload.texts:
        document = _object(workload, "ConfigMap", workload.files)
        documents.append({**document, "data": dict(workload.texts)})
    documents += [_deployment(workload, options), _service(workload), _policy(workload)]
    return [*documents, _autoscaler(workload, options)] if options.scales else documents


def settings() -> dict[str, Any]:
    """The environment of the containers that prepare models."""
    metadata = {"name": pod.SETTINGS, "labels": {"app.kubernetes.io/name": pod.SETTINGS}}
    kind = {"apiVersion": "v1", "kind": "ConfigMap"}
    return {**kind, "metadata": metadata, "data": pod.SETTINGS_OF_PREPARE}


def kustomization(files: Sequence[str], namespace: str) -> dict[str, Any]:
    """What `kubectl apply -k` reads."""
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        **({"namespace": namespace} if namespace else {}),
        "resources": list(files),
    }


def storage(workload: Workload, options: Options) -> str:
    """The size of the claim."""
    return options.storage or pod.in_gib(workload.disk * SPARE if workload.disk else UNKNOWN)


def _object(workload: Workload, kind: str, name: str, api: str = "v1") -> dict[str, Any]:
    metadata = {"name": name, "labels": workload.all_labels}
    return {"apiVersion": api, "kind": kind, "metadata": metadata}


def _claim(workload: Workload, options: Options) -> dict[str, Any]:
    several = options.replicas[1] > 1
    named = {"storageClassName": options.storage_class} if options.storage_class else {}
    return {
        **_object(workload, "PersistentVolumeClaim", workload.claim),
        "spec": {
            "accessModes": ["ReadWriteMany" if several else "ReadWriteOnce"],
            **named,
            "resources": {"requests": {"storage": storage(workload, options)}},
        },
    }


def _deployment(workload: Workload, options: Options) -> dict[str, Any]:
    least, most = options.replicas
    rolling = {"maxSurge": 0, "maxUnavailable": 1}
    several = {"type": "RollingUpdate", "rollingUpdate": rolling}
    loading = math.ceil(workload.instance.ready_timeout)
    mounted = json.dumps([dict(workload.texts), pod.SETTINGS_OF_PREPARE], sort_keys=True)
    checksum = hashlib.sha256(mounted.encode()).hexdigest()[:16]
    return {
        **_object(workload, "Deployment", workload.name, "apps/v1"),
        "spec": {
            # The autoscaler sets the number: if written here, each apply would reset it.
            **({} if options.scales else {"replicas": least}),
            "revisionHistoryLimit": 3,
            "progressDeadlineSeconds": loading + pod.DOWNLOADING + PULLING,
            "strategy": several if most > 1 else {"type": "Recreate"},
            "selector": {"matchLabels": workload.labels},
            "template": pod.template(workload, options, checksum),
        },
    }


def _service(workload: Workload) -> dict[str, Any]:
    port = {"name": "http", "port": workload.instance.port, "targetPort": "http", "protocol": "TCP"}
    return {
        **_object(workload, "Service", workload.name),
        "spec": {"type": "ClusterIP", "selector": workload.labels, "ports": [port]},
    }


def _policy(workload: Workload) -> dict[str, Any]:
    """Only labelled pods, and the pods of labelled namespaces, can reach the port."""
    allowed = [
        {"podSelector": {"matchLabels": CLIENT}},
        {"namespaceSelector": {"matchLabels": CLIENT}},
    ]
    return {
        **_object(workload, "NetworkPolicy", workload.name, "networking.k8s.io/v1"),
        "spec": {
            "podSelector": {"matchLabels": workload.labels},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": allowed, "ports": [{"port": "http", "protocol": "TCP"}]}],
        },
    }


def _autoscaler(workload: Workload, options: Options) -> dict[str, Any]:
    """More pods when three quarters of the slots are busy, or a request waits in each pod.

    The larger of the two numbers of pods counts: waiting requests tell of too few pods, busy slots
    of too many.
    """
    busy, waiting = LLAMA_METRICS if workload.is_llama else VLLM_METRICS
    least, most = options.replicas
    return {
        **_object(workload, "HorizontalPodAutoscaler", workload.name, "autoscaling/v2"),
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "name": workload.name,
            },
            "minReplicas": least,
            "maxReplicas": most,
            "metrics": [
                _each_pod(busy, max(1, workload.slots * 3 // 4)),
                _each_pod(waiting, 1),
            ],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": SCALE_DOWN_SECONDS}},
        },
    }


def _each_pod(metric: str, value: int) -> dict[str, Any]:
    target = {"type": "AverageValue", "averageValue": str(value)}
    return {"type": "Pods", "pods": {"metric": {"name": metric}, "target": target}}
