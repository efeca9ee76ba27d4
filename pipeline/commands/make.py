"""What each step does, once `Model` or `Programs` says that there is something to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from pathlib import Path

from pipeline.bins.compile import source
from pipeline.core import log
from pipeline.core.errors import PipelineError
from pipeline.core.parallel import Background
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import disk_errors
from pipeline.core.store.receipts import Status
from pipeline.models import chain as chains
from pipeline.models import convert as conversions
from pipeline.models import converter, gguf, imatrix, mix_file, one_pass
from pipeline.models import fetch as fetching
from pipeline.models import quantize as quantizations
from pipeline.models.adapter import file_misfit
from pipeline.models.chain import Chain
from pipeline.models.convert import Conversion
from pipeline.models.quantize import Quantization

from . import beside, estimate, header_checks, headers, quality_check, quality_gate, resolve
from .model import Model
from .programs import Programs
from .request import Request
from .session import Session

# Looks at what was made, before it is published. Raises PipelineError.
Check = Callable[[Path], None]


def fetch_ahead(session: Session) -> None:
    """Fetch what the models need in the background, while llama.cpp is compiled: only what is
    surely needed. Its source is here by now, so that a model that it cannot convert is refused.
    What fails here is done again by the step itself."""
    programs, request = session.programs, session.request
    if request.force or request.offline or request.has_options:
        return  # options of the server are checked first, where there are any
    models = [copy(model) for model in session.models.values()]

    def work() -> None:
        for model in models:
            chain = model.chain()
            if chain is None or chain.final.exists() or header_checks.are_due(model):
                continue
            try:
                _fetch(model)
                if chain.conversion:
                    make_converter(model.home, request)
            except PipelineError as error:
                log.info(f"{error.message}\n(tried again once llama.cpp is built)")

    programs.fetched_ahead = Background(work)


def get_source(programs: Programs) -> None:
    source.fetch(programs.llama_cpp, programs.home, offline=programs.request.offline)


def build_bins(session: Session) -> None:
    if session.programs.are_compiled:
        fetch_ahead(session)
    make_programs(session.programs)


def make_programs(programs: Programs) -> None:
    for warning in programs.warnings():
        log.info(f"warning: {warning}")
    if programs.are_compiled and programs.without_page:
        log.info(f"llama-server is built without its page: {programs.without_page}")
    programs.make()


def tell_recipe(programs: Programs) -> None:
    """Print a cache key that changes whenever the build would."""
    source = programs.source
    recipe = json.dumps(source.recipe(), sort_keys=True)
    print(f"{source.tag}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}")


def settle(model: Model) -> None:
    """Hash what was copied or restored, and mark what is to be kept, before other steps look."""
    chain = model.require_chain()
    while moved := chains.moved(chain, model.home, model.programs.tool):
        with only_one(moved):
            receipts.revalidate(moved)
    if chain.conversion and chains.needs_keep_mark(chain):
        artifacts.keep(chain.conversion.target)


def fetch(model: Model) -> None:
    if model.programs.fetched_ahead:
        model.programs.fetched_ahead.wait()
    _fetch(model)


def _fetch(model: Model) -> None:
    chain = model.require_chain()
    if model.request.has_limit:
        quality_gate.reference(chain)  # a limit of nothing is refused before anything is fetched
    resolved = chain.resolved
    offline, force = model.request.offline, model.request.force
    for each in resolved.fetched:
        if each.source["type"] == "package":
            text = (model.base or model).require_reference().text
            archive = pins().demos[text].archive
            fetching.unpack(each, archive, model.home, offline=offline, force=force)
    of_hub = [each for each in resolved.fetched if each.source["type"] == "hf"]
    if not of_hub:
        return
    resolve.require_architecture(model, resolved)  # the source may have come since then
    with model.asking_anew():
        is_new = model.base is None and not model.is_done("fetch")
        # A mix or a limit that cannot be is refused once llama-quantize can read the header.
        has_checks = model.binaries.has("llama-quantize") and header_checks.are_due(model)
        if is_new and (has_checks or headers.foreign_code(model, model.require_chain())):
            make_converter(model.home, model.request)
            headers.require_convertible(model, model.require_chain())
            header_checks.require(model)
        for each in of_hub:
            fetching.fetch(each, offline=offline, force=force)


def make_converter(home: Home, request: Request) -> None:
    converter.make(home, force=request.again, offline=request.offline)


def convert(model: Model, *, is_named: bool = False) -> None:
    """Convert the model, unless `quantize` does that in the same pass; `is_named`: the command line
    names this step, so that its result is wanted."""
    chain, force = model.require_chain(), model.request.force
    if made := chain.conversion:
        # Whoever held the lock before may have made the file, used it and removed it.
        with only_one(made.target), ExitStack() as lock:
            needs, why = model.needs(), model.two_steps()
            is_due = needs is None or needs.convert
            if is_due:
                header_checks.require(model)
            if why:
                log.info(f"{made.title} is converted first and then quantized: {why}")
            if is_due and (why != "" or is_named):
                limit = None
                if chain.quantization is None and model.request.has_limit:
                    base = lock.enter_context(unquantized(model, chain))
                    limit = quality_check.check(model, chain, base)
                check = fits(model, model.base) if model.base else estimate.loads(model)
                with _limited(made.target, limit, force=force):
                    conversions.make(made, model.home, force=force, check=_both(check, limit))
    if chain.projector:
        conversions.make(chain.projector, model.home, force=force)


def convert_or_quantize(model: Model) -> None:
    """Make the quant of a model whose files are here, whichever step makes it."""
    if not model.is_done("convert"):
        convert(model)
    if not model.is_done("quantize"):
        quantize(model)


def _both(*checks: Check | None) -> Check:
    def check(made: Path) -> None:
        for each in filter(None, checks):
            each(made)

    return check


@contextmanager
def _limited(target: Path, limit: Check | None, *, force: bool) -> Iterator[None]:
    """Hold `target` to the limit, too, where the block leaves it as it was: it may have been
    published without that limit."""
    before = receipts.known_sha256(target)
    yield
    if limit and not force and receipts.known_sha256(target) == before:
        limit(target)


@contextmanager
def unquantized(model: Model, chain: Chain) -> Iterator[Path]:
    """The GGUF that the quant of the chain is compared with, for as long as the block runs: made
    where it is not there, and removed after the block where it is an intermediate file. Raises
    PipelineError."""
    of = quality_gate.reference(chain, keep=model.request.wanted.keep_f16)
    if of.conversion is None:
        yield of.path
        return
    with disk_errors(of.path.parent), only_one(of.path):
        conversions.make(of.conversion, model.home, check=estimate.loads(model))
        yield of.path
        entry = receipts.of(of.path)
        if entry and not entry.keep:
            artifacts.discard(of.path)


def fits(adapter: Model, model: Model) -> Check | None:
    """The check that a made adapter fits its model; None where that is not here."""
    chain = model.chain()
    if chain is None or not model.is_made(chain):
        return None
    final, name = chain.final, beside.name_of(adapter)

    def check(made: Path) -> None:
        if why := file_misfit(made, gguf.shards(final)):
            raise PipelineError(f"lora={name}: {why}", beside.ADAPTER_HINT)

    return check


def quantize(model: Model) -> None:
    """Make the quant, and before that its input, where that is not there any more."""
    chain, home, force = model.require_chain(), model.home, model.request.force
    made, between = chain.quantization, chain.conversion
    if made is None:
        return
    reads_text = made.imatrix is not None and imatrix.is_text(made.imatrix)
    imatrix_program = model.binaries.program("llama-imatrix") if reads_text else None
    if not (between or chain.resolved.fetched):  # else it was done before that
        header_checks.require(model)
    limited = model.request.has_limit and (
        force or not quality_gate.is_passed(model.request, model.programs, chain)
    )
    # Another run that makes another quant of the model removes the input when it is done with it:
    # hold it while it is read.
    with only_one(between.target) if between else nullcontext():
        if between and not between.target.exists():
            is_due = force or limited or not _is_current(model, chain)
            if is_due and _quantize_in_one_pass(model, made, between):
                return
            if is_due:
                conversions.make(between, home, check=estimate.loads(model))
        if made.imatrix and not reads_text and made.input.exists():
            imatrix.require_of(made.imatrix, made.input)
        limit = quality_check.check(model, chain, made.input) if limited else None
        with _limited(made.target, limit, force=force):
            quantizations.make(
                made,
                home,
                model.binaries.program("llama-quantize"),
                model.binaries.recipe("llama-quantize"),
                imatrix_program=imatrix_program,
                matrix_made=_chosen_mix(model, chain) if made.budget else None,
                force=force,
                check=limit,
            )
        if between and chains.leftover(chain):
            artifacts.discard(between.target)


def _is_current(model: Model, chain: Chain) -> bool:
    tool = model.binaries.recipe("llama-quantize")
    return chains.final_status(chain, model.home, tool) is Status.CURRENT


def _quantize_in_one_pass(model: Model, made: Quantization, between: Conversion) -> bool:
    """Quantize what the converter converts, without a file in between. Returns whether that was
    possible."""
    library, has_limit = model.binaries.quantizer, model.request.has_limit
    if library is None or one_pass.obstacle(made, has_library=True, has_limit=has_limit):
        return False
    return one_pass.make(
        made,
        between,
        model.home,
        model.binaries.program("llama-quantize"),
        library,
        model.binaries.recipe("llama-quantize"),
        force=model.request.force,
        check=estimate.loads(model),
    )


def _chosen_mix(model: Model, chain: Chain) -> Path | None:
    """Have the types of a mix chosen, unless the mix is made; the matrix to make it with."""
    made, force = chain.quantization, model.request.force
    if not made or (not force and _is_current(model, chain)):
        return None
    programs = mix_file.MixPrograms(
        quantize=model.binaries.program("llama-quantize"),
        imatrix=model.binaries.find("llama-imatrix"),
        perplexity=model.binaries.find("llama-perplexity"),
        tool=model.binaries.recipe("llama-quantize"),
    )
    tree = model.programs.llama_cpp.folder
    return mix_file.prepare(made, model.home, programs, tree, force=force)
