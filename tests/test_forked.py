"""Runs that are forked are as runs that are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import psutil
import pytest
from conftest import wait_for

WORDS = [
    ("-c", "print('ü'); import sys; print(sys.argv[1:], file=sys.stderr)", "", "two words"),
    ("-c", "import sys; sys.exit('said')"),
    ("-c", "import sys; sys.exit(3)"),
    ("-c", "import atexit; atexit.register(print, 'last'); raise SystemExit"),
    ("-c", "import threading; threading.Timer(0.1, print, ['later']).start()"),
    ("-c", "import os; print(os.getcwd(), os.environ['OF_THIS_RUN'], os.isatty(1), os.umask(0))"),
    ("-c", "import os; print(os.getsid(0) == os.getpid(), sorted(os.listdir('/dev/fd')))"),
    ("-c", "import os, signal; print('begun'); os.kill(os.getpid(), signal.SIGTERM)"),
    ("-c", "import signal; print([signal.getsignal(n) for n in range(1, 32)])"),
    ("-m", "doit", "help", "serve"),
    ("-m", "doit", "serv"),
    ("-m", "doit", "plan", "model=/no/such.gguf"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a new Python is started")
@pytest.mark.parametrize("words", WORDS)
def test_a_run_is_as_a_started_one(words: tuple[str, ...]) -> None:
    env = {**os.environ, "OF_THIS_RUN": "ü"}
    started = subprocess.run(
        [sys.executable, *words],
        cwd=forked.REPOSITORY,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    runner = forked.own()
    assert runner and runner.begins_with(env)
    assert runner.run(words, env, 60) == (started.returncode, started.stdout, started.stderr)


def test_variables_of_python_need_a_start() -> None:
    words = ("-c", "import sys; print(sys.flags.utf8_mode, 'pipeline.core' in sys.modules)")
    status, out, _ = forked.run(words, {**os.environ, "PYTHONUTF8": "1"}, 60)
    assert (status, out) == (0, "1 False\n")


def test_each_has_temporary_names_of_its_own() -> None:
    words = ("-c", "from pipeline.core.store import locks; print(locks.RUN)")
    told = {forked.run(words, os.environ, 60) for _ in range(3)}
    assert len(told) == 3 and {(status, err) for status, _, err in told} == {(0, "")}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a new Python is started")
def test_one_that_takes_too_long_is_killed() -> None:
    env = dict(os.environ)
    words = ("-c", "import time; time.sleep(60)")
    runner = forked.own()
    assert runner and runner.run(words, env, 0.5) == (-9, "", "")


@pytest.mark.parametrize("end", [signal.SIGTERM, None])
def test_one_that_is_not_waited_for(tmp_path: Path, end: int | None) -> None:
    script, log, go = tmp_path / "a script ü.py", tmp_path / "log", tmp_path / "go"
    (tmp_path / "beside.py").write_text(
        f"import os\ndef is_over(): return os.path.exists({str(go)!r})\n", encoding="utf-8"
    )
    script.write_text(
        "import beside, sys, time\nprint('begun', sys.argv[1:], flush=True)\n"
        "while not beside.is_over():\n    time.sleep(0.01)\nsys.exit(5)\n"
    )
    with log.open("wb") as out:
        words = [str(script), "two words"]
        process = forked.start(words, out.fileno(), out.fileno(), os.environ)
    wait_for(lambda: log.read_text() == "begun ['two words']\n")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.send_signal(end) if end else go.touch()
    assert process.wait(60) == (-end if end else 5)
    assert process.poll() == process.returncode == process.wait()
    process.kill()  # nothing, once it has ended


START = """
import os, sys, time
import forked
process = forked.start(["-c", "import time; time.sleep(600)"], 1, 2, os.environ)
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a new Python is started")
def test_a_run_ends_where_the_tests_are_interrupted() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    words = [sys.executable, "-c", START]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as tests:
        assert tests.stdout
        run = psutil.Process(int(tests.stdout.readline()))
        tests.kill()
    wait_for(lambda: not run.is_running(), 30)
