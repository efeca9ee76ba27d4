"""vLLM's server in the placement group of its replica, started by vLLM's own Python:

    python -m pipeline.deploy.ray.vllm_in_group OPTION …

vLLM places its workers in the group of the actor that it runs in, and a process that a replica has
started is in none: so the server is an actor, in the group's first bundle, which is on this node.
It ends with this process, and this process with it. Nothing else of this package is imported here.
"""

from __future__ import annotations

import os
import runpy
import shlex
import signal
import sys

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

GROUP = "LLAMA_PIPELINE_PLACEMENT_GROUP"  # the variable with its id
SERVER = "vllm.entrypoints.openai.api_server"
CARDS = "CUDA_VISIBLE_DEVICES"  # Ray sets it for each actor


class VllmServer:
    """The actor."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, words: list[str], env: dict[str, str]) -> None:
        """Run the server as this process."""
        os.environ.update(env)
        sys.argv[1:] = words
        runpy.run_module(SERVER, run_name="__main__", alter_sys=True)


def main() -> None:
    # Its workers on all nodes need vLLM, too. Ray reads this as words of a shell.
    ray.init(os.environ["RAY_ADDRESS"], runtime_env={"py_executable": shlex.quote(sys.executable)})
    group = PlacementGroup(ray.PlacementGroupID.from_hex(os.environ[GROUP]))
    strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    server = ray.remote(num_cpus=0, scheduling_strategy=strategy)(VllmServer).remote()
    pid = ray.get(server.pid.remote())
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), lambda number, frame: os.kill(pid, number))
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env.pop(CARDS, None)
    try:
        ray.get(server.run.remote(sys.argv[1:], env))
    except RayActorError as error:  # it was ended, or crashed
        sys.exit(f"vLLM's server has ended: {error}")


if __name__ == "__main__":
    main()
