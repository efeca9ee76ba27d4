"""Stands for vLLM's server with `--distributed-executor-backend ray`. As vLLM does, it takes the
placement group of the actor that it runs in, and hands it to its engine, which is another process.
It answers everything with where its workers are."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import ray
from vllm import engine


class Handler(BaseHTTPRequestHandler):
    text = ""

    def do_GET(self) -> None:
        self.tell({"data": []})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": Handler.text}
        choice = {"index": 0, "message": message, "text": "x", "finish_reason": "stop"}
        self.tell({"object": "chat.completion", "choices": [choice]})

    def tell(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    for name in ("tensor", "pipeline"):
        parser.add_argument(f"--{name}-parallel-size", type=int, default=1)
    parser.add_argument("--distributed-executor-backend", choices=["ray"], required=True)
    options, _ = parser.parse_known_args()
    context = ray.get_runtime_context()
    assert context.get_actor_id(), "it is in no actor"
    group = ray.util.get_current_placement_group()
    os.environ["RAY_ADDRESS"] = context.gcs_address
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    count = options.tensor_parallel_size * options.pipeline_parallel_size
    process = spawning.Process(target=engine.run, args=(theirs, group, count, context.runtime_env))
    process.start()
    theirs.close()
    pids = {"server": os.getpid(), "engine": process.pid}
    Handler.text = json.dumps({**pids, "workers": ours.recv()})
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
