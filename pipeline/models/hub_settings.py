"""The hub's settings in the environment, as huggingface_hub reads them. Apart from `hub_errors`:
every command reads them at its start, and that module loads ssl."""

from __future__ import annotations

import os
import re

from pipeline.core.errors import UsageError
from pipeline.core.network import is_url


def is_offline() -> bool:
    """Whether the environment forbids the network, as huggingface_hub reads it."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.strip().upper() in ("1", "ON", "YES", "TRUE")


def check_environment() -> None:
    """Raise UsageError for what huggingface_hub would stumble over when it is imported."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        value = os.environ.get(name, "10")
        if not re.fullmatch(r"[0-9]{1,6}", value.strip()) or not int(value):
            raise UsageError(f"{name}={value}: must be a number of seconds", "or leave it unset")
    if not os.environ.get("HF_TOKEN", "").strip().isascii():
        raise UsageError("HF_TOKEN: contains letters that no token has", "copy it again")
    if not os.environ.get("HF_ENDPOINT", " ").strip():
        os.environ.pop("HF_ENDPOINT", None)  # empty means unset; not so for the library
    if not is_url(endpoint()):
        raise UsageError(
            "HF_ENDPOINT: is not the address of a hub", "https://HOST, or leave it unset"
        )


def has_token() -> bool:
    """Whether requests carry a token."""
    from huggingface_hub import get_token

    return bool(get_token())


def endpoint() -> str:
    """The hub's address as it may be shown: without a password."""
    text = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"
    return re.sub(r"//[^/@]*@", "//", text)
