"""The arguments of vLLM's server, read from the sources in its wheel without running them.

python tests/serve/config/vllm_arguments.py vllm-*.whl >pipeline/serve/config/vllm_flags.txt
"""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ENGINE = "vllm/engine/arg_utils.py"
FRONTEND = "vllm/entrypoints/common/cli_args.py"
ONE_VALUE = {  # lists that FrontendArgs makes options of one value of
    *("allowed-origins", "allowed-methods", "allowed-headers", "middleware"),
    "disable-access-log-for-endpoints",
}
ACTIONS = {"'store_true'": "", "argparse.BooleanOptionalAction": "bool"}
NUMBERS = {"int": "INT", "float": "FLOAT"}
COUNTS = {  # whole numbers with units, such as 2K
    *("max-model-len", "max-num-batched-tokens", "max-num-scheduled-tokens"),
    *("kv-cache-memory-bytes", "safetensors-prefetch-block-size", "max-num-queued-tokens"),
}
INVERSE = (("--enable-", "--disable-"), ("--disable-", "--enable-"))


def listed(wheel: Path) -> str:
    """All of them, in the form of a help; the first line names the version."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("vllm/config/") and n[-3:] == ".py"]
        trees = {n: ast.parse(archive.read(n)) for n in (*names, ENGINE, FRONTEND)}
    literals = {
        node.targets[0].id: ast.unparse(node.value)
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if ast.unparse(node.value).startswith("Literal[")
    }
    fields: dict[str, dict[str, str]] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                fields[node.name] = {
                    name: _literal(annotation, literals)
                    for name, annotation in _fields(node).items()
                }
    lines = {*_called(trees[ENGINE], fields), *_called(trees[FRONTEND], fields)}
    for name in ("BaseFrontendArgs", "FrontendArgs"):
        for field, annotation in fields[name].items():
            lines.add(_line([f"--{field.replace('_', '-')}"], annotation))
    return "\n".join([f"vLLM {wheel.name.split('-')[1]}", *sorted(lines)]) + "\n"


def _fields(node: ast.ClassDef) -> dict[str, str]:
    return {
        part.target.id: ast.unparse(part.annotation)
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def _literal(annotation: str, literals: dict[str, str]) -> str:
    """The annotation with what its names stand for: `RunnerOption` is `Literal['auto', …]`."""
    while (
        spelled := re.sub(r"\b[A-Z]\w+\b", lambda m: literals.get(m[0], m[0]), annotation)
    ) != annotation:
        annotation = spelled
    return annotation


def _called(tree: ast.Module, fields: dict[str, dict[str, str]]) -> Iterator[str]:
    """Each `add_argument("--x", **some_kwargs["x"])`."""
    sources: dict[str, str] = {}  # some_kwargs: the class whose fields they are
    for node in ast.walk(tree):
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Name(id="get_kwargs"), args=[ast.Name(id=kind)]),
            ):
                sources[name] = kind
    for node in ast.walk(tree):
        if not (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add_argument"
        ):
            continue
        names = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
        names = [name for name in names if name.startswith("-")]
        if not names:
            continue
        annotation = "str"
        for keyword in node.keywords:
            if keyword.arg == "action":
                annotation = ACTIONS.get(ast.unparse(keyword.value), "str")
            if keyword.arg == "type" and ast.unparse(keyword.value) in NUMBERS:
                annotation = ast.unparse(keyword.value)
            if keyword.arg == "choices" and isinstance(keyword.value, ast.List):
                annotation = f"Literal{ast.unparse(keyword.value)}"
            for part in ast.walk(keyword.value) if keyword.arg is None else ():
                match part:
                    case ast.Subscript(
                        value=ast.Name(id=kwargs), slice=ast.Constant(value=field)
                    ) if kwargs in sources:
                        annotation = fields[sources[kwargs]][str(field)]
        yield _line(names, annotation)


def _line(names: list[str], annotation: str) -> str:
    parts = {part.strip() for part in annotation.split("|")}
    if parts == {"bool", "str", "None"}:
        value = " [VALUE]"
    elif "bool" in parts:
        value = ""
        for name in [name for name in names if name.startswith("--")]:
            names = [*names, f"--no-{name[2:]}"]
            names += [name.replace(*pair, 1) for pair in INVERSE if name.startswith(pair[0])]
    elif not annotation:
        value = ""
    elif any(p.startswith(("list[", "set[", "tuple[")) for p in parts):
        value = " VALUE" if names[0][2:] in ONE_VALUE else " VALUE ..."
    else:
        value = f" {_hint(names[0][2:], annotation, parts - {'None'})}"
    return ", ".join(names) + value


def _hint(name: str, annotation: str, parts: set[str]) -> str:
    """What the option takes: `{a,b}`, INT, COUNT, FLOAT, or any VALUE."""
    if "Literal[" in annotation and "str" not in parts:
        words = re.findall(r"'([^']*)'|(?<=[\[ ])(\d+)(?=[,\]])", annotation)
        return f"{{{','.join(text or number for text, number in words)}}}"
    if name in COUNTS:
        return "COUNT"
    (only, *others) = parts
    return "VALUE" if others else NUMBERS.get(only, "VALUE")


if __name__ == "__main__":
    sys.stdout.write(listed(Path(sys.argv[1])))
