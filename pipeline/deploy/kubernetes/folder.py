"""The manifests as files: all of a folder, or none of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import require_writable
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import (
    full_disk_is_an_error,
    part,
    publish_folder,
    recover_folder,
    remove,
)

from . import objects
from .options import Options
from .workload import Workload

MARK = "# Written by `doit kubernetes`, which writes it anew: change it with an overlay."
LAST = "kustomization.yaml"
UNCLEAR = re.compile(r"[+-]?[.]?\d|[yn]$", re.IGNORECASE)


def files(workloads: Sequence[Workload], options: Options) -> dict[str, str]:
    """The text of each file, by its name."""
    told: dict[str, str] = {}
    if any(one.prepare for one in workloads):
        told["settings.yaml"] = text([objects.settings()])
    for one in workloads:
        told[f"{one.name}.server.yaml"] = text(objects.objects(one, options), remarks(one, options))
    return {**told, LAST: text([objects.kustomization([*told], options.namespace)])}


def text(found: Sequence[dict[str, Any]], remarks: Sequence[str] = ()) -> str:
    """The documents of one file."""
    import yaml

    class Plain(yaml.SafeDumper):
        """Writes out what stands in two places: an alias is hard to read, and to patch. Quotes what
        other readers take for a number or for true: PyYAML knows YAML 1.1 alone, and not all."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def quoted(self, data: str) -> yaml.ScalarNode:
            style = "|" if "\n" in data else "'" if UNCLEAR.match(data) else None
            return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    Plain.add_representer(str, Plain.quoted)
    head = "".join(f"{line}\n" for line in (MARK, *(f"# {one}" for one in remarks)))
    return head + "---\n".join(
        yaml.dump(one, Dumper=Plain, sort_keys=False, width=100, allow_unicode=True)
        for one in found
    )


def remarks(workload: Workload, options: Options) -> list[str]:
    """Why some of it is as it is, for who reads the file."""
    found = []
    if options.replicas[1] > 1:
        found.append("ReadWriteMany: several pods on several nodes read one claim.")
        found.append("maxSurge 0: a new pod would need a GPU and memory beside those in use.")
    else:
        found.append("Recreate: the claim is ReadWriteOnce, and no second GPU may be free.")
    if workload.has_key:
        found.append(f"The key is in the Secret {workload.secret}, which is not written here.")
    return found


def write(told: Mapping[str, str], target: Path) -> bool:
    """Have `told` and nothing else in the folder; False where that is so. Raises PipelineError."""
    _require_ours(target)
    require_writable(target.parent)
    with full_disk_is_an_error(target.parent), only_one(target):
        recover_folder(target)
        if _require_ours(target) == dict(told):
            return False
        made = part(target)
        made.mkdir()
        try:
            for name, content in told.items():
                (made / name).write_text(content, encoding="utf-8", newline="\n")
            publish_folder(made, target)
        finally:
            remove(made)
    return True


def _require_ours(target: Path) -> dict[str, str]:
    """The files that are there. Raises UsageError where one was not written here."""
    if not target.exists():
        return {}
    if not target.is_dir():
        raise UsageError(f"out=: {target} is no folder", "name one that is, or is not there yet")
    found = {path.name: _read(path) for path in sorted(target.iterdir())}
    others = [name for name, content in found.items() if not content.startswith(MARK)]
    if others:
        raise UsageError(
            f"{target}: {', '.join(others)}: would be lost; not written by {doitw('kubernetes')}",
            "name another folder, out=…; your own changes go into an overlay beside it",
        )
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace") if path.is_file() else ""
    except OSError:  # ours can be read
        return ""
