"""Which requests are refused because a page of another site sends them, or may have sent them.

Without a key, web pages are the danger. Any page may send a request to this machine and name itself
in `Origin`; one whose name is led to this machine (DNS rebinding) is of the same origin, and shows
itself by `Host` alone.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping, Sequence

from pipeline.serve.keys import is_loopback

from .refusal import Refused

TWO_LENGTHS = Refused(400, "the request has Content-Length and Transfer-Encoding", closes=True)

# Pages of this machine.
LOCAL_ORIGINS = [
    f"{scheme}://{host}{port}"
    for scheme in ("http", "https")
    for host in ("localhost", "*.localhost", "127.0.0.1", "[::1]", "0.0.0.0")  # noqa: S104
    for port in ("", ":*")
]
# Names that no public name server leads anywhere, and that of this machine.
LOCAL_HOSTS = ["localhost", "*.localhost", "*.local", "*.internal", socket.gethostname()]
# As browsers send them. Anything else is from no browser.
ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/?#\s]*")
HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")


class Rules:
    """Who may ask `who`, which listens on `host`: pages of this machine and of `origins`, under
    the names of this machine and `hosts`; `*` stands for any text. `place` is how messages name
    either list, `{key}`."""

    def __init__(
        self,
        host: str,
        origins: Sequence[str],
        hosts: Sequence[str],
        *,
        who: str,
        place: str,
        needs_key: bool = False,
    ) -> None:
        self.origins = _any_of([*LOCAL_ORIGINS, *origins])
        self._any_host = not (hosts or is_loopback(host))
        self._hosts = _any_of([*LOCAL_HOSTS, *hosts])
        self._who, self._place, self._needs_key = who, place, needs_key

    def refusal(self, method: str, headers: Mapping[str, str]) -> Refused | None:
        """Why a request is refused; None where it is not. `headers` have names in lower case."""
        if "content-length" in headers and "transfer-encoding" in headers:
            return TWO_LENGTHS
        is_preflight = method == "OPTIONS" and "access-control-request-method" in headers
        if self._needs_key and not is_preflight:
            return None
        host = headers.get("host", "").lower()
        if not (self._needs_key or self._is_own_name(host)):
            return self._not_in("hosts", f"{self._who} does not answer to the name {host}")
        origin = _page(headers)
        is_same_site = origin in (f"http://{host}", f"https://{host}")
        if ORIGIN.fullmatch(origin) and not (is_same_site or self.origins.fullmatch(origin)):
            return self._not_in("origins", f"pages of {origin} may not ask {self._who}")
        return None

    def _not_in(self, key: str, what: str) -> Refused:
        instead = "" if self._needs_key else ", or set an API key"
        return Refused(403, f"{what}; add it to {self._place.format(key=key)}{instead}")

    def _is_own_name(self, host: str) -> bool:
        """Whether a browser that asks for `host` cannot have been led here by another site."""
        match = HOST.fullmatch(host)
        name = match[1].rstrip(".") if match else host
        return self._any_host or not name or _is_address(name) or bool(self._hosts.fullmatch(name))


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """Matches what one of `patterns` does; `*` stands for any text."""
    return re.compile(
        "|".join(re.escape(pattern.lower()).replace(r"\*", ".*") for pattern in patterns)
    )


def _page(headers: Mapping[str, str]) -> str:
    """The origin of the page that asks; empty where none does, or a user opens the address."""
    origin = headers.get("origin", "").lower()
    is_embedded = headers.get("sec-fetch-dest") != "document"
    if origin or headers.get("sec-fetch-site") != "cross-site" or not is_embedded:
        return origin
    # What a page of another site embeds, such as an image or a frame, comes without an origin.
    referrer = ORIGIN.match(headers.get("referer", "").lower())
    return referrer[0] if referrer else "null"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
