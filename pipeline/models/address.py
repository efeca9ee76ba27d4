"""Addresses of the hub, as they are copied from a browser or from another program's command."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from msgspec import Struct

from pipeline.core.errors import UsageError

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co", "hf-mirror.com")
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
OTHER = {  # what else the hub has, by the first part of the path
    "datasets": "a data set",
    "spaces": "a space",
    "buckets": "a bucket",
    "collections": "a collection",
    "papers": "a paper",
    "docs": "a page of the documentation",
    "blog": "an article",
    "models": "a list of models",
}
OF_A_FILE = ("blob", "resolve", "raw", "blame", "edit", "delete", "commits", "tree")
FILES = (".safetensors", ".json", ".md", ".model", ".txt", ".jinja", ".py", ".gitattributes")
HINT = "the address of a model's page, or of a .gguf in it; or org/model"


class HubAddress(Struct, frozen=True):
    """What an address names: a repository, in it a revision, and a file or a folder's files.

    `reference` is org/model, with a quant and a revision where it ends in them.
    """

    reference: str
    revision: str = ""
    filename: str = ""
    pattern: str = ""
    note: str = ""  # says what was ignored


def is_address(text: str) -> bool:
    """Whether `text` is an address, of a model or of something else."""
    try:
        return parse(text) is not None
    except UsageError:
        return True


def parse(text: str) -> HubAddress | None:
    """Parse an address of the hub; None where `text` is none. Raises UsageError for an address that
    names no model."""
    scheme = SCHEME.match(text)
    address = text if scheme else f"//{text}"
    if text.lower().startswith("git@"):  # git@hf.co:org/model
        address = "//" + text[4:].replace(":", "/", 1)
    try:
        parts = urlsplit(address)
        host = (parts.hostname or "").lower()
    except ValueError as error:
        raise _error(text, f"not an address: {error}") from None
    if scheme and scheme[0].lower() == "hf://":
        host, path = "hf.co", f"{parts.netloc}{parts.path}"
    else:
        path = parts.path
    if host not in {*HOSTS, _own_host()} - {""}:
        if scheme:
            raise _error(text, "is not an address of the hub; download the file and pass its path")
        return None
    return _of_path(text, [unquote(part) for part in path.split("/") if part], parts.query)


def _own_host() -> str:
    """The host of HF_ENDPOINT; empty where that is unset or invalid."""
    try:
        return (urlsplit(os.environ.get("HF_ENDPOINT", "").strip()).hostname or "").lower()
    except ValueError:
        return ""


def _of_path(text: str, parts: list[str], query: str) -> HubAddress:
    """The address with these parts of a path and this query. Raises UsageError."""
    if parts[:2] == ["api", "models"]:
        parts = parts[2:]
    elif parts[:1] == ["models"] and len(parts) > 2:  # hf://models/org/model
        parts = parts[1:]
    if parts and parts[0] in OTHER:
        raise _error(text, f"is the address of {OTHER[parts[0]]}, not of a model")
    if len(parts) < 2:
        raise _error(text, "names no repository: org/model")
    kind, revision = "".join(parts[2:3]), ""
    if kind in OF_A_FILE:
        end = 6 if parts[3:4] == ["refs"] else 4  # refs/pr/7
        revision, file = "/".join(parts[3:end]), "/".join(parts[end:])
    elif kind:  # a page about it, or hf://org/model/file.gguf
        file = "/".join(parts[2:]) if parts[-1].lower().endswith(".gguf") else ""
    else:  # the page about a file
        file = parse_qs(query).get("show_file_info", [""])[0].strip("/")
    reference = f"{parts[0]}/{parts[1].removesuffix('.git')}"
    revision = "" if revision == "main" else revision
    name = PurePosixPath(file)
    if not file:
        return HubAddress(reference, revision)
    if name.suffix.lower() == ".gguf":
        return HubAddress(reference, revision, filename=file)
    if kind == "tree":
        return HubAddress(reference, revision, pattern=f"{file}/*")
    if name.suffix.lower() in FILES or name.name in FILES:
        return HubAddress(reference, revision, note=f"{file}: taken for the repository it is in")
    raise _error(text, f"{file} is no GGUF, and no file of a model in safetensors")


def _error(text: str, why: str) -> UsageError:
    return UsageError(f"model={text}: {why}", HINT)
