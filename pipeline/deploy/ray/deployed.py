"""Where the servers of a configuration were deployed: beside its state, as long as they are. And
which servers on this machine are a cluster's."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct, convert, to_builtins

from pipeline.core.store import json_file
from pipeline.serve.supervisor.state import Folder, read_wanted

from .cluster import Cluster
from .config import REPLICAS
from .environment import token, with_token
from .local import LocalRay


class Deployed(Struct, frozen=True, kw_only=True):
    """The cluster of a configuration. `config` is the file as the user knows it, `configuration`
    its name on the cluster."""

    config: str
    configuration: str
    address: str  # of the dashboard
    local: LocalRay | None = None

    @property
    def cluster(self) -> Cluster:
        """To ask it. Raises UsageError where its token cannot be read."""
        own = with_token(Path(self.local.token_file)) if self.local else os.environ
        return Cluster(self.address, token(own))


def read(at: Folder) -> Deployed | None:
    """What was written; None where nothing is deployed, or the file is damaged."""
    return json_file.read(at.cluster, lambda data: convert(data, Deployed))


def write(at: Folder, deployed: Deployed) -> None:
    """Raises OSError."""
    json_file.write_private(at.cluster, to_builtins(deployed))


def forget(at: Folder) -> None:
    """Raises OSError."""
    at.cluster.unlink(missing_ok=True)


def is_replica(at: Folder) -> bool:
    """Whether a cluster runs its replica there: see local_server.py."""
    wanted = read_wanted(at)
    return wanted is not None and Path(wanted.config).parent.parent == at.run / REPLICAS
