"""What text files hold that options of llama-server name: it takes them as they are, and much of
what is none of them without a word."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection
from pathlib import Path

from pipeline.core.text import decoded

from .values import GRAMMAR

TEMPLATE, GRAMMARS = "chat-template-file", "grammar-file"
OBJECTS = {"ui-config-file", "mcp-servers-config"}
TEXTS = {TEMPLATE, GRAMMARS, "json-schema-file", *OBJECTS}
LONGEST = 16 * 1024 * 1024  # bytes


def wrong(names: Collection[str], path: Path, *, takes_names: bool) -> str:
    """Why the file `path` is not what the option with these names takes; empty where it is.
    `takes_names`: a chat template may be the name of one of llama.cpp's own."""
    kind = TEXTS.intersection(names)
    if not kind:
        return ""
    try:
        if path.stat().st_size > LONGEST:
            return f"{path} is too long for such a file"
        data = path.read_bytes()
        text = decoded(data)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    except ValueError as error:
        return f"{path}: {error}"
    if kind & {TEMPLATE, GRAMMARS} and data.startswith(codecs.BOM_UTF8):
        return f"{path} begins with a byte order mark (BOM); save it as UTF-8 without"
    if not text.strip():
        return f"{path} is empty"
    if TEMPLATE in kind and "{" not in text and not takes_names:
        return f"{path} is not a template: every prompt would be this text"
    if GRAMMARS in kind and not GRAMMAR.search(text):
        return f"{path} is not a grammar: it has no rule root ::= …"
    return f"{path} {why}" if kind & OBJECTS and (why := _not_json(text)) else ""


def _not_json(text: str) -> str:
    """Why a text is no object in JSON; empty where it is one."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return "" if isinstance(content, dict) else "is JSON, but no object"
