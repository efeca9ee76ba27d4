"""The shared libraries that ELF programs are published with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# ggml loads its backends by name, so no program says that it needs them.
MODULES = "libggml-*.so"


def closure(
    programs: Iterable[Path], folders: Sequence[Path], single: Mapping[str, Path]
) -> dict[str, Path]:
    """What the programs need of what lies in `folders` or is named in `single`, and what that
    needs: by the name under which it is looked for. All else is the system's."""
    found: dict[str, Path] = {}
    waiting = list(programs)
    while waiting:
        for name in needed(waiting.pop()):
            there = (folder / name for folder in folders if (folder / name).is_file())
            path = next(there, single.get(name))
            if path and name not in found:
                found[name] = path
                waiting.append(path)
    return found


def needed(file: Path) -> list[str]:
    """The names of the libraries that a program or library is linked with."""
    return [tag.needed for tag in dynamic(file, "DT_NEEDED")]


def dynamic(file: Path, kind: str) -> list[Any]:
    """The entries of a kind in an ELF file's dynamic section; none in what is no such file."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    with file.open("rb") as stream:
        try:
            section: Any = ELFFile(stream).get_section_by_name(".dynamic")
            return list(section.iter_tags(kind)) if section else []
        except ELFError:
            return []
