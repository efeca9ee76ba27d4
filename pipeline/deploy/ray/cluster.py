"""A Ray cluster, by the REST API of its dashboard: what it has, what it serves, and what it is to
serve. Applications of others are sent back as they are, for Serve removes what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import MsgspecError, Struct, convert, field, json

from pipeline.core import bounded, network
from pipeline.core.bounded import Bound
from pipeline.core.errors import PipelineError, UsageError
from pipeline.serve.server import GATEWAY

from .config import INGRESS, OURS
from .nodes import ClusterNode

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
APPLICATIONS = "/api/serve/applications/"
SECONDS = 30.0  # for an answer; Serve's own start, in the first deployment, takes some of them
DEPLOY_SECONDS = 180.0
ANSWER = Bound(bytes=64 * 1024**2, seconds=2 * SECONDS)  # a thousand replicas take a few MB
DEPLOYED = Bound(bytes=1024**2, seconds=2 * DEPLOY_SECONDS)  # empty, or an error
MOST_NODES = 10_000  # that the dashboard lists
VARIABLE = "RAY_ADDRESS"

# The states of an application.
RUNNING, DEPLOYING, FAILED = "RUNNING", "DEPLOYING", "DEPLOY_FAILED"
UNHEALTHY, DELETING, NOT_STARTED = "UNHEALTHY", "DELETING", "NOT_STARTED"


class ReplicaDetails(Struct, frozen=True):
    """One replica, as the dashboard describes it."""

    replica_id: str
    state: str
    node_ip: str | None = None
    node_id: str | None = None
    log_file_path: str | None = None
    pid: int | None = None


class DeploymentDetails(Struct, frozen=True):
    """One deployment of an application."""

    status: str
    message: str = ""
    target_num_replicas: int = 0
    replicas: list[ReplicaDetails] = field(default_factory=list)


class ApplicationDetails(Struct, frozen=True):
    """One application. `deployed_app_config` is what was sent, where it came by this API."""

    name: str
    status: str
    message: str = ""
    deployed_app_config: dict[str, Any] | None = None
    deployments: dict[str, DeploymentDetails] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return str((self.deployed_app_config or {}).get("import_path", "")).startswith(OURS)

    @property
    def replicas(self) -> list[ReplicaDetails]:
        return [each for one in self.deployments.values() for each in one.replicas]

    @property
    def wanted(self) -> int:
        """How many replicas there should be."""
        return sum(each.target_num_replicas for each in self.deployments.values())

    @property
    def problem(self) -> str:
        """Why it does not run: its own message, and those of its deployments."""
        texts = [self.message, *(each.message for each in self.deployments.values())]
        return "\n".join(dict.fromkeys(filter(None, map(str.strip, texts))))


class ServeDetails(Struct, frozen=True):
    """What Serve runs on a cluster."""

    applications: dict[str, ApplicationDetails] = field(default_factory=dict)
    http_options: dict[str, Any] | None = None  # None: Serve has not been started
    proxy_location: str | None = None

    @property
    def ours(self) -> dict[str, ApplicationDetails]:
        return {name: each for name, each in self.applications.items() if each.is_ours}

    @property
    def gateway_config(self) -> dict[str, Any]:
        """What the gateway was given (config.IngressConfig); empty where there is none."""
        gateway = self.ours.get(GATEWAY)
        deployments = (gateway.deployed_app_config or {})["deployments"] if gateway else []
        return next((each["user_config"] for each in deployments), {})

    @property
    def configuration(self) -> str:
        """The name of the file whose servers it serves; empty for none."""
        return str(self.gateway_config.get("configuration", ""))


class NodeDetails(Struct, frozen=True):
    """A node, as the dashboard lists it."""

    node_id: str
    node_ip: str
    state: str
    resources_total: dict[str, Any] = field(default_factory=dict)


def address(typed: str, environ: Mapping[str, str]) -> str:
    """The dashboard that `address=` or RAY_ADDRESS names; empty for none. Raises UsageError."""
    name, text = ("address", typed) if typed else (VARIABLE, environ.get(VARIABLE, "").strip())
    if text and not network.is_url(text):
        raise UsageError(
            f"{name}={text}: is not a dashboard of a Ray cluster",
            "pass its URL, such as address=http://head:8265",
        )
    return text.rstrip("/")


class Cluster:
    """A cluster whose dashboard answers at `address`, where it wants one to those with `token`."""

    def __init__(self, address: str, token: str) -> None:
        self.address, self.token = address, token

    def version(self) -> str:
        """The version of Ray that it runs. Raises PipelineError."""
        return str(self._get("/api/version", dict[str, Any]).get("ray_version", ""))

    def serves(self) -> ServeDetails:
        """What Serve runs. Raises PipelineError."""
        return self._get(APPLICATIONS, ServeDetails)

    def nodes(self) -> list[ClusterNode]:
        """The nodes that are alive. Raises PipelineError."""
        answer = self._get(f"/api/v0/nodes?limit={MOST_NODES}", dict[str, Any])
        try:
            rows = convert(answer["data"]["result"]["result"], list[NodeDetails], strict=False)
        except (MsgspecError, KeyError, TypeError) as error:
            raise self._strange("/api/v0/nodes", error) from None
        return [
            ClusterNode(
                ip=row.node_ip,
                id=row.node_id,
                resources={
                    name: count
                    for name, count in row.resources_total.items()
                    if isinstance(count, (int, float))
                },
            )
            for row in rows
            if row.state == "ALIVE"
        ]

    def deploy(self, body: Mapping[str, Any]) -> None:
        """Have Serve run these applications, and no others that came by this API. Raises
        PipelineError."""
        with self._client(DEPLOY_SECONDS) as client:
            answer = bounded.get(client, APPLICATIONS, DEPLOYED, method="PUT", json=dict(body))
        if answer.status_code != 200:
            raise PipelineError(
                f"{self.shown}: refuses the applications ({answer.status_code}):\n"
                f"{answer.text[:4000].strip()}",
                "see whether the cluster runs the version of Ray in requirements/ray.txt",
            )

    def log(self, node_id: str, file: str, lines: int) -> str | None:
        """The last lines of a file in a node's log folder; None where there is none. Raises
        PipelineError."""
        options = {"node_id": node_id, "filename": file, "lines": str(max(1, lines))}
        with self._client(SECONDS) as client:
            answer = bounded.get(client, "/api/v0/logs/file", ANSWER, params=options)
        if answer.status_code != 200:
            return None
        return answer.text if lines else ""

    def follow(self, node_id: str, file: str, lines: int) -> Iterator[str]:
        """Pieces of such a file, the last lines first, as they are written, until the node is gone
        or the caller stops. Raises PipelineError."""
        options = {"node_id": node_id, "filename": file, "interval": "0.5"}
        options["lines"] = str(max(1, lines))
        with (
            self._client(None) as client,
            client.stream("GET", "/api/v0/logs/stream", params=options) as answer,
        ):
            yield from answer.iter_text()

    @property
    def shown(self) -> str:
        """The address without a password."""
        return bounded.address(self.address)

    def _get(self, path: str, type: type[T]) -> T:
        with self._client(SECONDS) as client:
            answer = bounded.get(client, path, ANSWER)
        if answer.status_code != 200:
            raise PipelineError(
                f"{self.shown}: answers {path} with {answer.status_code}: "
                f"{answer.text[:1000].strip()}",
                "see whether it is a Ray dashboard; a cluster's token is in RAY_AUTH_TOKEN, or in "
                "the file that RAY_AUTH_TOKEN_PATH names, else in ~/.ray/auth_token",
            )
        try:
            return json.decode(answer.content, type=type)
        except MsgspecError as error:
            raise self._strange(path, error) from None

    def _strange(self, path: str, error: Exception) -> PipelineError:
        return PipelineError(
            f"{self.shown}: the answer to {path} cannot be read: {error}",
            "see whether the cluster runs the version of Ray in requirements/ray.txt",
        )

    @contextmanager
    def _client(self, seconds: float | None) -> Iterator[httpx2.Client]:
        """A client whose requests become PipelineErrors where they fail."""
        import httpx2

        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        timeout = httpx2.Timeout(seconds, connect=SECONDS)
        try:
            with httpx2.Client(base_url=self.address, headers=headers, timeout=timeout) as client:
                yield bounded.client(client)
        except httpx2.RequestError as error:
            raise ClusterGone(
                f"{self.shown}: no Ray dashboard answers: {error}",
                "see whether the cluster is up, and its dashboard listens on that address"
                f"{network.through(self.address)}",
            ) from None


class ClusterGone(PipelineError):
    """Nothing answers at a cluster's address."""


def with_others(details: ServeDetails, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body that deploys the applications of `body` and leaves those of others as they are.
    Serve's options for HTTP cannot change once it runs."""
    new = {application["name"] for application in body["applications"]}
    kept = [
        each.deployed_app_config
        for name, each in details.applications.items()
        if each.deployed_app_config and name not in new and not each.is_ours
    ]
    made = {**body, "applications": [*kept, *body["applications"]]}
    if details.http_options is not None:
        made["http_options"] = details.http_options
    if details.proxy_location:
        made["proxy_location"] = details.proxy_location
    return made


def require_free(
    details: ServeDetails, body: Mapping[str, Any], configuration: str, shown: str
) -> None:
    """Raise UsageError where a name or the route is another's, or another file is served."""
    if details.configuration not in ("", configuration):
        raise UsageError(
            f"{shown}: serves {details.configuration} already, and a cluster has one gateway",
            "take that down first, name another cluster, or put all servers into one file",
        )
    errors = [
        f"{name}: an application of somebody else has this name at {shown}"
        for name in (application["name"] for application in body["applications"])
        if name in details.applications and not details.applications[name].is_ours
    ]
    errors += [
        f"{name}: an application of somebody else has the route / at {shown}"
        for name, each in details.applications.items()
        if not each.is_ours and _route(each) == "/"
    ]
    if errors:
        raise UsageError("\n".join(errors), "rename the server, or name another cluster")


def _route(each: ApplicationDetails) -> str | None:
    config = each.deployed_app_config
    return config.get("route_prefix", "/") if config else None


def changed(details: ServeDetails, body: Mapping[str, Any]) -> list[str]:
    """The names of our applications that are new, differ, have failed, or are to go."""
    new = {application["name"]: application for application in body["applications"]}
    ours = details.ours
    differ = [
        name
        for name, application in new.items()
        if name not in ours
        or ours[name].deployed_app_config != application
        or ours[name].status in (FAILED, DELETING)
    ]
    return differ + [name for name in ours if name not in new]


def failed(details: ServeDetails, names: Sequence[str]) -> list[str]:
    """Those of the applications that could not be deployed."""
    there = details.applications
    return [name for name in names if name in there and there[name].status == FAILED]


def left_out(body: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The body without these applications."""
    kept = [each for each in body["applications"] if each["name"] not in names]
    return {**body, "applications": kept}


def without(
    details: ServeDetails, names: Sequence[str], configuration: str
) -> tuple[dict[str, Any], list[str]]:
    """The body that takes our applications `names` away, or all where none is named, and what it
    takes away; the gateway goes with the last server, else it forgets them."""
    ours = {n: each for n, each in details.ours.items() if details.configuration == configuration}
    servers = [name for name in ours if name != GATEWAY]
    gone = [name for name in servers if not names or name in names]
    left = [name for name in servers if name not in gone]
    kept = [ours[name].deployed_app_config or {} for name in left]
    if left and GATEWAY in ours:
        gateway = json.decode(json.encode(ours[GATEWAY].deployed_app_config))
        for deployment in gateway["deployments"]:
            if deployment["name"] == INGRESS:
                known = deployment["user_config"]["servers"]
                deployment["user_config"]["servers"] = {n: known[n] for n in left if n in known}
        kept.append(gateway)
    elif GATEWAY in ours:
        gone.append(GATEWAY)
    return with_others(details, {"applications": kept}), gone
