"""The commands of a container.

python -m pipeline.deploy entrypoint [COMMAND …]      what docker/entrypoint is
python -m pipeline.deploy boot                        the same servers, in the background
python -m pipeline.deploy get-llama-cpp-pkg | install-llama-cpp-pkg [ARCHIVE]
python -m pipeline.deploy check-and-run-llama-cpp | check-and-run-vllm
python -m pipeline.deploy healthcheck
python -m pipeline.deploy sbom                        prints the image's bill of materials
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from pipeline.core import log, paths
from pipeline.core.errors import PipelineError, UsageError, did_you_mean
from pipeline.core.paths import REPOSITORY, absolute
from pipeline.core.process import become, shown
from pipeline.core.store import publish
from pipeline.serve.config.named import misspelled
from pipeline.serve.server import LLAMA_CPP, VLLM

from . import boot, container, package

FAILED, WRONG_USAGE, INTERRUPTED = 1, 3, 130


def entrypoint(words: Sequence[str]) -> int:
    """Start what the variables name, then run the command; that alone where the start fails and
    people can log in to mend it."""
    try:
        return container.run(requested(words), os.environ)
    except PipelineError as error:
        if not (words and container.notify(os.environ, str(error))):
            raise
        log.info(f"error: {error}")
        return container.run(boot.Boot(command=tuple(words)), os.environ)


def requested(words: Sequence[str] = ()) -> boot.Boot:
    """What the environment names. Of variables that are almost ours doit tells where it starts the
    servers, and this where nothing is started. Raises UsageError."""
    found = boot.Boot()
    try:
        found = boot.boot(os.environ, words)
        return found
    finally:
        for line in () if found.sources else misspelled(os.environ):
            log.info(line)


def get_package(words: Sequence[str]) -> int:
    """Install the package named here, or by the variable."""
    _require_no_arguments(words[1:])
    archive = next(iter(words), "") or os.environ.get(boot.PACKAGE, "").strip()
    if not archive:
        raise UsageError(f"{boot.PACKAGE} names no file", "name the archive of a package")
    package.get(absolute(archive), paths.home())
    return 0


def check_and_run(engine: str) -> Callable[[Sequence[str]], int]:
    """Start the servers of the engine's file; other arguments go to `doit up`."""

    def run(words: Sequence[str]) -> int:
        source = boot.source(os.environ, engine)
        if "" in words:  # doit itself crashes over it
            raise UsageError("an argument is empty", "leave it out")
        command = container.doit("up", *source.words, *words)
        become(command, env=container.for_doit(os.environ), cwd=REPOSITORY)

    return run


def healthcheck(words: Sequence[str]) -> int:
    """Print which servers do not answer."""
    from . import health

    errors = health.errors(os.environ)
    for line in errors:
        log.info(line)
    return FAILED if errors else 0


def print_bill(words: Sequence[str]) -> int:
    """Print the bill of materials of the image."""
    from . import bill

    print(bill.text(os.environ), end="")
    return 0


def _require_no_arguments(words: Sequence[str]) -> None:
    if words:
        raise UsageError(f"{shown(words)}: unexpected arguments", "this command takes none")


ALONE = ("boot", "healthcheck", "sbom")  # commands without arguments
COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "entrypoint": entrypoint,
    "boot": lambda words: container.up(requested(), os.environ),
    "get-llama-cpp-pkg": get_package,
    "install-llama-cpp-pkg": get_package,
    "check-and-run-llama-cpp": check_and_run(LLAMA_CPP),
    "check-and-run-vllm": check_and_run(VLLM),
    "healthcheck": healthcheck,
    "sbom": print_bill,
}


def main(words: Sequence[str]) -> int:
    """Run the command of this name; its exit status."""
    name, *rest = words or ("",)
    log.guard_streams()
    try:
        if name not in COMMANDS:
            near = did_you_mean(name, list(COMMANDS))
            raise UsageError(f"{name}: there is no such command{near}", ", ".join(COMMANDS))
        if name in ALONE:
            _require_no_arguments(rest)
        return COMMANDS[name](rest)
    except PipelineError as error:
        log.info(f"error: {error}")
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    except OSError as error:
        log.info(f"error: {publish.described(error, paths.home().root)}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
