"""Models from strangers: every public class of flaw in their files is one clear error, in bounded
memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes.raw_gguf import number, raw, tensor, text, whole
from figures import Figure
from model_flaws import GGUF, INDEX, INDEXES, SAFETENSORS, Flaw, entry, named

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux bounds a process's memory"
)

SCRIPT = Path(__file__).with_name("bounded_reads.py")
MEMORY = 128 * 1024 * 1024  # bytes beyond what Python has when it starts
SECONDS = 5  # of the processor
LARGE_JSON = 700 * 1024 * 1024  # for a header of 100 MB, the longest that the format allows

Check = Callable[[Path], dict[str, Any]]


@contextmanager
def checking(*replaced: str, memory: int = MEMORY, seconds: int = SECONDS) -> Iterator[Check]:
    words = [sys.executable, str(SCRIPT), str(memory), str(seconds), *replaced]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stdin and process.stdout

        def check(path: Path) -> dict[str, Any]:
            assert process.stdin and process.stdout
            print(path, file=process.stdin, flush=True)
            return dict(json.loads(process.stdout.readline()))

        yield check
        process.stdin.close()


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    with checking() as check:
        yield check


@pytest.fixture(scope="module")
def check_large() -> Iterator[Check]:
    with checking(memory=LARGE_JSON) as check:
        yield check


def require_clear(answer: dict[str, Any], path: Path, said: str) -> None:
    message = answer.get("refused", "")
    assert said in message, answer
    assert str(path) in message
    assert len(message) < 500 + len(str(path))
    assert message.isprintable()


@pytest.mark.parametrize("name", GGUF)
def test_a_flaw_of_a_gguf_is_a_clear_error(
    name: str, check: Check, tmp_path: Path, figure: Figure
) -> None:
    path = tmp_path / "von Fremden ü.gguf"
    GGUF[name].write(path)
    require_clear(check(path), path, GGUF[name].said)
    figure("classes of flaws in model files refused", 1)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_flaw_of_safetensors_is_a_clear_error(
    name: str, check: Check, check_large: Check, tmp_path: Path, figure: Figure
) -> None:
    path = tmp_path / "von Fremden ü.safetensors"
    flaw = SAFETENSORS[name]
    flaw.write(path)
    is_large = max(flaw.size, len(flaw.parts[0][1])) > 10**7
    require_clear((check_large if is_large else check)(path), path, flaw.said)
    figure("classes of flaws in model files refused", 1)


@pytest.mark.parametrize("name", INDEXES)
def test_a_flaw_of_an_index_is_a_clear_error(
    name: str, check_large: Check, tmp_path: Path, figure: Figure
) -> None:
    content, said = INDEXES[name]
    named("", [entry()]).write(tmp_path / "model.safetensors")
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / INDEX).write_bytes(data)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    require_clear(check_large(tmp_path), tmp_path, said)
    figure("classes of flaws in model files refused", 1)


def test_what_has_no_flaw_is_accepted(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    tensors = (tensor(), tensor("scalar", (), 0, 128), tensor("u", (32, 2), 8, 160))
    values = (("a", 8, text("{{ 1 }}")), ("general.alignment", 4, number(32)))
    path.write_bytes(whole(raw(*values, tensors=b"".join(tensors), count=3), 228))
    assert check(path) == {}
    path = tmp_path / "a.safetensors"
    tensors = (entry(), entry([], [4, 8]), entry([0, 9], [8, 8]), entry([4], [8, 10], "F4"))
    named("", tensors, 10).write(path)
    assert check(path) == {}


TOO_LONG = "SIGPROF"
ANY = str(1 << 62)
HEADER = f"gguf_format.MAX_HEADER={ANY}"
NUMBERS = (f"gguf_format.MAX_ARRAY={ANY}", f"gguf_format.MAX_KEPT={ANY}")


@pytest.mark.parametrize(
    ("flaw", "replaced", "said"),
    [
        (GGUF["array of a billion"], (HEADER, *NUMBERS), "MemoryError"),
        (GGUF["268 million empty tokens"], (HEADER, f"gguf_format.MAX_TEXTS={ANY}"), TOO_LONG),
        (GGUF["offset behind a gap"], ("gguf_format.TENSOR_RULES=()",), ""),
        (SAFETENSORS["offsets swapped"], ("safetensors.TENSOR_RULES=()",), ""),
        (SAFETENSORS["a million values"], (f"safetensors.MAX_VALUES={ANY}",), "MemoryError"),
    ],
    ids=["memory", "time", "rules of GGUF", "rules of safetensors", "memory of JSON"],
)
def test_without_a_bound_its_flaw_is_seen(
    flaw: Flaw, replaced: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    """The harness can fail."""
    path = tmp_path / ("a.gguf" if flaw in GGUF.values() else "a.safetensors")
    flaw.write(path)
    with checking(*replaced, seconds=1 if said == TOO_LONG else SECONDS) as check:
        answer = check(path)
    assert said in answer.get("failed", "")
    with pytest.raises(AssertionError):
        require_clear(answer, path, flaw.said)
