"""Skeletons: the header that the real file will have, from its first bytes alone; bytes that lie
are an error."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Doit
from fakes import large_llama
from fakes.large_llama import Size
from fakes.raw_gguf import array, raw, text
from test_gguf import write
from twins import DENSE, GROUPED, Twin, conversion, skeleton_of

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.models import gguf, run_converter
from pipeline.models.contents import Readable, local
from pipeline.models.converter import environment
from pipeline.models.run_converter import HEADER
from pipeline.models.skeleton import FIRST_READ, gguf_skeleton


class Remote:
    """A file of which every read is counted."""

    def __init__(self, data: bytes, size: int | None = None, short: int = 0) -> None:
        self.data, self.size, self.short = data, len(data) if size is None else size, short
        self.asked: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        data = self.data[start:stop]
        return (data + bytes(stop - start - len(data)))[: stop - start - self.short]

    def readable(self, name: str = "model.gguf") -> Readable:
        return Readable(name=name, size=self.size, read=self.read)


def tensor(offset: int = 0, elements: int = 1 << 20) -> bytes:
    return text("t") + struct.pack("<IQIQ", 1, elements, 0, offset)


def long_header(length: int) -> bytes:
    """A header of about this many bytes, whose tensor takes 4 MiB."""
    words = array(8, length // 1024, (struct.pack("<Q", 1016) + b"w" * 1016) * (length // 1024))
    return raw(("tokenizer.ggml.tokens", 9, words), tensors=tensor(), count=1)


@pytest.mark.parametrize("length", [0, FIRST_READ, 5 * FIRST_READ])
def test_only_the_start_is_read_in_doubling_steps(tmp_path: Path, length: int) -> None:
    head = long_header(length)
    remote = Remote(head, size=1 << 40)
    skeleton_path = gguf_skeleton([remote.readable()], tmp_path)
    assert skeleton_path == tmp_path / "model.gguf"
    assert skeleton_path.stat().st_size == 1 << 40
    with skeleton_path.open("rb") as file:
        assert file.read(len(head)) == head
        assert not any(file.read(1000))
    assert remote.asked[0] == (0, FIRST_READ)
    stops = [stop for _, stop in remote.asked]
    assert remote.asked == list(zip([0, *stops], stops, strict=False))
    assert stops[-1] <= max(FIRST_READ, 2 * len(head))
    assert gguf.read(skeleton_path).vocabulary == length // 1024


def test_a_skeleton_that_is_there_is_not_asked_for_again(tmp_path: Path) -> None:
    remote = Remote(long_header(0), size=1 << 30)
    for _ in range(2):
        gguf_skeleton([remote.readable("sub/model.gguf")], tmp_path)
    assert len(remote.asked) == 1
    assert not list(tmp_path.glob(".*part*"))


def test_parts_keep_their_names(tmp_path: Path) -> None:
    names = [f"a-0000{n}-of-00002.gguf" for n in (1, 2)]
    remotes = [Remote(long_header(0), size=1 << 30) for _ in names]
    files = [r.readable(f"Q4/{n}") for r, n in zip(remotes, names, strict=True)]
    first = gguf_skeleton(files, tmp_path)
    assert first == tmp_path / names[0]
    assert gguf.shards(first) == [tmp_path / name for name in names]


@pytest.mark.parametrize(
    ("data", "said", "reads"),
    [
        (b"<!doctype html>" + bytes(1 << 22), "is a web page", 1),
        (b"GGUF" + bytes(1 << 22), "version 0", 1),
        (raw(version=9) + bytes(1 << 22), "version 9", 1),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0) + bytes(1 << 22), "tensors", 1),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 62) + bytes(1 << 22), "values", 1),
        (raw(("a", 9, array(4, 1 << 60))) + bytes(1 << 22), "elements in an array", 1),
        (raw(("a", 8, struct.pack("<Q", 1 << 60))) + bytes(1 << 22), "in one text", 1),
        # Less than a file of this size could hold: known after the first read.
        (raw(("a", 9, array(10, 1 << 21))) + bytes(1 << 22), "ends inside its header", 1),
        (raw(tensors=tensor(), count=1), "cut short", 1),
        (raw(tensors=tensor(1 << 62), count=1), "overlap or leave gaps", 1),
        (raw(tensors=tensor(0, (1 << 64) - 1), count=1), "too many elements", 1),
        (raw(("general.alignment", 10, struct.pack("<Q", 1 << 63))), "value type 10", 1),
        (raw(("general.alignment", 4, struct.pack("<I", 1 << 31))), "power of two", 1),
        (raw()[:10], "ends inside its header", 1),
        (b"", "is empty", 0),
    ],
)
def test_bytes_that_lie_are_an_error_at_once(
    tmp_path: Path, data: bytes, said: str, reads: int
) -> None:
    remote = Remote(data)
    with pytest.raises(PipelineError, match=said):
        gguf_skeleton([remote.readable()], tmp_path)
    assert len(remote.asked) == reads
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def test_a_header_without_end_is_given_up(tmp_path: Path) -> None:
    endless = raw(("a", 9, array(8, 1, struct.pack("<Q", 1 << 39))))
    remote = Remote(endless, size=1 << 40)
    with pytest.raises(PipelineError, match="longer than"):
        gguf_skeleton([remote.readable()], tmp_path)
    assert remote.asked == [(0, FIRST_READ)]


def test_a_read_that_brings_less_is_an_error(tmp_path: Path) -> None:
    remote = Remote(long_header(0), size=1 << 30, short=1)
    with pytest.raises(PipelineError, match=f"{FIRST_READ} bytes were requested"):
        gguf_skeleton([remote.readable()], tmp_path)


@pytest.mark.parametrize("name", ["", "..", "a\\b.gguf", "c:x.gguf"])
def test_a_name_that_is_no_files_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PipelineError, match="not a file name"):
        gguf_skeleton([Remote(long_header(0), size=1 << 30).readable(name)], tmp_path)


def test_a_file_system_without_room_for_it_is_none(tmp_path: Path) -> None:
    """No file system takes 2**63 bytes: as good as one without holes."""
    remote = Remote(long_header(0), size=1 << 63)
    assert gguf_skeleton([remote.readable()], tmp_path) is None
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


@pytest.mark.build
@pytest.mark.parametrize("outtype", ["F16", "BF16", "F32", "Q8_0"])
def test_the_header_is_that_of_the_later_conversion(
    tiny: Path, twin: Callable[[Path, str], Twin], outtype: str
) -> None:
    _same_header(twin(tiny, outtype))


@pytest.mark.build
def test_an_embedding_model_and_a_split_one_too(
    demo: Doit, tmp_path: Path, twin: Callable[[Path, str], Twin]
) -> None:
    from fakes import tiny_llama

    (folder,) = (demo.home / "models" / "source").iterdir()
    shutil.copytree(folder, tmp_path / "MiniLM")
    for leftover in (tmp_path / "MiniLM").glob(".*"):
        leftover.unlink()
    _same_header(twin(tmp_path / "MiniLM", "F16"))
    tiny_llama.make(tmp_path / "split", shards=3)
    _same_header(twin(tmp_path / "split", "BF16"))


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.parametrize("size", [DENSE, GROUPED], ids=["dense", "grouped"])
def test_larger_ones_too(large: Callable[[Size], Twin], size: Size) -> None:
    made = large(size)
    _same_header(made)
    whole = Path(made.real)
    again = gguf_skeleton([local(whole, "again.gguf")], made.skeleton.parent)
    assert again
    with again.open("rb") as one, made.skeleton.open("rb") as other:
        assert one.read(1 << 20) == other.read(1 << 20)


def _same_header(made: Twin) -> None:
    header = gguf.read(made.skeleton)
    assert made.skeleton.stat().st_size == made.real.stat().st_size
    with made.skeleton.open("rb") as one, made.real.open("rb") as other:
        assert one.read(header.data) == other.read(header.data)
        assert not any(one.read(1 << 20))
    if sys.platform != "win32":
        assert made.skeleton.stat().st_blocks * 512 < header.data + (1 << 17)


@pytest.mark.build
@pytest.mark.slow
def test_eight_billion_weights_are_no_work(converter: Path, script: Path, tmp_path: Path) -> None:
    size = Size(layers=32, hidden=4096, feed_forward=14336, heads=32, kv_heads=8, vocabulary=128256)
    elements = large_llama.make(tmp_path / "llama", size)
    made = conversion(tmp_path / "llama", "BF16", Home(tmp_path / "home"), script)
    skeleton_path = skeleton_of(made, converter, tmp_path / "home" / "s.gguf")
    assert elements == 8_030_261_248
    assert 2 * elements < skeleton_path.stat().st_size < 2 * elements + (8 << 20)
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == [".s.gguf.lock", "s.gguf"]


@pytest.mark.build
def test_what_the_converter_refuses_is_said_before_the_download(
    converter: Path, script: Path, own_tiny: Path, tmp_path: Path
) -> None:
    (own_tiny / "tokenizer.model").unlink()
    made = conversion(own_tiny, "F16", Home(tmp_path / "home"), script)
    with pytest.raises(PipelineError, match="the converter refuses its headers"):
        skeleton_of(made, converter, tmp_path / "home" / "s.gguf")
    assert [path.name for path in (tmp_path / "home").iterdir()] == [".s.gguf.lock"]


@pytest.mark.build
@pytest.mark.parametrize(
    ("head", "said"),
    [
        ((1 << 60).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
        (
            b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},'
            b'"b":{"dtype":"F16","shape":[2],"data_offsets":[2,6]}}',
            "overlap",
        ),
    ],
)
def test_weights_that_lie_are_an_error(
    converter: Path, script: Path, own_tiny: Path, tmp_path: Path, head: bytes, said: str
) -> None:
    if head.startswith(b"{"):
        head = len(head).to_bytes(8, "little") + head + bytes(6)
    (own_tiny / "model.safetensors").write_bytes(head)
    made = conversion(own_tiny, "F16", Home(tmp_path / "home"), script)
    with pytest.raises(PipelineError, match=said):
        skeleton_of(made, converter, tmp_path / "home" / "s.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_converter_that_wants_the_weights_in_memory_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "converter.py").write_text(f"bytearray({2 * run_converter.MOST_MEMORY})")
    words = [sys.executable, run_converter.__file__, HEADER, tmp_path / "converter.py"]
    done = subprocess.run(words, check=False, timeout=60)
    assert done.returncode == run_converter.TOO_MUCH


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], [HEADER]], ids=["whole", "header"])
def test_transformers_loads_nothing_of_its_own_for_torch(
    converter: Path, tmp_path: Path, mode: list[str]
) -> None:
    env = environment(converter, tmp_path)
    tree = tmp_path / "converter.py"
    tree.write_text(
        "import sys, torch\nfrom transformers import AutoConfig\nAutoConfig.for_model('llama')\n"
        "print(sys.argv[1:], bool(torch.zeros(1)[0] == 0), 'torch._dynamo' in sys.modules)\n"
    )
    (tmp_path / "gguf.py").write_text("class GGUFWriter: ...")
    words = [converter, run_converter.__file__, *mode, tree, "a word"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("['a word'] True False\n", "")


def test_a_real_file_by_the_official_writer(tmp_path: Path) -> None:
    path = write(tmp_path / "real.gguf", lambda writer: writer.add_token_list(["a"] * 1000))
    skeleton_path = gguf_skeleton([local(path, path.name)], tmp_path / "skeletons")
    assert skeleton_path
    header = gguf.read(path)
    assert skeleton_path.read_bytes()[: header.data] == path.read_bytes()[: header.data]
    assert not any(skeleton_path.read_bytes()[header.data :])
