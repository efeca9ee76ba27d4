"""Our download of one file over `curl` then `sha256sum`, and over `aria2c -x8 -s8`.

    .venv/bin/python benchmarks/download.py [rounds] [folder=/dev/shm] [mib=1024] [limit=20]

The server is this program, on this machine. It sends as fast as it can for curl and, for aria2c,
`limit` MB/s on each connection. All write into `folder`, in turn; the ratios are of medians. What
we report includes Python's start and the sha256; aria2c is shown without a check as well. None of
them flushes to the disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from common import REPOSITORY, environment

STEP = 256 * 1024  # bytes sent at once under a limit

OURS = """
import resource, sys, time
from pathlib import Path
import httpx2
from pipeline.core.download import Content, Downloads, Location
url, size, sha256, made = sys.argv[1:]
with (
    httpx2.Client() as client,
    Downloads(client, title="fetching", total=int(size), timeout=30) as downloads,
):
    content = Content(size=int(size), sha256=sha256)
    downloads.get("file", content, lambda: Location(url=url), Path(made))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(usage.ru_maxrss)
"""


def serve(path: Path, limit: float) -> None:
    """Send the file's ranges, each connection at `limit` bytes per second (0: no limit)."""
    source = os.open(path, os.O_RDONLY)
    size = os.fstat(source).st_size
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)

    def answer(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if limit:
            # Else megabytes would stand in buffers, and a limit be none.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STEP)
        request = connection.makefile("rb")
        due = time.monotonic()
        while request.readline():
            start, stop, status = 0, size, "200 OK"
            while line := request.readline().strip():
                if found := re.match(rb"range: *bytes=(\d+)-(\d*)", line, re.IGNORECASE):
                    start = int(found[1])
                    stop = int(found[2]) + 1 if found[2] else size
                    status = (
                        f"206 Partial Content\r\nContent-Range: bytes {start}-{stop - 1}/{size}"
                    )
            head = f"HTTP/1.1 {status}\r\nAccept-Ranges: bytes\r\nContent-Length: {stop - start}"
            connection.sendall(f"{head}\r\n\r\n".encode())
            # Time between two requests is no credit for more speed.
            due = max(due, time.monotonic() - 0.05)
            while start < stop:
                step = min(stop - start, STEP if limit else stop - start)
                sent = os.sendfile(connection.fileno(), source, start, step)
                start += sent
                if limit:
                    due += sent / limit
                    time.sleep(max(0.0, due - time.monotonic()))

    def attend(connection: socket.socket) -> None:
        with connection:
            try:
                answer(connection)
            except OSError:
                return  # the client went away

    while True:
        threading.Thread(target=attend, args=listener.accept()[:1], daemon=True).start()


def start_server(path: Path, limit: float) -> tuple[subprocess.Popen[str], str]:
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", str(path), str(limit)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout
    return server, f"http://127.0.0.1:{server.stdout.readline().strip()}/file"


def seconds(*commands: list[str]) -> tuple[float, str]:
    """The time of commands in a row, and what the last one printed."""
    start = time.perf_counter()
    for command in commands:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**environment(), "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{command[0]} ended with {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - start, done.stdout


def compare(
    title: str, rounds: int, ours: list[str], others: dict[str, list[list[str]]], made: Path
) -> None:
    """Run all in turn and print the ratio of our median to each other one's."""
    print(title)
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in others}}
    peak = 0
    for number in range(rounds + 1):
        for name, commands in {"ours": [ours], **others}.items():
            spent, output = seconds(*commands)
            made.unlink()
            if number:  # the first round warms the disk cache
                times[name].append(spent)
            if name == "ours":
                peak = max(peak, int(output) * 1024)
    mine = statistics.median(times["ours"])
    print(f"  {'ours':32} {mine:6.2f} s, at most {peak / 1e6:.0f} MB of memory")
    for name in others:
        other = statistics.median(times[name])
        print(f"  {name:32} {other:6.2f} s, ratio {mine / other:.2f}")


def present(programs: dict[str, list[list[str]]]) -> dict[str, list[list[str]]]:
    """The commands whose programs are installed; what is skipped is printed."""
    found = {}
    for name, commands in programs.items():
        missing = [command[0] for command in commands if not shutil.which(command[0])]
        if missing:
            print(f"skipped: {name}: {' and '.join(missing)} not found")
        else:
            found[name] = commands
    return found


def main() -> None:
    words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    rounds = next((int(word) for word in sys.argv[1:] if word.isdecimal()), 5)
    folder = Path(words.get("folder", "/dev/shm")) / f"llama-pipeline-download-{os.getpid()}"
    size = int(words.get("mib", "1024")) * 1024 * 1024
    limit = float(words.get("limit", "20")) * 1e6
    folder.mkdir()
    servers = []
    try:
        source, made = folder / "source", folder / "made"
        digest = hashlib.sha256()
        with source.open("wb") as file:
            for _ in range(size // (1024 * 1024)):
                block = os.urandom(1024 * 1024)
                file.write(block)
                digest.update(block)
        sha256 = digest.hexdigest()

        server, url = start_server(source, 0)
        servers.append(server)
        ours = [sys.executable, "-c", OURS]
        what = [str(size), sha256, str(made)]
        curl = ["curl", "--silent", "--fail", "--output", str(made), url]
        others = {
            "curl, sha256sum": [curl, ["sha256sum", str(made)]],
            "curl, openssl sha256": [curl, ["openssl", "dgst", "-sha256", str(made)]],
        }
        title = f"{size / 1e9:.2f} GB, no limit (median of {rounds}, alternating)"
        compare(title, rounds, [*ours, url, *what], present(others), made)

        server, url = start_server(source, limit)
        servers.append(server)
        aria2c = [
            *("aria2c", "--quiet", "-x8", "-s8", "--file-allocation=none"),
            *("--dir", str(folder), "--out", made.name, url),
        ]
        others = {
            "aria2c -x8 -s8, unchecked": [aria2c],
            "aria2c -x8 -s8, checked": [[*aria2c, f"--checksum=sha-256={sha256}"]],
        }
        title = f"{size / 1e9:.2f} GB, {limit / 1e6:g} MB/s each (median of {rounds}, alternating)"
        compare(title, rounds, [*ours, url, *what], present(others), made)
    finally:
        for server in servers:
            server.kill()
            server.wait()
        shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        main()
