"""JSON Schemas of both kinds of files, so that editors complete and check them."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from pipeline.core.store.publish import publish_text

from .profile_tables import Registry
from .tables import InstancesFile

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILES: dict[str, type[BaseModel]] = {
    "instances.schema.json": InstancesFile,
    "llm_profiles.schema.json": Registry,
}


def text(kind: type[BaseModel]) -> str:
    """The schema of a file whose tables are `kind`."""
    return json.dumps({"$schema": DIALECT} | kind.model_json_schema(), indent=2) + "\n"


def write(folder: Path) -> None:
    for name, kind in FILES.items():
        publish_text(folder / name, text(kind))
