"""The name that a deployment gives its server."""

from __future__ import annotations

from collections.abc import Mapping

NAMES = ("SERVICE_NAME", "SERVICE_VERSION")


def service(environ: Mapping[str, str]) -> dict[str, str]:
    """`service` for a summary; nothing where the environment names none."""
    told = " ".join(filter(None, (environ.get(name, "").strip() for name in NAMES)))
    return {"service": told} if told else {}
