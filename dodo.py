"""Any model reference to a running llama.cpp server, doing only the work that is missing.

    doit serve model=demo            a real model, served
    doit plan model=org/model        what that would take
    doit list                        the steps; --status: which have something to do

Steps keep receipts, not a database: doit is told that it has nothing to remember.
"""

from __future__ import annotations

from pipeline.tasks import bins_tasks as bins
from pipeline.tasks import fleet_tasks as fleet
from pipeline.tasks import table as tasks
from pipeline.tasks.doit import Reporter
from pipeline.tasks.task import Task, Tasks

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


def task_resolve() -> Tasks:
    """find out which files model= means"""
    return tasks.each(steps, tasks.resolve)


def task_fetch() -> Tasks:
    """download the model's files"""
    return tasks.each(steps, tasks.fetch)


def task_converter() -> Task:
    """make the environment of llama.cpp's converter"""
    return tasks.converter(steps)


def task_convert() -> Tasks:
    """convert safetensors to GGUF"""
    return tasks.each(steps, tasks.convert)


def task_quantize() -> Tasks:
    """quantize the GGUF to quant= (q4_k_m)"""
    return tasks.each(steps, tasks.quantize)


def task_prepare() -> Task:
    """do all that serve needs, and start nothing"""
    return tasks.prepare(steps)


def task_serve() -> Task:
    """serve model= in the foreground, preparing it if needed"""
    return tasks.serve(steps)


def task_up() -> Task:
    """start the servers of config= in the background, and say when each is ready"""
    return fleet.up(steps)


def task_ps() -> Task:
    """list the servers that are up"""
    return fleet.ps(steps)


def task_logs() -> Task:
    """print the log of name=; follow=1 stays with it"""
    return fleet.logs(steps)


def task_down() -> Task:
    """stop the servers of config=, or name= alone"""
    return fleet.down(steps)


def task_gateway() -> Task:
    """serve one address for all servers of config=, in the foreground"""
    return fleet.gateway(steps)


def task_claude() -> Task:
    """print how Claude Code is started on the gateway of config=; start=1 starts it"""
    return fleet.claude(steps)


def task_systemd() -> Task:
    """print a unit that keeps the servers of config= up"""
    return fleet.systemd(steps)


def task_kubernetes() -> Task:
    """write manifests for the servers of config=, for kubectl apply -k"""
    return fleet.kubernetes(steps)


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


def task__config() -> Task:
    """say what is wrong with config= before any work"""
    return fleet.config(steps)


def task__places() -> Task:
    """say that a profile's folder cannot be written before any work"""
    return fleet.places(steps)


def task__options() -> Task:
    """hold the options in config= against the llama-server that will run"""
    return fleet.options(steps)


def task__settle() -> Tasks:
    """hash the served file once where it was copied or restored"""
    return tasks.each(steps, tasks.settle)


def task__frozen() -> Tasks:
    """with frozen=1: hold what was made against pipeline.lock"""
    return tasks.each(steps, tasks.frozen)


def task__lockable() -> Task:
    """say that pipeline.lock cannot be written before any work"""
    return tasks.lockable(steps)


def task__port() -> Task:
    """say that the port is taken before any work"""
    return tasks.port(steps)


def task__flags() -> Task:
    """hold server.NAME=… against the options of the llama-server that will run"""
    return tasks.flags(steps)
