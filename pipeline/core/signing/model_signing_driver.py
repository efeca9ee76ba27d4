"""Run model-signing: a program of its own, started with the folder of its packages.

    model_signing_driver.py PACKAGES sign   PRIVATE_KEY SCRATCH '["TARGET", "SIGNATURE", "MADE"]' …
    model_signing_driver.py PACKAGES verify PUBLIC_KEY  ''      '["TARGET", "SIGNATURE"]' …

Prints one JSON object: what is wrong with each target, empty for nothing; or under KEY what is
wrong with the key. Where SIGNATURE is right already, MADE is not written.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

KEY = "key"
CHANGED = "is not what was signed"
OTHER_KEY = "was signed with another key"
NO_CURVE = "it is a key of another kind, such as RSA or Ed25519, not of an elliptic curve"


def main(words: list[str]) -> None:
    packages, action, key, scratch, *rows = words
    sys.path.insert(0, packages)
    model_signing = importlib.import_module("model_signing")
    answers = {}
    try:
        public = public_half(Path(key), Path(scratch)) if action == "sign" else Path(key)
        model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public)
    except Exception as error:
        has_no_curve = getattr(error, "name", "") == "curve"
        answers = {KEY: NO_CURVE if has_no_curve else str(error) or type(error).__name__}
        rows = []
    for row in rows:
        target, signature, *made = map(Path, json.loads(row))
        why = problem(model_signing, public, target, signature) if signature.is_file() else "none"
        if action == "sign" and why:
            why = sign(model_signing, Path(key), target, signature, *made)
        answers[str(target)] = why
    json.dump(answers, sys.stdout)


def public_half(key: Path, folder: Path) -> Path:
    """The public key that belongs to a private one, as a file in `folder`."""
    serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    public = folder / "public.pem"
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(private.public_key().public_bytes(serialization.Encoding.PEM, form))
    return public


def sign(model_signing: Any, key: Path, target: Path, signature: Path, made: Path) -> str:
    """Sign `target` into `made`, for the place `signature`; why that fails, empty where it does
    not."""
    hashing = (
        model_signing.hashing.Config()
        .use_file_serialization(allow_symlinks=True)
        .set_ignored_paths(paths=[signature])
    )
    signing = model_signing.signing.Config().use_elliptic_key_signer(private_key=key)
    try:
        signing.set_hashing_config(hashing).sign(target, made)
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def problem(model_signing: Any, public: Path, target: Path, signature: Path) -> str:
    """What is wrong with `target`, by its signature; empty for nothing."""
    try:
        config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public)
        config.verify(target, signature)
    except Exception as error:
        text = str(error)
        if "Signature mismatch" in text:
            return CHANGED
        if type(error).__name__ == "InvalidSignature" or "Key mismatch" in text:
            return OTHER_KEY
        if isinstance(error, KeyError | UnicodeDecodeError | json.JSONDecodeError):
            text = "it is not a signature; sign again, or get the file that sign wrote"
        return f"its signature {signature.name} cannot be checked: {text or type(error).__name__}"
    return ""


if __name__ == "__main__":
    main(sys.argv[1:])
