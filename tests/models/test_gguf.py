"""GGUF headers: everything the format holds is read, and hostile bytes are only ever an error."""

from __future__ import annotations

import os
import random
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.raw_gguf import array, raw, tensor, text, whole
from msgspec import to_builtins
from msgspec.structs import replace

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.store import stat_cache
from pipeline.models import contents, gguf, gguf_format, quants
from pipeline.models.contents import Readable

SCALARS = {
    "u8": 250,
    "i8": -3,
    "u16": 65000,
    "i16": -300,
    "u32": 4_000_000_000,
    "i32": -70_000,
    "u64": 2**63,
    "i64": -(2**40),
    "f32": 0.5,
    "f64": 0.1,
    "yes": True,
    "no": False,
    "text": "grüße\n",
}
TEMPLATE = "{{ messages }}"


def write(path: Path, fill: Callable[[Any], None], tensors: bool = True) -> Path:
    """A GGUF by the official writer; `fill(writer)` adds to it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    fill(writer)
    if tensors:
        writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
        writer.add_tensor("output.weight", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def everything(writer: Any) -> None:
    adders = {
        "u8": writer.add_uint8,
        "i8": writer.add_int8,
        "u16": writer.add_uint16,
        "i16": writer.add_int16,
        "u32": writer.add_uint32,
        "i32": writer.add_int32,
        "u64": writer.add_uint64,
        "i64": writer.add_int64,
        "f32": writer.add_float32,
        "f64": writer.add_float64,
        "yes": writer.add_bool,
        "no": writer.add_bool,
        "text": writer.add_string,
    }
    for name, value in SCALARS.items():
        adders[name](f"test.{name}", value)
    writer.add_array("test.ints", [1, 2, 3])
    writer.add_array("test.words", ["a", "", "ö" * 50])
    writer.add_name("Tiny")
    writer.add_file_type(15)
    writer.add_context_length(8192)
    writer.add_chat_template(TEMPLATE)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return write(tmp_path / "full.gguf", everything)


def parsed(data: bytes) -> gguf.Header:
    """The header at the start of a file that is longer than anything that it claims."""

    def read(start: int, stop: int) -> bytes:
        return data[start:stop].ljust(stop - start, b"\0")

    return gguf.parse(Readable(name="a.gguf", size=1 << 62, read=read))


def refusal(path: Path, data: bytes) -> str:
    """What `read` says of a file with these bytes."""
    path.write_bytes(data)
    with pytest.raises(PipelineError) as caught:
        gguf.read(path)
    return str(caught.value)


def test_every_value_type_is_read_and_arrays_of_texts_are_skipped(full: Path) -> None:
    header = gguf.read(full)
    got = {k[5:]: v for k, v in header.values.items() if k.startswith("test.")}
    assert got == {**SCALARS, "ints": [1, 2, 3]}
    assert (header.architecture, header.quant) == ("llama", "Q4_K_M")
    assert header.values["general.name"] == "Tiny"
    assert (header.context_length, header.pooling, header.shards) == (8192, "none", 1)
    assert header.has_chat_template
    assert header.values["tokenizer.chat_template"] == TEMPLATE
    assert header.tensors == 2


def test_a_header_that_says_nothing_has_plain_defaults(tmp_path: Path) -> None:
    header = gguf.read(write(tmp_path / "a.gguf", lambda writer: None, tensors=False))
    assert (header.quant, header.context_length) == ("", 0)
    assert (header.shards, header.tensors, header.has_chat_template) == (1, 0, False)


@pytest.mark.parametrize(
    ("number", "name"), [(0, "none"), (1, "mean"), (2, "cls"), (3, "last"), (4, "rank")]
)
def test_pooling_under_the_names_of_the_server(tmp_path: Path, number: int, name: str) -> None:
    path = write(
        tmp_path / "a.gguf", lambda w: w.add_uint32(f"{w.arch}.pooling_type", number), False
    )
    assert gguf.read(path).pooling == name


@pytest.mark.parametrize("architecture", gguf.ENCODERS)
@pytest.mark.parametrize("said", [None, 0])
def test_an_encoder_that_does_not_say_how_it_pools(architecture: str, said: int | None) -> None:
    values = {"general.architecture": architecture}
    values |= {} if said is None else {f"{architecture}.pooling_type": said}
    header = gguf.Header(tensors=1, size=1, data=0, values=values)
    assert (header.is_encoder, header.lacks_pooling, header.pooling) == (True, True, "mean")


@pytest.mark.parametrize(
    ("name", "shape", "pooling"),
    [
        ("cls.output.weight", (1, 64), "rank"),
        ("cls.weight", (1, 64), "rank"),
        ("cls.output.weight", (3, 64), "mean"),  # it tells moods apart, or languages
        ("cls.weight", (64, 64), "mean"),
    ],
)
def test_an_encoder_with_a_classifier_of_one_output_is_a_reranker(
    tmp_path: Path, name: str, shape: tuple[int, int], pooling: str
) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "r.gguf"
    writer = GGUFWriter(path, "bert")
    writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf.read_cached(path, tmp_path)
    assert (header.pooling, header.lacks_pooling) == (pooling, pooling == "mean")
    assert gguf.read_cached(path, tmp_path) == header


@pytest.mark.parametrize(
    ("values", "pooling", "is_encoder"),
    [
        ({"general.architecture": "bert", "bert.pooling_type": 2}, "cls", True),
        ({"general.architecture": "qwen2", "qwen2.attention.causal": False}, "mean", True),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 3}, "last", False),
        ({"general.architecture": "dream", "dream.attention.causal": False}, "none", False),
        ({"general.architecture": "llama"}, "none", False),
        ({"general.architecture": "t5"}, "none", False),
    ],
)
def test_what_only_embeds(values: dict[str, Any], pooling: str, is_encoder: bool) -> None:
    header = gguf.Header(tensors=1, size=1, data=0, values=values)
    assert (header.pooling, header.is_encoder) == (pooling, is_encoder)


def test_the_size_is_that_of_the_file_or_less(full: Path, tmp_path: Path) -> None:
    """The official writer pads the end; one byte less than the header needs is refused."""
    size = gguf.read(full).size
    assert full.stat().st_size - 32 < size <= full.stat().st_size
    data = full.read_bytes()
    (tmp_path / "exact.gguf").write_bytes(data[:size])
    assert gguf.read(tmp_path / "exact.gguf").size == size
    message = refusal(tmp_path / "cut.gguf", data[: size - 1])
    assert "cut short" in message
    assert str(size) in message
    assert str(size - 1) in message


def test_the_alignment_of_the_file_is_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", lambda writer: writer.add_custom_alignment(256))
    assert path.stat().st_size - 256 < gguf.read(path).size <= path.stat().st_size


def test_block_sizes_are_those_of_the_format() -> None:
    from gguf import GGML_QUANT_SIZES

    theirs = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    ours = quants.TENSOR_BLOCKS
    both = set(theirs) & set(ours)
    assert {kind: ours[kind] for kind in both} == {kind: theirs[kind] for kind in both}
    # Q8_1 is made in memory only and never stored.
    assert set(theirs) - set(ours) <= {9}


def test_a_type_that_came_later(tmp_path: Path) -> None:
    """llama.cpp adds types; to download the file again would change nothing."""
    for kind, hint in ((43, gguf.NEWER), (106, gguf.NEWER), (4, gguf.AGAIN), (107, gguf.AGAIN)):
        path = tmp_path / f"{kind}.gguf"
        path.write_bytes(whole(raw(tensors=tensor(kind=kind), count=1), 4096))
        with pytest.raises(PipelineError, match=f"tensor type {kind}, .* newest is 42") as caught:
            gguf.read(path)
        assert caught.value.hint == hint


def test_a_big_vocabulary_is_skipped_to_what_follows(tmp_path: Path) -> None:
    def fill(writer: Any) -> None:
        writer.add_token_list([f"word {n}" for n in range(100_000)])
        writer.add_token_scores([0.0] * 100_000)
        writer.add_name("after")

    header = gguf.read(write(tmp_path / "a.gguf", fill))
    assert header.values["general.name"] == "after"
    assert not any("tokens" in key for key in header.values)


@pytest.mark.parametrize("version", [2, 3])
def test_known_versions(version: int) -> None:
    assert parsed(raw(("a", 4, struct.pack("<I", 7)), version=version)).values == {"a": 7}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"GGUF", "ends inside its header"),
        (b"this is not a model, of any kind", "does not start with GGUF"),
        (raw(version=1) + bytes(8), "version 1"),
        (raw(version=0x03000000), "big-endian"),
        (raw(("a", 13, b"")), "value type 13"),
        (raw(("a", 9, array(9, 1, array(4, 1, bytes(4))))), "array of value type 9"),
        (raw(("a", 9, array(99, 0))), "array of value type 99"),
        (raw(("a", 9, array(8, 3, text("x")))), "ends inside its header"),
        (raw(("general.alignment", 4, bytes(4))), "alignment is 0"),
        (raw(tensors=text("w") + struct.pack("<I", 5), count=1), "5 dimensions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",
)
def test_refused_headers_say_why(tmp_path: Path, data: bytes, said: str) -> None:
    assert said in refusal(tmp_path / "a.gguf", data)


HUGE = struct.pack("<Q", 2**60)


@pytest.mark.parametrize(
    "data",
    [
        b"GGUF" + struct.pack("<I", 3) + HUGE + bytes(8),  # tensors
        b"GGUF" + struct.pack("<IQ", 3, 0) + HUGE,  # pairs
        raw(("a", 8, HUGE)),  # a text
        raw(("a", 9, array(0, 2**60))),  # numbers
        raw(("a", 9, array(8, 2**60))),  # texts
        raw(("a", 9, array(8, 40, HUGE * 40))),  # lengths inside an array
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + HUGE,  # a key
        raw(tensors=HUGE + bytes(40), count=1),  # a tensor's name
        raw(tensors=text("w") + struct.pack("<I", 4) + HUGE * 4 + bytes(12), count=1),
        raw(tensors=text("w") + struct.pack("<IQI", 1, 1, 0) + HUGE, count=1),  # an offset
    ],
)
def test_claims_of_2_to_the_60_cost_nothing(tmp_path: Path, data: bytes) -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        message = refusal(tmp_path / "a.gguf", data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert re.search("claims|cut short|ends inside|too many elements|leave gaps", message)


NUMBERS = ("general.alignment", "split.count", "llama.context_length", "llama.pooling_type")
NOT_NUMBERS = {
    "text": (8, text("many")),
    "nan": (6, struct.pack("<f", float("nan"))),
    "infinity": (12, struct.pack("<d", float("inf"))),
}


@pytest.mark.parametrize("kind", NOT_NUMBERS)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_value_of_the_wrong_type_is_an_error_or_nothing(
    tmp_path: Path, key: str, kind: str
) -> None:
    """Hostile values where a number is expected never end in a traceback."""
    path = tmp_path / "a.gguf"
    head = raw(("general.architecture", 8, text("llama")), (key, *NOT_NUMBERS[kind]))
    path.write_bytes(head + bytes(64))
    try:
        header = gguf.read(path)
        shown = (header.shards, header.context_length, header.pooling, header.quant)
    except PipelineError as error:
        assert str(path) in str(error)
    else:
        assert shown == (1, 0, "none", "")


def test_cut_at_every_byte(full: Path, tmp_path: Path) -> None:
    data, path = full.read_bytes(), tmp_path / "cut.gguf"
    header = gguf.read(full)
    table = data.index(b"output.weight") + len("output.weight") + 4 + 8 + 4 + 8  # its last entry
    for length in range(header.size):
        said = "is empty" if not length else "ends inside its header"
        assert (said if length < table else "is cut short") in refusal(path, data[:length])


def test_flipped_bytes_are_only_ever_an_error(full: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed}")
    chance = random.Random(seed)
    whole, path = full.read_bytes(), tmp_path / "flipped.gguf"
    refused = 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(len(data))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
        path.write_bytes(data)
        try:
            header = gguf.read(path)
            assert header.size <= len(data)
        except PipelineError:
            refused += 1
    assert 100 < refused < 2000, refused


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(PipelineError, match="cannot be read"):
            gguf.read(path)


def test_a_header_is_remembered_while_the_stamp_stays(full: Path, tmp_path: Path) -> None:
    book = tmp_path / "run" / "gguf.json"
    first = gguf.read_cached(full, book.parent)
    assert (first.values["general.name"], first.has_chat_template) == ("Tiny", True)
    assert TEMPLATE not in book.read_text("utf-8")
    stat = full.stat()
    full.write_bytes(bytes(stat.st_size))  # same size, same time: the notes answer
    os.utime(full, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert gguf.read_cached(full, book.parent) == first
    os.utime(full, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(PipelineError, match="begins with zeros"):
        gguf.read_cached(full, book.parent)


def test_a_note_of_an_earlier_version_is_not_used(full: Path, tmp_path: Path) -> None:
    book = tmp_path / "gguf.json"
    header = gguf.read_cached(full, book.parent)
    note = to_builtins(header)
    del note["scores"]
    stat_cache.remember(book, full, note | {"values": {}}, stat_cache.stamp(full))
    assert gguf.read_cached(full, book.parent) == header


def test_unreadable_notes_are_no_harm(full: Path, tmp_path: Path) -> None:
    book = tmp_path / "gguf.json"
    for garbage in ("", "{", "[]", "\0"):
        book.write_text(garbage)
        assert gguf.read_cached(full, book.parent).values["general.name"] == "Tiny"


def parts(folder: Path, numbers: list[int], count: int, end: str = "gguf") -> list[Path]:
    paths = [folder / f"m.Q4-{n:05d}-of-{count:05d}.{end}" for n in numbers]
    for path in paths:
        path.touch()
    return paths


def test_shards_in_order(tmp_path: Path) -> None:
    paths = parts(tmp_path, [1, 2, 3], 3)
    assert gguf.shards(paths[0]) == paths
    assert gguf.shards(tmp_path / "whole.gguf") == [tmp_path / "whole.gguf"]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    first, *_ = parts(tmp_path, [1, 3], 4)
    with pytest.raises(PipelineError) as caught:
        gguf.shards(first)
    assert "2 of its 4 parts are missing" in str(caught.value)
    assert "m.Q4-00002-of-00004.gguf, m.Q4-00004-of-00004.gguf" in str(caught.value)


def test_another_shard_than_the_first_names_the_first(tmp_path: Path) -> None:
    paths = parts(tmp_path, [1, 2], 2)
    with pytest.raises(UsageError, match="part 2 of 2") as caught:
        gguf.shards(paths[1])
    assert str(paths[0]) in caught.value.hint


def test_a_split_of_no_parts_is_no_crash(tmp_path: Path) -> None:
    (path,) = parts(tmp_path, [1], 0)
    try:
        assert gguf.shards(path) == [path]
    except PipelineError as error:
        assert path.name in str(error)


def test_shards_with_a_suffix_in_capitals(tmp_path: Path) -> None:
    paths = parts(tmp_path, [1, 2], 2, "GGUF")
    assert gguf.shards(paths[0]) == paths


def test_a_claim_of_many_shards_is_told_in_a_few_words(tmp_path: Path) -> None:
    (first,) = parts(tmp_path, [1], 99999)
    with pytest.raises(PipelineError, match="99998 of its 99999") as caught:
        gguf.shards(first)
    assert len(str(caught.value)) < 2000


def test_short_arrays_of_numbers_are_kept_and_the_tokenizers_are_not() -> None:
    heads = ("llama.attention.head_count_kv", 9, array(4, 3, struct.pack("<III", 8, 0, 4)))
    header = parsed(
        raw(
            heads,
            ("long", 9, array(0, gguf_format.MAX_ARRAY + 1, bytes(gguf_format.MAX_ARRAY + 1))),
            ("words", 9, array(8, 1, text("a"))),
            ("tokenizer.ggml.tokens", 9, array(8, 2, text("a") + text("b"))),
            ("tokenizer.ggml.scores", 9, array(6, 2, struct.pack("<ff", 0, 0))),
        )
    )
    assert header.values == {"llama.attention.head_count_kv": [8, 0, 4]}
    assert header.vocabulary == 2


def test_many_short_arrays_are_kept_only_up_to_a_sum() -> None:
    pairs = [(f"a{n}", 9, array(0, 1024, bytes(1024))) for n in range(100)]
    assert len(parsed(raw(*pairs)).values) == gguf_format.MAX_KEPT // 1024


@pytest.mark.skipif(sys.platform == "win32", reason="a file with a hole")
def test_of_a_40_gb_model_only_the_header_is_read(tmp_path: Path) -> None:
    rows, layers = 1 << 16, 80
    words = array(8, 200_000, text("a word") * 200_000)
    table = b"".join(
        text(f"blk.{n}.ffn_up.weight") + struct.pack("<IQQIQ", 2, rows, 4096, 1, n * rows * 8192)
        for n in range(layers)
    )
    vocabulary = ("tokenizer.ggml.tokens", 9, words)
    head = raw(vocabulary, tensors=table, count=layers)
    path = tmp_path / "large model.gguf"
    path.write_bytes(head)
    os.truncate(path, gguf_format.padded(len(head)) + layers * rows * 8192)
    file = contents.local(path, "large")
    assert file.size > 40 * 10**9
    sizes: list[int] = []

    def read(start: int, stop: int) -> bytes:
        sizes.append(stop - start)
        return file.read(start, stop)

    header = gguf.parse(replace(file, read=read))
    assert (header.tensors, header.vocabulary, header.size) == (layers, 200_000, file.size)
    assert sum(sizes) < len(head) + 2 * gguf_format.WINDOW
    os.truncate(path, file.size - 1)
    with pytest.raises(PipelineError, match="is cut short"):
        gguf.read(path)


def test_what_is_skipped_is_not_read(tmp_path: Path) -> None:
    """A long text, and numbers that nobody needs: the reader jumps over them."""
    long = ("tokenizer.huggingface.json", 8, text("{" * 50_000_000))
    scores = ("tokenizer.ggml.scores", 9, array(6, 10_000_000, bytes(40_000_000)))
    data = raw(long, scores, ("general.name", 8, text("after")))
    sizes: list[int] = []

    def read(start: int, stop: int) -> bytes:
        sizes.append(stop - start)
        return data[start:stop]

    header = gguf.parse(Readable(name="a", size=len(data), read=read))
    assert header.values == {"general.name": "after"}
    assert sum(sizes) <= 3 * gguf_format.WINDOW


def test_tokens_are_read_where_the_header_says(full: Path, tmp_path: Path) -> None:
    words = [f"word {n} ü" for n in range(70_000)]  # more than one window of them
    path = write(tmp_path / "a.gguf", lambda writer: writer.add_token_list(words))
    texts = [text.decode() for text in gguf.tokens(path, gguf.read(path))]
    assert texts == words


def test_a_text_ends_where_llama_cpp_ends_it(tmp_path: Path) -> None:
    """At a zero: what stands behind it must not hide what stands before it."""
    pair = ("tokenizer.chat_template", 8, text("{{ endless }}\0{% nonsense"))
    assert parsed(raw(pair)).values == {"tokenizer.chat_template": "{{ endless }}"}


def test_messages_hold_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    name = text("\x1b]0;title\x07\x1b[2Jw\u202e")
    data = raw(tensors=name + struct.pack("<I", 5), count=1)
    message = refusal(tmp_path / "a.gguf", data)
    assert "its tensor ]0;title[2Jw has 5 dimensions" in message
