"""The table of steps: what each makes, when it is up to date, and what has to run before it.

Nothing is imported here but at need: the command line is checked against this table before doit,
or anything of the pipeline, is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import commands as do
from pipeline.core.errors import doitw

from .step import (
    PREPARATION,
    PREPARED_FOR,
    Step,
    after_resolve,
    before_resolve,
    before_start,
    builds,
    has_flags,
    is_auto,
    is_router,
    model,
    servers,
    servers_or_url,
)

if TYPE_CHECKING:
    from pipeline.commands.model import Steps

# Which groups of commands/variables.py, or single variables, a step reads: for `help` and shells.
OWN = ("force", "offline")  # of llama.cpp's own steps
RUN = ("force", "refresh", "frozen", "offline")
MODEL = ("model", "config", "profile", *RUN)
MAKING = (*MODEL, "programs")
SERVING = ("model", "programs", "server", "serving", "config", "profile", "engine", *RUN, "format")

STEPS = (
    # llama.cpp's programs
    Step(
        "source",
        "get llama.cpp's source: the submodule if checked out, else the pinned archive",
        run=lambda steps: do.make.get_source(steps),
        done=lambda steps: steps.source_is_done(),
        after=lambda steps: ["_check", *after_resolve(steps, "source")],
        clean=lambda steps: do.clean.clean_source(steps),
        forget=lambda steps: do.clean.forget_source(steps),
        reads=OWN,
    ),
    Step(
        "build_ui",
        "build llama-server's own page with npm, where Node.js is here",
        run=lambda steps: steps.programs.make_page(),
        done=lambda steps: steps.programs.page_is_done(),
        after=["_check", "_compiler", "source"],
        clean=lambda steps: do.clean.clean_page(steps),
        forget=lambda steps: do.clean.forget_page(steps),
        reads=("ui", *OWN),
    ),
    Step(
        "cuda_toolkit",
        "get NVIDIA's compiler where CUDA is built and no toolkit is installed",
        run=lambda steps: steps.programs.make_toolkit(),
        done=lambda steps: steps.programs.toolkit_is_done(),
        after=["_check", "_compiler"],
        clean=lambda steps: do.clean.clean_toolkit(steps),
        forget=lambda steps: do.clean.forget_toolkit(steps),
        reads=("programs", *OWN),
    ),
    Step(
        "build_bins",
        "compile llama-server and its tools for this machine",
        run=lambda steps: do.make.build_bins(steps),
        done=lambda steps: steps.bins_are_done(),
        after=lambda steps: [
            *("_check", "_compiler"),
            *(["source", "build_ui", "cuda_toolkit"] if steps.programs.are_compiled else []),
            *after_resolve(steps, "build_bins"),
        ],
        clean=lambda steps: do.clean.clean_bins(steps),
        forget=lambda steps: do.clean.forget_bins(steps),
        reads=("programs", *OWN),
    ),
    Step(
        "package",
        "pack the programs for other machines, as .tar.gz and .zip",
        run=lambda steps: do.package.pack(steps),
        after=lambda steps: ["_check", *(["source"] if steps.programs.are_compiled else [])],
        clean=lambda steps: do.package.clean(steps),
        forget=lambda steps: do.package.forget(steps),
        reads=("programs", *OWN),
    ),
    Step(
        "install_package",
        "install the programs of the archive pkg=",
        run=lambda steps: do.package.install_package(steps),
        after=["_writable"],
        reads=("package", "force"),
    ),
    Step(
        "recipe",
        "print a cache key that changes whenever the build would",
        run=lambda steps: do.make.tell_recipe(steps),
        reads=("programs",),
    ),
    # a model
    Step(
        "resolve",
        "find out which files model= means",
        run=lambda steps: do.resolve.resolve(steps),
        done=lambda steps: steps.resolve_is_done(),
        after=lambda steps: ["_check", *before_resolve(steps)],
        clean=lambda steps: do.clean.clean_resolve(steps),
        forget=lambda steps: do.clean.forget_resolve(steps),  # its answer is its receipt
        needs=model,
        each_model=True,
        reads=MODEL,
    ),
    Step(
        "fetch",
        "download the model's files",
        run=lambda steps: do.make.fetch(steps),
        done=lambda steps: steps.fetch_is_done(),
        # options of the server are checked first, where there are any
        after=lambda steps: ["resolve", *(["_settle", "_flags"] if has_flags(steps) else [])],
        clean=lambda steps: do.clean.clean(steps, "fetch"),
        forget=lambda steps: do.clean.forget(steps, "fetch"),
        needs=model,
        each_model=True,
        reads=MODEL,
    ),
    Step(
        "converter",
        "make the environment of llama.cpp's converter",
        run=lambda steps: do.make.make_converter(steps),
        done=lambda steps: steps.converter_is_done(),
        after=lambda steps: ["_settle", "fetch"] if after_resolve(steps, "converter") else [],
        clean=lambda steps: do.clean.clean_converter(steps),
        forget=lambda steps: do.clean.forget_converter(steps),
        reads=OWN,
    ),
    Step(
        "convert",
        "convert safetensors to GGUF",
        run=lambda steps: do.make.convert(steps),
        done=lambda steps: steps.convert_is_done(),
        after=PREPARATION[:-2],
        clean=lambda steps: do.clean.clean(steps, "convert"),
        forget=lambda steps: do.clean.forget(steps, "convert"),
        needs=model,
        each_model=True,
        reads=MAKING,
    ),
    Step(
        "quantize",
        "quantize the GGUF to quant= (q4_k_m)",
        run=lambda steps: do.make.quantize(steps),
        done=lambda steps: steps.quantize_is_done(),
        after=PREPARATION[:-1],
        clean=lambda steps: do.clean.clean(steps, "quantize"),
        forget=lambda steps: do.clean.forget(steps, "quantize"),
        needs=model,
        each_model=True,
        reads=MAKING,
    ),
    Step(
        "prepare",
        "do all that serve needs, and start nothing",
        run=lambda steps: do.install_model.place(steps),
        after=lambda steps: before_start(steps) if steps.configured else ["_frozen"],
        needs=model,
        is_group=lambda steps: steps.configured is None,
        reads=MAKING,
    ),
    Step(
        "serve",
        "serve model= in the foreground, preparing it if needed",
        run=lambda steps: do.up.serve(steps) if steps.configured else do.serve.serve(steps),
        after=lambda steps: (
            before_start(steps)
            if steps.configured
            else ["_port", *(["_flags"] if has_flags(steps) else []), "_frozen"]
        ),
        needs=model,
        reads=SERVING,
    ),
    # many servers
    Step(
        "up",
        "start the servers of config= in the background, and say when each is ready",
        run=lambda steps: (
            do.plan_servers.changes(steps) if steps.request.many.dry_run else do.up.up(steps)
        ),
        after=lambda steps: [] if steps.request.many.dry_run else before_start(steps),
        needs=servers,
        reads=("file", "programs", "sandbox", *RUN, "format"),
    ),
    Step(
        "ps",
        "list the servers that are up",
        run=lambda steps: do.ps.ps(steps),
        reads=("file", "format"),
    ),
    Step(
        "logs",
        "print the log of name=; follow=1 stays with it",
        run=lambda steps: do.ps.logs(steps),
        reads=("file",),
    ),
    Step(
        "down",
        "stop the servers of config=, or name= alone",
        run=lambda steps: do.ps.down(steps),
        reads=("file",),
    ),
    Step(
        "gateway",
        "serve one address for all servers of config=, in the foreground",
        run=lambda steps: do.gateway.run(steps),
        after=lambda steps: before_start(steps) if is_router(steps) else [],
        needs=servers,
        reads=("file", "programs", "host", "port", "api_key_file"),
    ),
    Step(
        "claude",
        "print how Claude Code is started on the gateway of config=; start=1 starts it",
        run_with=lambda steps, words: do.claude.run(steps, words),
        needs=servers_or_url,
        reads=("file", "api_key_file", "format"),
    ),
    Step(
        "systemd",
        "print a unit that keeps the servers of config= up",
        run=lambda steps: do.up.systemd(steps),
        after=lambda steps: ["_config"] if steps.configured else [],
        needs=servers,
        reads=("file", "sandbox"),
    ),
    Step(
        "kubernetes",
        "write manifests for the servers of config=, for kubectl apply -k",
        run=lambda steps: do.kubernetes.write(steps),
        needs=servers,
        reads=("file", "kubernetes", "format", *RUN),
    ),
    # what was made, and what would be
    Step(
        "lock",
        "write pipeline.lock: what model= was made of, for frozen=1",
        run=lambda steps: do.lock.lock(steps),
        after=["_lockable", "_frozen"],
        needs=model,
        reads=MAKING,
    ),
    Step(
        "plan",
        "show what serve would do, and what it would cost",
        run=lambda steps: (
            do.plan_servers.plan(steps.configured) if steps.configured else do.plan.plan(steps)
        ),
        needs=model,
        reads=SERVING,
    ),
    Step(
        "verify",
        "hash every artifact again and compare it with its receipt",
        run=lambda steps: do.verify.verify(steps),
        reads=("format",),
    ),
    Step(
        "doctor",
        "tell what this machine has, and what each backend lacks; format=json too",
        run=lambda steps: do.doctor.doctor(steps),
        reads=("format",),
    ),
    Step(
        "test",
        "run the tests; arguments after it go to pytest",
        run_with=lambda steps, words: do.test.run(words),
    ),
    Step("_help", "what a bare doit prints", run=lambda steps: print_help()),
    # mistakes, before any work
    Step(
        "_check",
        "say what is wrong with the request before any work",
        run=lambda steps: check_request(steps),
        after=lambda steps: ["_config"] if steps.configured else [],
    ),
    Step(
        "_writable",
        "say that nothing can be written before any work",
        run=lambda steps: do.check.require_writable(steps),
    ),
    Step(
        "_compiler",
        "say that a compiler is missing before any work",
        run=lambda steps: do.check.check_compiler(steps),
    ),
    Step(
        "_config",
        "say what is wrong with config= before any work",
        run=lambda steps: steps.configured.check() if steps.configured else None,
    ),
    Step(
        "_places",
        "say that a profile's folder cannot be written before any work",
        run=lambda steps: do.install_model.require_writable(steps),
        after=["_config"],
    ),
    Step(
        "_options",
        "hold the options in config= against the llama-server that will run",
        run=lambda steps: check_options(steps),
        after=lambda steps: ["_config", *builds(steps)],
    ),
    Step(
        "_settle",
        "hash the served file once where it was copied or restored",
        run=lambda steps: do.make.settle(steps),
        done=lambda steps: steps.is_settled(),
        after=PREPARED_FOR,
        each_model=True,
    ),
    Step(
        "_frozen",
        "with frozen=1: hold what was made against pipeline.lock",
        run=lambda steps: do.lock.require(steps),
        done=lambda steps: not steps.request.frozen,
        after=PREPARATION,
        each_model=True,
    ),
    Step(
        "_lockable",
        "say that pipeline.lock cannot be written before any work",
        run=lambda steps: do.lock.require_writable(steps),
    ),
    Step(
        "_port",
        "say that the port is taken before any work",
        run=lambda steps: do.serve.check_start(steps),
    ),
    Step(
        "_flags",
        "hold server.NAME=… against the options of the llama-server that will run",
        run=lambda steps: do.serve.check_flags(steps),
        after=["build_bins"],
    ),
)


# Steps that are too long for a line


def check_request(steps: Steps) -> None:
    for each in (*steps.models.values(),) or (steps,):
        do.check.check(each)
        if each.request.frozen:
            do.lock.require(each, before=True)
        # A repository that is not there should not cost a build, though quant=auto is decided
        # after it.
        reference = each.request.reference
        asks = is_auto(each) and not each.request.frozen and not each.resolve_is_done()
        if asks and reference and reference.kind == "hub":
            do.resolve.listing(each)


def check_options(steps: Steps) -> None:
    from pipeline.core import log

    if steps.configured:
        steps.configured.check(log.info)


def print_help() -> None:
    print(
        "Any model reference to a running llama.cpp server, doing only the work that is missing.\n"
    )
    for words, meaning in (
        ("serve model=demo", "a real model, served"),
        ("plan model=org/model", "what that would take"),
        ("list", "the steps; --status: which have something to do"),
        ("help serve", "a step and its variables"),
    ):
        print(f"    {doitw(words):<32} {meaning}")
