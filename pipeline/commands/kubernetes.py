"""`kubernetes config=…`: manifests for the instances of a configuration. Nothing is started."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import absolute
from pipeline.core.process import shown
from pipeline.deploy.kubernetes import folder, manifests, workload
from pipeline.deploy.kubernetes.gateway import PODS, SECRET, Gateway
from pipeline.deploy.kubernetes.options import HPA, KEDA, NAME, Options, options, require_images
from pipeline.deploy.kubernetes.workload import (
    DATA,
    KEY,
    MODELS,
    AdaptedSpec,
    Workload,
    kubernetes_name,
)
from pipeline.models import gguf
from pipeline.serve.config import checks, instances, vllm
from pipeline.serve.config.api_keys import NONE, split
from pipeline.serve.config.configuration import Configuration, InstanceSpec
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.config.options import ResolvedOptions
from pipeline.serve.gateway import settings as gateways
from pipeline.serve.server import LLAMA_CPP, VLLM, Server
from pipeline.serve.supervisor.state import require_known

from . import check, estimate, serve
from .servers import Servers

# Options of llama-server that set its model's purpose; without them its metadata does.
ENDPOINTS = ("embeddings", "embedding", "reranking", "rerank", "pooling")
CONVERTER = 4 * 1024**3  # bytes of its environment and of llama.cpp's source
IMAGES = {LLAMA_CPP: "image", VLLM: "vllm_image"}
NO_NEWLINE = "tr -d '\\n'"


def write(servers: Servers) -> None:
    """Write the manifests, and print how to apply them. Raises PipelineError."""
    chosen = options(servers.variables)
    image = chosen.vllm_image or f"vllm/vllm-openai:v{vllm.listed().version}"
    chosen = chosen.replace(vllm_image=image)
    configuration = check_configuration(servers, chosen)
    made = workloads(servers, configuration, chosen)
    gateway = gateway_of(configuration, made, chosen)
    out, home = chosen.out, servers.home.root
    target = absolute(out).resolve() if out else home / "deploy" / part_of(servers)
    is_new = folder.write(folder.files(made, chosen, gateway), target)
    report(made, gateway, chosen, target, is_new, as_json=servers.request.json)


def part_of(servers: Servers) -> str:
    """The configuration's name: that of its file, or of the profile."""
    requested = servers.requested
    source = Path(requested.config).stem if requested.config else requested.profile
    return kubernetes_name(source)


def check_configuration(servers: Servers, options: Options) -> Configuration:
    """The configuration with the named instances. Raises UsageError with all errors."""
    configuration = workload.without_programs(servers.configuration)
    names = servers.requested.names
    require_known(names, [spec.name for spec in configuration.enabled])
    chosen = tuple(spec for spec in configuration.enabled if not names or spec.name in names)
    configuration = replace(configuration, specs=chosen, errors=servers.errors)
    if not chosen and not configuration.errors:
        raise UsageError(f"{configuration.label}: no instance is enabled, so nothing to write")
    taken = {PODS: "a Service of the gateway's"} if configuration.gateway.enable else {}
    errors = [*servers.misplaced(), *clashes(chosen, taken)]
    for spec in chosen:
        errors += workload.unpreparable(spec.model, spec.at)
    configuration = replace(configuration, errors=(*configuration.errors, *errors))
    checks.check(
        configuration,
        server=servers.server,
        flags=servers.flags(),
        environ=os.environ,
        note=log.info,
        is_there=workload.is_available,
    )
    engines = {spec.engine for spec in chosen}
    images = {x: variable for x, variable in IMAGES.items() if x in engines}
    if configuration.gateway.enable:
        images["the gateway"] = "image"
    require_images(options, images)
    return configuration


def gateway_of(
    configuration: Configuration, made: Sequence[Workload], options: Options
) -> Gateway | None:
    """The gateway, where the file enables it. Raises UsageError where something needs one."""
    table = configuration.gateway
    by_keda = [item.instance.name for item in made if item.uses_keda]
    needs = [f"{name}: KEDA asks the gateway for its requests" for name in by_keda]
    needs += [f"route={options.route}: leads to the gateway"] if options.route else []
    if needs and not table.enable:
        raise UsageError("\n".join(needs), "write [gateway] enable = true into a file of instances")
    if bool(options.route) != bool(options.route_parent):
        raise UsageError("route= and route_parent= belong together", "pass both, or none")
    if by_keda and not options.namespace:
        raise UsageError(
            f"{by_keda[0]}: KEDA runs in another namespace, and has to know the gateway's",
            "pass namespace=…",
        )
    if not table.enable:
        return None
    if table.pull:
        log.info(f"not used: {configuration.at_gateway('pull')} (pods have their models prepared)")
    key_file = Path(table.api_key_file or "")
    if by_keda and table.api_key_file and len(key_file.read_text("utf-8").splitlines()) != 1:
        raise UsageError(
            f"{configuration.at_gateway('api_key_file')}: KEDA sends all of the file as the key",
            "leave one key in it, and no comment",
        )
    is_open = split(table.api_key) == [NONE]
    if table.api_key and not is_open:
        place = configuration.at_gateway("api_key")
        log.info(f"{place}: is not copied; put it into the Secret {SECRET}")
    if is_open and options.route:
        log.info(f"warning: route={options.route}: leads to a gateway without a key")
    return Gateway(
        settings=gateways.of_table(table),
        workloads=tuple(made),
        part_of=made[0].part_of,
        has_key=not is_open,
        key_here=table.api_key_file or "",
    )


def clashes(chosen: Sequence[InstanceSpec], taken: Mapping[str, str]) -> list[str]:
    """Instances whose objects would have the same name, or one that is `taken`."""
    owners = dict(taken)
    return [
        f"{spec.place}: would have the same name as {owner} in a cluster; rename one"
        for spec in chosen
        if (owner := owners.setdefault(kubernetes_name(spec.name), spec.name)) != spec.name
    ]


def workloads(servers: Servers, configuration: Configuration, options: Options) -> list[Workload]:
    """Each instance as it will run in a pod. Raises PipelineError."""
    flags = servers.flags() or {}
    adapted = {
        spec.name: workload.adapt(spec, configuration.folder, flags) for spec in configuration.specs
    }
    if errors := [line for spec in adapted.values() for line in spec.errors]:
        raise UsageError("\n".join(errors))
    models = {spec.name: PodModel(servers, spec) for spec in configuration.specs if spec.model}
    planned = servers.as_started(
        replace(configuration, specs=tuple(item.spec for item in adapted.values())),
        {name: model.model for name, model in models.items()},
    )
    part = part_of(servers)
    made = [
        _workload(server, adapted[server.name], models.get(server.name), part, options)
        for server in planned
    ]
    if errors := [x for item in made for x in workload.conflicts(item)]:
        raise UsageError("\n".join(errors))
    for item in made:
        _report_models(item, adapted[item.instance.name], models.get(item.instance.name))
    return made


def _workload(
    server: Server, adapted: AdaptedSpec, prepared: PodModel | None, part: str, options: Options
) -> Workload:
    is_llama = server.engine == LLAMA_CPP
    resolved = ResolvedOptions(adapted.spec, {})
    parts = 1 if is_llama else vllm.gpus(instances.resolve(adapted.spec, None))
    gpus, note = workload.gpus(server.gpu_ids, options.gpus, parts)
    threads = resolved.text("threads") if is_llama else ""
    size = sum(disk_size(file) for file in _weights(adapted, prepared))
    replicas = options.replicas or adapted.spec.control.replicas
    # Kubernetes' own keeps at least one pod.
    autoscaler = options.autoscaler or (HPA if replicas[0] else KEDA)
    image = options.model_image.replace(NAME, kubernetes_name(server.name)) if is_llama else ""
    if options.model_image and not is_llama:
        log.info(f"{adapted.spec.place}: not used: model_image (vLLM downloads its model itself)")
    made = Workload(
        instance=server,
        part_of=part,
        replicas=replicas,
        uses_keda=replicas[0] < replicas[1] and autoscaler == KEDA,
        idle_seconds=math.ceil(adapted.spec.control.idle_timeout),
        model_image=image,
        prepare=prepared.variables if prepared and not image else {},
        converts=bool(prepared and prepared.converts),
        texts=adapted.texts,
        env=adapted.spec.control.env,
        gpus=gpus,
        slots=slots(adapted.spec),
        threads=int(threads) if threads.isdecimal() else 0,
        memory=prepared.memory(resolved) if prepared else size,
        disk=prepared.disk if prepared and prepared.variables else size,
        key_here=adapted.key_here,
    )
    for line in (*adapted.notes, *([f"{adapted.spec.place}: {note}"] if note else [])):
        log.info(line)
    return made


def slots(spec: InstanceSpec) -> int:
    """The requests that one pod or replica answers at a time."""
    is_llama = spec.engine == LLAMA_CPP
    names = ("parallel", "np") if is_llama else ("max-num-seqs",)
    number = ResolvedOptions(spec, {}).text(*names)
    default = workload.SLOTS if is_llama else workload.SEQUENCES
    return int(number) if number.isdecimal() and int(number) else default


def _weights(adapted: AdaptedSpec, prepared: PodModel | None) -> list[Path]:
    """Files of this machine that the pod needs."""
    return [*adapted.weights, *(prepared.weights if prepared else ())]


def _report_models(made: Workload, adapted: AdaptedSpec, prepared: PodModel | None) -> None:
    """What the user has to bring to the pod."""
    place = adapted.spec.place
    if made.model_image:
        log.info(f"{place}: {made.model_image} has to hold {', '.join(made.model_files)}")
        return
    for file in _weights(adapted, prepared):
        log.info(f"{place}: copy {file} to {MODELS}/{file.name} on the claim {made.claim}")


def disk_size(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def report(
    made: Sequence[Workload],
    gateway: Gateway | None,
    options: Options,
    target: Path,
    is_new: bool,
    *,
    as_json: bool,
) -> None:
    """Print what was written, and what else the cluster needs."""
    namespace = f" -n {options.namespace}" if options.namespace else ""
    secrets = [
        secret(item.secret + namespace, item.key_here, is_read_whole=not item.is_llama)
        for item in made
        if item.has_key
    ]
    if gateway and gateway.has_key:
        name = SECRET + namespace
        secrets.append(secret(name, gateway.key_here, is_read_whole=gateway.has_keda))
    unknown = [item for item in made if item.has_claim and not (options.storage or item.disk)]
    for item in unknown:
        size = manifests.storage(item, options)
        log.info(f"{item.claim}: {size}, as the model's size is unknown; set it: storage=…")
    if as_json:
        names = [path.name for path in sorted(target.iterdir())]
        result = {"folder": str(target), "files": names, "changed": is_new, "secrets": secrets}
        print(json.dumps(result, indent=1))
        return
    print(f"{'wrote' if is_new else 'nothing to do: up to date in'} {target}")
    if options.namespace:
        print(f"kubectl create namespace {options.namespace}")
    if gateway and gateway.has_keda:
        print(f"kubectl label namespace {KEDA} {'='.join(*manifests.CLIENT.items())}")
    print("\n".join([*secrets, f"kubectl apply -k {shown([str(target)])}"]))


def secret(name: str, key_here: str, *, is_read_whole: bool = False) -> str:
    """The command that creates the Secret of this name, with options of kubectl behind it. vLLM and
    KEDA take the whole file as the key, its line's end included."""
    create = f"kubectl create secret generic {name} --from-file={KEY}="
    if not key_here:
        return f"openssl rand -hex 32 | {NO_NEWLINE} | {create}/dev/stdin"
    if not is_read_whole:
        return create + shown([key_here])
    return f"{NO_NEWLINE} < {shown([key_here])} | {create}/dev/stdin"


def require_purpose(spec: InstanceSpec, ahead: estimate.MemoryEstimate) -> None:
    """Raise UsageError where nothing tells yet what a model is for: chat, or embeddings."""
    if ahead.header is None and not any(name in spec.server for name in ENDPOINTS):
        raise UsageError(
            f"{spec.place}.model: its purpose is read from the model, which is not here yet",
            "prepare it: "
            + doitw("prepare " + " ".join(f"{n}={v}" for n, v in spec.model.items())),
        )


class PodModel:
    """The prepared model of an instance, as a pod will have it."""

    def __init__(self, servers: Servers, spec: InstanceSpec) -> None:
        """Resolves it unless it is known already. Raises PipelineError."""
        model = servers.model_of(spec)
        check.require_known((model,))
        self.made_from, self.chain = model, model.require_chain()
        self.estimate = estimate.outlook(model, self.chain)
        self.converts = self.chain.conversion is not None
        self.is_local = self.chain.resolved.local
        # the user's own files are served in place
        self.weights = tuple(gguf.shards(self.chain.final)) if self.is_local else ()
        require_purpose(spec, self.estimate)
        if self.is_local and (self.converts or self.chain.quantization):
            raise UsageError(
                f"{spec.at('model.ref')} = {spec.model['model']}: no pod has that folder or file",
                f"{doitw('prepare')} here, then name the file: server.model = {self.chain.final}",
            )

    @property
    def variables(self) -> dict[str, str]:
        """The variables of `prepare`, with the resolved commit: every pod gets the same model."""
        source = self.chain.resolved.source
        if self.is_local:
            return {}
        variables = self.made_from.request.model_words
        if source["type"] == "hf":
            revision = str(source["revision"])
            variables |= {"model": f"hf:{variables['model']}", "revision": revision}
        return variables

    @property
    def model(self) -> PreparedModel:
        projector = serve.projector(self.made_from)
        return PreparedModel(
            path=self._in_pod(self.chain.final),
            mmproj=self._in_pod(projector) if projector else None,
            pooling=self.estimate.header.pooling if self.estimate.header else "none",
            ctx_size=self.estimate.trained,
        )

    def _in_pod(self, file: Path) -> PurePosixPath:
        if self.is_local:
            return PurePosixPath(MODELS, file.name)
        return PurePosixPath(DATA, file.relative_to(self.made_from.home.root).as_posix())

    def memory(self, options: ResolvedOptions) -> int:
        """For weights and context, in bytes; 0: unknown."""
        ctx_size = options.number("ctx-size") or self.estimate.trained
        needed = self.estimate.at(ctx_size) if ctx_size else None
        return needed.total if needed else self.estimate.bytes

    @property
    def disk(self) -> int:
        """Bytes on the claim after preparing."""
        fetched = self.chain.resolved.bytes
        if not self.converts:
            return fetched + (self.estimate.bytes if self.chain.quantization else 0)
        return 2 * fetched + self.estimate.bytes + CONVERTER
