from __future__ import annotations

import errno
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import wait_for
from core_tools import finish, line
from disks import disk
from download_tools import (
    PIECE,
    SIZE,
    Site,
    assert_whole,
    fetch,
    journal,
    leave_partial,
    start,
)
from download_tools import served as served
from download_tools import site as site

from pipeline.core.download import Content
from pipeline.core.errors import PipelineError
from pipeline.core.text import size as shown_size


def test_what_is_there_is_not_fetched_again(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    missing = leave_partial(site, made)
    capsys.readouterr()
    fetch(site, made)
    assert_whole(site, made)
    assert site.sent() == missing
    there = f"big.gguf: {shown_size(SIZE - missing)} were downloaded by an earlier run"
    assert capsys.readouterr().err.splitlines()[0] == there


def test_a_whole_file_that_was_not_published_is_not_fetched_again(
    site: Site, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    fetch(site, made)
    site.running.control(clear_log=True)
    fetch(site, made)
    assert_whole(site, made)
    assert site.sent() == 0


def test_a_torn_journal(site: Site, tmp_path: Path) -> None:
    made = tmp_path / "made"
    missing = leave_partial(site, made)
    with journal(made).open("ab") as file:
        file.write(b"\0\0\xff\n999999 00000000\n15 0badc0")
    fetch(site, made)
    assert_whole(site, made)
    assert site.sent() == missing


def test_a_journal_that_cannot_be_read(site: Site, tmp_path: Path) -> None:
    made = tmp_path / "made"
    leave_partial(site, made)
    journal(made).write_bytes(b"\0" * 100)
    fetch(site, made)
    assert_whole(site, made)
    assert site.sent() == SIZE


def test_a_damaged_piece_is_fetched_again(site: Site, tmp_path: Path) -> None:
    made = tmp_path / "made"
    missing = leave_partial(site, made)
    with made.open("r+b") as file:
        file.seek(3 * PIECE + 100)
        file.write(b"\0" * 4096)
    fetch(site, made)
    assert_whole(site, made)
    assert site.sent() == missing + PIECE


def test_a_shortened_partial_file(site: Site, tmp_path: Path) -> None:
    made = tmp_path / "made"
    missing = leave_partial(site, made)
    os.truncate(made, 4 * PIECE)
    fetch(site, made)
    assert_whole(site, made)
    assert site.sent() == SIZE - 4 * PIECE > missing


@pytest.mark.parametrize("with_journal", [True, False])
def test_bytes_with_another_name_are_never_written_to(
    site: Site, tmp_path: Path, with_journal: bool
) -> None:
    made, other = tmp_path / "made", tmp_path / "somebody's"
    if with_journal:
        leave_partial(site, made)
    else:
        made.write_bytes(b"precious")
    os.link(made, other)
    before = other.read_bytes()
    fetch(site, made)
    assert_whole(site, made)
    assert other.read_bytes() == before


def test_a_symbolic_link_is_replaced(site: Site, tmp_path: Path) -> None:
    made, other = tmp_path / "made", tmp_path / "somebody's"
    other.write_bytes(b"precious")
    made.symlink_to(other)
    fetch(site, made)
    assert_whole(site, made)
    assert other.read_bytes() == b"precious"


def test_a_journal_without_its_file(site: Site, tmp_path: Path) -> None:
    made = tmp_path / "made"
    leave_partial(site, made)
    made.unlink()
    fetch(site, made)
    assert_whole(site, made)


def test_another_file_than_last_time(site: Site, tmp_path: Path) -> None:
    made = tmp_path / "made"
    leave_partial(site, made)
    fetch(site, made, "other.gguf")
    assert_whole(site, made, "other.gguf")
    assert site.sent("other.gguf") == SIZE


def test_without_a_hash_nothing_is_resumed(site: Site, tmp_path: Path) -> None:
    made = tmp_path / "made"
    site.fault("status500", skip=2)
    with pytest.raises(PipelineError):
        fetch(site, made, content=Content(size=SIZE), connections=1)
    site.running.control(reset=True, clear_log=True)
    fetch(site, made, content=Content(size=SIZE))
    assert site.sent() == SIZE


def test_a_full_disk_is_an_oserror(site: Site, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=512k"):
        with pytest.raises(OSError, match="space") as caught:
            fetch(site, tmp_path / "disk" / "made")
        assert caught.value.errno == errno.ENOSPC


def test_killed_at_any_instant_little_is_fetched_again(site: Site, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    made, content, url = (
        tmp_path / "made",
        site.content("long.gguf"),
        site.location("long.gguf").url,
    )
    rate = 640_000  # a piece takes a tenth of a second
    site.fault("slow", "long.gguf", bytes_per_second=rate)
    kills = 20
    for _ in range(kills):
        with start(content, url, made) as process:
            assert line(process) == "begun"
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
    site.running.control(reset=True)
    before = site.sent("long.gguf")
    with start(content, url, made) as process:
        finish(process)
    assert_whole(site, made, "long.gguf")
    assert site.sent("long.gguf") - before < content.size, "nothing was kept"
    on_the_way = 2 * rate // 20  # what the server sends before it notices
    again = site.sent("long.gguf") - content.size
    print("fetched again for each kill", again // kills)
    assert again <= kills * 4 * (PIECE + on_the_way)


@pytest.mark.parametrize("silent", ["before the answer", "within the answer"])
@pytest.mark.parametrize("caller", ["main", "a thread"])
def test_an_interrupt_ends_it_though_the_server_is_silent(
    site: Site, tmp_path: Path, silent: str, caller: str
) -> None:
    made, content = tmp_path / "made", site.content("big.gguf")
    with socket.create_server(("127.0.0.1", 0), backlog=16) as mute:
        if silent == "before the answer":
            url = f"http://127.0.0.1:{mute.getsockname()[1]}/big.gguf"
        else:
            site.fault("stall", after=PIECE + 1000)
            url = site.location("big.gguf").url
        with start(content, url, made, caller=caller) as process:
            assert line(process) == "begun"
            if silent == "within the answer":
                wait_for(lambda: site.sent() > SIZE - 2 * PIECE)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=25)  # a silent server is given up after 30
            assert process.stderr
            assert "KeyboardInterrupt" in process.stderr.read()
    assert journal(made).exists()
    site.running.control(reset=True, clear_log=True)
    fetch(site, made)
    assert_whole(site, made)
    if silent == "within the answer":
        assert site.sent() <= SIZE - 4 * PIECE
