"""The certificate and the key of a server that speaks TLS itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .configuration import beside
from .options import ResolvedOptions

CERTIFICATE = ("ssl-cert-file", "ssl-certfile")  # llama-server's, vLLM's
KEY = ("ssl-key-file", "ssl-keyfile")


def errors(resolved: ResolvedOptions, folder: Path) -> Iterator[str]:
    """The error of files that the server could not use: of those llama-server says that it could
    not bind its port. Files that are not here are somebody else's to find."""
    given = [name for name in CERTIFICATE if resolved.text(name)]
    if not given:
        return
    certificate = beside(folder, resolved.text(*CERTIFICATE))
    key = beside(folder, resolved.text(*KEY)) if resolved.text(*KEY) else certificate
    if certificate.is_file() and key.is_file() and (why := _unusable(certificate, key)):
        yield resolved.spec.line(f"server.{given[0]}", f" = {resolved.text(*given)}: {why}")


def _unusable(certificate: Path, key: Path) -> str:
    """Why a certificate and its key cannot be used together, or nothing."""
    import ssl  # slow to load

    locked: list[Path] = []

    def passphrase() -> str:
        locked.append(key)
        return ""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, passphrase)
    except ssl.SSLError as error:
        if locked:
            plain = f"openssl pkey -in {key.name} -out plain.pem"
            return f"{key} has a passphrase, which nobody could enter; {plain} writes it without"
        if error.reason == "KEY_VALUES_MISMATCH":
            own = "the server's own certificate comes first in its file"
            return f"{key} is the key of another certificate ({own}, before its issuers')"
        return f"{certificate} and {key} are not a certificate and its private key, both as PEM"
    except OSError as error:
        return f"{certificate} or {key} cannot be read: {error.strerror}"
    return ""
