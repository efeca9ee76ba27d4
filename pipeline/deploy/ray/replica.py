"""A replica: one server of an instance on one node of the cluster, as an actor of Serve."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.experimental import internal_kv

from pipeline.core import paths
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY
from pipeline.core.process.lifetime import end_with_parent
from pipeline.serve.guard.relay import Address
from pipeline.serve.health import key

from .local_server import LocalServer
from .peers import ModelPeers, models_of
from .relay import Relay
from .vllm_in_group import GROUP

NAMESPACE = "llama-pipeline"  # of our keys at the cluster's head


class Replica:
    """Serve makes it, and it is ready once its server is. Requests reach the server through its
    relay, each with a lease that counts as a request under way of Serve's."""

    def __init__(self, name: str, configuration: str, lock: str = "") -> None:
        """Prepare and start the server. Raises PipelineError."""
        end_with_parent()  # Ray's own way takes a raylet that nobody has waited for as alive
        home, self._host = paths.home(), ray.util.get_node_ip_address()
        self._relay: Relay | None = None
        self._listening = asyncio.Lock()
        self._peers = ModelPeers(HeadStore(), self._host)
        self._server = LocalServer(home, name, configuration, lock, log_file(), in_group())
        try:
            models = models_of(self._server.lock_file, home)
            with self._peers.bring(models):
                self._server.start()
                self._target = self._server.wait_until_ready()
        except BaseException:
            self._server.stop()
            self._peers.close()
            raise

    async def lease(self, prefix: Sequence[int] = ()) -> AsyncIterator[dict[str, Any]]:
        """Where to send one request, and with which keys. Lasts until that request's connection is
        over, or the caller cancels it. `prefix` is what the router chose this replica by. Raises
        PipelineError while the server is not ready."""
        relay = await self._listen()
        with relay.lease() as lease:
            yield {**self._described(relay), "lease": lease.key}
            await lease.over.wait()

    async def address(self) -> dict[str, Any]:
        """The same for questions to the server. Raises PipelineError while it is not ready."""
        return self._described(await self._listen())

    async def _listen(self) -> Relay:
        self._require_ready()
        async with self._listening:
            if self._relay is None:
                relay = Relay(self._address)
                await relay.listen(self._host)
                self._relay = relay
        return self._relay

    def _require_ready(self) -> None:
        target = self._server.target()
        if not (target and target.is_ready):
            raise PipelineError(f"{self._server.name} is {target.state if target else 'starting'}")

    def _address(self) -> Address:
        """Where the server listens now: a guarded one has a new socket with each start."""
        target = self._server.target() or self._target
        return target.socket or (target.instance.address, target.instance.port)

    def _described(self, relay: Relay) -> dict[str, Any]:
        """As ReplicaAddress has it."""
        server_key = key(self._target.instance)
        where = {"host": self._host, "port": relay.port}
        return {**where, "relay_key": relay.key, "server_key": server_key}

    def check_health(self) -> None:
        """Raise PipelineError where the server has ended for good: Serve then replaces this
        replica. One that hangs or crashes is started again by its supervisor."""
        self._server.require_running()

    def __del__(self) -> None:
        """Called by Serve once all requests are over, or their time is."""
        if hasattr(self, "_target"):  # else it was never ready
            self._peers.close()
            self._server.stop()


class HeadStore:
    """What the cluster's head keeps for all nodes."""

    def put(self, key: str, value: str, *, overwrite: bool = True) -> bool:
        existed = internal_kv._internal_kv_put(key, value, overwrite, namespace=NAMESPACE)
        return overwrite or not existed

    def get(self, key: str) -> str | None:
        value = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        return None if value is None else str(value, "utf-8")

    def delete(self, key: str) -> None:
        internal_kv._internal_kv_del(key, namespace=NAMESPACE)

    def keys(self, prefix: str) -> list[str]:
        keys = internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)
        return [str(key, "utf-8") for key in keys]


def in_group() -> dict[str, str]:
    """The variables by which vLLM finds this replica's placement group; none where it has none."""
    group = ray.util.get_current_placement_group()
    if group is None:
        return {}
    return {
        **{name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")},
        "PYTHONPATH": str(REPOSITORY),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_DEDUP_LOGS": "0",  # each line reaches the log
        GROUP: group.id.hex(),
    }


def log_file() -> Path:
    """Where the server's output goes: beside the log that Serve keeps of this replica, so that the
    cluster's dashboard shows it."""
    files = [Path(getattr(each, "baseFilename", "")) for each in _handlers("ray.serve")]
    (own, *_) = (file for file in files if file.name.startswith("replica_"))
    return own.with_name("server_" + own.name.removeprefix("replica_"))


def _handlers(name: str) -> Iterator[logging.Handler]:
    """The handlers of a logger, and those that they hand on to."""
    for handler in logging.getLogger(name).handlers:
        yield getattr(handler, "target", None) or handler
