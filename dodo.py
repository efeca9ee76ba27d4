"""Any model reference to a running llama.cpp server, doing only the work that is missing.

    doit serve model=demo            a real model, served
    doit plan model=org/model        what that would take
    doit list                        the steps; --status: which have something to do

Steps keep receipts, not a database: doit is told that it has nothing to remember.
"""

from __future__ import annotations

from pipeline.tasks import bins_tasks as bins
from pipeline.tasks import doit_tasks as tasks
from pipeline.tasks.reporting import Reporter
from pipeline.tasks.task import Task

DOIT_CONFIG = {
    "backend": "sqlite3",
    "dep_file": ":memory:",
    "default_tasks": ["_help"],
    "reporter": Reporter,
    "verbosity": 2,
}

steps = tasks.start()


def task_source() -> Task:
    """get llama.cpp's source: the submodule if checked out, else the pinned archive"""
    return bins.source(steps)


def task_build_ui() -> Task:
    """build llama-server's own page with npm, where Node.js is here"""
    return bins.build_ui(steps)


def task_cuda_toolkit() -> Task:
    """get NVIDIA's compiler where CUDA is built and no toolkit is installed"""
    return bins.cuda_toolkit(steps)


def task_build_bins() -> Task:
    """compile llama-server and its tools for this machine"""
    return bins.build_bins(steps)


def task_package() -> Task:
    """pack the programs for other machines, as .tar.gz and .zip"""
    return bins.package(steps)


def task_install_package() -> Task:
    """install the programs of the archive pkg="""
    return bins.install_package(steps)


def task_recipe() -> Task:
    """print a key for caches: another one whenever the programs would be"""
    return bins.recipe(steps)


def task_resolve() -> Task:
    """find out which files model= means"""
    return tasks.resolve(steps)


def task_fetch() -> Task:
    """download the model's files"""
    return tasks.fetch(steps)


def task_converter() -> Task:
    """make the environment of llama.cpp's converter"""
    return tasks.converter(steps)


def task_convert() -> Task:
    """convert safetensors to GGUF"""
    return tasks.convert(steps)


def task_quantize() -> Task:
    """quantize the GGUF to quant= (q4_k_m)"""
    return tasks.quantize(steps)


def task_prepare() -> Task:
    """do all that serve needs, and start nothing"""
    return tasks.prepare(steps)


def task_serve() -> Task:
    """serve model= in the foreground, preparing it if needed"""
    return tasks.serve(steps)


def task_lock() -> Task:
    """write pipeline.lock: what model= was made of, for frozen=1"""
    return tasks.lock(steps)


def task_plan() -> Task:
    """show what serve would do, and what it would cost"""
    return tasks.plan(steps)


def task_verify() -> Task:
    """hash every artifact again and compare it with its receipt"""
    return tasks.verify(steps)


def task_doctor() -> Task:
    """tell what this machine has, and what each backend lacks; format=json too"""
    return tasks.doctor(steps)


def task_test() -> Task:
    """run the tests; arguments after it go to pytest"""
    return tasks.test()


def task__help() -> Task:
    """what a bare doit prints"""
    return tasks.print_help(__doc__)


def task__check() -> Task:
    """say what is wrong with the request before any work"""
    return tasks.check(steps)


def task__writable() -> Task:
    """say that nothing can be written before any work"""
    return bins.writable(steps)


def task__compiler() -> Task:
    """say that a compiler is missing before any work"""
    return bins.compiler(steps)


def task__settle() -> Task:
    """hash the served file once where it was copied or restored"""
    return tasks.settle(steps)


def task__frozen() -> Task:
    """with frozen=1: hold what was made against pipeline.lock"""
    return tasks.frozen(steps)


def task__lockable() -> Task:
    """say that pipeline.lock cannot be written before any work"""
    return tasks.lockable(steps)


def task__port() -> Task:
    """say that the port is taken before any work"""
    return tasks.port(steps)


def task__flags() -> Task:
    """hold server.NAME=… against the options of the llama-server that will run"""
    return tasks.flags(steps)
