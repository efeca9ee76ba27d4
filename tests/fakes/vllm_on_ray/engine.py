"""Stands for vLLM's engine on Ray: a worker on the GPU of each part of the placement group."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class Worker:
    def place(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        gpus = len(ray.get_gpu_ids())
        return {"pid": os.getpid(), "node": node, "python": sys.executable, "gpus": gpus}


def run(pipe: Connection, group: Any, count: int, runtime_env: Any) -> None:
    """In a process of its own, until the server's end of the pipe is closed."""
    ray.init(os.environ["RAY_ADDRESS"], runtime_env=runtime_env)
    bundles = [each for each in group.bundle_specs if each.get("GPU", 0) == 1]
    if len(bundles) < count:
        raise ValueError(f"{count} GPUs are needed, and the placement group has {len(bundles)}")
    workers = [
        ray.remote(
            num_cpus=0,
            num_gpus=1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
        )(Worker).remote()
        for index in range(count)
    ]
    pipe.send(ray.get([worker.place.remote() for worker in workers]))
    try:
        pipe.recv()
    except EOFError:
        os._exit(0)
