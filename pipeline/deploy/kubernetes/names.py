"""Names that Kubernetes takes."""

from __future__ import annotations

import hashlib
import re
import unicodedata

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
LONGEST = 40  # of a name here: what is added (`-api-key`, a pod's own letters) has to fit in 63


def name(text: str) -> str:
    """`text` as a name of an object, a label's value and a host: RFC 1035, which holds RFC 1123.

    Two texts that differ in more than letter case get two names: one that loses something gets a
    hash of what it was.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    found = re.sub(r"[^a-z0-9]+", "-", plain)[:LONGEST].strip("-")
    if not found[:1].isalpha():
        found = f"model-{found}".strip("-")
    if found == text.lower():
        return found
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{found[: LONGEST - 7].rstrip('-')}-{digest}"
