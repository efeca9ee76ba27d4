from __future__ import annotations

import hashlib
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import wait_for
from download_tools import (
    SIZE,
    Site,
    assert_whole,
    downloads,
    fetch,
    journal,
)
from download_tools import served as served
from download_tools import site as site

from pipeline.core.download import Content, Location, read_range, remote
from pipeline.core.download.answers import retry_after
from pipeline.core.download.partial import runs
from pipeline.core.errors import PipelineError


def test_a_file_arrives_and_its_sha256_is_told(site: Site, tmp_path: Path) -> None:
    assert fetch(site, tmp_path / "made") == site.content("big.gguf").sha256
    assert_whole(site, tmp_path / "made")
    assert site.sent() == SIZE


def test_pieces_larger_than_a_block_and_no_multiple_of_it(site: Site, tmp_path: Path) -> None:
    fetch(site, tmp_path / "made", piece=100_001, connections=3)
    assert_whole(site, tmp_path / "made")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("slow", {"bytes_per_second": 400_000, "times": 2}),
        ("stall", {"after": 1000, "times": 3}),
        ("stall", {"after": 0, "times": 2}),
        ("cut", {"after": 70_000, "times": 5}),
        ("cut", {"after": 0, "times": 4}),
        ("status416", {"times": 3}),
        ("ignore_range", {"times": 1}),
        ("ignore_range", {"times": 2, "skip": 3}),
        ("wrong_content_range", {"times": 3}),
        ("etag_changes", {"times": 1, "skip": 2}),
        ("flip_byte", {"times": 1, "offset": 5}),
        ("status429", {"times": 3, "retry_after": 0}),
        ("status500", {"times": 4}),
        # These last, and yet the right bytes can be had.
        ("cut", {"after": 20_000}),
        ("ignore_range", {}),
        ("etag_changes", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_fault_that_can_be_mended(
    site: Site, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    site.fault(kind, **options)
    # One connection where a certain request has to be the bad one.
    fetch(site, tmp_path / "made", connections=1 if "offset" in options else 4)
    assert_whole(site, tmp_path / "made")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("stall", {"after": 0}, "localhost: no data in time"),
        ("cut", {"after": 0}, "localhost: the connection ended early"),
        ("status416", {}, "localhost: answered 416"),
        ("wrong_content_range", {}, "localhost: the response is another range"),
        ("flip_byte", {"offset": 5}, "expected "),
        ("status429", {"retry_after": 0}, "localhost: answered 429 Too Many Requests"),
        ("status500", {}, "localhost: answered 500 Internal Server Error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_that_stays_is_an_error_and_leaves_nothing_wrong(
    site: Site, tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    made = tmp_path / "made"
    site.fault(kind, **options)
    with pytest.raises(PipelineError, match=message) as caught:
        fetch(site, made, timeout=0.2)
    assert caught.value.message.startswith("big.gguf: ")
    assert site.commit not in str(caught.value), "no address in a message"
    if kind == "flip_byte":
        assert caught.value.message.count(site.content("big.gguf").sha256) == 1
        assert not made.exists()
        assert not journal(made).exists()
    else:
        assert journal(made).exists()
    site.running.control(reset=True)
    fetch(site, made)
    assert_whole(site, made)


def test_a_connection_of_a_few_bytes_a_second_is_given_up_and_continued(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SLOWEST_SECONDS", 0.5)
    site.fault("slow", bytes_per_second=20, times=3)  # each of them would take an hour
    fetch(site, tmp_path / "made", timeout=10)
    assert_whole(site, tmp_path / "made")


def test_a_server_that_cuts_each_answer_after_a_byte_is_left(site: Site, tmp_path: Path) -> None:
    """Each request brings something, but the end of them could not be awaited."""
    site.fault("cut", after=1)
    with pytest.raises(PipelineError, match="the connection ended early"):
        fetch(site, tmp_path / "made", connections=1)
    assert site.sent() < 10


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/\x1b[2J", "http://[/x", "http://a:99999999/"])
def test_what_is_no_address_is_an_error(site: Site, tmp_path: Path, url: str) -> None:
    with pytest.raises(PipelineError, match="leads to what is not an address"):
        fetch(site, tmp_path / "made", locate=lambda: Location(url=url))


def test_a_file_that_keeps_changing_is_an_error(site: Site, tmp_path: Path) -> None:
    site.fault("etag_changes", skip=1, times=1)
    site.fault("etag_changes", skip=3, times=1)
    with pytest.raises(PipelineError, match="changed on localhost"):
        fetch(site, tmp_path / "made", connections=1)
    fetch(site, tmp_path / "made")
    assert_whole(site, tmp_path / "made")


@pytest.mark.parametrize("ranges", [True, False])
def test_another_size_is_an_error_of_sizes(site: Site, tmp_path: Path, ranges: bool) -> None:
    if not ranges:
        site.fault("ignore_range")
    wrong = Content(size=SIZE + 1, sha256="0" * 64)
    with pytest.raises(PipelineError, match=f"says {SIZE} bytes, expected {SIZE + 1}"):
        fetch(site, tmp_path / "made", content=wrong)
    fetch(site, tmp_path / "made")
    assert_whole(site, tmp_path / "made")


def test_a_file_that_is_not_there_is_an_error_at_once(site: Site, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="localhost: answered 404 Not Found"):
        fetch(
            site,
            tmp_path / "made",
            content=Content(size=5, sha256="0" * 64),
            locate=lambda: site.location("gone.gguf"),
            connections=1,
        )
    assert len(site.running.log()) == 1


def test_nobody_there_is_an_error(site: Site, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(PipelineError, match=r"127.0.0.1: .*refused"):
        fetch(
            site,
            tmp_path / "made",
            locate=lambda: Location(url=f"http://127.0.0.1:{port}/file?secret=1"),
        )


def test_a_header_that_cannot_be_sent_is_not_told(site: Site, tmp_path: Path) -> None:
    bad = Location(url=site.location("big.gguf").url, headers={"Authorization": "Bearer s3cret\n"})
    with pytest.raises(PipelineError) as caught:
        fetch(site, tmp_path / "made", locate=lambda: bad)
    assert "s3cret" not in str(caught.value)


def test_an_empty_file(site: Site, tmp_path: Path) -> None:
    assert fetch(site, tmp_path / "made", "empty.json", total=0) == hashlib.sha256().hexdigest()
    assert_whole(site, tmp_path / "made", "empty.json")
    assert site.running.log() == []


def test_a_file_known_by_its_git_blob_id(site: Site, tmp_path: Path) -> None:
    data = site.data("small.json")
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    content = Content(size=len(data), blob=blob)
    digest = fetch(site, tmp_path / "made", "small.json", content=content)
    assert digest == hashlib.sha256(data).hexdigest()
    assert_whole(site, tmp_path / "made", "small.json")
    wrong = Content(size=len(data), blob="0" * 40)
    with pytest.raises(PipelineError, match=f"wrong git blob id: expected {'0' * 40}, got {blob}"):
        fetch(site, tmp_path / "made", "small.json", content=wrong)


def test_several_files_at_once(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("big.gguf", "other.gguf", "third.gguf", "small.json", "empty.json")
    total = sum(site.content(name).size for name in names)
    with httpx2.Client() as client, downloads(client, total=total) as all_files:

        def get(name: str) -> str:
            content, location = site.content(name), site.location(name)
            return all_files.get(name, content, lambda: location, tmp_path / name)

        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(get, names))
    assert digests == [site.content(name).sha256 for name in names]
    for name in names:
        assert_whole(site, tmp_path / name, name)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fetching: 100 %, ")


def test_one_file_that_fails_stops_the_others(site: Site, tmp_path: Path) -> None:
    site.fault("slow", "other.gguf", bytes_per_second=1000)
    site.fault("stall", "third.gguf")
    begin = time.monotonic()
    with (
        httpx2.Client() as client,
        downloads(client, timeout=30, piece=SIZE) as all_files,  # one piece each
        ThreadPoolExecutor() as pool,
    ):

        def get(name: str, there: str) -> Future[str]:
            content, location = site.content(name), site.location(there)
            return pool.submit(all_files.get, name, content, lambda: location, tmp_path / name)

        others = [get("other.gguf", "other.gguf"), get("third.gguf", "third.gguf")]
        wait_for(lambda: len(site.running.log()) == 2)
        failing = get("big.gguf", "gone.gguf")
        for future in (failing, *others):
            with pytest.raises(PipelineError, match=r"big\.gguf: localhost: answered 404"):
                future.result()
        with pytest.raises(PipelineError, match=r"big\.gguf: localhost: answered 404"):
            get("small.json", "small.json").result()
    assert time.monotonic() - begin < 25


def test_an_expired_address_is_asked_for_again(site: Site, tmp_path: Path) -> None:
    (site.folder.parent / "closed").mkdir(exist_ok=True)
    (site.folder.parent / "closed" / ".hub.json").write_text('{"private": true}')
    expired = Location(url=f"{site.running.endpoint}/org/closed/resolve/main/big.gguf?sig=s3cret")
    asked: list[Location] = []

    def locate() -> Location:
        asked.append(expired if not asked else site.location("big.gguf"))
        return asked[-1]

    fetch(site, tmp_path / "made", locate=locate)
    assert_whole(site, tmp_path / "made")
    assert len(asked) == 2, "once, and not for each connection"

    with pytest.raises(PipelineError, match=r"127\.0\.0\.1: answered 401") as caught:
        fetch(site, tmp_path / "another", locate=lambda: expired)
    assert "s3cret" not in str(caught.value)


def test_the_token_goes_to_the_first_host_only(site: Site, tmp_path: Path) -> None:
    first = Location(
        url=f"{site.running.endpoint}/org/model/resolve/main/big.gguf",
        headers={"Authorization": "Bearer hf_s3cret"},
    )
    fetch(site, tmp_path / "made", locate=lambda: first)
    assert_whole(site, tmp_path / "made")
    seen = {(entry["server"], entry["authorization"]) for entry in site.running.log()}
    assert seen == {("hub", True), ("cdn", False)}


def test_a_wait_that_the_server_asks_for_is_said_once(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.fault("status429", times=4, retry_after=1)
    begin = time.monotonic()
    fetch(site, tmp_path / "made")
    assert time.monotonic() - begin >= 1
    assert capsys.readouterr().err.count("asks to wait 1 s") == 1


def test_a_range_of_a_file(site: Site) -> None:
    data = site.data("big.gguf")

    def read(start: int, stop: int, name: str = "big.gguf") -> bytes:
        with httpx2.Client() as client:
            locate = lambda: site.location(name)  # noqa: E731
            return read_range(client, name, locate, start, stop, timeout=5)

    assert read(0, 100) == data[:100]
    assert read(1000, 200_000) == data[1000:200_000]
    assert read(0, 10_000, "small.json") == site.data("small.json"), "fewer where the file ends"
    assert read(5, 5) == b""
    site.fault("cut", after=70_000, times=2)
    assert read(1000, 200_000) == data[1000:200_000]
    site.running.control(reset=True, clear_log=True)
    site.fault("ignore_range")
    site.fault("slow", bytes_per_second=200_000)
    assert read(0, 100) == data[:100]
    assert read(1000, 20_000) == data[1000:20_000]
    assert site.sent() < SIZE / 4, "it hangs up when it has what it wants"


def test_runs_are_long_at_first_and_single_at_the_end() -> None:
    assert runs([], 8) == []
    assert runs([3], 8) == [range(3, 4)]
    ranges = runs(range(256), 8)
    assert [n for numbers in ranges for n in numbers] == list(range(256))
    lengths = [len(numbers) for numbers in ranges]
    assert lengths[:16] == [8] * 16
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-8:] == [1] * 8
    assert runs([0, 1, 2, 5, 6, 9], 1)[:2] == [range(3), range(5, 6)]


def test_how_long_a_server_asks_to_wait() -> None:
    then = 1445412480.0  # Wed, 21 Oct 2015 07:28:00 GMT
    assert retry_after("7", then) == 7
    assert retry_after("99999", then) == 300
    assert retry_after("Wed, 21 Oct 2015 07:28:09 GMT", then) == 9
    assert retry_after("Wed, 21 Oct 2015 07:27:00 GMT", then) == 0
    assert retry_after("soon", then) is None
    assert retry_after("", then) is None
