"""What `model=` means, by its form and by what exists on disk: a path, a repository, or an address
of the hub as it is copied from a browser or from another program's command."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core.errors import UsageError
from pipeline.core.paths import absolute, dangling
from pipeline.core.pins import pins

from . import contents

ReferenceKind = Literal["demo", "gguf", "folder", "hub"]

HUB = re.compile(
    r"(?P<repo>(?!\.)[\w.-]+/(?!\.)[\w.-]+?)"
    r"(?::(?P<quant>[\w.-]+))?(?:@(?P<revision>[^\s:]+))?(?::(?P<late>[\w.-]+))?"
)
FILE_OF_HUB = re.compile(r"((?![.~])[\w.-]+/[\w.-]+)/([^\\]+\.gguf)", re.I)
# What git has no branch, tag or commit for; `..` would lead out of the hub's own path.
NO_REVISION = re.compile(r"[\0-\x20\x7f~^:?*\[\\]|\.\.|@\{|(^|/)(\.|/|$)")
PROJECTOR = re.compile(r"mmproj|projector", re.IGNORECASE)  # by name; metadata has the last word
# A GGUF that was cut for a limit on the size of files: not the parts that llama.cpp reads.
PIECE = r".*\.gguf([._-]?(split|part)[._-]?|\.)(a?[a-z]|\d{1,3}(of\d+)?)"
JOIN = "get all of them and join them in order: cat MODEL.gguf.part* > MODEL.gguf"
NO_PROJECTOR = "none"  # of mmproj=
# What `draft=` may name instead of a model: llama-server's --spec-type.
NGRAMS = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
WITHOUT_DRAFT = {"ngram": "ngram-mod", "mtp": "draft-mtp", **{name: name for name in NGRAMS}}
SCALE = re.compile(r"[+-]?(\d{1,6}(\.\d*)?|\.\d+)", re.A)  # behind the colon after an adapter
# Addresses of the hub.
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
OF_A_FILE = ("blob", "resolve", "raw", "blame", "edit", "delete", "commit", "commits", "tree")
FILES = (".safetensors", ".json", ".md", ".model", ".txt", ".jinja", ".py", ".gitattributes")
ADDRESS_HINT = "the address of a model's page, or of a .gguf in it; or org/model"
HINT = (
    "a reference is demo, demo-embed, org/model, org/model:QUANT, org/model@revision, an address "
    "of the hub, a path of a .gguf, or of a folder"
)


def split_scale(text: str) -> tuple[str, float]:
    """An adapter's reference, and the scale that follows it, else 1. What follows a colon is a
    scale where it is a plain number: no quant is one, nor the path behind a drive."""
    rest, _, scale = text.rpartition(":")
    return (rest, float(scale)) if rest and SCALE.fullmatch(scale) else (text, 1.0)


class FileFilter(Struct, frozen=True, kw_only=True):
    """Which files of a repository are requested; empty means any."""

    quant: str = ""
    filename: str = ""
    pattern: str = ""
    mmproj: str = ""


class Reference(Struct, frozen=True, kw_only=True):
    """A model as the user wrote it: `path` for files, `repo` and `revision` for the hub."""

    kind: ReferenceKind
    text: str
    path: Path | None = None
    repo: str = ""
    revision: str = ""
    quant: str = ""
    filename: str = ""  # of an address that names a file
    pattern: str = ""  # and of one that names a folder
    note: str = ""  # what was decided, to be shown once

    @property
    def is_safetensors(self) -> bool:
        """Whether it is certain to be converted here; for a repository only the hub knows."""
        is_pinned = self.kind == "demo" and pins().demos[self.text].kind == "safetensors"
        return is_pinned or self.kind == "folder"


def parse(text: str) -> Reference:
    """Parse a reference. A path that exists wins. Raises UsageError."""
    if text.strip() != text and not exists(absolute(text)):
        return parse(text.strip())  # as copied, or as a file has it
    if text in pins().demos:
        return Reference(kind="demo", text=text)
    plain = text if text.lower().startswith("hf://") else text.removeprefix("hf:")
    match = HUB.fullmatch(plain.removesuffix("/"))
    path = absolute(text)
    if plain == text and exists(path):
        note = f"{text}: taken for the path {path}, which exists" if match else ""
        return existing(text, path, note)
    if pasted := parse_address(plain):
        return replace(pasted, text=text)
    is_tagged = text.startswith("hf:") or (match and (match["quant"] or match["late"]))
    looks_like_path = (
        text.startswith((".", "/", "~", "\\"))
        or "\\" in text
        or (not match)
        or (text.lower().endswith((".gguf", ".safetensors")) and not is_tagged)
    )
    if match and not looks_like_path:
        return _of_match(text, match)
    if any(letter in text for letter in "/\\~.") and not text.startswith("hf:"):
        file = FILE_OF_HUB.fullmatch(text)
        of_hub = (
            f"for a file on Hugging Face write model={file[1]} filename={file[2]}" if file else ""
        )
        raise missing("model", text, path, of_hub or HINT)
    raise UsageError(f"model={text}: not a valid reference", HINT)


def repository(name: str) -> Reference | None:
    """The repository of this plain name; None where it is something else, such as a path."""
    match = HUB.fullmatch(name)
    is_plain = match and match["repo"] == name and not absolute(name).exists()
    return _of_match(name, match) if match and is_plain else None


def _of_match(text: str, match: re.Match[str]) -> Reference:
    """The reference to the hub that `match` spells. Raises UsageError."""
    if foreign := [letter for letter in match["repo"] if not letter.isascii()]:
        name = unicodedata.name(foreign[0], "no letter")
        raise UsageError(
            f"model={text}: no repository has {foreign[0]!r} ({name}) in its name, and no path "
            "is called so",
            "type the name instead of copying it",
        )
    if match["quant"] and match["late"]:
        raise UsageError(f"model={text}: names two quants", HINT)
    quant = match["quant"] or match["late"] or ""
    is_file = quant.lower().endswith(".gguf")  # which Ollama takes there, too
    return Reference(
        kind="hub",
        text=text,
        repo=match["repo"],
        revision=match["revision"] or "",
        quant="" if is_file or quant.lower() == "latest" else quant,  # Ollama's default one
        filename=quant if is_file else "",
    )


def require_revision(revision: str, where: str) -> None:
    """Raise UsageError for what cannot name a branch, a tag or a commit."""
    if NO_REVISION.search(revision):
        raise UsageError(
            f"{where}: {revision!r} is not the name of a branch, tag or commit",
            "such names are main, v1.0 and refs/pr/7",
        )


def exists(path: Path) -> bool:
    """Whether there is such a file or folder. A name may be too long to exist."""
    try:
        return path.exists()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Whether there is such a file."""
    return exists(path) and path.is_file()


def missing(
    variable: str, text: str, path: Path, hint: str = "", *, why: str = "does not exist"
) -> UsageError:
    """The error for a path that does not exist, may not be looked at, or leads to a disk that is
    not mounted."""
    try:
        path.stat()
    except PermissionError as error:
        return UsageError(
            f"{variable}={text}: {path} cannot be looked at: {error.strerror}",
            "let this user read it, and enter the folders above it",
        )
    except OSError as error:  # what is not there is told below
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return UsageError(f"{variable}={text}: {path} {why}: {error.strerror}", hint)
    if link := dangling(path):
        return UsageError(f"{variable}={text}: {link.message}", link.hint)
    return UsageError(f"{variable}={text}: {path} {why}", hint)


def existing(text: str, path: Path, note: str = "") -> Reference:
    """A reference to a file or folder that exists. Raises UsageError."""
    if path.is_dir():
        return Reference(kind="folder", text=text, path=path, note=note)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return Reference(kind="gguf", text=text, path=path, note=note)
    what = f"{path.name} is neither a .gguf file nor a folder"
    hint = "for safetensors pass the folder that holds config.json and the weights"
    if not path.is_file():  # one that nobody writes to would be waited for
        what, hint = f"{path.name} is a pipe, a socket or a device, not a file", "copy it into one"
    elif re.fullmatch(PIECE, path.name.lower()):
        what, hint = f"{path.name} is a piece of a GGUF", JOIN
    elif path.suffix.lower() != ".safetensors":
        with contextlib.suppress(OSError), path.open("rb") as file:
            start = file.read(contents.START)
            if start.startswith(b"GGUF"):
                hint = "it is a GGUF by its content: give it a name that ends in .gguf"
            elif start and (kind := contents.foreign(start)):
                what, hint = f"{what}: it {kind[0]}", kind[1]
    raise UsageError(f"model={text}: {what}", hint)


# Addresses of the hub


def is_address(text: str) -> bool:
    """Whether `text` is an address, of a model or of something else."""
    try:
        return parse_address(text) is not None
    except UsageError:
        return True


def parse_address(text: str) -> Reference | None:
    """The repository, and the file or folder in it, that an address of the hub names; None where
    `text` is no address. Raises UsageError for an address that names no model."""
    scheme = SCHEME.match(text)
    address = text if scheme else f"//{text}"
    if text.lower().startswith("git@"):  # git@hf.co:org/model
        address = "//" + text[4:].replace(":", "/", 1)
    try:
        parts = urlsplit(address)
        host = (parts.hostname or "").lower()
    except ValueError as error:
        raise _address_error(text, f"not an address: {error}") from None
    if scheme and scheme[0].lower() == "hf://":
        host, path = "hf.co", f"{parts.netloc}{parts.path}"
    else:
        path = parts.path
    own_host, own_path = _own_hub()
    if host not in {*HOSTS, own_host} - {""}:
        if scheme and scheme[0].lower() == "file://":
            raise UsageError(
                f"model={text}: is the address of a file here", f"pass its path: {unquote(path)}"
            )
        if scheme:
            raise _address_error(
                text, "is not an address of the hub; download the file and pass its path"
            )
        return None
    names = _parts(path)
    if host == own_host and names[: len(own_path)] == own_path:
        names = names[len(own_path) :]
    return _of_path(text, names, parts.query)


def _parts(path: str) -> list[str]:
    """The parts of an address's path."""
    return [unquote(part) for part in path.split("/") if part]


def _at(text: str, repo: str, revision: str) -> Reference:
    """The repository, which may be spelled with a quant, or with a revision where the address has
    none of its own. Raises UsageError."""
    match = HUB.fullmatch(repo)
    if match is None or (match["revision"] and revision):
        raise UsageError(f"model={text}: not a valid address", HINT)
    reference = _of_match(text, match)
    return replace(reference, revision=reference.revision or revision)


def _own_hub() -> tuple[str, list[str]]:
    """The host of HF_ENDPOINT, and the path that its repositories are below, as those of a mirror
    may be; empty where it is unset or invalid."""
    try:
        parts = urlsplit(os.environ.get("HF_ENDPOINT", "").strip())
        return (parts.hostname or "").lower(), _parts(parts.path)
    except ValueError:
        return "", []


def _of_path(text: str, parts: list[str], query: str) -> Reference:
    """What an address with these parts of a path and this query names. Raises UsageError."""
    if parts[:2] == ["api", "models"]:
        parts = parts[2:]
    elif parts[:1] == ["models"] and len(parts) > 2:  # hf://models/org/model
        parts = parts[1:]
    if parts and parts[0] in OTHER:
        raise _address_error(text, f"is the address of {OTHER[parts[0]]}, not of a model")
    if len(parts) < 2:
        raise _address_error(text, "names no repository: org/model")
    kind, revision = "".join(parts[2:3]), ""
    if kind in OF_A_FILE:
        end = 6 if parts[3:4] == ["refs"] else 4  # refs/pr/7
        revision, file = "/".join(parts[3:end]), "/".join(parts[end:])
    elif kind:  # a page about it, or hf://org/model/file.gguf
        file = "/".join(parts[2:]) if parts[-1].lower().endswith(".gguf") else ""
    else:  # the page about a file
        file = parse_qs(query).get("show_file_info", [""])[0].strip("/")
    repo, name = f"{parts[0]}/{parts[1].removesuffix('.git')}", PurePosixPath(file)
    reference = _at(text, repo, "" if revision == "main" else revision)
    if not file:
        return reference
    if name.suffix.lower() == ".gguf":
        return replace(reference, filename=file)
    if kind == "tree":
        return replace(reference, pattern=f"{glob.escape(file)}/*")
    if name.suffix.lower() in FILES or name.name in FILES:
        return replace(reference, note=f"{file}: taken for the repository it is in")
    raise _address_error(text, f"{file} is not a GGUF, nor a file of a model in safetensors")


def _address_error(text: str, why: str) -> UsageError:
    return UsageError(f"model={text}: {why}", ADDRESS_HINT)
