"""What each step does, where `steps` says that there is something to do."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack

from pipeline.bins.compile import source
from pipeline.core import log
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.locks import only_one
from pipeline.core.store.receipts import Status
from pipeline.models import chain as chains
from pipeline.models import convert as conversions
from pipeline.models import converter, imatrix
from pipeline.models import fetch as fetching
from pipeline.models import quantize as quantizations

from . import estimate, resolve
from .model import Steps


def get_source(steps: Steps) -> None:
    source.fetch(steps.llama_cpp, steps.home, offline=steps.request.offline)


def build_bins(steps: Steps) -> None:
    for warning in steps.programs.warnings():
        log.info(f"warning: {warning}")
    if steps.programs.are_compiled and steps.programs.without_page:
        log.info(f"llama-server is built without its page: {steps.programs.without_page}")
    steps.programs.make()


def tell_recipe(steps: Steps) -> None:
    """Print a cache key that changes whenever the build would."""
    source = steps.programs.source
    recipe = json.dumps(source.recipe(), sort_keys=True)
    print(f"{source.tag}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}")


def settle(steps: Steps) -> None:
    """Hash once what was copied or restored, and mark what is wanted now, before other steps
    look."""
    chain = steps.require_chain()
    while moved := chains.moved(chain, steps.home, steps.tool):
        with only_one(moved):
            receipts.revalidate(moved)
    if chain.conversion and chains.needs_keep_mark(chain):
        artifacts.keep(chain.conversion.target)


def fetch(steps: Steps) -> None:
    resolved, offline = steps.require_chain().resolved, steps.request.offline
    if resolved.local:
        return
    if resolved.source["type"] == "package":
        fetching.fetch_demo(resolved, steps.home, offline=offline)
        return
    resolve.require_architecture(steps, resolved)  # the source may have come since then
    with steps.asking_anew():
        if not steps.fetch_is_done() and estimate.foreign_code(steps, steps.require_chain()):
            make_converter(steps)
            estimate.require_convertible(steps, steps.require_chain())
        fetching.fetch(resolved, offline=offline)


def make_converter(steps: Steps) -> None:
    converter.make(steps.home, force=steps.request.again, offline=steps.request.offline)


def convert(steps: Steps) -> None:
    made = steps.require_chain().conversion
    if made:
        # Whoever held the lock before may have made the file, used it and removed it.
        with only_one(made.target):
            if not steps.convert_is_done():
                conversions.make(made, steps.home, force=steps.request.force)


def quantize(steps: Steps) -> None:
    chain, home, force = steps.require_chain(), steps.home, steps.request.force
    made, between = chain.quantization, chain.conversion
    if made is None:
        return
    program = steps.binaries.program("llama-quantize")
    tool = steps.binaries.recipe("llama-quantize")
    text = made.imatrix is not None and imatrix.is_text(made.imatrix)
    matrix = steps.binaries.program("llama-imatrix") if text else None
    with ExitStack() as lock:
        if between:
            # Another run that makes another quant of the model removes the input when it is done
            # with it: hold it while it is read, and make it once more where it was just removed.
            lock.enter_context(only_one(between.target))
            done = chains.final_status(chain, home, tool) is Status.CURRENT
            if (force or not done) and not between.target.exists():
                conversions.make(between, home)
        quantizations.make(made, home, program, tool, imatrix_program=matrix, force=force)
        if between and chains.leftover(chain):
            artifacts.discard(between.target)
