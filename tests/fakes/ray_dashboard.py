"""The dashboard of a Ray cluster, as far as its REST API is used: what is deployed runs at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

GIB = 1024**3


class Dashboard:
    """What the cluster holds. `puts` are the bodies that were sent, `logs` its files by name."""

    def __init__(self) -> None:
        self.url = ""
        self.applications: dict[str, dict[str, Any]] = {}
        self.http_options: dict[str, Any] | None = None
        self.puts: list[dict[str, Any]] = []
        self.logs: dict[str, str] = {}
        self.statuses: dict[str, tuple[str, str]] = {}  # of applications that do not run well
        self.nodes = [node("10.0.0.1", head=True), node("10.0.0.2")]
        self.version = "2.60.0"

    def put(self, body: dict[str, Any]) -> None:
        self.puts.append(body)
        self.http_options = self.http_options or body["http_options"]
        before = self.applications
        kept = {n: x for n, x in before.items() if x["source"] == "imperative"}
        new = {app["name"]: app for app in body["applications"]}
        failed = {  # Serve does not try the same again
            name: app
            for name, app in before.items()
            if app["status"] == "DEPLOY_FAILED" and app["deployed_app_config"] == new.get(name)
        }
        self.applications = kept | {n: self.application(app) for n, app in new.items()} | failed

    def application(self, config: dict[str, Any], source: str = "declarative") -> dict[str, Any]:
        """How an application is described once it runs."""
        name = config["name"]
        status, message = self.statuses.get(name, ("RUNNING", ""))
        deployments = {}
        for each in config["deployments"]:
            scaling = each.get("autoscaling_config")
            count = scaling["min_replicas"] if scaling else each["num_replicas"]
            replicas = [
                {
                    "replica_id": f"r{number}",
                    "state": "RUNNING",
                    "node_ip": "10.0.0.2",
                    "node_id": "n2",
                    "pid": 7,
                    "start_time_s": 1.0,
                    "log_file_path": f"/serve/replica_{name}_{each['name']}_r{number}.log",
                }
                for number in range(count)
            ]
            deployments[each["name"]] = {
                "name": each["name"],
                "status": "HEALTHY",
                "message": message,
                "target_num_replicas": count,
                "replicas": replicas,
            }
        return {
            "name": name,
            "route_prefix": config.get("route_prefix", "/"),
            "docs_path": None,
            "status": status,
            "message": "",
            "deployed_app_config": config if source == "declarative" else None,
            "source": source,
            "deployments": deployments,
        }

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, str]:
        if path == "/api/serve/applications/":
            details: dict[str, Any] = {"applications": self.applications}
            if self.http_options:
                details |= {"http_options": self.http_options, "proxy_location": "EveryNode"}
            return 200, json.dumps(details)
        if path == "/api/v0/nodes":
            result = {"result": {"total": len(self.nodes), "result": self.nodes}}
            return 200, json.dumps({"result": True, "msg": "", "data": result})
        if path == "/api/version":
            return 200, json.dumps({"ray_version": self.version})
        if path == "/api/v0/logs/file" and query["filename"][0] in self.logs:
            lines = self.logs[query["filename"][0]].splitlines(keepends=True)
            return 200, "".join(lines[-int(query["lines"][0]) :])
        return 500 if path.startswith("/api/v0/logs") else 404, "no such thing"


def node(ip: str, *, head: bool = False, **more: float) -> dict[str, Any]:
    """A node with 4 CPUs and 8 GiB, and `more`."""
    return {
        "node_id": f"n{ip[-1]}",
        "node_ip": ip,
        "is_head_node": head,
        "state": "ALIVE",
        "resources_total": {"CPU": 4.0, "memory": 8.0 * GIB, f"node:{ip}": 1.0, **more},
    }


@contextmanager
def start() -> Iterator[Dashboard]:
    """A dashboard at a free port."""
    board = Dashboard()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            self.reply(*board.answer(url.path, parse_qs(url.query)))

        def do_PUT(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            board.put(body)
            self.reply(200, "")

        def reply(self, status: int, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    board.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield board
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
