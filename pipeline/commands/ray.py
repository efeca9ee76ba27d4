"""`ray config=…`: the servers of a file on a cluster, by Ray Serve: its files, and with start=1 the
deployment."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from msgspec.structs import replace

from pipeline.bins.hardware import nvidia
from pipeline.core import log
from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import absolute
from pipeline.core.process import shown
from pipeline.deploy.kubernetes import folder
from pipeline.deploy.kubernetes.options import Options, options
from pipeline.deploy.ray import adapt, environment, local, nodes, rayservice
from pipeline.deploy.ray import cluster as clusters
from pipeline.deploy.ray.config import ClusterPlan, ClusterServer
from pipeline.models import lockfile
from pipeline.serve.config import checks, instances, vllm
from pipeline.serve.config.api_keys import NONE, split
from pipeline.serve.config.configuration import Configuration, InstanceSpec, Value
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.config.options import ResolvedOptions
from pipeline.serve.flags import RPC
from pipeline.serve.gateway import settings as gateways
from pipeline.serve.gateway.settings import GatewaySettings
from pipeline.serve.keys import is_loopback
from pipeline.serve.server import LLAMA_CPP, VLLM, Server
from pipeline.serve.stopping import run_attached

from . import check, estimate, kubernetes, lock, needs, ray_deploy, serve
from .model import Model
from .servers import Servers
from .session import Session

MARK = "# Written by `doit ray`, which writes it anew."
SERVE_FILE, KUBERAY_FILE = "serve.yaml", "rayservice.yaml"


def run(session: Session) -> None:
    """Write the files, and with start=1 deploy; or run a node. Raises PipelineError."""
    if session.request.ray.node:
        run_node(session)
        return
    servers, request = session.require_servers(), session.request
    chosen = options(servers.variables)
    at = clusters.address(request.ray.address, os.environ)
    if request.ray.address and not request.servers.start:
        raise UsageError(f"address={at}: is deployed to with start=1", "add it, or leave it out")
    planned = plan(servers, chosen)
    target = out(servers, chosen)
    is_new = folder.write(files(servers, planned, chosen), target, mark=MARK, by="ray")
    if request.servers.start:
        if not at:
            gateways.check(planned.settings)
            planned = replace(planned, ingresses=1)
        ray_deploy.start(servers, planned, at)
    else:
        report(servers, planned, chosen, target, is_new)


def out(servers: Servers, options: Options) -> Path:
    """The folder to write."""
    if options.out:
        return absolute(options.out).resolve()
    return servers.home.root / "deploy" / f"{kubernetes.part_of(servers)}-ray"


def plan(servers: Servers, options: Options) -> ClusterPlan:
    """The servers as a cluster will run them. Raises PipelineError, for all errors of the file at
    once."""
    configuration = check_configuration(servers)
    settings = gateway_settings(configuration)
    made = cluster_servers(servers, configuration, options)
    return ClusterPlan(
        configuration=kubernetes.part_of(servers),
        servers=tuple(made),
        settings=settings,
        ingresses=options.gateway_replicas,
    )


def check_configuration(servers: Servers) -> Configuration:
    """The configuration. Raises UsageError with all errors."""
    configuration, flags = servers.configuration, servers.flags() or {}
    chosen = configuration.enabled
    if not chosen and not servers.errors:
        raise UsageError(f"{configuration.label}: no instance is enabled, so nothing to run")
    errors = [*servers.errors, *servers.misplaced(), *adapt.of_file(configuration)]
    for spec in chosen:
        errors += adapt.errors(spec, flags if spec.engine == LLAMA_CPP else {})
    # The key is a file of the nodes, and their programs and files need not be here.
    gateway = configuration.gateway.model_copy(update={"api_key_file": None})
    master = configuration.master.model_copy(update={"llama_cpp_path": None})
    checks.check(
        replace(
            configuration,
            specs=tuple(map(with_own_address, configuration.specs, count(1))),
            master=master,
            gateway=gateway,
            errors=tuple(errors),
        ),
        server=servers.server,
        flags=flags,
        environ=os.environ,
        note=log.info,
        is_there=lambda path: True,
    )
    for spec in chosen:
        for line in adapt.notes(spec):
            log.info(line)
    for line in adapt.unused_of_file(configuration):
        log.info(line)
    return configuration


def with_own_address(spec: InstanceSpec, port: int) -> InstanceSpec:
    """The spec with a port of its own, and a log of its own: what clashes on one machine does not
    on a cluster."""
    kept = {name: value for name, value in spec.server.items() if name not in adapt.OURS}
    server: dict[str, Value] = {**kept, "port": port}
    control = replace(spec.control, log_file=None, log_dir=None)
    return replace(spec, server=server, control=control)


def gateway_settings(configuration: Configuration) -> GatewaySettings:
    """The gateway's settings, with the path of its key on the nodes. Raises UsageError."""
    table = configuration.gateway
    settings = gateways.of_table(
        table,
        pull=False,
        without_key=not table.api_key_file and split(table.api_key) == [NONE],
    )
    if not (settings.api_key_file or settings.without_key or is_loopback(settings.host)):
        raise UsageError(
            f"{configuration.at_gateway('host')} = {settings.host}: other machines can reach it, "
            "and there is no API key",
            'write api_key_file = "PATH" into [gateway], a file that all nodes have',
        )
    return settings


def cluster_servers(
    servers: Servers, configuration: Configuration, options: Options
) -> list[ClusterServer]:
    """Each instance as a replica runs it, with what it needs of a node. Raises PipelineError."""
    has_card = bool(nvidia.listed())
    specs = {spec.name: spec for spec in configuration.enabled}
    models = {name: servers.model_of(spec) for name, spec in specs.items() if spec.model}
    check.require_known([*servers.models.values()])
    prepared = {name: prepared_model(model, specs[name]) for name, model in models.items()}
    made = []
    for server in servers.as_started(configuration, prepared):
        spec = specs[server.name]
        parts = vllm.gpus(instances.resolve(spec, None)) if spec.engine == VLLM else 1
        usual = parts if parts > 1 else int(has_card)
        number = ResolvedOptions(spec, {}).text("threads", "t")
        resources, note = adapt.resources(
            spec,
            threads=int(number) if number.isdecimal() else 0,
            memory=memory(servers, spec, server),
            default_gpus=usual if options.gpus is None else options.gpus,
        )
        if note:
            log.info(f"{spec.place}: {note}")
        for file in adapt.files(spec):
            log.info(f"{spec.place}: every node needs {file}")
        context = prepared[server.name].ctx_size if server.name in prepared else 0
        model = models.get(server.name)
        made.append(
            ClusterServer(
                server=server,
                slots=kubernetes.slots(spec),
                replicas=adapt.replicas(spec),
                resources=resources,
                text=adapt.text(spec, configuration, context or 0),
                lock=lockfile.text(entries([model])) if model else "",
            )
        )
    return made


def prepared_model(model: Model, spec: InstanceSpec) -> PreparedModel:
    """The model of an instance with its trained context, where no option names one: a node's own
    memory does not decide it, for replicas are alike. Raises UsageError."""
    of_server = model.served_by(spec)
    chain = model.require_chain()
    ahead = estimate.outlook(of_server, chain)
    kubernetes.require_purpose(spec, ahead)
    return serve.prepared_model(of_server, chain, ahead, ahead.trained)


def memory(servers: Servers, spec: InstanceSpec, server: Server) -> int:
    """What the server takes of all devices, in bytes; 0 where that is not known."""
    named = server.argument("--model") if server.engine == LLAMA_CPP else ""
    if server.engine == LLAMA_CPP and server.argument(f"--{RPC}"):
        log.info(f"{spec.place}: a part is on its RPC servers, so no memory is reserved for it")
        return 0
    if not spec.model and named and not Path(named).is_file():
        log.info(f"{spec.place}: {named} is not here, so no memory is reserved for it")
        return 0
    return sum(needs.of_server(servers, server).values())


def entries(models: Sequence[Model]) -> list[lockfile.LockedModel]:
    """The entries of pipeline.lock for these models, and for those beside them."""
    return [lock.entry(each) for model in models for each in (model, *model.beside.values())]


def files(servers: Servers, planned: ClusterPlan, options: Options) -> dict[str, str]:
    """The text of each file, by its name."""
    texts = {SERVE_FILE: folder.text([planned.body], mark=MARK)}
    if options.image:
        made = rayservice.documents(planned, options, environment.version())
        texts[KUBERAY_FILE] = folder.text(made, mark=MARK)
    if servers.models:
        all_entries = [lock.entry(model) for model in servers.models.values()]
        texts[lockfile.FILE] = f"{MARK}\n{lockfile.text(all_entries)}"
    return texts


def report(
    servers: Servers, planned: ClusterPlan, options: Options, target: Path, is_new: bool
) -> None:
    """Print what was written, and the commands that come next."""
    config = shown(
        [next(f"{n}={v}" for n, v in servers.words.items() if n in ("config", "profile"))]
    )
    commands = [
        doitw(f"ray {config} start=1"),
        doitw(f"ray {config} start=1 address=http://HEAD:8265"),
    ]
    if options.image:
        if options.namespace:
            commands.append(f"kubectl create namespace {options.namespace}")
        if not planned.settings.without_key:
            namespace = f" -n {options.namespace}" if options.namespace else ""
            name = rayservice.secret(planned.configuration) + namespace
            commands.append(kubernetes.secret(name, planned.settings.api_key_file or ""))
        commands.append(f"kubectl apply -f {shown([str(target / KUBERAY_FILE)])}")
    if servers.request.json:
        names = [path.name for path in sorted(target.iterdir())]
        result = {"folder": str(target), "files": names, "changed": is_new, "commands": commands}
        print(json.dumps(result, indent=1))
        return
    print(f"{'wrote' if is_new else 'nothing to do: up to date in'} {target}")
    if not options.image:
        log.info(f"image=…: adds {KUBERAY_FILE}, for KubeRay")
    print("\n".join(commands))


def cluster_token(is_head: bool) -> dict[str, str]:
    """The variables of a node that tell its cluster's token: without one, whoever reaches Ray's
    ports could run programs on all nodes. The user may have it so. Raises UsageError."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        log.info("warning: RAY_AUTH_MODE=disabled: whoever reaches Ray's ports can run programs")
        return {}
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return {"RAY_AUTH_MODE": "token"}
    file = environment.token_file(os.environ)
    if is_head and environment.make_token(file):
        log.info(f"made the cluster's token, {file}: copy it to the other nodes")
    elif not file.is_file():
        raise UsageError(f"{file}: the cluster's token is not there", "copy it from the head")
    return environment.with_token(file)


def run_node(session: Session) -> None:
    """Run this machine as a node of a cluster, in the foreground. Raises PipelineError."""
    request, head = session.request, session.request.ray.node
    if "config" in session.variables:
        raise UsageError("node= and config= contradict each other", "deploy from another shell")
    ip = request.host if "host" in session.variables else ""
    if head == "head":
        ip = ip or local.LOOPBACK
    elif ":" not in head:
        raise UsageError(
            f"node={head}: must be head, or the address of a head",
            f"such as node={head}:{local.GCS_PORT}",
        )
    token = cluster_token(head == "head")
    python = ray_deploy.environment_of(session.home, request.offline)
    node = local.here(len(nvidia.listed()), ray_deploy.own_resources(session.programs), ip)
    words = (
        local.head_words(node, local.GCS_PORT, local.DASHBOARD_PORT)
        if head == "head"
        else local.join_words(node, head)
    )
    log.info(f"this node has {nodes.shown(node.resources)}")
    env = {**environment.variables(os.environ, session.home), **token}
    command = [str(python), *environment.COMMAND, *words]
    run_attached(command, name="ray", env=env, patience=local.STOP_SECONDS)
