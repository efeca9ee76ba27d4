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
from pipeline.deploy.kubernetes import drafts, folder, objects, workload
from pipeline.deploy.kubernetes.drafts import Fitted
from pipeline.deploy.kubernetes.options import Options, options, require_images
from pipeline.deploy.kubernetes.workload import DATA, MODELS, Workload
from pipeline.models import gguf
from pipeline.serve.config import checks, instances, vllm
from pipeline.serve.config.configuration import Configuration, InstanceSpec
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.config.options import ResolvedOptions
from pipeline.serve.server import LLAMA_CPP, VLLM, Server

from . import check, estimate, lock, resolve, serve
from .model import Steps
from .servers import Configured, require, require_known

# Options of llama-server that say what its model is for; else its metadata does.
ENDPOINTS = ("embeddings", "embedding", "reranking", "rerank", "pooling")
CONVERTER = 4 * 1024**3  # bytes of its environment and of llama.cpp's source
IMAGES = {LLAMA_CPP: "image", VLLM: "vllm_image"}
NO_NEWLINE = "tr -d '\\n'"


def write(steps: Steps) -> None:
    """Write the manifests, and say how to apply them. Raises PipelineError."""
    configured = require(steps)
    asked = options(configured.given)
    asked = replace(asked, vllm_image=asked.vllm_image or f"vllm/vllm-openai:v{vllm.version()}")
    configuration = look(configured, asked)
    found = workloads(configured, configuration, asked)
    target = out(configured)
    is_new = folder.write(folder.files(found, asked), target)
    tell(found, asked, target, is_new, as_json=steps.request.json)


def out(configured: Configured) -> Path:
    """The folder that is written."""
    if "out" in configured.given:
        return absolute(configured.given["out"]).resolve()
    return configured.steps.home.root / "deploy" / part_of(configured)


def part_of(configured: Configured) -> str:
    """The configuration's name: that of its file, or of the profile."""
    wish = configured.wish
    return workload.kubernetes_name(Path(wish.config).stem if wish.config else wish.profile)


def look(configured: Configured, asked: Options) -> Configuration:
    """The configuration with the instances that are named. Raises UsageError that names all
    mistakes."""
    told = drafts.without_programs(configured.configuration)
    named = configured.wish.names
    require_known(named, [draft.name for draft in told.enabled])
    chosen = tuple(one for one in told.enabled if not named or one.name in named)
    told = replace(told, drafts=chosen, mistakes=configured.wrong)
    if not chosen and not told.mistakes:
        raise UsageError(f"{told.label}: enables no instance, so there is nothing to write")
    wrong = [*configured.misplaced(), *clashes(chosen)]
    for draft in chosen:
        wrong += drafts.not_made_there(draft.model, draft.at)
    told = replace(told, mistakes=(*told.mistakes, *wrong))
    checks.check(
        told,
        server=configured.server,
        flags=configured.flags(),
        environ=os.environ,
        note=log.info,
        is_there=drafts.is_there,
    )
    engines = {draft.engine for draft in chosen}
    require_images(asked, {one: name for one, name in IMAGES.items() if one in engines})
    if told.gateway.enable:
        log.info("the gateway is left out: it leads to the servers of one machine")
    return told


def clashes(chosen: Sequence[InstanceSpec]) -> list[str]:
    """Two whose objects would have one name."""
    seen: dict[str, str] = {}
    return [
        f"{one.place}: would have the same name as {other} in a cluster; rename one"
        for one in chosen
        if (other := seen.setdefault(workload.kubernetes_name(one.name), one.name)) != one.name
    ]


def workloads(
    configured: Configured, configuration: Configuration, asked: Options
) -> list[Workload]:
    """Each instance as it will run in a pod. Raises PipelineError."""
    flags = configured.flags() or {}
    fits = {
        one.name: drafts.fitted(one, configuration.folder, flags) for one in configuration.drafts
    }
    if wrong := [line for fit in fits.values() for line in fit.mistakes]:
        raise UsageError("\n".join(wrong))
    models = {one.name: PodModel(configured, one) for one in configuration.drafts if one.model}
    started = instances.instances(
        replace(configuration, drafts=tuple(fit.draft for fit in fits.values())),
        server=configured.server,
        flags=flags,
        models={name: one.model for name, one in models.items()},
        logs=configured.steps.home.logs,
        keys=configured.keys,
        xdg=configured.steps.home.run / "xdg",
        environ=os.environ,
    )
    if wrong := [line for one in started for line in drafts.misled(one, scales=asked.scales)]:
        raise UsageError("\n".join(wrong))
    part = part_of(configured)
    return [_workload(one, fits[one.name], models.get(one.name), part, asked) for one in started]


def _workload(
    instance: Server, fit: Fitted, prepared: PodModel | None, part: str, asked: Options
) -> Workload:
    is_llama = instance.engine == LLAMA_CPP
    given = ResolvedOptions(fit.draft, {})
    gpus, told = workload.cards(instance.gpu_ids, asked.gpus)
    slots = given.text("parallel", "np") if is_llama else given.text("max-num-seqs")
    threads = given.text("threads") if is_llama else ""
    usual = workload.SLOTS if is_llama else workload.SEQUENCES
    weights = [*fit.weights, *(prepared.weights if prepared else ())]
    here = sum(bytes_of(file) for file in weights)
    made = Workload(
        instance=instance,
        part_of=part,
        prepare=prepared.variables if prepared else {},
        converts=bool(prepared and prepared.converts),
        texts=fit.texts,
        env=fit.draft.control.env,
        gpus=gpus,
        slots=int(slots) if slots.isdecimal() and int(slots) else usual,
        threads=int(threads) if threads.isdecimal() else 0,
        memory=prepared.memory(given) if prepared else here,
        disk=prepared.disk if prepared and prepared.variables else here,
        key_here=fit.key_here,
    )
    for line in (*fit.notes, *([f"{fit.draft.place}: {told}"] if told else [])):
        log.info(line)
    for file in weights:
        log.info(
            f"{fit.draft.place}: copy {file} to {MODELS}/{file.name} on the claim {made.claim}"
        )
    return made


def bytes_of(path: Path) -> int:
    """The size of a file, or of all in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def tell(
    found: Sequence[Workload], asked: Options, target: Path, is_new: bool, *, as_json: bool
) -> None:
    """Say what was written, and what the cluster needs beside it."""
    space = f" -n {asked.namespace}" if asked.namespace else ""
    secrets = [secret(one, space) for one in found if one.has_key]
    unknown = [one for one in found if not (asked.storage or one.disk)]
    for one in unknown:
        size = objects.storage(one, asked)
        log.info(f"{one.claim}: {size}, for the size of the model is not known; storage=… says it")
    if as_json:
        names = [path.name for path in sorted(target.iterdir())]
        told = {"folder": str(target), "files": names, "changed": is_new, "secrets": secrets}
        print(json.dumps(told, indent=1))
        return
    print(f"{'wrote' if is_new else 'nothing to do: as asked for in'} {target}")
    if asked.namespace:
        print(f"kubectl create namespace {asked.namespace}")
    print("\n".join([*secrets, f"kubectl apply -k {shown([str(target)])}"]))


def secret(one: Workload, space: str) -> str:
    """The command that makes the Secret of its key."""
    made = f"kubectl create secret generic {one.secret}{space} --from-file={workload.KEY}="
    if not one.key_here:
        return f"openssl rand -hex 32 | {NO_NEWLINE} | {made}/dev/stdin"
    if one.is_llama:
        return made + shown([one.key_here])
    return f"{NO_NEWLINE} < {shown([one.key_here])} | {made}/dev/stdin"  # vLLM takes all of it


class PodModel:
    """The model of an instance that is prepared first, as a pod will have it."""

    def __init__(self, configured: Configured, draft: InstanceSpec) -> None:
        """Resolves it, where it is not known yet. Raises PipelineError."""
        steps = configured.steps_of(draft)
        check.check_request(steps)
        lock.require(steps, before=True)
        if not steps.resolve_is_done():
            resolve.resolve(steps, store=False)
        self.draft, self.steps, self.chain = draft, steps, steps.require_chain()
        self.ahead = estimate.outlook(steps, self.chain)
        says = any(name in draft.server for name in ENDPOINTS)
        if self.ahead.header is None and not says:
            raise UsageError(
                f"{draft.place}.model: what it is for stands in the model, which is not here yet",
                "prepare it: "
                + doitw("prepare " + " ".join(f"{n}={v}" for n, v in draft.model.items())),
            )
        if self.chain.resolved.local and (self.converts or self.chain.quantization):
            raise UsageError(
                f"{draft.at('model.ref')} = {draft.model['model']}: no pod has that folder or file",
                f"{doitw('prepare')} here, then name the file: server.model = {self.chain.final}",
            )

    @property
    def converts(self) -> bool:
        return self.chain.conversion is not None

    @property
    def weights(self) -> tuple[Path, ...]:
        """Files of the user's own, which are served in place."""
        return tuple(gguf.shards(self.chain.final)) if self.chain.resolved.local else ()

    @property
    def variables(self) -> dict[str, str]:
        """Of `prepare`, with the commit that was found: every pod has the same model."""
        source = self.chain.resolved.source
        if self.chain.resolved.local:
            return {}
        asked = self.steps.request.asked
        if source["type"] == "hf":
            asked |= {"model": f"hf:{asked['model']}", "revision": str(source["revision"])}
        return asked

    @property
    def model(self) -> PreparedModel:
        projector = serve.projector(self.steps)
        return PreparedModel(
            path=self._there(self.chain.final),
            mmproj=self._there(projector) if projector else None,
            name=self.chain.resolved.name,
            pooling=self.ahead.header.pooling if self.ahead.header else "none",
            ctx_size=self.ahead.trained,
        )

    def _there(self, file: Path) -> PurePosixPath:
        if self.chain.resolved.local:
            return PurePosixPath(MODELS, file.name)
        return PurePosixPath(DATA, file.relative_to(self.steps.home.root).as_posix())

    def memory(self, given: ResolvedOptions) -> int:
        """For weights and context, in bytes; 0: not known."""
        told = given.text("ctx-size")
        ctx_size = int(told) if told.isdecimal() and int(told) else self.ahead.trained
        needed = self.ahead.at(ctx_size) if ctx_size else None
        return needed.total if needed else self.ahead.bytes

    @property
    def disk(self) -> int:
        """For all that preparing leaves on the claim, in bytes."""
        fetched = self.chain.resolved.bytes
        if not self.converts:
            return fetched + (self.ahead.bytes if self.chain.quantization else 0)
        return 2 * fetched + self.ahead.bytes + CONVERTER
