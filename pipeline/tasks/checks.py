"""The steps that `doit list` does not show: they find errors before any work, or belong to another.

Nothing is imported here but at need, as in the table.
"""

from __future__ import annotations

from pipeline import commands as do
from pipeline.core import log, paths
from pipeline.core.errors import doitw

from .step import PREPARATION, PREPARED_FOR, ModelStep, Step, builds

HIDDEN = (
    Step(
        "_check",
        "refuse a wrong request before any work",
        run=lambda session: do.check.check_session(session),
        after=lambda session: ["_config"] if session.servers else [],
    ),
    Step(
        "_compiler",
        "report a missing compiler before any work",
        run=lambda session: session.programs.require_tools(),
    ),
    Step(
        "_config",
        "report the errors of config= before any work",
        run=lambda session: do.check.check_servers(session.require_servers()),
    ),
    Step(
        "_places",
        "report a profile's folder that cannot be written before any work",
        run=lambda session: do.launch.require_writable(
            session.require_servers().configuration.enabled
        ),
        after=["_config"],
    ),
    Step(
        "_options",
        "check the options in config= against the llama-server that will run",
        run=lambda session: do.check.check_servers(session.require_servers(), log.info),
        after=lambda session: ["_config", *builds(session)],
    ),
    Step(
        "_fits",
        "refuse a draft or an adapter that does not fit its model before anything is downloaded",
        run=lambda session: do.beside.check(session.models.values()),
        done=lambda session: do.beside.is_ready(session.models.values()),
        after=lambda session: ["resolve"] if session.models else [],
    ),
    ModelStep(
        "_settle",
        "hash the served file once where it was copied or restored",
        run=lambda model: do.make.settle(model),
        done=lambda model: model.is_settled(),
        after=PREPARED_FOR,
    ),
    ModelStep(
        "_frozen",
        "with frozen=1: compare what was made with pipeline.lock",
        run=lambda model: do.lock.require(model),
        done=lambda model: not model.request.frozen,
        after=PREPARATION,
    ),
    Step(
        "_lockable",
        "report a pipeline.lock that cannot be written before any work",
        run=lambda session: paths.require_writable(session.model.lock_file.parent, paths.HERE),
    ),
    Step(
        "_chat",
        "report who cannot be talked to before any work",
        run=lambda session: do.chat.check(session),
    ),
    ModelStep(
        "_talks",
        "report a model that cannot chat before it is downloaded",
        run=lambda model: do.chat.check_model(model),
        after=["resolve"],
    ),
    Step(
        "_port",
        "report a port that is taken before any work",
        run=lambda session: do.serve.check_start(session.programs),
    ),
    Step(
        "_flags",
        "check server.NAME=… against the options of the llama-server that will run",
        run=lambda session: do.serve.check_flags(session.model),
        after=["build_bins"],
    ),
    Step("_help", "what a bare doit prints", run=lambda session: print_help()),
)


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
