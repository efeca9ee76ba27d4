"""CycloneDX's official schema, as its own library brings it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _validator() -> Any:
    import cyclonedx.schema
    from jsonschema import Draft7Validator
    from referencing import Registry, Resource

    folder = Path(cyclonedx.schema.__file__).parent / "_res"
    schemas = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (
            folder / f"{name}.SNAPSHOT.schema.json" for name in ("bom-1.6", "spdx", "jsf-0.82")
        )
    ]
    registry: Any = Registry()
    for schema in schemas:
        registry = registry.with_resource(schema["$id"], Resource.from_contents(schema))
    return Draft7Validator(schemas[0], registry=registry)


def invalid(bill: Any) -> list[str]:
    """What the schema refuses in a bill of materials, and names that are given twice."""
    refs = [bill["metadata"]["component"]["bom-ref"], *_refs(bill["components"])]
    twice = sorted({f"{ref} is in it twice" for ref in refs if refs.count(ref) > 1})
    return twice + [
        f"{error.json_path}: {error.message[:200]}" for error in _validator().iter_errors(bill)
    ]


def _refs(components: Any) -> list[str]:
    return [
        ref
        for each in components
        for ref in (each.get("bom-ref"), *_refs(each.get("components", ())))
    ]
