from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, wait_for
from core_tools import child, finish, line
from disks import disk
from supervisor_tools import lives

from pipeline.core import process
from pipeline.core.errors import PipelineError
from pipeline.core.process import lifetime, stop

posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="as Linux does it")


def python(script: str) -> list[str]:
    return [sys.executable, "-u", "-c", script]


TALK = python("import sys; print('größe'); print('on stderr', file=sys.stderr); sys.exit(3)")


def test_run_logs_everything_and_returns_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUTF8", "1")
    log, heard = tmp_path / "new" / "a.log", list[str]()
    assert process.run(TALK, log=log, on_line=heard.append) == 3
    shown = f"+ {process.shown(TALK)}"
    assert heard == ["größe", "on stderr"]
    assert log.read_text(encoding="utf-8").splitlines() == [shown, *heard]
    assert capsys.readouterr().err == f"{shown}\n"
    assert process.run(python("print(1)"), log=log, append=True) == 0
    assert len(log.read_text(encoding="utf-8").splitlines()) == 5
    assert process.run(python("print(2)"), log=log) == 0
    assert log.read_text(encoding="utf-8").splitlines()[1:] == ["2"]


def test_run_with_another_folder_and_environment(tmp_path: Path) -> None:
    script, heard = "import os; print(os.getcwd(), os.environ['WHO'])", list[str]()
    env = {**os.environ, "WHO": "me"}
    process.run(python(script), log=tmp_path / "log", cwd=tmp_path, env=env, on_line=heard.append)
    assert heard == [f"{tmp_path} me"]


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\r\nb", ["a", "b"]),
        (b" 1 %\r 2 %\r100 %\nend\n", [" 1 %", " 2 %", "100 %", "end"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        (b"\xff\xfe\n", ["\ufffd\ufffd"]),
        (b"", []),
        (b"x" * 200_000 + b"\ny", ["x" * 200_000, "y"]),
    ],
    ids=["lines", "crlf", "progress", "empty", "bytes", "nothing", "long"],
)
def test_lines(tmp_path: Path, output: bytes, lines: list[str]) -> None:
    (tmp_path / "output").write_bytes(output)
    script = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
    heard: list[str] = []
    process.run([*python(script), tmp_path / "output"], log=tmp_path / "log", on_line=heard.append)
    assert heard == lines


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [(["a\r", "\nb\n"], ["a", "b"]), (["gr\xc3", "\xb6\xc3\x9fe\n"], ["größe"])],
    ids=["crlf", "letter"],
)
def test_what_arrives_in_pieces(tmp_path: Path, pieces: list[str], lines: list[str]) -> None:
    script = f"""
import os, time
for piece in {[piece.encode("latin-1") for piece in pieces]}:
    os.write(1, piece)
    time.sleep(0.3)
"""
    heard: list[str] = []
    process.run(python(script), log=tmp_path / "log", on_line=heard.append)
    assert heard == lines


def test_progress_is_heard_while_it_happens(tmp_path: Path) -> None:
    """The program waits for what the listener does on hearing it."""
    go = tmp_path / "go"
    script = f"""
import os, time
print("50 %", end="\\r")
while not os.path.exists({str(go)!r}):
    time.sleep(0.01)
"""
    assert process.run(python(script), log=tmp_path / "log", on_line=lambda _: go.touch()) == 0


def test_a_log_that_cannot_grow_hides_nothing(tmp_path: Path) -> None:
    script, heard = "import sys; [print(i) for i in range(50_000)]; sys.exit(3)", list[str]()
    with disk(tmp_path / "disk", "size=64k"):
        log = tmp_path / "disk" / "log"
        assert process.run(python(script), log=log, on_line=heard.append) == 3
    assert len(heard) == 50_000


@pytest.mark.parametrize("program", ["no-such-program-anywhere", "/no/such/path"])
def test_what_cannot_be_started(tmp_path: Path, program: str) -> None:
    with pytest.raises(PipelineError, match=f"{program}: cannot be started: No such file"):
        process.start([program])
    with pytest.raises(PipelineError):
        process.run([program], log=tmp_path / "log")
    assert process.capture([program]) is None


@posix
def test_a_program_without_its_loader_is_not_called_missing(tmp_path: Path) -> None:
    """As one made for another C library is; a script's interpreter stands in for the loader."""
    program = tmp_path / "program"
    program.write_text("#!/lib/no-such-loader.so\n")
    program.chmod(0o755)
    why = "No such file or directory: it is there, but what starts it is not"
    said = f"{program}: cannot be started: {why}"
    status, out, err = process.outcome([program])
    assert (status, out) == (-1, "") and err.startswith(said)
    with pytest.raises(PipelineError, match="it is there, but what starts it is not"):
        process.start([program])
    gone = tmp_path / "gone"
    assert process.outcome([gone])[2] == f"{gone}: cannot be started: No such file or directory"


def test_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUTF8", "1")
    both = "import sys; print('größe'); print('err', file=sys.stderr)"
    assert process.capture(python(both)) == f"größe{os.linesep}err{os.linesep}"
    assert process.capture(TALK) is None
    assert process.capture(python("import sys; print(sys.stdin.read())"), timeout=30) == os.linesep
    env = {**os.environ, "WHO": "me"}
    assert process.outcome(python("import os; print(os.environ['WHO'])"), env=env)[1] == "me\n"


@posix
def test_capture_of_what_hangs_ends(tmp_path: Path) -> None:
    """Also where a grandchild keeps the pipe open."""
    script = f"echo $$ >{tmp_path / 'pid'}; sleep 30 & wait"
    assert process.capture(["/bin/sh", "-c", script], timeout=2) is None
    assert not lives(int((tmp_path / "pid").read_text()))


def test_attached(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = "import os, sys; print(os.getcwd()); sys.exit(4)"
    assert process.attached(python(script), cwd=tmp_path) == 4
    out, err = capfd.readouterr()
    assert out.strip() == str(tmp_path)
    assert err.startswith("+ ")


def test_shown_can_be_typed() -> None:
    words = ["a b", "c'd", Path("größe"), "$x"]
    shown = process.shown(words)
    if os.name != "nt":
        assert shlex.split(shown) == [str(word) for word in words]
    assert '"a b"' in shown or "'a b'" in shown


def test_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"".join(b"%d \xff\n" % i for i in range(100)))
    assert process.last_lines(log, 2) == "  | 98 \ufffd\n  | 99 \ufffd"
    assert len(process.last_lines(log).splitlines()) == process.LAST_LINES
    assert process.last_lines(tmp_path / "missing") == ""


# Nobody is left behind

PARENT = """
import sys, time
from pipeline.core.process import start
child = start(sys.argv[3:], own_group=sys.argv[2] == "own",
              killed_with_us=sys.argv[1] == "killed")
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
time.sleep(60)
"""
SLEEP = python("import time; print('up'); time.sleep(60)")
STUBBORN = python(
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up');"
    "[time.sleep(1) for _ in range(60)]"
)


def die_and_see(parent: subprocess.Popen[str]) -> None:
    """Kill the parent outright; its child, whose number it printed, must end too."""
    pid, up = line(parent).split()
    assert up == "up"
    assert lives(int(pid))
    parent.kill()
    try:
        wait_for(lambda: not lives(int(pid)))
    finally:
        if lives(int(pid)):
            os.kill(int(pid), signal.SIGKILL)


@posix
@pytest.mark.parametrize("group", ["own", "shared"])
@pytest.mark.parametrize("death", ["asked", "killed"])
def test_a_child_dies_with_its_parent(death: str, group: str) -> None:
    with child(PARENT, death, group, *SLEEP) as parent:
        die_and_see(parent)


@linux
def test_a_stubborn_child_dies_with_a_parent_that_asked_for_it() -> None:
    with child(PARENT, "killed", "own", *STUBBORN) as parent:
        die_and_see(parent)


@posix
@pytest.mark.parametrize("program", [SLEEP, STUBBORN], ids=["sleep", "stubborn"])
def test_the_watcher_of_other_systems_does_the_same(program: list[str]) -> None:
    script = """
import subprocess, sys, time
from pipeline.core.process.lifetime import watch_from_outside
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
watch_from_outside(child)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
time.sleep(60)
"""
    with child(script, *program) as parent:
        die_and_see(parent)


@posix
def test_the_watcher_ends_with_the_child_and_leaves_nothing_open() -> None:
    script = """
import gc, subprocess, sys, warnings
import psutil
from pipeline.core.process.stop import running
from pipeline.core.process.lifetime import watch_from_outside
warnings.simplefilter("always")
with running(lambda: subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE)) as child:
    watch_from_outside(child)
    assert len(psutil.Process().children()) == 2
assert child.returncode == -15
assert psutil.Process().children() == []
del child
gc.collect()
"""
    with child(script) as parent:
        assert finish(parent) == ""


def test_running_ends_it_however_the_block_ends() -> None:
    with pytest.raises(KeyboardInterrupt), stop.running(lambda: process.start(SLEEP)) as sleeper:
        raise KeyboardInterrupt
    assert sleeper.returncode is not None
    assert sleeper.stdout is not None
    assert sleeper.stdout.closed
    with stop.running(lambda: process.start(python("raise SystemExit(5)"))) as ended:
        ended.wait()
    assert ended.returncode == 5


@posix
@pytest.mark.slow
def test_running_kills_what_does_not_listen() -> None:
    with stop.running(lambda: process.start(STUBBORN)) as stubborn:
        assert next(process.lines_of(stubborn)) == "up"
    assert stubborn.returncode == -signal.SIGKILL


@posix
@posix
def test_an_interruption_while_a_program_is_started_is_not_lost() -> None:
    """It comes while Python forks, when what handlers raise is dropped."""
    script = """
import os, signal, sys
from pipeline.core import process
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
os.register_at_fork(after_in_parent=interrupt)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, perhaps, by who started us
try:
    process.start(["sleep", "60"], steps=[lambda: None])
except KeyboardInterrupt:
    print("interrupted")
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("no child is left")
"""
    done = subprocess.run(
        python(script), cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["interrupted", "no child is left"], done.stderr


def test_run_ends_its_program_when_it_is_interrupted(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        pid.append(int(line))
        raise KeyboardInterrupt

    pid: list[int] = []
    script = "import os, time; print(os.getpid()); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        process.run(python(script), log=tmp_path / "log", on_line=interrupt)
    assert not lives(pid[0])
    assert str(pid[0]) in (tmp_path / "log").read_text()


@posix
@pytest.mark.parametrize("own", [False, True])
def test_own_group(own: bool) -> None:
    with stop.running(lambda: process.start(SLEEP, own_group=own)) as sleeper:
        assert next(process.lines_of(sleeper)) == "up"
        assert (os.getpgid(sleeper.pid) != os.getpgrp()) is own


@posix
def test_ask_to_stop() -> None:
    with stop.running(lambda: process.start(SLEEP, own_group=True)) as sleeper:
        stop.ask_to_stop(sleeper)
        assert sleeper.wait(timeout=30) == -signal.SIGTERM


@posix
def test_a_group_of_zombies_is_empty() -> None:
    """They stay where nobody asks how they ended, as in a container without an init."""

    def sleeper(group: int) -> process.Process:
        return subprocess.Popen(SLEEP, stdout=subprocess.PIPE, process_group=group)

    with (
        stop.running(lambda: sleeper(0)) as first,
        stop.running(lambda: sleeper(first.pid)) as last,
    ):
        first.kill()
        first.wait()
        assert not stop.group_is_empty(first)
        last.kill()
        wait_for(lambda: not lives(last.pid))
        assert stop.group_is_empty(first)


@linux
def test_a_child_born_after_its_parents_death_does_not_live() -> None:
    """The kernel tells nothing to a child that asks too late; it looks for itself."""
    ask = lifetime.die_with(1 << 30, killed=False)
    born = subprocess.Popen(["true"], preexec_fn=ask)
    assert born.wait() == 1


@posix
def test_a_program_that_says_nothing_is_killed_with_its_children(tmp_path: Path) -> None:
    log, heard = tmp_path / "log", list[str]()
    shell = ["/bin/sh", "-c", "sleep 600 & echo $!; wait"]
    assert process.run(shell, log=log, on_line=heard.append, patience=2) != 0
    assert log.read_text().splitlines()[-1] == "killed: it had printed nothing for 2 s"
    wait_for(lambda: not lives(int(heard[0])))


@posix
def test_a_program_that_takes_too_long_is_killed_though_it_talks(tmp_path: Path) -> None:
    """The reason stands below all that it printed, also what was still to be read."""
    log, slowly = tmp_path / "log", lambda _: time.sleep(0.01)
    script = "while True: print('up' * 500)"
    assert process.run(python(script), log=log, on_line=slowly, timeout=1.5) == -signal.SIGKILL
    assert log.read_text().splitlines()[-1] == "killed: it had not ended after 1.5 s"


def test_a_program_that_talks_is_left_alone(tmp_path: Path) -> None:
    """All of it takes longer than it may be silent, and each pause is a small part of that."""
    script, heard = "import time\nfor i in range(9): print(i); time.sleep(0.7)", list[str]()
    assert process.run(python(script), log=tmp_path / "log", on_line=heard.append, patience=5) == 0
    assert heard == list("012345678")


BACKGROUND = """
import sys, time
from pathlib import Path
from pipeline.core import process
from pipeline.core.parallel import Background
from pipeline.core.process import run

def slow(*words, begin=process._popen, **options):
    started = begin(*words, **options)
    time.sleep(float(sys.argv[2]))
    return started

process._popen = slow
folder = Path(sys.argv[1])
shell = 'sleep 1000 & echo $! > "$0"; wait'
Background(lambda: run(["sh", "-c", shell, str(folder / "pid")], log=folder / "log", patience=1000))
while not (folder / "pid").exists():
    time.sleep(0.05)
"""


@posix
@pytest.mark.parametrize("pause", ["0", "1"])  # seconds after the fork: still being started
def test_what_a_thread_runs_ends_with_this_process(tmp_path: Path, pause: str) -> None:
    """And what that has started."""
    command = [sys.executable, "-c", BACKGROUND, tmp_path, pause]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    wait_for(lambda: bool((tmp_path / "pid").read_text()))
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not lives(pid))


# Of gdb and of glibc, which ggml prints after the reason.
BACKTRACE = """[New LWP 21116]
[Thread debugging using libthread_db enabled]
Using host libthread_db library "/lib/x86_64-linux-gnu/libthread_db.so.1".
0x00007f318b6f1c17 in __GI___wait4 (pid=21118, options=0) at ../sysdeps/unix/wait4.c:30
30\t../sysdeps/unix/wait4.c: No such file or directory.
warning: 30\t../sysdeps/unix/wait4.c: No such file or directory
#0  0x00007f318b6f1c17 in __GI___wait4 (pid=21118) at ../sysdeps/unix/wait4.c:30
30\tin ../sysdeps/unix/wait4.c
#12 0x000055f1031601b1 in _start ()
[Inferior 1 (process 21112) detached]
/opt/a folder/libggml-base.so.0(+0x1768b)[0x7f5b8156c68b]
/opt/libggml-base.so(ggml_abort+0x152) [0x7f5b8156c7de]
llama-server(_ZN3foo3barEv+0x1)[0x7f5b8156c7de]
"""


def test_a_backtrace_does_not_hide_the_reason() -> None:
    said = "ggml-rpc.cpp:547: Failed to connect\n[a line] of 0x10 # 3\n"
    expected = ["  | ggml-rpc.cpp:547: Failed to connect", "  | [a line] of 0x10 # 3"]
    assert process.indented(said + BACKTRACE).splitlines() == expected
