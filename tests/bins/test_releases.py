"""Which files of a release are needed, and what GitHub's API may answer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from fakes import releases as fake
from msgspec import convert

from pipeline.bins import build_options
from pipeline.bins.release import assets, github, releases
from pipeline.bins.release.assets import Asset, NoMatchError, kind, matching
from pipeline.core.bounded import Bound
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home

# A release as upstream made it in 2026, and one as it announced it later that year.
B10107 = [
    "cudart-llama-bin-win-cuda-12.4-x64.zip",
    "cudart-llama-bin-win-cuda-13.3-x64.zip",
    "llama-b10107-bin-android-arm64.tar.gz",
    "llama-b10107-bin-macos-arm64.tar.gz",
    "llama-b10107-bin-macos-x64.tar.gz",
    "llama-b10107-bin-ubuntu-arm64.tar.gz",
    "llama-b10107-bin-ubuntu-openvino-2026.2.1-x64.tar.gz",
    "llama-b10107-bin-ubuntu-rocm-7.2-x64.tar.gz",
    "llama-b10107-bin-ubuntu-s390x.tar.gz",
    "llama-b10107-bin-ubuntu-sycl-fp16-x64.tar.gz",
    "llama-b10107-bin-ubuntu-sycl-fp32-x64.tar.gz",
    "llama-b10107-bin-ubuntu-vulkan-arm64.tar.gz",
    "llama-b10107-bin-ubuntu-vulkan-x64.tar.gz",
    "llama-b10107-bin-ubuntu-x64.tar.gz",
    "llama-b10107-bin-win-cpu-arm64.zip",
    "llama-b10107-bin-win-cpu-x64.zip",
    "llama-b10107-bin-win-cuda-12.4-x64.zip",
    "llama-b10107-bin-win-cuda-13.3-x64.zip",
    "llama-b10107-bin-win-hip-radeon-x64.zip",
    "llama-b10107-bin-win-opencl-adreno-arm64.zip",
    "llama-b10107-bin-win-openvino-2026.2.1-x64.zip",
    "llama-b10107-bin-win-sycl-x64.zip",
    "llama-b10107-bin-win-vulkan-x64.zip",
    "llama-b10107-ui.tar.gz",
    "llama-b10107-xcframework.zip",
    "llama-b10107-bin-310p-openEuler-x86.tar.gz",
    "llama-b10107-bin-910b-openEuler-aarch64-aclgraph.tar.gz",
]
LATER = [
    "llama-b11146-bin-ubuntu-cuda-12.8-x64.tar.gz",
    "llama-b11146-bin-ubuntu-cuda-13.4-x64.tar.gz",
    "llama-b11146-bin-ubuntu-cuda-13.4-arm64.tar.gz",
    "llama-b11146-bin-ubuntu-rocm-10.0-x64.tar.gz",
    "cudart-llama-b11146-bin-ubuntu-cuda-12.8-x64.tar.gz",
    "cudart-llama-b11146-bin-ubuntu-cuda-13.4-x64.tar.gz",
    "cudart-llama-b11146-bin-ubuntu-cuda-13.4-arm64.tar.gz",
    "llama-b11146-bin-linux-arm64-snapdragon.tar.gz",
    "llama-b11146-bin-win-rocm-10.0-x64.zip",
]


def asset(name: str, **more: Any) -> Asset:
    given = {"size": 1, "digest": f"sha256:{'0' * 64}", "url": f"https://host/{name}", **more}
    return Asset(name=name, **given)


def chosen(
    names: list[str], platform: str, backend: str, driver: tuple[int, int] | None = None
) -> list[str]:
    found = matching([asset(name) for name in names], platform, backend, driver)
    return [entry.name for entry in found.assets]


# The choice


@pytest.mark.parametrize(
    ("names", "platform", "backend", "expected"),
    [
        (B10107, "windows-x64", "cpu", "llama-b10107-bin-win-cpu-x64.zip"),
        (B10107, "windows-arm64", "cpu", "llama-b10107-bin-win-cpu-arm64.zip"),
        (B10107, "windows-x64", "vulkan", "llama-b10107-bin-win-vulkan-x64.zip"),
        (B10107, "windows-x64", "hip", "llama-b10107-bin-win-hip-radeon-x64.zip"),
        (B10107, "windows-x64", "sycl", "llama-b10107-bin-win-sycl-x64.zip"),
        (B10107, "linux-x64", "cpu", "llama-b10107-bin-ubuntu-x64.tar.gz"),
        (B10107, "linux-arm64", "cpu", "llama-b10107-bin-ubuntu-arm64.tar.gz"),
        (B10107, "linux-s390x", "cpu", "llama-b10107-bin-ubuntu-s390x.tar.gz"),
        (B10107, "linux-x64", "vulkan", "llama-b10107-bin-ubuntu-vulkan-x64.tar.gz"),
        (B10107, "linux-x64", "hip", "llama-b10107-bin-ubuntu-rocm-7.2-x64.tar.gz"),
        (B10107, "linux-x64", "sycl", "llama-b10107-bin-ubuntu-sycl-fp32-x64.tar.gz"),
        (B10107, "macos-arm64", "metal", "llama-b10107-bin-macos-arm64.tar.gz"),
        (B10107, "macos-arm64", "cpu", "llama-b10107-bin-macos-arm64.tar.gz"),
        (LATER, "windows-x64", "hip", "llama-b11146-bin-win-rocm-10.0-x64.zip"),
        (["llama-b6000-bin-ubuntu-x64.zip"], "linux-x64", "cpu", "llama-b6000-bin-ubuntu-x64.zip"),
        # Names that nobody has given yet.
        (["llama-v9-bin-linux-x86_64-cpu.tgz"], "linux-x64", "cpu", None),
        (["llama-b1-bin-ubuntu-24.04-vulkan-aarch64.tar.gz"], "linux-arm64", "vulkan", None),
        (["llama-b1-rc-bin-windows-amd64.zip"], "windows-x64", "cpu", None),
        (["llama-b1-bin-darwin-metal-arm64.zip"], "macos-arm64", "metal", None),
        # Two that would do: the newest, the form that keeps links, the usual variant.
        (
            ["llama-b1-bin-ubuntu-x64.zip", "llama-b1-bin-ubuntu-x64.tar.gz"],
            *("linux-x64", "cpu", "llama-b1-bin-ubuntu-x64.tar.gz"),
        ),
        (
            ["llama-b1-bin-ubuntu-rocm-7.2-x64.tar.gz", "llama-b1-bin-ubuntu-rocm-10.0-x64.tar.gz"],
            *("linux-x64", "hip", "llama-b1-bin-ubuntu-rocm-10.0-x64.tar.gz"),
        ),
    ],
)
def test_matching(names: list[str], platform: str, backend: str, expected: str | None) -> None:
    assert chosen(names, platform, backend) == [expected or names[0]]
    assert chosen(names[::-1], platform, backend) == [expected or names[0]]


@pytest.mark.parametrize(
    ("driver", "version"),
    [
        (None, "12.4"),
        ((12, 4), "12.4"),
        ((12, 9), "12.4"),
        ((13, 2), "12.4"),
        ((13, 3), "13.3"),
        ((14, 0), "13.3"),
    ],
)
def test_cuda_comes_with_its_libraries(driver: tuple[int, int] | None, version: str) -> None:
    assert chosen(B10107, "windows-x64", "cuda", driver) == [
        f"llama-b10107-bin-win-cuda-{version}-x64.zip",
        f"cudart-llama-bin-win-cuda-{version}-x64.zip",
    ]


def test_cuda_on_linux_where_there_is_one() -> None:
    assert chosen(LATER, "linux-arm64", "cuda", (13, 4)) == [
        "llama-b11146-bin-ubuntu-cuda-13.4-arm64.tar.gz",
        "cudart-llama-b11146-bin-ubuntu-cuda-13.4-arm64.tar.gz",
    ]
    assert chosen(LATER, "linux-x64", "cuda")[0] == "llama-b11146-bin-ubuntu-cuda-12.8-x64.tar.gz"


def test_older_ways_to_write_cuda() -> None:
    names = ["llama-b4000-bin-win-cuda-cu12.4-x64.zip", "cudart-llama-bin-win-cu12.4-x64.zip"]
    assert chosen(names, "windows-x64", "cuda", (12, 4)) == names
    assert kind(asset("llama-b1-bin-ubuntu-cuda13-x64.tar.gz")).version == (13,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("names", "platform", "backend", "driver", "message", "hint"),
    [
        (
            *(B10107, "linux-x64", "cuda", (13, 0)),
            *("no archive for linux-x64 with cuda, only with cpu, hip, sycl, vulkan", "bins=build"),
        ),
        (B10107, "linux-riscv64", "cpu", None, "only for linux-arm64, linux-s390x", "bins=build"),
        (
            B10107,
            "windows-x64",
            "cuda",
            (11, 8),
            "12.4, 13.3, and the driver here.* 11.8",
            "driver",
        ),
        (B10107[3:], "windows-x64", "cuda", None, "no archive of the CUDA libraries", "bins=build"),
        (["llama-b1-ui.tar.gz"], "linux-x64", "cpu", None, "only for nothing known", "bins=build"),
        ([], "linux-x64", "cpu", None, "only for nothing known", "bins=build"),
    ],
)
def test_nothing_fits(
    names: list[str],
    platform: str,
    backend: str,
    driver: tuple[int, int] | None,
    message: str,
    hint: str,
) -> None:
    with pytest.raises(NoMatchError, match=message) as caught:
        chosen(names, platform, backend, driver)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "name",
    [
        "llama-b10107-xcframework.zip",
        "llama-b10107-ui.tar.gz",
        "llama-b1-bin-android-arm64.tar.gz",
        "llama-b1-bin-linux-arm64-snapdragon.tar.gz",
        "llama-b1-bin-310p-openEuler-x86.tar.gz",
        "llama-b1-bin-win-opencl-adreno-arm64.zip",
        "llama-b1-bin-ubuntu-openvino-2026.2.1-x64.tar.gz",
        "llama-b1-bin-macos-arm64-kleidiai.tar.gz",
        "llama-b1-bin-win-avx2-x64.zip",
        "llama-b1-bin-win-hip-x64-gfx1030.zip",
        "llama-b1-bin-ubuntu-x64.tar.xz",
        "llama-b1-bin-ubuntu-x64",
        "llama-b1-bin-ubuntu-x64-arm64.tar.gz",
        "llama-b1-bin-ubuntu-vulkan-sycl-x64.tar.gz",
        "llama-b1-bin-ubuntu.tar.gz",
        "other-b1-bin-ubuntu-x64.tar.gz",
        "sha256sums.txt",
        "",
    ],
)
def test_names_that_are_not_for_us(name: str) -> None:
    assert kind(asset(name)) is None


@pytest.mark.parametrize("digest", ["", "md5:abc", "sha512:" + "0" * 128, "sha256:short", "x"])
def test_without_a_digest_nothing_is_taken(digest: str) -> None:
    with pytest.raises(PipelineError, match=r"no digest for it|only sha256 is known"):
        _ = asset("a.zip", digest=digest).sha256


@pytest.mark.parametrize("name", ["b10605", "v0.5.0", "latest", "gguf-v0.4.0-3352-g855cd07"])
def test_names_of_releases(name: str) -> None:
    assert build_options.release_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "a\\b", "-b1", "b1.", "C:b", "b 1", "ü", "x" * 101, " b1"]
)
def test_no_names_of_releases(name: str) -> None:
    with pytest.raises(ValueError, match="a tag of upstream's"):
        build_options.release_name(name)


# The API


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fake.Site]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in github.TOKENS:
            monkeypatch.delenv(name)
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cäche"))
    with fake.start() as site:
        monkeypatch.setenv("GITHUB_API_URL", site.api)
        yield site


UBUNTU = "llama-{}-bin-ubuntu-x64.tar.gz"


def find(release: str, backend: str = "cpu", platform: str = "linux-x64") -> releases.Release:
    return releases.find(release, platform, backend, lambda: None)


def test_by_tag(site: fake.Site) -> None:
    site.add("b7000", dict.fromkeys(B10107, b"bytes"))
    found = find("b7000", "cuda", "windows-x64")
    assert found.tag == "b7000"
    assert [asset.sha256 for asset in found.choice.assets] == [
        hashlib.sha256(b"bytes").hexdigest()
    ] * 2
    assert site.asked("api") == [f"{fake.BASE}/tags/b7000"]
    assert site.asked("files") == []


def test_the_latest_has_what_is_asked_for(site: fake.Site) -> None:
    """A version holds only a pointer, drafts are nobody's, and files arrive one by one."""
    for tag in ("b1", "b2"):
        site.add(tag, {UBUNTU.format(tag): b"x"})
    site.add("b3", {UBUNTU.format("b3"): b"x"}, {UBUNTU.format("b3"): {"state": "open"}})
    site.add("b4", {"llama-b4-bin-win-cpu-x64.zip": b"x"})
    site.add("b5", {UBUNTU.format("b5"): b"x"}, draft=True)
    site.add("v0.6.0", {releases.POINTER: b"b1\n"}, prerelease=False)
    site.add("b7", {})
    assert find("latest").tag == "b2"
    assert find("latest", platform="windows-x64").tag == "b4"
    with pytest.raises(PipelineError, match="b4 has no archive for linux-s390x"):
        find("latest", platform="linux-s390x")


def test_a_version_points_to_a_build(site: fake.Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.add("b7000", {UBUNTU.format("b7000"): b"x"})
    site.add("v0.6.0", {releases.POINTER: b"b7000\n"}, prerelease=False)
    assert find("v0.6.0").tag == "b7000"
    assert "v0.6.0 is the build b7000" in capsys.readouterr().err


@pytest.mark.parametrize("pointed", [b"../../etc\n", b"", b"\xff", b"b7000\n" * 1000])
def test_a_pointer_to_no_build(site: fake.Site, pointed: bytes) -> None:
    site.add("v0.6.0", {releases.POINTER: pointed})
    with pytest.raises(PipelineError, match="does not hold the tag"):
        find("v0.6.0")


def test_a_pointer_that_was_changed(site: fake.Site) -> None:
    site.add("v0.6.0", {releases.POINTER: b"b7000"})
    site.faults["flip"] = True
    with pytest.raises(PipelineError, match="does not hold the tag"):
        find("v0.6.0")


def test_an_unknown_tag(site: fake.Site) -> None:
    with pytest.raises(UsageError, match=r"release=b1: llama\.cpp has no such release"):
        find("b1")


@pytest.mark.parametrize("tag", ["b7", "latest"])
def test_no_programs_yet(site: fake.Site, tag: str) -> None:
    site.add("b7", {})
    with pytest.raises(PipelineError, match="has no archive of programs"):
        find(tag)


def test_an_asset_without_a_digest(site: fake.Site) -> None:
    name = UBUNTU.format("b7")
    site.add("b7", {name: b"x"}, {name: {"digest": None}})
    with pytest.raises(PipelineError, match=f"{name}: the release gives no digest") as caught:
        find("b7")
    assert "bins=build" in caught.value.hint


@pytest.mark.parametrize("variable", github.TOKENS)
def test_the_token_goes_to_the_api_alone(
    site: fake.Site, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, "geheim")
    site.token = "geheim"
    site.add("b7", {UBUNTU.format("b7"): b"data"})
    path = releases.fetch(find("b7").choice.programs, Home(tmp_path))
    assert path.read_bytes() == b"data"
    tokens = {(entry["where"], entry["path"][:5], entry["token"]) for entry in site.log}
    assert tokens == {
        *(("api", "/repo", "Bearer geheim"), ("api", "/down", ""), ("files", "/down", ""))
    }


def test_the_token_does_not_follow_to_another_host(
    site: fake.Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "geheim")
    site.add("b7", {UBUNTU.format("b7"): b"data"})
    site.faults["move"] = True
    assert find("b7").tag == "b7"
    assert [entry["token"] for entry in site.log] == ["Bearer geheim", ""]


def test_the_first_token_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "  ")
    monkeypatch.setenv("GH_TOKEN", "two")
    assert github.token() == ("GH_TOKEN", "two")
    monkeypatch.setenv("GITHUB_TOKEN", "one ")
    assert github.token() == ("GITHUB_TOKEN", "one")
    monkeypatch.setenv("GITHUB_TOKEN", "schlüssel")
    with pytest.raises(UsageError, match="GITHUB_TOKEN: contains characters") as caught:
        github.token()
    assert "schlüssel" not in str(caught.value)


def test_a_wrong_token(site: fake.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GH_TOKEN", "wrong")
    site.token = "right"
    with pytest.raises(PipelineError, match="token in GH_TOKEN") as caught:
        find("b7")
    assert "wrong" not in str(caught.value)


def test_the_rate_limit(site: fake.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    reset = str(int(time.time()) + 1830)
    site.faults["rate_limit"] = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": reset}
    with pytest.raises(
        PipelineError, match=r"no more requests for 30 min \d+ s, until 20"
    ) as caught:
        find("b7")
    assert "GITHUB_TOKEN" in caught.value.hint
    monkeypatch.setenv("GITHUB_TOKEN", "geheim")
    with pytest.raises(PipelineError, match="no more requests") as caught:
        find("b7")
    assert "GITHUB_TOKEN" not in caught.value.hint


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (403, {"retry-after": "60"}, r"for 1 min 0 s, until .* \(status 403\)"),
        (429, {}, r"no more requests \(status 429\)"),
        (429, {"retry-after": "Sat, 21 Nov"}, r"no more requests \(status 429\)"),
        (429, {"x-ratelimit-reset": "99999999999999999999"}, "no more requests"),
        (429, {"x-ratelimit-reset": "9999999999"}, "until 2286-"),
        (403, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "900"}, "for 0 s"),
        (403, {"x-ratelimit-remaining": "12"}, "answered 403"),
        (401, {}, "answered 401"),
        (500, {}, "answered 500"),
        (204, {}, "answered 204"),
    ],
)
def test_refusals(status: int, headers: dict[str, str], message: str) -> None:
    error = github.refusal(status, headers, now=1000.0)
    with pytest.raises(PipelineError, match=message):
        raise error
    assert error.hint


def test_another_status(site: fake.Site) -> None:
    site.faults["status"] = 502
    with pytest.raises(PipelineError, match=r"127\.0\.0\.1 answered 502") as caught:
        find("latest")
    assert "later" in caught.value.hint


GOOD = {
    "name": UBUNTU.format("b7"),
    "size": 1,
    "browser_download_url": "http://host/a",
    "digest": None,
}


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"<html>sign in</html>", b"[]", b"{}", b"null", b"\xff\xfe", b'"text"', b"7"),
        *(b"[" * 100_000, b'{"tag_name": 1' + b"0" * 5000 + b', "assets": []}'),
        *(
            b'{"tag_name": "b8", "assets": []}',
            b'{"tag_name": "b7"}',
            b'{"tag_name": "b7", "assets": {"a": 1}}',
        ),
        *(b'{"tag_name": "../b7", "assets": []}', b'{"tag_name": ["b7"], "assets": []}'),
        *(
            json.dumps({"tag_name": "b7", "assets": [{**GOOD, **wrong}]}).encode()
            for wrong in (
                *({"size": -1}, {"size": "1"}, {"size": True}, {"size": 1e3}, {"size": 1 << 60}),
                *({"browser_download_url": "file:///etc/passwd"}, {"browser_download_url": 7}),
                *({"browser_download_url": "http://[/"}, {"digest": 7}, {"name": None}),
            )
        ),
    ],
)
def test_answers_that_are_none(site: fake.Site, body: bytes) -> None:
    site.faults["body"] = body
    with pytest.raises(PipelineError, match=r"127\.0\.0\.1 sent no list of releases"):
        find("b7")


@pytest.mark.parametrize("body", [b"{}", b'[{"assets": []}]', b"[7]", b"[null]"])
def test_lists_that_are_none(site: fake.Site, body: bytes) -> None:
    site.faults["body"] = body
    with pytest.raises(PipelineError, match="sent no list of releases"):
        find("latest")


def test_an_answer_without_an_end(site: fake.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(github, "ANSWER", Bound(bytes=1000, seconds=60))
    site.faults["body"] = b" " * 100_000
    with pytest.raises(PipelineError, match=r"/releases/tags/b7: sends more than 1\.0 kB"):
        find("b7")


@pytest.mark.parametrize(
    "name", ["../evil.zip", "a/b.zip", "a\\b.zip", ".state.json", "a\n.zip", "x" * 300]
)
def test_names_that_no_file_should_have(site: fake.Site, name: str) -> None:
    good = UBUNTU.format("b7")
    site.add("b7", {good: b"x", name: b"x"})
    assert find("b7").choice.programs.name == good


def test_over_https_all_is_over_https(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_API_URL", "https://host/api/v3/")
    assert github.api() == "https://host/api/v3"
    with pytest.raises(ValueError):
        convert(GOOD, releases.PublishedAsset)


@pytest.mark.parametrize(
    "text", ["host", "ftp://host", "https://", "http://[", "https://me:pw@host"]
)
def test_no_address_of_an_api(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_API_URL", text)
    with pytest.raises(UsageError, match="GITHUB_API_URL") as caught:
        github.api()
    assert "pw" not in str(caught.value)


def test_the_api_is_githubs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_API_URL", " ")
    assert github.api() == "https://api.github.com"


def test_no_network(site: fake.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_API_URL", "http://127.0.0.1:9")
    with pytest.raises(PipelineError, match=r"could not be fetched: 127\.0\.0\.1") as caught:
        find("latest")
    assert "proxy" in caught.value.hint


def test_an_api_that_hangs(site: fake.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(github, "TIMEOUT", 0.3)
    site.faults["hang"] = 2
    with pytest.raises(PipelineError, match="no data in time"):
        find("b7")


def test_through_a_proxy(site: fake.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_API_URL", "http://api.invalid")
    monkeypatch.setenv("HTTP_PROXY", site.api)
    site.add("b7", {UBUNTU.format("b7"): b"x"})
    assert find("b7").tag == "b7"
    assert [entry["host"] for entry in site.log] == ["api.invalid"]


def test_a_proxy_that_is_none(site: fake.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "gopher://host")
    with pytest.raises(UsageError, match="HTTP_PROXY: is not the address of a proxy"):
        find("b7")


# The files


def test_fetched_once(site: fake.Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = os.urandom(300_000)
    site.add("b7", {UBUNTU.format("b7"): data})
    programs, home = find("b7").choice.programs, Home(tmp_path / "home")
    path = releases.fetch(programs, home)
    assert path == releases.cached(programs, home)
    assert path.is_relative_to(tmp_path / "cäche")
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == [path.name]
    asked = len(site.log)
    assert releases.fetch(programs, home, offline=True) == path
    path.write_bytes(b"damaged")
    with pytest.raises(PipelineError, match="offline=1 forbids"):
        releases.fetch(programs, home, offline=True)
    assert len(site.log) == asked
    assert releases.fetch(programs, home).read_bytes() == data


def test_a_download_that_breaks_goes_on(site: fake.Site, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    site.add("b7", {UBUNTU.format("b7"): data})
    site.faults["cut"] = 100_000
    path = releases.fetch(find("b7").choice.programs, Home(tmp_path))
    assert path.read_bytes() == data
    ranges = [entry["range"] for entry in site.log if entry["where"] == "files"]
    assert ranges == ["bytes=0-299999", "bytes=100000-299999"]


def test_other_bytes_than_the_digest_says(site: fake.Site, tmp_path: Path) -> None:
    site.add("b7", {UBUNTU.format("b7"): b"data"})
    site.faults["flip"] = True
    programs = find("b7").choice.programs
    with pytest.raises(PipelineError, match="wrong sha256: expected"):
        releases.fetch(programs, Home(tmp_path))
    assert not releases.cached(programs, Home(tmp_path)).exists()


@pytest.mark.parametrize("name", [*B10107, *LATER])
def test_names_stay_names_on_windows(name: str) -> None:
    """What NAME lets through is one plain part of a path there too."""
    assert re.fullmatch(releases.NAME, name, re.ASCII)
    assert (PureWindowsPath("C:/cache") / name).name == name
    assert not set(name) & set('<>:"/\\|?*')


def test_versions_are_written_with_dots() -> None:
    assert assets.dotted((12, 4)) == "12.4"
    assert assets.dotted(()) == "of unknown version"
