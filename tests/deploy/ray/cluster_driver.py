"""Several Ray nodes on this machine, run by Ray's own Python: a line of JSON on stdin for each
command, one on stdout for each answer. All ends with stdin. RAY_TMPDIR is the folder of its own.
"""

import json
import os
import signal
import sys
import traceback
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

STORE = 80 * 1024 * 1024  # bytes of the object store of a node: next to nothing goes through it


class Driver:
    """The commands, each a method."""

    def __init__(self) -> None:
        self.cluster = Cluster(shutdown_at_exit=True)
        self.nodes: dict[str, Any] = {}

    def add(self, name: str, env: dict[str, str], resources: dict[str, float]) -> dict[str, str]:
        """Start a node with these variables; the first one is the head."""
        head = {} if self.nodes else {"include_dashboard": False}
        node = self.cluster.add_node(
            num_cpus=resources.pop("CPU", 4),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            env_vars=env,
            object_store_memory=STORE,
            **head,
        )
        self.nodes[name] = node
        if head:
            ray.init(self.cluster.address, namespace="tests", log_to_driver=False)
        return {"id": node.node_id}

    def remove(self, name: str) -> None:
        """End all processes of a node."""
        self.cluster.remove_node(self.nodes.pop(name))

    def kill_raylet(self, name: str) -> None:
        """Kill it, and wait for it, as init does: the others would take a zombie for a raylet."""
        (raylet,) = self.nodes[name].all_processes["raylet"]
        raylet.process.kill()
        raylet.process.wait()

    def forget(self, name: str) -> None:
        """The raylet of a node was killed: end what Ray itself leaves of it."""
        node = self.nodes.pop(name)
        node.kill_all_processes(check_alive=False, allow_graceful=False)
        self.cluster.worker_nodes.discard(node)

    def start(self, port: int) -> None:
        """Start Serve, whose proxy listens on `port`."""
        serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})

    def deploy(self, config: dict[str, Any]) -> None:
        """What `PUT /api/serve/applications/` does."""
        config = {"applications": config["applications"]}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))

    def status(self) -> dict[str, Any]:
        """By application: its state, and its replicas."""
        details = _get_global_client().get_serve_details()["applications"]
        return {
            name: {
                "status": app["status"],
                "message": app["message"],
                "replicas": [
                    {
                        "id": replica["replica_id"],
                        "state": replica["state"],
                        "pid": replica.get("pid"),
                        "node": replica.get("node_id"),
                        "host": replica.get("node_ip"),
                        "log": replica.get("log_file_path"),
                    }
                    for deployment in app["deployments"].values()
                    for replica in deployment["replicas"]
                ],
            }
            for name, app in details.items()
        }


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is not an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = Driver()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"answer": getattr(driver, name)(**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer, default=str), file=out)
    ray.shutdown()
    driver.cluster.shutdown()


if __name__ == "__main__":
    main()
