"""What a Serve config imports: `pipeline.deploy.ray.app:server` and `…:gateway`."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from .config import INGRESS, REPLICA
from .ingress import Ingress
from .prefix_router import PrefixRouter
from .replica import Replica


def server(args: dict[str, Any]) -> serve.Application:
    """The application of one instance. `args`: its `name`, the text of a file with it alone as
    `configuration`, and that of its pipeline.lock, or nothing, as `lock`."""
    deployment = serve.deployment(Replica, name=REPLICA).options(
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        logging_config=LoggingConfig(enable_access_log=False),  # the gateway's has each request
    )
    return deployment.bind(args["name"], args["configuration"], args.get("lock", ""))


def gateway(args: dict[str, Any]) -> serve.Application:
    """The gateway of all instances, which its deployment's `user_config` lists."""
    return serve.deployment(serve.ingress()(Ingress), name=INGRESS).bind()
