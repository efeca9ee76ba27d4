"""What the supervisor of many servers costs: memory, and a core's share while nothing happens.

    .venv/bin/python benchmarks/supervisor.py [instances=50] [seconds=60]

The servers are stand-ins that are ready at once, with /metrics and with probes as by default. The
supervisor's share is measured over `seconds` once all are ready, its reaper's too.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import common  # noqa: F401 - makes what follows importable
from supervisor_tools import servers_at, stand_in

from pipeline.serve.supervisor import marker
from pipeline.serve.supervisor.policy import Timing

MOST_BYTES, MOST_SHARE = 60_000_000, 0.01


def main() -> None:
    named = dict(word.split("=", 1) for word in sys.argv[1:])
    count, seconds = int(named.get("instances", 50)), float(named.get("seconds", 60))
    with tempfile.TemporaryDirectory() as top, servers_at(Path(top) / "run") as servers:
        servers.timing = Timing()
        names = [f"s{number:03}" for number in range(count)]
        many = [stand_in(Path(top), x, "--metrics", probe_timeout=60.0) for x in names]
        began = time.monotonic()
        assert servers.up(*many) == {}
        print(f"up, {count} instances        {time.monotonic() - began:8.2f} s")
        time.sleep(2)
        supervisor = servers.supervisor()
        processes = marker.marked(servers.at)[servers.at.marker]
        before = [sum(each.cpu_times()[:2]) for each in processes]
        time.sleep(seconds)
        after = [sum(each.cpu_times()[:2]) for each in processes]
        share = (sum(after) - sum(before)) / seconds
        held = sum(each.memory_info().rss for each in processes)
        threads = supervisor.num_threads()
        print(f"memory, with its reaper     {held / 1e6:8.1f} MB, {threads} threads")
        print(f"share of a core while idle  {share:8.2%}")
        began = time.monotonic()
        rows = servers.rows()
        print(f"ps                          {time.monotonic() - began:8.2f} s")
        assert {row.state for row in rows.values()} == {"ready"}
        began = time.monotonic()
        servers.down()
        print(f"down                        {time.monotonic() - began:8.2f} s")
        servers.nothing_left()
    if held > MOST_BYTES or share > MOST_SHARE:
        sys.exit(f"at most {MOST_BYTES / 1e6:.0f} MB and {MOST_SHARE:.0%} of a core are allowed")


if __name__ == "__main__":
    main()
