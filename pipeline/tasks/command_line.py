"""The words of a command line, before doit sees them.

doit knows tasks, `name=value` and options of its own. People also write `--name value`,
`--name=value` and `--name`, with - for _, and a mistake should be answered by what there is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from pipeline.core.errors import UsageError, did_you_mean, doitw
from pipeline.core.paths import REPOSITORY
from pipeline.core.variables import NO, YES, flag

from .table import STEPS

COMMANDS = (
    *("list", "help", "run", "clean", "forget", "info", "ignore", "dumpdb", "strace"),
    *("tabcompletion", "reset-dep"),
)  # doit's, with options of their own
PRINTING = ("list", "help", "info", "tabcompletion")
WITH_WORDS = ("test", "claude")  # tasks that take words of another program
SERVER = "server."

# What users of other tools type, and its name here.
TASKS_ELSEWHERE = {
    **{"pull": "prepare", "download": "fetch", "start": "up", "stop": "down", "status": "ps"},
    **{"build": "build_bins", "install": "install_package", "quantise": "quantize"},
}
OPTIONS_ELSEWHERE = {
    **{"m": "model", "hf": "hf_model", "hf_repo": "hf_model", "c": "ctx_size", "n_ctx": "ctx_size"},
    **{"max_model_len": "ctx_size", "num_ctx": "ctx_size", "t": "threads", "np": "parallel"},
    **{"ngl": "gpu_layers", "n_gpu_layers": "gpu_layers", "b": "batch_size", "a": "alias"},
    **{"dev": "device", "quantization": "quant", "q": "quant", "print_diagnostics": "doctor"},
}


def understood(
    words: Sequence[str], tasks: Collection[str], table: Callable[[], Mapping[str, object]]
) -> list[str]:
    """The words as doit takes them. `tasks` are all there are; `table` gives the variables' parsers
    by name, and is called only where an option is written. Raises UsageError."""
    end = words.index("--") if "--" in words else len(words)
    own = list(words[:end])
    if "" in own:
        raise UsageError("a word of the command line is empty", "leave it out")
    first = next((word for word in own if not word.startswith("-") and "=" not in word), "")
    if first in COMMANDS:
        return list(words)
    return [*_words(own, tasks, table, takes_words=first in WITH_WORDS), *words[end:]]


def _words(
    own: list[str],
    tasks: Collection[str],
    table: Callable[[], Mapping[str, object]],
    *,
    takes_words: bool,
) -> Iterator[str]:
    rest = deque(own)
    while rest:
        word = rest.popleft()
        if word.startswith("-") and len(word) > 1:
            name, given, value = word.lstrip("-").partition("=")
            parser = _parser(word, name.replace("-", "_"), table())
            if not given:
                value = _value(word, rest, is_flag=parser is flag)
            yield f"{_key(name)}={value}"
        elif "=" in word or takes_words or word.partition(":")[0] in tasks:
            yield word
        elif word in TASKS_ELSEWHERE:
            raise UsageError(
                f"{word}: there is no such task", f"here it is {TASKS_ELSEWHERE[word]}"
            )
        else:
            near = did_you_mean(word, [name for name in tasks if not name.startswith("_")])
            raise UsageError(
                f"{word}: there is no such task{near}", f"{doitw('list')} shows them all"
            )


def _key(name: str) -> str:
    """An option of the server keeps its own dashes."""
    return name if name.startswith(SERVER) else name.replace("-", "_")


def _parser(word: str, name: str, table: Mapping[str, object]) -> object:
    if name.startswith(SERVER) and len(name) > len(SERVER):
        return None
    if name in table:
        return table[name]
    if name in OPTIONS_ELSEWHERE:
        meant = OPTIONS_ELSEWHERE[name]
        hint = (
            f"here it is --{meant.replace('_', '-')}" if meant in table else f"try {doitw(meant)}"
        )
        raise UsageError(f"{word}: there is no such option", hint)
    near = did_you_mean(name, list(table)).replace("_", "-")
    raise UsageError(
        f"{word}: there is no such option{near}",
        f"docs/variables.md lists them all; an option of llama-server is written {SERVER}NAME=…",
    )


def _value(word: str, rest: deque[str], *, is_flag: bool) -> str:
    """What follows an option, taken from `rest`. A switch may stand alone."""
    following = rest[0].strip().lower() if rest else ""
    if is_flag:
        return rest.popleft() if following in {*YES, *NO} - {""} else "1"
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"{word}: needs a value", f"write {word}=…")
    return rest.popleft()


def task_names() -> list[str]:
    """The tasks that there are."""
    return [step.name for step in STEPS]


def versions() -> str:
    """This project's, llama.cpp's and doit's."""
    import tomllib
    from importlib.metadata import version

    from pipeline.core.pins import pins

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return "\n".join(
        [
            f"{project['name']} {project['version']}",
            f"llama.cpp {pins().llama_cpp_commit}",
            f"doit {version('doit')}",
        ]
    )
