"""`plan`: what `serve` would do, and what it would cost. No weight is moved, nothing is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from pipeline.bins.binaries import program_file
from pipeline.bins.compile import cuda_toolkit, node, source
from pipeline.bins.compile.source import Source
from pipeline.bins.hardware import cuda_versions, nvidia
from pipeline.core import capacity, packages
from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.core.pins import Archive, pins
from pipeline.core.process import shown
from pipeline.core.store.publish import SPARE_BYTES
from pipeline.core.text import plural, size
from pipeline.models import choice, converter, fetch, quants
from pipeline.models.chain import Chain
from pipeline.models.memory import UNKNOWN, Device, Fit, Memory
from pipeline.serve import sandbox
from pipeline.serve.guard import port

from . import beside, check, estimate, headers, resolve, serve, summary
from .estimate import MemoryEstimate
from .model import Model
from .variables import CONTAINER

UP_TO_DATE, TO_DO = "up to date", "to do"
PARTS = ("weights", "context", "compute")  # of the memory


class PlannedStep(Struct, frozen=True):
    """A step; if it is to do, the bytes that it downloads and the room on disk that it takes."""

    name: str
    is_done: bool
    what: str
    download: int = 0
    disk: int = 0


def plan(model: Model) -> None:
    """Print the plan: text, or one JSON document with format=json. Raises PipelineError."""
    if model.request.servers.target == CONTAINER:
        raise UsageError("target=container: needs config= or profile=")
    model.programs.require_device()
    model.programs.require_tools()
    if model.request.wanted.quant == quants.ALL:
        check.check_request(model)
        rows = every_quant(model)
        print(json.dumps(rows, indent=1) if model.request.json else quants_text(rows))
        return
    check.require_known((model, *model.beside.values()))
    with model.asking_anew():
        values = collect(model)
    print(json.dumps(values, indent=1) if model.request.json else text(values))


def collect(model: Model) -> dict[str, Any]:
    """The plan as plain values. Sizes in bytes."""
    chain = model.require_chain()
    ahead = estimate.outlook(model, chain)
    steps = [*planned_steps(model, chain, ahead.bytes)]
    for name, each in model.beside.items():
        steps += steps_beside(name, each, {step.name for step in steps})
    todo = {step.name: step for step in steps if not step.is_done}
    server, warnings = None, tuple[str, ...]()
    if model.binaries.has("llama-server") and ahead.header and "build_bins" not in todo:
        planned = serve.planned(model, chain, ahead)
        server, fit, warnings = planned.server, planned.fit, planned.warnings
    else:
        fit = serve.fit_context(model, ahead)
    disk = sum(step.disk for step in todo.values())
    folder = model.home.models
    there = next(path for path in (folder, *folder.parents) if path.exists())
    is_named = model.request.ctx_size is not None
    return {
        "model": chain.resolved.name,
        "why": chain.resolved.why,
        "file": str(chain.final),
        "file_bytes": ahead.bytes,
        "files": [{"name": f.name, "bytes": f.size} for f in chain.resolved.files],
        "draft": beside.planned_draft(model),
        "adapters": beside.planned_adapters(model),
        "steps": [
            {"name": s.name, "state": UP_TO_DATE if s.is_done else TO_DO, "what": s.what}
            for s in steps
        ],
        "backend": model.programs.backend or None,
        "backend_why": model.programs.selection.why if model.programs.are_chosen else "",
        "warnings": [
            *model.programs.warnings(),
            *warnings,
            *(
                f"{code}: a model's own code never runs; if the conversion needs it, it fails"
                for code in (headers.foreign_code(model, chain) if "convert" in todo else ())
            ),
            *beside.draft_warnings(model, ahead.header),
            *beside.adapter_warnings(model),
            *serve.tuned_warnings(model, chain.final),
            *serve.model_warnings(ahead.header, server),
        ],
        "download_bytes": sum(step.download for step in todo.values()),
        "disk_peak_bytes": disk + SPARE_BYTES if disk else 0,
        "disk_free_bytes": shutil.disk_usage(there).free,
        "disk_folder": str(folder),
        "memory": memory_of(fit),
        "estimate_why": estimate_why(model, fit),
        "context": summary.context(fit.ctx_size, fit.trained, is_named=is_named),
        "executable": str(model.binaries.folder / program_file("llama-server")),
        "cmd": list(server.cmd) if server else None,
        "env": dict(server.env) if server else None,
        "sandbox": sandbox.shown(server) if server else None,
        "guard": port.shown(server) if server else None,
    }


def planned_steps(model: Model, chain: Chain, bytes_: int) -> Iterator[PlannedStep]:
    """The steps that `serve` consists of, in order. `bytes_`: of the GGUF."""
    programs, home = model.programs, model.home
    yield PlannedStep(
        "source",
        model.source_is_done(),
        f"llama.cpp {programs.llama_cpp.revision}",
        download=source_bytes(programs.llama_cpp, home),
        disk=source.UNPACKED_BYTES,
    )
    if programs.are_compiled and programs.page:
        used = programs.page.node
        is_missing = used == node.packaged(home) and not node.folder(home).is_current()
        sizes = (node.DOWNLOAD_BYTES, node.INSTALLED_BYTES) if is_missing else (0, 0)
        what = f"llama-server's page, with Node.js {used.version}"
        yield PlannedStep("build_ui", programs.page_is_done(), what, *sizes)
    if programs.release:
        sizes = (cuda_versions.DOWNLOAD_BYTES, cuda_toolkit.INSTALLED_BYTES)
        what = f"CUDA {programs.release.version}, NVIDIA's wheels"
        yield PlannedStep("cuda_toolkit", programs.toolkit_is_done(), what, *sizes)
    is_built, folder = programs.are_done(), str(model.binaries.folder)
    sizes = (0, 0) if is_built else (programs.source.download, programs.source.bytes)
    yield PlannedStep("build_bins", is_built, folder, *sizes)
    if fetched := chain.resolved.fetched:
        total = sum(each.bytes for each in fetched)
        what = f"{plural(sum(len(each.files) for each in fetched), 'file')}, {size(total)}"
        if chain.resolved.source["type"] == "package":
            archive = pins().demos[model.require_reference().text].archive
            sizes = (still_to_come(archive, home), total)
        else:
            force = model.request.force and not model.request.offline
            sizes = (sum(fetch.bytes_to_come(each, force=force) for each in fetched),) * 2
        yield PlannedStep("fetch", model.is_done("fetch"), what, *sizes)
    needs = model.needs()
    if made := chain.conversion:
        sizes = (converter.DOWNLOAD_BYTES, converter.INSTALLED_BYTES)  # as if none were cached
        what = str(converter.installed(home).folder)
        yield PlannedStep("converter", model.converter_is_done(), what, *sizes)
        is_done, why = not (needs and needs.convert), model.two_steps()
        if why == "":
            yield PlannedStep("convert", is_done, "in one pass with quantize")
        else:
            what = f"{made.target}, in a step of its own: {why}" if why else str(made.target)
            yield PlannedStep("convert", is_done, what, disk=made.need)
    if made := chain.projector:
        is_done = not (needs and needs.projector)
        yield PlannedStep("convert:mmproj", is_done, str(made.target), disk=made.need)
    if chain.quantization:
        what = str(chain.quantization.target)
        yield PlannedStep("quantize", model.is_done("quantize"), what, disk=bytes_)


def steps_beside(name: str, model: Model, known: set[str]) -> list[PlannedStep]:
    """The steps of a draft or an adapter that are not `known`, its own with its `name`."""
    chain = model.require_chain()
    bytes_ = 0 if model.base else estimate.outlook(model, chain).bytes
    own = ("fetch", "convert", "quantize")
    return [
        replace(step, name=f"{step.name}:{name}") if step.name in own else step
        for step in planned_steps(model, chain, bytes_)
        if step.name in own or step.name not in known
    ]


def source_bytes(llama_cpp: Source, home: Home) -> int:
    """The bytes to download for llama.cpp's source, if it is not there."""
    if llama_cpp.upgrade:
        return source.ARCHIVE_BYTES
    return still_to_come(pins().llama_cpp_archive, home) * llama_cpp.fetched


def still_to_come(archive: Archive, home: Home) -> int:
    """The bytes of a pinned archive, unless it was downloaded before."""
    return 0 if packages.cached(archive, home).exists() else archive.size


def estimate_why(model: Model, fit: Fit) -> str:
    """Why the memory is an estimate; empty where llama.cpp itself measured it."""
    if fit.memory is None or not fit.memory.estimate:
        return ""
    if model.binaries.has("llama-fit-params"):
        return "llama.cpp's own tool gave no figure"
    return "llama.cpp measures it once it is built"


def parts_of(memory: Memory | Device) -> dict[str, int]:
    return {f"{name}_bytes": getattr(memory, name) for name in PARTS}


def memory_of(fit: Fit) -> dict[str, Any] | None:
    """What the model needs at its context, and where that fits."""
    needed = fit.memory
    if needed is None:
        return None
    return {
        "estimate": needed.estimate,
        **parts_of(needed),
        "total_bytes": needed.total,
        "devices": [
            {"name": device.name, **parts_of(device)}
            for device in needed.devices
            if device.name != UNKNOWN
        ],
        "available_bytes": fit.available,
        "fits": fit.fits,
        "gpus": [
            {
                "name": gpu.name,
                "total_bytes": gpu.total,
                "free_bytes": gpu.free,
                "fits": needed.total <= gpu.free,
            }
            for gpu in nvidia.find()
        ],
    }


def text(plan: dict[str, Any]) -> str:
    """The plan for people."""
    width = max(len(step["name"]) for step in plan["steps"])
    steps = [
        f"{step['state']:<11} {step['name']:<{width}} {step['what']}" for step in plan["steps"]
    ]
    return "\n".join([*steps, "", *(f"{title:<11} {value}" for title, value in rows(plan))])


def rows(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the plan says beside the steps, in the order in which it is shown."""
    yield from (("warning", warning) for warning in plan["warnings"])
    if plan["backend"]:
        yield "backend", with_reason(plan["backend"], plan["backend_why"])
    yield "model", with_reason(plan["model"], plan["why"])
    if draft := plan["draft"]:
        named = f"{draft['model']}, {size(draft['file_bytes'])}" if "model" in draft else ""
        yield "draft", with_reason(draft["type"], named)
    for number, each in enumerate(plan["adapters"]):
        bytes_ = size(each["file_bytes"])
        yield "lora", f"{number}: {each['name']}, {bytes_}, scale {each['scale']:g}"
    if len(plan["files"]) > 1:
        yield from (("file", f"{f['name']}  {size(f['bytes'])}") for f in plan["files"])
    yield "download", size(plan["download_bytes"])
    peak, free = size(plan["disk_peak_bytes"]), size(plan["disk_free_bytes"])
    yield "disk", f"{peak} needed at the peak, {free} free in {plan['disk_folder']}"
    if needed := plan["memory"]:
        weights, cache, compute = (size(needed[f"{n}_bytes"]) for n in PARTS)
        about = "about " * needed["estimate"]
        yield "context", plan["context"]
        yield (
            "memory",
            f"{about}{size(needed['total_bytes'])}: "
            f"weights {weights}, cache {cache}, compute {compute}",
        )
        yield "RAM", f"{fits_text(needed['fits'])}: {size(needed['available_bytes'])} free"
        for gpu in needed["gpus"]:
            yield "GPU", f"{fits_text(gpu['fits'])}: {gpu['name']}, {size(gpu['free_bytes'])} free"
        if needed["estimate"]:
            yield "", f"an estimate by a formula: {plan['estimate_why']}"
    else:
        yield "memory", "known once the model is here"
    command = plan["cmd"] and shown([plan["executable"], *plan["cmd"]])
    yield "command", command or "known once llama.cpp is built and the model is here"
    yield from (("environment", f"{n}={value}") for n, value in (plan["env"] or {}).items())
    yield from ((name, plan[name]) for name in ("sandbox", "guard") if plan[name])


def with_reason(text: str, why: str) -> str:
    return f"{text}: {why}" if why else text


def fits_text(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def every_quant(model: Model) -> list[dict[str, Any]]:
    """Each quant that a repository has, or that can be made: file, memory, and whether it fits."""
    request = model.request
    of_any = request.replace(
        file_filter=replace(request.file_filter, quant=""),
        wanted=replace(request.wanted, quant=""),
    )
    base = Model(of_any, model.programs)
    reference = base.require_reference()
    sized: list[tuple[str, str, MemoryEstimate]] = []
    if reference.kind == "hub" and not (request.offline and base.known()):
        repo = resolve.RepoFiles(base)
        options = choice.options(repo.listing.files)
        options = choice.narrow(options, request.file_filter, reference.text)
        sized = [(o.label, o.name, repo.outlook(o)) for o in options if not o.missing]
        if not sized:
            base.resolved = repo.resolved()
    if not sized:
        if base.known() is None:
            resolve.resolve(base, store=False)
        chain = base.require_chain()
        if chain.resolved.kind == "gguf" and chain.resolved.precision not in quants.UNQUANTIZED:
            sized = [(chain.resolved.precision, chain.final.name, estimate.outlook(base, chain))]
        else:
            of = estimate.unquantized(base, base.chain_with("Q4_K_M"))
            made = ((quant, of(quant)) for quant in quants.TYPES)
            sized = [(quant, "", ahead) for quant, ahead in made if ahead.bytes]
    room, rows = capacity.memory(), []
    for quant, name, ahead in sized:
        fit = estimate.least(base, ahead, room)
        rows.append(
            {
                "quant": quant,
                "name": name,
                "file_bytes": ahead.bytes,
                "ctx_size": fit.ctx_size,
                "memory_bytes": fit.memory.total if fit.memory else None,
                "estimate": fit.memory.estimate if fit.memory else True,
                "fits": fit.fits,
            }
        )
    return sorted(rows, key=lambda row: row["file_bytes"])


def quants_text(rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        f"{row['quant'] or '?':<12} {size(row['file_bytes']):>9} "
        f"{size(row['memory_bytes']) if row['memory_bytes'] else '?':>9}  "
        f"{fits_text(row['fits']):<12}  {row['name']}".rstrip()
        for row in rows
    ]
    contexts = " or ".join(str(ctx) for ctx in sorted({row["ctx_size"] for row in rows}))
    about = ", an estimate" if any(row["estimate"] for row in rows) else ""
    head = f"{'quant':<12} {'file':>9} {'memory':>9}  (at a context of {contexts}{about})"
    return "\n".join([head, *lines])
