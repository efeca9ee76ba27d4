"""Software bills of materials in CycloneDX 1.6. The same parts give the same bytes: there is no
time in it, and its serial number follows from its content."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

SUFFIX = ".cdx.json"  # of a file beside what it describes
NAME = "bom.json"  # inside what it describes
ALGORITHMS = {"sha1": "SHA-1", "sha256": "SHA-256", "sha384": "SHA-384", "sha512": "SHA-512"}


class Component(Struct, frozen=True, kw_only=True):
    """A part. `kind` is CycloneDX's type; `hashes` are in hex, by `sha256` and the like; `license`
    is SPDX's name; `notes` are properties; `parts` are inside it."""

    kind: str
    name: str
    version: str = ""
    purl: str = ""
    hashes: Mapping[str, str] = {}
    license: str = ""
    source: str = ""  # the address of its repository
    notes: Mapping[str, str] = {}
    parts: tuple[Component, ...] = ()

    @property
    def ref(self) -> str:
        """What names it inside the document."""
        return self.purl or f"{self.kind}:{self.name}"

    def document(self) -> dict[str, Any]:
        """The component as an object of CycloneDX."""
        known = {
            "type": self.kind,
            "bom-ref": self.ref,
            "name": self.name,
            "version": self.version,
            "hashes": [
                {"alg": ALGORITHMS[name], "content": value} for name, value in self.hashes.items()
            ],
            "licenses": [{"expression": self.license}] if self.license else [],
            "purl": self.purl,
            "externalReferences": ([{"type": "vcs", "url": self.source}] if self.source else []),
            "properties": [{"name": name, "value": text} for name, text in self.notes.items()],
            "components": [each.document() for each in self.parts],
        }
        return {name: value for name, value in known.items() if value}


def text(
    subject: Component, components: Iterable[Component], others: Iterable[Mapping[str, Any]] = ()
) -> str:
    """The bill of `subject`, which is made of `components`, and of `others` that another bill
    lists. It does not claim to be complete."""
    parts = [*(each.document() for each in components), *others]
    body = {
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "llama-pipeline"}]},
            "component": subject.document(),
        },
        "components": parts,
        "dependencies": [
            {"ref": subject.ref, "dependsOn": sorted({str(each["bom-ref"]) for each in parts})}
        ],
        "compositions": [{"aggregate": "incomplete", "assemblies": [subject.ref]}],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(body, sort_keys=True))
    head = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
    }
    return json.dumps({**head, **body}, indent=1, ensure_ascii=False) + "\n"


def npm_packages(lock: Path) -> tuple[Component, ...]:
    """The packages of a package-lock.json, each once. Raises OSError, ValueError, KeyError."""
    packages = json.loads(lock.read_text(encoding="utf-8"))["packages"]
    found = {}
    for place, package in packages.items():
        name = package.get("name") or place.rpartition("node_modules/")[2]
        if not place or package.get("link") or "version" not in package:
            continue
        version, scope = package["version"], name.startswith("@")
        purl = f"pkg:npm/{'%40' + name[1:] if scope else name}@{version}"
        kind, _, value = package.get("integrity", "").partition(" ")[0].partition("-")
        hashes = {kind: base64.b64decode(value).hex()} if kind in ALGORITHMS else {}
        found[purl] = Component(
            kind="library", name=name, version=version, purl=purl, hashes=hashes
        )
    return tuple(found[purl] for purl in sorted(found))
