"""`package` and `install_package`: the programs for other machines, and from them."""

from __future__ import annotations

from pipeline.bins import platform
from pipeline.bins.binaries import program_file
from pipeline.bins.package import install
from pipeline.bins.package import pack as packing
from pipeline.bins.package.pack import Package
from pipeline.core import log
from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import CHOSEN_BY
from pipeline.core.process import shown
from pipeline.core.store import receipts

from . import check
from .programs import Programs

VARIANTS = "*ggml-cpu-*"  # libraries with the code of one kind of processor each


def planned(programs: Programs) -> Package:
    """What to pack."""
    source, llama_cpp, compiled = programs.source, programs.llama_cpp, programs.are_compiled
    server = receipts.load(source.programs).get(program_file("llama-server"))
    terms = (llama_cpp.folder if compiled else source.target) / "LICENSE"
    return Package(
        folder=source.programs,
        commit=source.commit,
        tree=llama_cpp.tree if compiled else "",
        platform=platform.platform_tag(),
        backend=programs.backend or "package",
        portable=bool(programs.options.portable) or any(source.programs.glob(VARIANTS)),
        home=programs.home,
        license=terms if compiled or terms.is_file() else None,
        made_by=server.recipe if server else {},
        source=llama_cpp.folder if compiled else None,
    )


def pack(programs: Programs) -> None:
    """Make the programs for other processors, unless they stand, and pack them. Prints the
    archives. Raises PipelineError."""
    programs = programs.portable()
    if programs.are_external:
        raise UsageError(
            "LLAMA_SERVER_BINS_DIR names programs of your own, which are not packed",
            "unset it to have them built and packed",
        )
    programs.require_device()
    programs.require_tools()
    if not programs.are_done():
        programs.make_page()
        programs.make_toolkit()
        programs.make()
    for path in packing.make(planned(programs), force=programs.request.again):
        print(path)


def clean(programs: Programs) -> None:
    packing.clean(planned(programs.portable()))


def forget(programs: Programs) -> None:
    packing.forget(planned(programs.portable()))


def install_package(programs: Programs) -> None:
    """Unpack, check, try out and swap in an archive of programs. Raises PipelineError."""
    request, home = programs.request, programs.home
    check.require_writable(home)
    pkg, target = request.pkg, request.into or install.default_target(home)
    if pkg is None:
        raise UsageError("no package given", "pass pkg=PATH")
    chosen_by = "into=" if request.into else CHOSEN_BY
    install.install(pkg, target, home=home, force=request.again, chosen_by=chosen_by)
    if request.into is None:
        log.info(f"serve with it: {doitw('serve bins=package model=…')}")
    else:
        programs_dir = shown([target / "bin"])
        log.info(f"serve with it: LLAMA_SERVER_BINS_DIR={programs_dir} {doitw('serve model=…')}")
