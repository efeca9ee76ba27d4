"""Autoscaling on what the servers say of themselves.

llama-server's /metrics has `llamacpp:requests_processing` and `llamacpp:requests_deferred`, vLLM's
`vllm:num_requests_running` and `vllm:num_requests_waiting`. The cluster's metrics adapter gives
them to the autoscaler under names without a colon: docs/kubernetes.md has its rule.
"""

from __future__ import annotations

from typing import Any

from .options import Options
from .workload import Workload

LLAMA = ("llamacpp_requests_processing", "llamacpp_requests_deferred")
VLLM = ("vllm_num_requests_running", "vllm_num_requests_waiting")
PATIENCE = 600  # seconds of less work before a pod is given up: a new one has to load first


def autoscaler(workload: Workload, options: Options) -> dict[str, Any]:
    """More pods when three quarters of the slots are busy, or a request waits in each pod.

    Of the two the larger number of pods counts: those that wait tell of too few pods, those that
    are worked on of too many.
    """
    busy, waiting = LLAMA if workload.is_llama else VLLM
    least, most = options.replicas
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": workload.name, "labels": workload.all_labels},
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
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": PATIENCE}},
        },
    }


def _each_pod(metric: str, value: int) -> dict[str, Any]:
    target = {"type": "AverageValue", "averageValue": str(value)}
    return {"type": "Pods", "pods": {"metric": {"name": metric}, "target": target}}
