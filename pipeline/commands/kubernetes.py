"""`kubernetes config=…`: manifests for the instances of a configuration. Nothing is started."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pipeline.core import log
from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import absolute
from pipeline.core.process import shown
from pipeline.deploy.kubernetes import folder, objects, specs, workload
from pipeline.deploy.kubernetes.options import Options, options, require_images
from pipeline.deploy.kubernetes.specs import AdaptedSpec
from pipeline.deploy.kubernetes.workload import DATA, KEY, MODELS, Workload, kubernetes_name
from pipeline.models import gguf
from pipeline.serve.config import checks, instances, vllm
from pipeline.serve.config.configuration import Configuration, InstanceSpec
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.config.options import ResolvedOptions
from pipeline.serve.server import LLAMA_CPP, VLLM, Server
from pipeline.serve.supervisor.state import require_known

from . import check, estimate, lock, resolve, serve
from .model import Steps
from .servers import Configured, require

# Options of llama-server that set its model's purpose; without them its metadata does.
ENDPOINTS = ("embeddings", "embedding", "reranking", "rerank", "pooling")
CONVERTER = 4 * 1024**3  # bytes of its environment and of llama.cpp's source
IMAGES = {LLAMA_CPP: "image", VLLM: "vllm_image"}
NO_NEWLINE = "tr -d '\\n'"


def write(steps: Steps) -> None:
    """Write the manifests, and print how to apply them. Raises PipelineError."""
    configured = require(steps)
    chosen = options(configured.given)
    chosen = replace(chosen, vllm_image=chosen.vllm_image or f"vllm/vllm-openai:v{vllm.version()}")
    configuration = check_configuration(configured, chosen)
    made = workloads(configured, configuration, chosen)
    target = out(configured)
    is_new = folder.write(folder.files(made, chosen), target)
    report(made, chosen, target, is_new, as_json=steps.request.json)


def out(configured: Configured) -> Path:
    """The folder to write."""
    if "out" in configured.given:
        return absolute(configured.given["out"]).resolve()
    return configured.steps.home.root / "deploy" / part_of(configured)


def part_of(configured: Configured) -> str:
    """The configuration's name: that of its file, or of the profile."""
    wish = configured.wish
    return kubernetes_name(Path(wish.config).stem if wish.config else wish.profile)


def check_configuration(configured: Configured, options: Options) -> Configuration:
    """The configuration with the named instances. Raises UsageError with all errors."""
    configuration = specs.without_programs(configured.configuration)
    names = configured.wish.names
    require_known(names, [spec.name for spec in configuration.enabled])
    chosen = tuple(spec for spec in configuration.enabled if not names or spec.name in names)
    configuration = replace(configuration, drafts=chosen, mistakes=configured.wrong)
    if not chosen and not configuration.mistakes:
        raise UsageError(f"{configuration.label}: no instance is enabled, so nothing to write")
    errors = [*configured.misplaced(), *clashes(chosen)]
    for spec in chosen:
        errors += specs.unpreparable(spec.model, spec.at)
    configuration = replace(configuration, mistakes=(*configuration.mistakes, *errors))
    checks.check(
        configuration,
        server=configured.server,
        flags=configured.flags(),
        environ=os.environ,
        note=log.info,
        is_there=specs.is_available,
    )
    engines = {spec.engine for spec in chosen}
    require_images(options, {x: variable for x, variable in IMAGES.items() if x in engines})
    if configuration.gateway.enable:
        log.info("the gateway is left out: it is for the servers of one machine")
    return configuration


def clashes(chosen: Sequence[InstanceSpec]) -> list[str]:
    """Instances whose objects would have the same name."""
    owners: dict[str, str] = {}
    return [
        f"{spec.place}: would have the same name as {owner} in a cluster; rename one"
        for spec in chosen
        if (owner := owners.setdefault(kubernetes_name(spec.name), spec.name)) != spec.name
    ]


def workloads(
    configured: Configured, configuration: Configuration, options: Options
) -> list[Workload]:
    """Each instance as it will run in a pod. Raises PipelineError."""
    flags = configured.flags() or {}
    adapted = {
        spec.name: specs.adapt(spec, configuration.folder, flags) for spec in configuration.drafts
    }
    if errors := [line for spec in adapted.values() for line in spec.errors]:
        raise UsageError("\n".join(errors))
    models = {spec.name: PodModel(configured, spec) for spec in configuration.drafts if spec.model}
    servers = instances.instances(
        replace(configuration, drafts=tuple(one.spec for one in adapted.values())),
        server=configured.server,
        flags=flags,
        models={name: model.model for name, model in models.items()},
        logs=configured.steps.home.logs,
        keys=configured.keys,
        xdg=configured.steps.home.run / "xdg",
        environ=os.environ,
    )
    if errors := [x for server in servers for x in specs.conflicts(server, scales=options.scales)]:
        raise UsageError("\n".join(errors))
    part = part_of(configured)
    return [
        _workload(server, adapted[server.name], models.get(server.name), part, options)
        for server in servers
    ]


def _workload(
    server: Server, adapted: AdaptedSpec, prepared: PodModel | None, part: str, options: Options
) -> Workload:
    is_llama = server.engine == LLAMA_CPP
    resolved = ResolvedOptions(adapted.spec, {})
    gpus, note = workload.gpus(server.gpu_ids, options.gpus)
    slots = resolved.text("parallel", "np") if is_llama else resolved.text("max-num-seqs")
    threads = resolved.text("threads") if is_llama else ""
    default_slots = workload.SLOTS if is_llama else workload.SEQUENCES
    weights = [*adapted.weights, *(prepared.weights if prepared else ())]
    size = sum(disk_size(file) for file in weights)
    made = Workload(
        instance=server,
        part_of=part,
        prepare=prepared.variables if prepared else {},
        converts=bool(prepared and prepared.converts),
        texts=adapted.texts,
        env=adapted.spec.control.env,
        gpus=gpus,
        slots=int(slots) if slots.isdecimal() and int(slots) else default_slots,
        threads=int(threads) if threads.isdecimal() else 0,
        memory=prepared.memory(resolved) if prepared else size,
        disk=prepared.disk if prepared and prepared.variables else size,
        key_here=adapted.key_here,
    )
    place = adapted.spec.place
    for line in (*adapted.notes, *([f"{place}: {note}"] if note else [])):
        log.info(line)
    for file in weights:
        log.info(f"{place}: copy {file} to {MODELS}/{file.name} on the claim {made.claim}")
    return made


def disk_size(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def report(
    made: Sequence[Workload], options: Options, target: Path, is_new: bool, *, as_json: bool
) -> None:
    """Print what was written, and what else the cluster needs."""
    namespace = f" -n {options.namespace}" if options.namespace else ""
    secrets = [secret(item, namespace) for item in made if item.has_key]
    unknown = [item for item in made if not (options.storage or item.disk)]
    for item in unknown:
        size = objects.storage(item, options)
        log.info(f"{item.claim}: {size}, as the model's size is unknown; set it: storage=…")
    if as_json:
        names = [path.name for path in sorted(target.iterdir())]
        result = {"folder": str(target), "files": names, "changed": is_new, "secrets": secrets}
        print(json.dumps(result, indent=1))
        return
    print(f"{'wrote' if is_new else 'nothing to do: up to date in'} {target}")
    if options.namespace:
        print(f"kubectl create namespace {options.namespace}")
    print("\n".join([*secrets, f"kubectl apply -k {shown([str(target)])}"]))


def secret(item: Workload, namespace: str) -> str:
    """The command that creates the Secret with its key."""
    create = f"kubectl create secret generic {item.secret}{namespace} --from-file={KEY}="
    if not item.key_here:
        return f"openssl rand -hex 32 | {NO_NEWLINE} | {create}/dev/stdin"
    if item.is_llama:
        return create + shown([item.key_here])
    # vLLM takes the whole file as the key
    return f"{NO_NEWLINE} < {shown([item.key_here])} | {create}/dev/stdin"


class PodModel:
    """The prepared model of an instance, as a pod will have it."""

    def __init__(self, configured: Configured, spec: InstanceSpec) -> None:
        """Resolves it unless it is known already. Raises PipelineError."""
        steps = configured.steps_of(spec)
        check.check_request(steps)
        lock.require(steps, before=True)
        if not steps.resolve_is_done():
            resolve.resolve(steps, store=False)
        self.spec, self.steps, self.chain = spec, steps, steps.require_chain()
        self.estimate = estimate.outlook(steps, self.chain)
        is_set = any(name in spec.server for name in ENDPOINTS)
        if self.estimate.header is None and not is_set:
            raise UsageError(
                f"{spec.place}.model: its purpose is read from the model, which is not here yet",
                "prepare it: "
                + doitw("prepare " + " ".join(f"{n}={v}" for n, v in spec.model.items())),
            )
        if self.chain.resolved.local and (self.converts or self.chain.quantization):
            raise UsageError(
                f"{spec.at('model.ref')} = {spec.model['model']}: no pod has that folder or file",
                f"{doitw('prepare')} here, then name the file: server.model = {self.chain.final}",
            )

    @property
    def converts(self) -> bool:
        return self.chain.conversion is not None

    @property
    def weights(self) -> tuple[Path, ...]:
        """The user's own files, which are served in place."""
        return tuple(gguf.shards(self.chain.final)) if self.chain.resolved.local else ()

    @property
    def variables(self) -> dict[str, str]:
        """The variables of `prepare`, with the resolved commit: every pod gets the same model."""
        source = self.chain.resolved.source
        if self.chain.resolved.local:
            return {}
        variables = self.steps.request.asked
        if source["type"] == "hf":
            revision = str(source["revision"])
            variables |= {"model": f"hf:{variables['model']}", "revision": revision}
        return variables

    @property
    def model(self) -> PreparedModel:
        projector = serve.projector(self.steps)
        return PreparedModel(
            path=self._in_pod(self.chain.final),
            mmproj=self._in_pod(projector) if projector else None,
            name=self.chain.resolved.name,
            pooling=self.estimate.header.pooling if self.estimate.header else "none",
            ctx_size=self.estimate.trained,
        )

    def _in_pod(self, file: Path) -> PurePosixPath:
        if self.chain.resolved.local:
            return PurePosixPath(MODELS, file.name)
        return PurePosixPath(DATA, file.relative_to(self.steps.home.root).as_posix())

    def memory(self, options: ResolvedOptions) -> int:
        """For weights and context, in bytes; 0: unknown."""
        text = options.text("ctx-size")
        ctx_size = int(text) if text.isdecimal() and int(text) else self.estimate.trained
        needed = self.estimate.at(ctx_size) if ctx_size else None
        return needed.total if needed else self.estimate.bytes

    @property
    def disk(self) -> int:
        """Bytes on the claim after preparing."""
        fetched = self.chain.resolved.bytes
        if not self.converts:
            return fetched + (self.estimate.bytes if self.chain.quantization else 0)
        return 2 * fetched + self.estimate.bytes + CONVERTER
