"""The manifests as files: a folder is written whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import require_writable
from pipeline.core.store import artifacts

from . import gateway as gateways
from . import manifests
from .gateway import Gateway
from .options import Options
from .workload import Workload

MARK = "# Written by `doit kubernetes`, which writes it anew: change it with an overlay."
LAST = "kustomization.yaml"
AMBIGUOUS = re.compile(r"[+-]?[.]?\d|[yn]$", re.IGNORECASE)


def files(
    workloads: Sequence[Workload], options: Options, gateway: Gateway | None = None
) -> dict[str, str]:
    """The text of each file, by its name."""
    texts: dict[str, str] = {}
    if any(workload.prepare for workload in workloads):
        texts["settings.yaml"] = text([manifests.settings()])
    for workload in workloads:
        documents = manifests.objects(workload, options)
        if gateway and workload.uses_keda:
            documents.append(gateways.scaled_object(workload, gateway, options))
        texts[f"{workload.name}.server.yaml"] = text(documents, comments(workload))
    if gateway:
        lines = [f"The key is in the Secret {gateways.SECRET}, which is not written here."]
        documents = gateways.objects(gateway, options)
        texts["gateway.yaml"] = text(documents, lines if gateway.has_key else ())
    return {**texts, LAST: text([manifests.kustomization([*texts], options.namespace)])}


def text(
    documents: Sequence[dict[str, Any]], comments: Sequence[str] = (), *, mark: str = MARK
) -> str:
    """The text of one file."""
    import yaml

    class Plain(yaml.SafeDumper):
        """Repeats a value rather than aliasing it: aliases are hard to read and to patch. Quotes
        what other parsers take for a number or a boolean: PyYAML knows only part of YAML 1.1."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def quoted(self, data: str) -> yaml.ScalarNode:
            style = "|" if "\n" in data else "'" if AMBIGUOUS.match(data) else None
            return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    Plain.add_representer(str, Plain.quoted)
    head = "".join(f"{line}\n" for line in (mark, *(f"# {comment}" for comment in comments)))
    return head + "---\n".join(
        yaml.dump(document, Dumper=Plain, sort_keys=False, width=100, allow_unicode=True)
        for document in documents
    )


def comments(workload: Workload) -> list[str]:
    """Explanations for the reader of the file."""
    lines = []
    if workload.may_be_several:
        if workload.has_claim:
            lines.append("ReadWriteMany: several pods on several nodes read one claim.")
        lines.append("maxSurge 0: a new pod would need a GPU and memory beside those in use.")
    elif not workload.has_claim:
        lines.append("Recreate: no second GPU may be free.")
    else:
        lines.append("Recreate: the claim is ReadWriteOnce, and no second GPU may be free.")
    if workload.has_key:
        lines.append(f"The key is in the Secret {workload.secret}, which is not written here.")
    return lines


def write(
    texts: Mapping[str, str], target: Path, *, mark: str = MARK, by: str = "kubernetes"
) -> bool:
    """Write these files and no others into the folder; False where nothing changed. `mark` begins
    each file that the command `by` writes. Raises PipelineError."""
    _require_ours(target, mark, by)
    require_writable(target.parent, "out=")
    with artifacts.locked_folder(target, "out="):
        if _require_ours(target, mark, by) == dict(texts):
            return False
        with artifacts.new_folder(target) as made:
            made.mkdir()
            for name, content in texts.items():
                (made / name).write_text(content, encoding="utf-8", newline="\n")
    return True


def _require_ours(target: Path, mark: str, by: str) -> dict[str, str]:
    """The existing files. Raises UsageError where one was not written by us."""
    if not target.exists():
        return {}
    if not target.is_dir():
        raise UsageError(
            f"out=: {target} is not a folder", "name a folder, or a path that does not exist yet"
        )
    texts = {path.name: _read(path) for path in sorted(target.iterdir())}
    others = [name for name, content in texts.items() if not content.startswith(mark)]
    if others:
        raise UsageError(
            f"{target}: {', '.join(others)}: would be lost; not written by {doitw(by)}",
            "name another folder, out=…; your own changes go into an overlay beside it",
        )
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace") if path.is_file() else ""
    except OSError:  # not ours: those can be read
        return ""
