"""The bill of materials of a package: its files, and what they were made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.core import sbom
from pipeline.core.sbom import Component
from pipeline.core.statement import LLAMA_CPP
from pipeline.core.store.receipts import Recipe

from .manifest import Manifest

PAGE_LOCK = Path("tools", "ui", "package-lock.json")  # of llama.cpp's source
VENDORED = "vendor"  # there, a folder for each library


def text(manifest: Manifest, made_by: Recipe, source: Path | None) -> str:
    """The bill of the package with this manifest. `made_by` is the recipe of its programs, `source`
    llama.cpp's, where they were compiled."""
    subject = Component(
        kind="application",
        name=manifest.name,
        version=manifest.commit,
        notes={
            "llama-pipeline:platform": manifest.platform,
            "llama-pipeline:backend": manifest.backend,
            "llama-pipeline:portable": str(manifest.portable).lower(),
        },
    )
    listed = [
        Component(kind="file", name=path, hashes={"sha256": file.sha256})
        for path, file in manifest.files.items()
    ]
    llama_cpp = Component(
        kind="application",
        name="llama.cpp",
        version=manifest.commit,
        purl=f"pkg:github/ggml-org/llama.cpp@{manifest.commit}",
        license="MIT",
        source=LLAMA_CPP,
        notes={f"llama-pipeline:{name}": text for name, text in _notes(manifest, made_by)},
        parts=tuple(_vendored(source)),
    )
    return sbom.text(subject, [llama_cpp, *_page(manifest, made_by, source), *listed])


def _notes(manifest: Manifest, made_by: Recipe) -> Iterator[tuple[str, str]]:
    """The source's tree, what it was compiled with, or which release it is."""
    if manifest.tree:
        yield "git-tree", manifest.tree
    for name, version in made_by.get("tools", {}).items():
        yield name, str(version)
    for name in ("compiler", "release"):
        if value := made_by.get(name):
            yield name, str(value)


def _vendored(source: Path | None) -> Iterator[Component]:
    """The libraries whose source llama.cpp brings; it does not say their versions in one place."""
    folder = source and source / VENDORED
    for path in sorted(folder.iterdir()) if folder and folder.is_dir() else ():
        if path.is_dir():
            yield Component(kind="library", name=path.name)


def _page(manifest: Manifest, made_by: Recipe, source: Path | None) -> Iterator[Component]:
    """llama-server's page, and every npm package that took part in building it."""
    page = made_by.get("page")
    if not page:
        return
    lock = source and source / PAGE_LOCK
    yield Component(
        kind="application",
        name="llama-server's page",
        version=manifest.commit,
        notes={"llama-pipeline:node": str(page["node"])},
        parts=sbom.npm_packages(lock) if lock and lock.is_file() else (),
    )
