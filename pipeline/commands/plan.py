"""`plan`: what `serve` would do, and what it would cost. No weight is moved, nothing is made."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from pipeline.bins.binaries import program_file
from pipeline.bins.compile import cuda_toolkit, source
from pipeline.bins.hardware import cuda_versions, nvidia
from pipeline.core import capacity, packages
from pipeline.core.errors import UsageError
from pipeline.core.pins import pins
from pipeline.core.process import shown
from pipeline.core.store.publish import SPARE_BYTES
from pipeline.core.text import plural, size
from pipeline.models import choice, converter, fetch, quants
from pipeline.models.chain import Chain
from pipeline.models.memory import Fit
from pipeline.serve import sandbox

from . import check, estimate, lock, resolve, serve, summary
from .estimate import MemoryEstimate
from .model import Model
from .variables import CONTAINER

UP_TO_DATE, TO_DO = "up to date", "to do"


def plan(model: Model) -> None:
    """Print the plan: text, or one JSON document with format=json. Raises PipelineError."""
    if model.request.servers.target == CONTAINER:
        raise UsageError("target=container: is for config= or profile=")
    check.check_request(model)
    model.programs.require_tools()
    lock.require(model, before=True)
    if model.request.wanted.quant == quants.ALL:
        rows = every_quant(model)
        print(json.dumps(rows, indent=1) if model.request.json else quants_text(rows))
        return
    if not model.resolve_is_done():
        resolve.resolve(model, store=False)
    with model.asking_anew():
        told = collect(model)
    print(json.dumps(told, indent=1) if model.request.json else text(told))


def collect(model: Model) -> dict[str, Any]:
    """The plan as plain values. Sizes in bytes."""
    chain = model.require_chain()
    rows = [
        ("source", model.source_is_done(), f"llama.cpp {model.llama_cpp.commit[:12]}"),
    ]
    if model.programs.are_compiled and model.programs.page:
        node = f"llama-server's page, with Node.js {model.programs.page.node.version}"
        rows.append(("build_ui", model.programs.page_is_done(), node))
    if model.programs.release:
        kit = f"CUDA {model.programs.release.version}, NVIDIA's wheels"
        rows.append(("cuda_toolkit", model.programs.toolkit_is_done(), kit))
    rows.append(("build_bins", model.programs.are_done(), str(model.binaries.folder)))
    if not chain.resolved.local:
        what = f"{plural(len(chain.resolved.files), 'file')}, {size(chain.resolved.bytes)}"
        rows.append(("fetch", model.fetch_is_done(), what))
    if chain.conversion:
        rows.append(("converter", model.converter_is_done(), str(converter.folder(model.home))))
        rows.append(("convert", model.convert_is_done(), str(chain.conversion.target)))
    if chain.quantization:
        rows.append(("quantize", model.quantize_is_done(), str(chain.quantization.target)))
    todo = {name for name, done, _ in rows if not done}
    ahead = estimate.outlook(model, chain)
    server = None
    if model.binaries.has("llama-server") and ahead.header and "build_bins" not in todo:
        planned = serve.planned(model, chain, ahead)
        server, fit = planned.server, planned.fit
    else:
        fit = serve.fit_context(model, ahead)
    return {
        "model": chain.resolved.name,
        "why": chain.resolved.why,
        "file": str(chain.final),
        "file_bytes": ahead.bytes,
        "files": [{"name": f.name, "bytes": f.size} for f in chain.resolved.files],
        "steps": [
            {"name": name, "state": UP_TO_DATE if done else TO_DO, "what": what}
            for name, done, what in rows
        ],
        "backend": model.programs.backend or None,
        "backend_why": model.programs.selection.why if model.programs.are_chosen else "",
        "warnings": [
            *model.programs.warnings(),
            *code_warnings(model, chain, todo),
            *serve.model_warnings(ahead.header, server),
        ],
        "download_bytes": download_bytes(model, chain, todo),
        "disk_peak_bytes": disk_bytes(model, chain, todo, ahead),
        "disk_free_bytes": shutil.disk_usage(existing(model.home.models)).free,
        "disk_folder": str(model.home.models),
        "memory": memory_of(fit),
        "estimate_why": estimate_why(model, fit),
        "context": summary.context(
            fit.ctx_size, fit.trained, asked=model.request.settings.ctx_size is not None
        ),
        "executable": str(model.binaries.folder / program_file("llama-server")),
        "cmd": list(server.cmd) if server else None,
        "env": dict(server.env) if server else None,
        "sandbox": sandbox.shown(server) if server else None,
    }


def code_warnings(model: Model, chain: Chain, todo: set[str]) -> list[str]:
    """What is said of a model that brings code, where it is still to be converted."""
    if "convert" not in todo:
        return []
    return [
        f"{code}: code of a model never runs; if it cannot be converted without, it is refused"
        for code in estimate.foreign_code(model, chain)
    ]


def estimate_why(model: Model, fit: Fit) -> str:
    """Why the memory is an estimate; empty where llama.cpp itself told it."""
    if fit.memory is None or not fit.memory.estimate:
        return ""
    if model.binaries.has("llama-fit-params"):
        return "llama.cpp's own tool could not tell"
    return "llama.cpp tells its own figure once it is built"


def memory_of(fit: Fit) -> dict[str, Any] | None:
    """What the model needs at its context, and where that fits."""
    needed = fit.memory
    if needed is None:
        return None
    return {
        "estimate": needed.estimate,
        "weights_bytes": needed.weights,
        "context_bytes": needed.context,
        "compute_bytes": needed.compute,
        "total_bytes": needed.total,
        "devices": [
            {
                "name": device.name,
                "weights_bytes": device.weights,
                "context_bytes": device.context,
                "compute_bytes": device.compute,
            }
            for device in needed.devices
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


def text(told: dict[str, Any]) -> str:
    """The plan for people."""
    lines = [f"{step['state']:<11} {step['name']:<11} {step['what']}" for step in told["steps"]]
    lines += ["", *(f"warning     {warning}" for warning in told["warnings"])]
    if told["backend"]:
        lines += [
            f"backend     {told['backend']}{': ' * bool(told['backend_why'])}{told['backend_why']}"
        ]
    lines += [f"model       {told['model']}{': ' * bool(told['why'])}{told['why']}"]
    if len(told["files"]) > 1:
        lines += [f"file        {f['name']}  {size(f['bytes'])}" for f in told["files"]]
    lines += [
        f"download    {size(told['download_bytes'])}",
        f"disk        {size(told['disk_peak_bytes'])} needed at the peak, "
        f"{size(told['disk_free_bytes'])} free in {told['disk_folder']}",
    ]
    if needed := told["memory"]:
        about = "about " * needed["estimate"]
        lines += [
            f"context     {told['context']}",
            f"memory      {about}{size(needed['total_bytes'])}: "
            f"weights {size(needed['weights_bytes'])}, cache {size(needed['context_bytes'])}, "
            f"compute {size(needed['compute_bytes'])}",
            f"RAM         {verdict(needed['fits'])}: {size(needed['available_bytes'])} free",
        ]
        lines += [
            f"GPU         {verdict(gpu['fits'])}: {gpu['name']}, {size(gpu['free_bytes'])} free"
            for gpu in needed["gpus"]
        ]
        if needed["estimate"]:
            lines += [f"            an estimate by a formula: {told['estimate_why']}"]
    else:
        lines += ["memory      known once the model is here"]
    command = told["cmd"] and shown([told["executable"], *told["cmd"]])
    lines += [f"command     {command or 'known once llama.cpp is built and the model known'}"]
    lines += [f"environment {name}={value}" for name, value in (told["env"] or {}).items()]
    lines += [f"sandbox     {told['sandbox']}"] if told["sandbox"] else []
    return "\n".join(lines)


def verdict(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def every_quant(model: Model) -> list[dict[str, Any]]:
    """Each quant that a repository has, or that can be made: file, memory, and whether it fits."""
    request = model.request
    of_any = dataclasses.replace(
        request,
        file_filter=replace(request.file_filter, quant=""),
        wanted=replace(request.wanted, quant=""),
    )
    base = Model(of_any, model.programs)
    reference = base.require_reference()
    found: list[tuple[str, str, MemoryEstimate]] = []
    if reference.kind == "hub" and not (request.offline and base.known()):
        shelf = resolve.Shelf(base)
        options = choice.options(shelf.listing.files)
        options = choice.narrow(options, request.file_filter, reference.text)
        found = [(o.label, o.name, shelf.outlook(o)) for o in options if not o.missing]
        if not found:
            base.resolved_to(shelf.resolved())
    if not found:
        if base.known() is None:
            resolve.resolve(base, store=False)
        chain = base.require_chain()
        if chain.resolved.kind == "gguf" and chain.resolved.precision not in quants.UNQUANTIZED:
            found = [(chain.resolved.precision, chain.final.name, estimate.outlook(base, chain))]
        else:
            of = estimate.unquantized(base, base.chain_with("Q4_K_M"))
            made = ((quant, of(quant)) for quant in quants.TYPES)
            found = [(quant, "", ahead) for quant, ahead in made if ahead.bytes]
    room, rows = capacity.memory(), []
    for quant, name, ahead in found:
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
    told = [
        f"{row['quant'] or '?':<12} {size(row['file_bytes']):>9} "
        f"{size(row['memory_bytes']) if row['memory_bytes'] else '?':>9}  "
        f"{verdict(row['fits']):<12}  {row['name']}".rstrip()
        for row in rows
    ]
    contexts = " or ".join(str(ctx) for ctx in sorted({row["ctx_size"] for row in rows}))
    about = ", an estimate" if any(row["estimate"] for row in rows) else ""
    head = f"{'quant':<12} {'file':>9} {'memory':>9}  (at a context of {contexts}{about})"
    return "\n".join([head, *told])


def download_bytes(model: Model, chain: Chain, todo: set[str]) -> int:
    """What is still to come over the network; the converter's packages are counted as installed."""
    total = 0
    if "source" in todo and model.llama_cpp.fetched:
        archive = pins().llama_cpp_archive
        total += 0 if packages.cached(archive, model.home).exists() else archive.size
    if "cuda_toolkit" in todo:
        total += cuda_versions.DOWNLOAD_BYTES
    if "build_bins" in todo:
        total += model.programs.source.download
    if "fetch" in todo:
        if chain.resolved.source["type"] == "package":
            archive = pins().demo_archive
            total += 0 if packages.cached(archive, model.home).exists() else archive.size
        else:
            total += bytes_to_come(model, chain)
    if "converter" in todo:
        total += converter.DOWNLOAD_BYTES
    return total


def bytes_to_come(model: Model, chain: Chain) -> int:
    """What is to be downloaded of a model from the hub; offline nothing is."""
    request = model.request
    return fetch.bytes_to_come(chain.resolved, force=request.force and not request.offline)


def disk_bytes(model: Model, chain: Chain, todo: set[str], ahead: MemoryEstimate) -> int:
    """What all that is to do takes at its peak, intermediates included."""
    total = 0
    if "source" in todo:
        total += source.UNPACKED_BYTES
    if "cuda_toolkit" in todo:
        total += cuda_toolkit.INSTALLED_BYTES
    if "build_bins" in todo:
        total += model.programs.source.bytes
    if "converter" in todo:
        total += converter.INSTALLED_BYTES
    if "fetch" in todo:
        is_hub = chain.resolved.source["type"] == "hf"
        total += bytes_to_come(model, chain) if is_hub else chain.resolved.bytes
    if "convert" in todo and chain.conversion:
        total += chain.conversion.need
    if "quantize" in todo and chain.quantization:
        total += ahead.bytes
    return total + SPARE_BYTES if total else 0


def existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder
