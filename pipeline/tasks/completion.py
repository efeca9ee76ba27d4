"""Completion in shells: a short script for each of them asks `doitw completion words` at every Tab.

So what is offered is what there is: tasks, variables, quants, models on disk, instances of a file.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from pipeline.commands import parsers, variables
from pipeline.commands.variables import SERVER, TABLE
from pipeline.core import paths
from pipeline.core.errors import doitw
from pipeline.core.pins import pins
from pipeline.core.variables import OneOf, Variable, flag, path
from pipeline.models import on_disk, quants
from pipeline.serve.config.named import CONFIGS

from .command_line import COMMANDS, OF_TASKS, PUBLIC, read_by

RESERVED = ("control", "server")  # tables in [instance] that are no instances


def candidates(word: str, before: Sequence[str]) -> list[str]:
    """What `word` may become, as whole words; `before` are the words that were typed before it."""
    words = [each for each in before if not each.startswith("-")]
    typed = dict(each.split("=", 1) for each in words if "=" in each)
    plain = [each for each in words if "=" not in each]
    name, is_value, value = word.partition("=")
    if not is_value:
        steps = [step for step in PUBLIC if step.name in plain]
        first = [step.name for step in PUBLIC] if {*plain} <= {*OF_TASKS} else []
        first += COMMANDS if not plain else ()
        names = [each.name for step in steps for each in read_by(step)]
        options = (f"{name.removesuffix('NAME')}=".replace(".=", ".") for name in names)
        if word.startswith(SERVER):
            options = (f"{SERVER}{name}=" for name in server_options())
        return matching(word, [*first, *options])
    known = {each.name: each for each in TABLE}
    if name not in known:
        return []
    if name == "model" and "remove" in plain:
        return [f"model={each}" for each in matching(value, on_disk_names())]
    return [f"{name}={each}" for each in values(known[name], value, typed)]


def values(each: Variable, value: str, typed: Mapping[str, str]) -> list[str]:
    """What the value of a variable may become; `typed` are the variables before it."""
    if isinstance(each.parse, OneOf):
        return matching(value, each.parse.words)
    if each.parse is flag:
        return matching(value, ("1", "0"))
    if each.parse is path:
        return files(value)
    if each.parse is parsers.quant:
        every = (*quants.DECIDED, quants.ALL, *quants.TYPES)
        return matching(value.lower(), (quant.lower() for quant in every))
    if each.name in variables.MODEL_NAMES:
        demos = pins().demos if each.name == "model" else ()
        references = matching(value, [*demos, *repositories()])
        return [*references, *files(value, ".gguf")]
    if each.parse is parsers.names:
        earlier, comma, last = value.rpartition(",")
        is_lora = each.name == "lora"
        names = files(last, ".gguf") if is_lora else matching(last, instances(typed))
        return [f"{earlier}{comma}{name}" for name in names]
    return []


def matching(start: str, words: Iterable[str]) -> list[str]:
    """The words that begin so, each once."""
    return [word for word in dict.fromkeys(words) if word.startswith(start)]


def files(start: str, suffix: str = "") -> list[str]:
    """Folders, and files with that suffix, whose path begins so."""
    folder, _, name = start.rpartition("/")
    top = f"{folder}/" if "/" in start else ""
    try:
        entries = sorted(os.scandir(paths.absolute(top or ".")), key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        f"{top}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if entry.name.startswith(name)
        and (entry.is_dir() or entry.name.endswith(suffix))
        and (name.startswith(".") or not entry.name.startswith("."))
    ]


def on_disk_names() -> list[str]:
    """What `remove` takes: what the models on disk were made from, or their names."""
    models = on_disk.look(paths.home()).models
    return [*dict.fromkeys(each.reference or each.name for each in models)]


def repositories() -> Iterator[str]:
    """Those whose files were looked up: models of the hub that are on disk."""
    for answer in sorted((paths.home().models / "resolved").glob("*.json")):
        source = _json(answer).get("source")
        if isinstance(source, dict) and source.get("type") == "hf" and "use" not in source:
            yield str(source.get("ref"))


def server_options() -> Iterator[str]:
    """The options of the llama-server that ran last, as they are written behind `server.`."""
    lists = sorted((paths.home().run / "flags").glob("*.json"), key=lambda p: p.stat().st_mtime)
    for name in _json(lists[-1]) if lists else ():
        if re.fullmatch(r"[a-z][\w-]+", name):
            yield name.replace("-", "_")


def instances(typed: Mapping[str, str]) -> list[str]:
    """The instances of the TOML file that is named on the command line or in the environment."""
    named = [typed.get("config", ""), *(os.environ.get(name, "") for name in CONFIGS.values())]
    file = next(filter(None, named), "")
    try:
        table = tomllib.loads(paths.absolute(file).read_text(encoding="utf-8-sig"))
        return [name for name in table.get("instance", {}) if name not in RESERVED]
    except (OSError, ValueError, AttributeError):
        return []


def _json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# The shells. Each calls the program that is being completed, with the word at the cursor behind =,
# since an empty argument is lost on the way in some of them.

BASH = r"""# bash completion, made by `doitw completion bash`
_doitw() {
    local line="${COMP_LINE:0:COMP_POINT}" word each cut=""
    local -a words
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    word="${words[-1]}"
    unset "words[-1]"
    # bash splits words at = and : where COMP_WORDBREAKS has them, and puts in what follows alone
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && cut="${word%%=*}="
    [[ $COMP_WORDBREAKS == *:* && $word == *:* ]] && cut="${word%:*}:"
    COMPREPLY=()
    while IFS= read -r each; do
        each="${each#"$cut"}"
        printf -v each %q "$each"
        [[ $each == *[=/.] ]] || each+=" "
        COMPREPLY+=("$each")
    done < <("${words[0]/#\~/$HOME}" completion words "=$word" "${words[@]:1}" 2> /dev/null)
}
complete -o nospace -F _doitw @program@
"""

ZSH = r"""#compdef @program@
# zsh completion, made by `doitw completion zsh`
_doitw() {
    local each
    ${~words[1]} completion words "=$PREFIX" "${(@)words[2,CURRENT-1]}" 2> /dev/null |
    while IFS= read -r each; do
        if [[ $each == *[=/.] ]]; then compadd -S "" -- $each; else compadd -- $each; fi
    done
}
compdef _doitw @program@
"""

FISH = r"""# fish completion, made by `doitw completion fish`
function __doitw_words
    set -l words (commandline -opc)
    eval $words[1] completion words "="(string escape -- (commandline -ct)) \
        (string escape -- $words[2..-1]) 2> /dev/null
end
complete -c @program@ -f -a "(__doitw_words)"
"""

POWERSHELL = r"""# PowerShell completion, made by `doitw completion powershell`
Register-ArgumentCompleter -Native -CommandName @program@, @program@.cmd -ScriptBlock {
    param($word, $line, $cursor)
    $before = @($line.CommandElements | Where-Object { $_.Extent.EndOffset -lt $cursor } |
        ForEach-Object { $_.ToString() })
    $program, $rest = $before
    & $program completion words "=$word" @rest 2> $null | ForEach-Object {
        $text = if ($_ -match '\s') { "'$_'" } else { $_ }
        [System.Management.Automation.CompletionResult]::new($text, $_, 'ParameterValue', $_)
    }
}
"""

SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH, "powershell": POWERSHELL}


def script(shell: str) -> str:
    """What that shell has to read."""
    program = PurePath(shlex.split(doitw("list"))[0]).name
    return SHELLS[shell].replace("@program@", program)
