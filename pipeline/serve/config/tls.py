"""The certificate and the key of a server that speaks TLS itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.serve.server import LLAMA_CPP

from .configuration import beside
from .options import ResolvedOptions

CERTIFICATE = ("ssl-cert-file", "ssl-certfile")  # llama-server's, vLLM's
KEY = ("ssl-key-file", "ssl-keyfile")


def errors(resolved: ResolvedOptions, folder: Path) -> Iterator[str]:
    """The error of a certificate without its key, or a key alone, with which llama-server speaks
    plain HTTP and says nothing; and of files that the server could not use, of which it says that
    it could not bind its port. Files that are not here are somebody else's to find."""
    given = [name for name in (*CERTIFICATE, *KEY) if resolved.text(name)]
    if len(given) == 1 and resolved.spec.engine == LLAMA_CPP:
        (absent,) = {CERTIFICATE[0], KEY[0]} - {*given}
        why = f": llama-server speaks plain HTTP without {absent.replace('-', '_')}; write both"
        yield resolved.spec.line(f"server.{given[0]}", why)
        return
    if not resolved.text(*CERTIFICATE):
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
