"""The environment's proxies and certificates: checked before the network is used, and named in
errors. A proxy's address is never shown: it may hold a password."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from .errors import UsageError

PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
SCHEMES = ("http", "https", "socks5", "socks5h")


def check() -> None:
    """Raise UsageError that names the variable with which no request can succeed."""
    import ssl
    from urllib.request import proxy_bypass

    unset = "unset it, or let it name this machine's certificates"
    file, folders = os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", "")
    try:
        if file:
            ssl.create_default_context(cafile=file)
    except ssl.SSLError:
        raise UsageError(f"SSL_CERT_FILE={file}: holds no certificate", unset) from None
    except OSError as error:
        raise UsageError(f"SSL_CERT_FILE={file}: {error.strerror}", unset) from None
    if folders and not file and not any(map(os.path.isdir, folders.split(os.pathsep))):
        raise UsageError(f"SSL_CERT_DIR={folders}: there is no such folder", unset)
    if not proxy_bypass("*"):
        for name in _proxies():
            _check_proxy(name)


def _check_proxy(name: str) -> None:
    text = os.environ[name]
    url = text if "://" in text else f"http://{text}"
    if not is_url(url, SCHEMES):
        raise UsageError(f"{name}: is not the address of a proxy", "http://HOST:PORT, or unset it")
    if urlsplit(url).scheme.startswith("socks") and not importlib.util.find_spec("socksio"):
        raise UsageError(
            f"{name}: a SOCKS proxy needs the Python package socksio",
            "name an HTTP proxy instead; or, where the network is reached without one: "
            f"env -u {name} {sys.executable} -m pip install socksio",
        )


def is_url(text: str, schemes: Sequence[str] = ("http", "https")) -> bool:
    """Whether `text` is a URL of one of these schemes that names a host."""
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def through(url: str) -> str:
    """`; requests go through the proxy in HTTPS_PROXY`, or nothing where they go directly."""
    from urllib.request import proxy_bypass

    parts = urlsplit(url)
    names = [] if proxy_bypass(parts.hostname or "") else _proxies()
    fitting = (f"{parts.scheme.upper()}_PROXY", "ALL_PROXY")
    name = next((name for name in names if name.upper() in fitting), "")
    return f"; requests go through the proxy in {name}" if name else ""


def trust(error: object) -> str:
    """What helps where a server's certificate is not trusted, as behind a proxy that reads along;
    nothing for another error."""
    if "CERTIFICATE_VERIFY_FAILED" not in str(error):
        return ""
    unread = next((name for name in CERTIFICATES[2:] if os.environ.get(name)), "")
    return (
        "; if a proxy here signs with a certificate of its own, name a file that holds it: "
        f"SSL_CERT_FILE=FILE{f' ({unread} is not read)' if unread else ''}"
    )


def settings() -> str:
    """`; set here: HTTPS_PROXY, SSL_CERT_FILE (does not exist)`, or nothing: what pip heeds too."""
    names = _proxies()
    for name in CERTIFICATES:
        if places := os.environ.get(name, ""):
            is_there = any(Path(place).exists() for place in places.split(os.pathsep))
            names.append(name if is_there else f"{name} (does not exist)")
    return f"; set here: {', '.join(names)}" if names else ""


def _proxies() -> list[str]:
    """The proxy variables that are set; lower case wins."""
    spelled = ((name.lower(), name) for name in PROXIES)
    names = (next((name for name in pair if os.environ.get(name)), "") for pair in spelled)
    return [name for name in names if name]
