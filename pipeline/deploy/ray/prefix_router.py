"""The choice of a replica for a request, as Serve's router asks for it."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from pipeline.deploy.ray.prefix import PrefixMemory

# Requests under way by which a replica that has the prompt may exceed the least busy one. So many
# slow each other's tokens down by about what a prompt of a thousand tokens takes to evaluate again.
MOST_AHEAD = 3


class PrefixRouter(RequestRouter):  # type: ignore[misc] # ray is not installed here
    """The replica that has the request's prompt, unless it is much busier; else the less busy of
    two. Serve makes one for each handle, and each learns by itself."""

    def initialize_state(self, **options: Any) -> None:
        """Called by Serve with `request_router_kwargs`, of which there are none."""
        self._memory = PrefixMemory()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas to try, the preferred first."""
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [two]
        pending_request.routing_context.should_backoff = True
        prefix = _prefix(pending_request)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        best = self._memory.best(prefix, by_id)
        if best is None or self._is_far_ahead(by_id[best], candidate_replicas):
            return [two]
        return [[by_id[best]], two]

    def _is_far_ahead(self, replica: RunningReplica, others: list[RunningReplica]) -> bool:
        least = min(map(self._under_way, others))
        return self._under_way(replica) > least + MOST_AHEAD

    def _under_way(self, replica: RunningReplica) -> int:
        """Requests under way, as far as this router knows."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: Any, result: Any
    ) -> None:
        """Called by Serve once a replica was chosen."""
        self._memory.add(_prefix(pending_request), replica_id.unique_id)


def _prefix(request: PendingRequest) -> list[int]:
    """The first argument of `Replica.lease`."""
    return list(request.args[0]) if request.args else []
