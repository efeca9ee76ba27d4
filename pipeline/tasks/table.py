"""The table of steps: what each makes, when it is up to date, and what has to run before it.

Nothing is imported here but at need: the command line is checked against this table before doit,
or anything of the pipeline, is loaded.
"""

from __future__ import annotations

from pipeline import commands as do
from pipeline.bins.compile import source, web_ui
from pipeline.models import converter

from . import nodes, step
from .checks import HIDDEN
from .step import PREPARATION, ModelStep, Step

# Which groups of commands/variables.py, or single variables, a step reads: for `help` and shells.
OWN = ("force", "offline")  # of llama.cpp's own steps
RUN = ("force", "refresh", "frozen", "offline")
MODEL = ("model", "config", "profile", *RUN)
GATE = ("max_kld", "min_cosine", "text", "chunks")  # whether a quant is published
MAKING = (*MODEL, *GATE, "programs")
OF_SERVERS = ("sandbox", "guard", "origins", "hosts")  # of all in a file
SERVER = ("programs", "address", "server", "serving")
SERVING = ("model", *GATE, *SERVER, "tuned", "config", "profile", "engine", *RUN, "format")


STEPS: tuple[Step | ModelStep, ...] = (
    # llama.cpp's programs
    Step(
        "source",
        "get llama.cpp's source: the submodule if checked out, else the pinned archive",
        run=lambda session: do.make.get_source(session.programs),
        done=lambda session: session.all_models(lambda model: model.source_is_done()),
        due="not on disk as it was checked",
        after=lambda session: ["_check", *step.after_resolve(session, "source")],
        clean=lambda session: do.clean.clean_source(session.programs),
        forget=lambda session: source.forget(session.programs.llama_cpp),
        reads=OWN,
        also="serve",
    ),
    Step(
        "build_ui",
        "build llama-server's own page with npm",
        run=lambda session: session.programs.make_page(),
        done=lambda session: session.programs.page_is_done(),
        due="not built of this source with this Node.js",
        after=["_check", "_compiler", "source"],
        clean=lambda session: web_ui.clean(session.home),
        forget=lambda session: web_ui.forget(session.home),
        reads=("ui", *OWN),
        also="serve",
    ),
    Step(
        "cuda_toolkit",
        "get NVIDIA's compiler where CUDA is built and no toolkit is installed",
        run=lambda session: session.programs.make_toolkit(),
        done=lambda session: session.programs.toolkit_is_done(),
        due="not installed",
        after=["_check", "_compiler"],
        clean=lambda session: do.clean.clean_toolkit(session.programs),
        forget=lambda session: do.clean.forget_toolkit(session.programs),
        reads=("programs", *OWN),
        also="serve",
    ),
    Step(
        "build_bins",
        "compile llama-server and its tools for this machine",
        run=lambda session: do.make.build_bins(session),
        done=lambda session: session.programs.are_done(),
        due="not built of this source, with these options, for this processor",
        after=lambda session: ["_check", "_compiler", *step.before_build(session)],
        setup=lambda session: ["source", "cuda_toolkit"] if session.programs.are_compiled else [],
        clean=lambda session: do.clean.clean_bins(session.programs),
        forget=lambda session: session.programs.forget(),
        reads=("programs", *OWN),
        also="serve",
    ),
    Step(
        "package",
        "pack the programs for other machines, as .tar.gz and .zip",
        run=lambda session: do.package.pack(session.programs),
        after=lambda session: ["_check", *(["source"] if session.programs.are_compiled else [])],
        clean=lambda session: do.package.clean(session.programs),
        forget=lambda session: do.package.forget(session.programs),
        reads=("programs", *OWN),
    ),
    Step(
        "install_package",
        "install the programs of the archive pkg=",
        run=lambda session: do.package.install_package(session.programs),
        reads=("package", "force"),
    ),
    Step(
        "upgrade",
        "build another llama.cpp beside this one, compare them, and switch to it",
        run=lambda session: do.upgrade.upgrade(session),
        reads=("upgrade", "programs", *MODEL, "server", "dry_run", "yes", "format"),
    ),
    Step(
        "recipe",
        "print a cache key that changes whenever the build would",
        run=lambda session: do.make.tell_recipe(session.programs),
        reads=("programs",),
    ),
    # a model
    ModelStep(
        "resolve",
        "find out which files model= means",
        run=lambda model: do.resolve.resolve(model),
        done=lambda model: model.resolve_is_done(),
        due="not resolved yet",
        after=lambda model: ["_check", *step.before_resolve(model)],
        clean=lambda model: do.clean.clean_resolve(model),
        forget=lambda model: do.clean.forget_resolve(model),  # its answer is its receipt
        reads=MODEL,
    ),
    step.making(
        "fetch",
        "download the model's files",
        run=lambda model: do.make.fetch(model),
        # options of the server are checked first, where there are any
        after=lambda model: [
            *("resolve", "_fits", *step.before_talk()),
            *(["_settle", "_flags"] if model.request.has_options else step.beside_build()),
        ],
        reads=MAKING,
    ),
    Step(
        "converter",
        "make the environment of llama.cpp's converter",
        run=lambda session: do.make.make_converter(session.home, session.request),
        done=lambda session: session.all_models(lambda model: model.converter_is_done()),
        due="not installed, or changed since then",
        after=lambda session: (
            ["_settle", "fetch"] if step.after_resolve(session, "converter") else []
        ),
        clean=lambda session: do.clean.clean_converter(session.home),
        forget=lambda session: converter.installed(session.home).forget(),
        reads=OWN,
        also="serve",
    ),
    step.making(
        "convert",
        "convert safetensors to GGUF",
        run=lambda model: do.make.convert(model, is_named=step.is_named("convert")),
        after=PREPARATION[:-2],
        reads=MAKING,
    ),
    step.making(
        "quantize",
        "quantize the GGUF to quant= (q4_k_m)",
        run=lambda model: do.make.quantize(model),
        after=PREPARATION[:-1],
        reads=MAKING,
    ),
    Step(
        "prepare",
        "do all that serve needs, and start nothing",
        run=lambda session: do.launch.install_models(session.servers) if session.servers else None,
        after=lambda session: step.before_start(session) if session.servers else ["_frozen"],
        needs_model=True,
        is_group=lambda session: session.servers is None,
        reads=MAKING,
        also="serve",
    ),
    Step(
        "serve",
        "serve model= in the foreground, preparing it if needed",
        run=lambda session: (
            do.up.serve(session.servers) if session.servers else do.serve.serve(session.model)
        ),
        after=lambda session: (
            step.before_start(session)
            if session.servers
            else ["_port", *(["_flags"] if session.request.has_options else []), "_frozen"]
        ),
        needs_model=True,
        reads=SERVING,
    ),
    Step(
        "chat",
        "talk with model=, name= of a running server, or url=, in the terminal",
        run=lambda session: do.chat.chat(session),
        after=lambda session: [
            "_chat",
            *(["_talks", "_frozen"] if session.request.reference else []),
        ],
        reads=(
            *("prompt", "system", "url", "name", "api_key_file", "model", "programs", "server"),
            *("serving", "tuned", "config", "profile", "engine", *RUN),
        ),
    ),
    Step(
        "tune",
        "find the fastest settings of model= on this machine, for serve and up",
        run=lambda session: do.tune.tune(session.model),
        after=lambda session: [*(["_flags"] if session.request.has_options else []), "_frozen"],
        needs_model=True,
        reads=(
            *("model", "programs", "server", "sandbox", "ready_timeout", "stop_timeout"),
            *("budget", "lossy", *RUN, "format"),
        ),
    ),
    Step(
        "quality",
        "measure what quants= lost against the unquantized model, with error bars",
        run=lambda session: do.quality.quality(session),
        after=step.before_measuring,
        needs_model=True,
        reads=(
            *("model", "quants", "text", "chunks", "programs", "ctx_size", "threads"),
            *("gpu_layers", "device", "refresh", "offline", "format"),
        ),
    ),
    Step(
        "compare",
        "compare quants= of a model by size, quality, speed and memory, on a page with pictures",
        run=lambda session: do.compare.compare(session),
        after=step.before_measuring,
        needs_model=True,
        reads=(
            *("model", "quants", "text", "chunks", "compare", "programs", "ctx_size", "threads"),
            *("gpu_layers", "device", "force", "refresh", "offline", "out", "format"),
        ),
    ),
    # many servers
    Step(
        "up",
        "start the servers of config= in the background, and report when each is ready",
        run=lambda session: (
            do.plan_servers.changes(session.require_servers())
            if session.request.servers.dry_run
            else do.up.up(session.require_servers())
        ),
        after=lambda session: [] if session.request.servers.dry_run else step.before_start(session),
        reads=("file", "programs", *OF_SERVERS, "tuned", *RUN, "format"),
        also="serve",
    ),
    Step(
        "ps",
        "list the servers that are up",
        run=lambda session: do.ps.ps(session),
        reads=("file", "format"),
    ),
    Step(
        "logs",
        "print the log of name=; follow=1 stays with it",
        run=lambda session: do.ps.logs(session),
        reads=("file",),
    ),
    Step(
        "down",
        "stop the servers of config=, or name= alone",
        run=lambda session: do.ps.down(session),
        reads=("file", "format"),
    ),
    Step(
        "load",
        "load name= now, making room for it; for instances that are loaded on demand",
        run=lambda session: do.ps.load(session),
        reads=("file", "format"),
    ),
    Step(
        "unload",
        "unload name= once it has answered its requests; a request loads it again",
        run=lambda session: do.ps.unload(session),
        reads=("file", "format"),
    ),
    Step(
        "gateway",
        "serve one address for all servers of config=, in the foreground",
        run=lambda session: do.gateway.run(session),
        after=lambda session: step.before_start(session) if step.is_router(session) else [],
        reads=("file", "programs", "host", "port", "api_key_file"),
        also="serve",
    ),
    Step(
        "claude",
        "print how Claude Code is started on the gateway of config=; start=1 starts it",
        run_with=lambda session, words: do.claude.run(session, words),
        reads=("file", "host", "port", "api_key_file", "format"),
    ),
    Step(
        "systemd",
        "print a unit that keeps the servers of config= up",
        run=lambda session: do.up.systemd(session.require_servers()),
        after=lambda session: ["_config"] if session.servers else [],
        reads=("file", *OF_SERVERS),
        also="up",
    ),
    Step(
        "kubernetes",
        "write manifests for the servers of config=, for kubectl apply -k",
        run=lambda session: do.kubernetes.write(session.require_servers()),
        reads=("file", "kubernetes", "format", *RUN),
        also="serve",
    ),
    Step(
        "ray",
        "write a Ray Serve configuration for the servers of config=; start=1 deploys it",
        run=lambda session: do.ray.run(session),
        reads=(
            *("file", "ray", "image", "namespace", "gateway_replicas", "storage", "storage_class"),
            *("gpus", "host", "out", "format", *RUN),
        ),
        also="serve",
    ),
    # what was made, and what would be
    Step(
        "lock",
        "write pipeline.lock: what model= was made of, for frozen=1",
        run=lambda session: do.lock.lock(session.models.values()),
        after=["_lockable", "_frozen"],
        needs_model=True,
        reads=MAKING,
        also="serve",
    ),
    Step(
        "plan",
        "show what serve would do, and what it would cost",
        run=lambda session: (
            do.plan_servers.plan(session.servers)
            if session.servers
            else do.plan.plan(session.model)
        ),
        needs_model=True,
        reads=(*SERVING, "target"),
        also="serve",
    ),
    Step(
        "graph",
        "draw the steps that model= takes, and which of them have something to do",
        run=lambda session: do.graph.graph(session, nodes.nodes(STEPS, session)),
        reads=("model", "config", "profile", "engine", "programs", *RUN, "format", "out"),
        also="serve",
    ),
    Step(
        "provenance",
        "write a statement of what the GGUF of model=, or the package pkg=, was made from",
        run=lambda session: do.provenance.provenance(session),
        reads=("model", "pkg", "out", "key", "builder", "programs", "frozen", "offline", "format"),
    ),
    Step(
        "sign",
        "sign the .gguf, folder or package of model= or pkg= with key=",
        run=lambda session: do.provenance.sign(session),
        reads=("model", "pkg", "key", "programs", "frozen", "offline", "format"),
    ),
    Step(
        "verify",
        "hash every artifact again; compare it with its receipt, statement and signature",
        run=lambda session: do.verify.verify(session),
        reads=("model", "pkg", "signing", "programs", *RUN, "format"),
    ),
    Step(
        "models",
        "list the models on disk: size, origin, last use, and who uses them",
        run=lambda session: do.models.models(session),
        reads=("file", "format"),
    ),
    Step(
        "remove",
        "take model= away from the disk, or with quant= one quant of it",
        run=lambda session: do.remove.remove(session),
        reads=("model", "dry_run", "yes", "format"),
    ),
    Step(
        "prune",
        "take away what nothing uses any more: cut downloads, intermediates, old builds, caches",
        run=lambda session: do.prune.prune(session),
        reads=("file", "older_than", "yes", "format"),
    ),
    Step(
        "doctor",
        "print what this machine has, and what each backend lacks; format=json too",
        run=lambda session: do.doctor.doctor(session),
        reads=("format",),
    ),
    Step(
        "test",
        "run the tests; arguments after it go to pytest",
        run_with=lambda session, words: do.test.run(words),
    ),
    *HIDDEN,
)
