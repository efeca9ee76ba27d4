"""A user with caches of their own, and a stranger's model that cannot be read without its code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from canary import Canary

COMMIT = "1" * 40
FOREIGN = "org/evil--tok.Evil"


@dataclass(frozen=True)
class World:
    """`user` is the home of the user, `cwd` where they are, `elsewhere` any other folder.
    `variables` are set by the user."""

    top: Path
    canary: Canary
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.top / "evil model"

    @property
    def user(self) -> Path:
        return self.top / "user"

    @property
    def cwd(self) -> Path:
        return self.top / "cwd"

    @property
    def elsewhere(self) -> Path:
        return self.top / "elsewhere"  # no dot in its path: transformers wants exactly one

    def environ(self, outer: Mapping[str, str]) -> dict[str, str]:
        """The environment of the user."""
        kept = {name: value for name, value in outer.items() if not name.startswith("XDG_")}
        return kept | {"HOME": str(self.user)} | self.variables

    def plant(self, path: Path, code: str = "") -> Path:
        """Write the canary, or other code."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code or self.canary.code)
        return path

    def change(self, name: str, **values: Any) -> None:
        """Set keys of a JSON file of the model's."""
        path = self.model / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **values}))

    def tokenizer(self, auto_map: Any) -> None:
        """Name code for the tokenizer."""
        self.change("tokenizer_config.json", auto_map=auto_map)

    def fill_cache(self, hub: Path | None = None, *, refs: bool = True) -> Path:
        """A Hugging Face cache with another repository in it, as huggingface_hub lays it out."""
        hub = hub or self.user / ".cache" / "huggingface" / "hub"
        repository = hub / "models--org--evil"
        snapshot = repository / "snapshots" / COMMIT
        blob = self.plant(repository / "blobs" / ("b" * 40))
        snapshot.mkdir(parents=True)
        (snapshot / "tok.py").symlink_to(Path("..", "..", "blobs", blob.name))
        if refs:
            (repository / "refs").mkdir()
            (repository / "refs" / "main").write_text(COMMIT)
        return hub


def make(top: Path, tiny: Path, canary: Canary) -> World:
    """Without a tokenizer, and of an architecture whose class in the converter reads the tokenizer
    with trust_remote_code=True."""
    world = World(top, canary)
    shutil.copytree(tiny, world.model)
    (world.model / "tokenizer.model").unlink()
    world.change("config.json", architectures=["DreamModel"])
    for folder in (world.user, world.cwd, world.elsewhere):
        folder.mkdir()
    return world
