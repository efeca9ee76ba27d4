"""Where a server is reached, as programs and people are told."""

from __future__ import annotations

import pytest

from pipeline.serve import address

OTHERS = " (from other machines: port 80 of this one)"


@pytest.mark.parametrize(
    ("host", "url", "is_anywhere"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/a", False),
        ("localhost", "http://localhost:80/a", False),
        ("::1", "http://[::1]:80/a", False),
        ("192.168.1.5", "http://192.168.1.5:80/a", False),
        ("gpu-box.lan", "http://gpu-box.lan:80/a", False),
        ("0.0.0.0", "http://127.0.0.1:80/a", True),
        ("", "http://127.0.0.1:80/a", True),
        ("::", "http://[::1]:80/a", True),
        ("::0", "http://[::1]:80/a", True),
        ("0:0:0:0:0:0:0:0", "http://[::1]:80/a", True),
    ],
)
def test_a_url_leads_to_the_server_from_this_machine(
    host: str, url: str, is_anywhere: bool
) -> None:
    assert address.url(host, 80, "/a") == url
    assert address.url(host, 80, "/a", tls=True) == url.replace("http:", "https:")
    assert address.shown(host, 80, "/a") == url + OTHERS * is_anywhere
