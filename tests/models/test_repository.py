"""What of a repository is meant, over listings as the hub gives them. Nothing is fetched."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.models import checkpoint, repository
from pipeline.models.checkpoint import INDEX
from pipeline.models.choice import NoSuchQuant, Option
from pipeline.models.gguf import Header
from pipeline.models.hub import Listing
from pipeline.models.reference import FileFilter
from pipeline.models.repository import require_safe
from pipeline.models.resolve import ModelFile, Resolved
from pipeline.models.safetensors import Head

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GGUF = ("M-Q4_K_M.gguf", "M-Q8_0.gguf")
TENSORS = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
WIDTHS = {"mmproj": {"general.architecture": "clip", "clip.vision.projection_dim": 64}}
WIDTHS["model"] = {"general.architecture": "llama", "llama.embedding_length": 64}


def file(name: str, size: int = 1_000) -> ModelFile:
    """A file as the hub lists it: large ones with a sha256, small ones with git's own hash."""
    large = name.lower().endswith((".gguf", ".safetensors", ".bin", ".pth", ".model"))
    return ModelFile(name, size, "a" * 64 if large else "", "b" * 40)


def listing(*names: str, files: Sequence[ModelFile] = (), **more: Any) -> Listing:
    files_by_name = {entry.name: entry for entry in (*(file(name) for name in names), *files)}
    return Listing(repo="org/Model-GGUF", commit=COMMIT, files=files_by_name, **more)


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"t{n}": name for n, name in enumerate(names)}}).encode()


CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'


def resolve(
    repo: Listing,
    indexed: bytes = b"",
    *,
    fits: bool = True,
    config: bytes = CONFIG,
    **filters: str,
) -> Resolved:
    """What is meant; the index, `indexed`, and the configuration are all that may be read."""

    def read(entry: ModelFile) -> bytes:
        if entry.name == "config.json":
            return config
        assert entry.name == INDEX
        return indexed

    def read_header(files: Sequence[ModelFile]) -> Header:
        values = WIDTHS["mmproj" if "mmproj" in files[0].name else "model"]
        return Header(tensors=1, size=1, data=0, values=values)

    def read_head(entry: ModelFile) -> Head:
        assert entry.name in repo.files
        dtypes = Counter({"F16": 7, "F32": 1})
        return Head(length=8, shapes={"model.norm.weight": [4]}, dtypes=dtypes, elements=4)

    def fitting(option: Option) -> bool:
        return fits

    return repository.resolve(
        repo,
        FileFilter(**filters),
        "hf:org/Model-GGUF",
        Home(Path("home")),
        fits=fitting,
        read=read,
        read_header=read_header,
        read_head=read_head,
    )


def names(resolved: Resolved) -> list[str]:
    return [entry.name for entry in resolved.files]


def refused(
    *args: Any, kind: type[PipelineError] = PipelineError, indexed: bytes = b"", **filters: str
) -> str:
    repo = args[0] if args and isinstance(args[0], Listing) else listing(*args)
    with pytest.raises(PipelineError) as caught:
        resolve(repo, indexed, **filters)
    assert type(caught.value) is kind
    assert caught.value.message.startswith(("org/Model-GGUF:", "hf:org/Model-GGUF:"))
    return str(caught.value)


def test_a_gguf_with_its_place_and_its_reason() -> None:
    resolved = resolve(listing(*GGUF, *TENSORS), quant="Q8_0")
    assert names(resolved) == ["M-Q8_0.gguf"]
    assert (resolved.kind, resolved.precision, resolved.mmproj) == ("gguf", "Q8_0", "")
    assert (resolved.name, resolved.local) == ("Model", False)
    assert resolved.slug == "org__Model-GGUF__0123456789ab"
    assert resolved.folder == Path("home") / "models" / "gguf" / resolved.slug
    assert resolved.source == {"type": "hf", "ref": "org/Model-GGUF", "revision": COMMIT}
    assert resolved.why == "Q8_0: Q8_0 was asked for"


def test_all_parts_and_the_projector() -> None:
    parts = [f"Q8_0/M-Q8_0-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    resolved = resolve(
        listing("mmproj-F16.gguf", "imatrix.gguf", *reversed(parts), GGUF[0]), quant="Q8_0"
    )
    assert names(resolved) == [*parts, "mmproj-F16.gguf"]
    assert resolved.mmproj == "mmproj-F16.gguf"
    assert resolved.precision == "Q8_0"
    assert "projector mmproj-F16.gguf" in resolved.why
    without = resolve(listing("mmproj-F16.gguf", *parts), mmproj="none")
    assert names(without) == parts
    assert not without.mmproj


def test_the_name_explains_where_it_tells_no_quant() -> None:
    resolved = resolve(listing("M.gguf"))
    assert (resolved.precision, resolved.why) == ("", "M.gguf: it is the only one")


@pytest.mark.parametrize(
    ("filters", "kind"),
    [
        *(({}, "gguf"), ({"quant": "AUTO"}, "gguf"), ({"quant": "Q8_0"}, "gguf")),
        *(({"filename": "M-Q8_0.gguf"}, "gguf"), ({"pattern": "*Q8*"}, "gguf")),
        *(({"quant": "Q6_K"}, "safetensors"), ({"quant": "F16"}, "safetensors")),
        *(({"quant": "Q5_K"}, "safetensors"), ({"quant": "Q4_K"}, "gguf")),
        *(({"quant": "4.8BPW"}, "safetensors"), ({"quant": "FIT"}, "safetensors")),
    ],
)
def test_both_kinds_gguf_where_the_quant_is_there(filters: dict[str, str], kind: str) -> None:
    resolved = resolve(listing(*GGUF, *TENSORS), **filters)
    assert resolved.kind == kind
    assert ("converted" in resolved.why) is (kind == "safetensors")
    assert all(name.endswith(".gguf") is (kind == "gguf") for name in names(resolved))


def test_a_quant_that_nothing_makes_is_not_converted_to() -> None:
    """Only its uploader has UD-Q4_K_XL; llama-quantize knows no such type."""
    for quant in ("UD-Q4_K_XL", "Q6_K_L", "Q4"):
        error = refused(*GGUF, *TENSORS, kind=NoSuchQuant, quant=quant)
        assert f"no GGUF with the quant {quant}" in error
        assert all(name in error for name in GGUF)


def test_no_mix_is_made_of_files_that_are_quantized() -> None:
    for quant in ("4.8BPW", "3GIB", "FIT"):
        error = refused(*GGUF, kind=NoSuchQuant, quant=quant)
        assert f"no GGUF with the quant {quant}" in error
        assert all(name in error for name in GGUF)
    # One that is named is not taken for a mix, though its name tells no quant.
    refused("model.gguf", kind=NoSuchQuant, quant="4.8BPW", filename="model.gguf")


def test_a_name_that_is_not_there_is_not_converted_either() -> None:
    error = refused(*GGUF, *TENSORS, kind=UsageError, filename="M-Q6_K.gguf")
    assert "no GGUF matches filename=M-Q6_K.gguf" in error


@pytest.mark.parametrize("beside", ["imatrix.gguf", "mmproj-F16.gguf", "ggml-vocab-x.gguf"])
def test_what_is_no_model_does_not_hide_the_safetensors(beside: str) -> None:
    resolved = resolve(listing(beside, *TENSORS))
    assert resolved.kind == "safetensors"
    assert beside not in names(resolved)


def test_safetensors_with_what_the_converter_reads() -> None:
    others = (
        *("README.md", "modeling_x.py", "pytorch_model.bin", "model.onnx", ".gitattributes"),
        *("flax_model.msgpack", "tf_model.h5", "original/consolidated.00.pth", "onnx/model.onnx"),
        *("vae/model.safetensors", "tokenizer.pickle", ".hidden.json", ".cache/x.json"),
        *("train.jsonl", "data/tokenizer.jsonl"),
    )
    wanted = (
        *("config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json"),
        *("model.safetensors", "chat_template.jinja", "qwen.tiktoken", "1_Pooling/config.json"),
        *("sentencepiece.bpe.model", "spiece.model", "tokenizer.jsonl"),
    )
    resolved = resolve(listing(*others, *wanted, parameters={"F32": 10, "BF16": 5}))
    assert names(resolved) == sorted(wanted)
    assert (resolved.kind, resolved.precision, resolved.why) == ("safetensors", "F32", "")
    assert resolved.folder == Path("home") / "models" / "source" / resolved.slug


def test_a_folder_that_begins_with_a_dot_refuses_nothing() -> None:
    resolved = resolve(
        listing(*TENSORS, ".ipynb_checkpoints/x.json", "a/.b/c.json", ".eval/config.json")
    )
    assert names(resolved) == sorted(TENSORS)


def test_what_lies_in_folders_is_left_out_but_for_their_configuration() -> None:
    """As of a local folder, whose files are found with glob."""
    others = ("onnx/tokenizer.json", "checkpoint-500/trainer_state.json", "data/train.txt")
    assert names(resolve(listing(*TENSORS, *others))) == sorted(TENSORS)


@pytest.mark.parametrize(
    ("parameters", "precision"),
    [
        *(({"BF16": 8, "F32": 1}, "BF16"), ({"F16": 8}, "F16"), ({"F8_E4M3": 8}, "BF16")),
        *(({"I32": 8, "F16": 1}, "BF16"), ({}, "F16")),
    ],
)
def test_the_precision_of_most(parameters: dict[str, int], precision: str) -> None:
    """Where the hub has not counted, the first file's own header tells it."""
    assert resolve(listing(*TENSORS, parameters=parameters)).precision == precision


@pytest.mark.parametrize(
    ("there", "weights"),
    [
        (("model.safetensors",), ("model.safetensors",)),
        (("model.safetensors", "model.fp16.safetensors"), ("model.safetensors",)),
        (("model.safetensors", "consolidated.safetensors"), ("model.safetensors",)),
        (("model.safetensors", "adapter_model.safetensors"), ("model.safetensors",)),
        (
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ),
        (
            ("model-00001-of-00001.safetensors", "consolidated.00.safetensors"),
            ("model-00001-of-00001.safetensors",),
        ),
        (("model.fp16.safetensors",), ("model.fp16.safetensors",)),
        (("model.fp16.safetensors", "unet/model.safetensors"), ("model.fp16.safetensors",)),
    ],
)
def test_the_weights_once(there: tuple[str, ...], weights: tuple[str, ...]) -> None:
    resolved = resolve(listing("config.json", *there))
    assert tuple(n for n in names(resolved) if n.endswith(".safetensors")) == weights


def test_one_of_two_variants() -> None:
    there = ("model.fp16.safetensors", "model.fp32.safetensors")
    assert "which of them belong together" in refused("config.json", *there)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "weights.safetensors"])
def test_weights_that_the_converter_would_not_see(name: str) -> None:
    assert "llama.cpp's converter reads model*.safetensors" in refused("config.json", name)


def test_parts_that_are_missing_without_an_index() -> None:
    refused("config.json", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")


def test_the_index_decides() -> None:
    parts = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    others = ("consolidated.safetensors", "model.safetensors", "model-00001-of-00003.safetensors")
    resolved = resolve(listing("config.json", INDEX, *parts, *others), index(*parts, parts[0]))
    assert names(resolved) == sorted(["config.json", INDEX, *parts])


def test_an_index_that_names_what_is_not_there() -> None:
    parts = [f"model-{n:05d}-of-00009.safetensors" for n in range(1, 10)]
    error = refused(listing("config.json", INDEX, *parts[:4]), indexed=index(*parts))
    assert f"5 of the 9 files that {INDEX} names are missing" in error
    assert all(name in error for name in parts[4:7])
    assert parts[0] not in error


@pytest.mark.parametrize(
    "indexed",
    [
        *(b"", b"{", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b"\xff"),
        *(b'{"weight_map": {"t": 5}}', b'{"weight_map": {"t": []}}', b"[" * 100_000),
        *(index("../model.safetensors"), index("/model.safetensors"), index("a/model.safetensors")),
        *(index("model.bin"), index("C:model.safetensors"), index("config.json")),
    ],
    ids=range(16),
)
def test_an_index_that_is_none(indexed: bytes) -> None:
    assert INDEX in refused("config.json", INDEX, "model.safetensors", indexed=indexed)


def test_an_index_too_large_to_be_read() -> None:
    large = file(INDEX, checkpoint.MAX_DOCUMENT + 1)
    assert "too large" in refused(listing("model.safetensors", files=[large]))
    limit = file(INDEX, checkpoint.MAX_DOCUMENT)
    there = listing("config.json", "model.safetensors", files=[limit])
    resolved = resolve(there, index("model.safetensors"))
    assert names(resolved) == ["config.json", "model.safetensors", INDEX]


def test_weights_without_a_configuration() -> None:
    assert "no config.json" in refused("model.safetensors")


@pytest.mark.parametrize(
    "there",
    [
        ("adapter_config.json", "adapter_model.safetensors"),
        ("adapter_model.safetensors", "adapters.safetensors", "README.md"),
    ],
)
def test_an_adapter_is_no_model(there: tuple[str, ...]) -> None:
    error = refused(*there)
    assert "adapter (LoRA)" in error
    assert "this as lora=" in error


@pytest.mark.parametrize(
    "there",
    [
        ("pytorch_model.bin", "config.json"),
        ("original/consolidated.00.pth", "config.json", "README.md"),
        ("model.ckpt", ".model.safetensors.json"),
        ("weights.PT",),
    ],
)
def test_only_pickled_weights(there: tuple[str, ...]) -> None:
    error = refused(*there)
    assert "only pickled weights" in error
    assert f"({there[0]})" in error
    assert "run code" in error
    assert "hint: " in error


@pytest.mark.parametrize(
    "there", [(), (".gitattributes",), ("README.md", "LICENSE.txt", ".gitignore")]
)
def test_an_empty_repository(there: tuple[str, ...]) -> None:
    error = refused(*there)
    assert f"is empty at {COMMIT[:12]}" in error
    assert "revision=" in error


def test_projectors_alone() -> None:
    error = refused("mmproj-F16.gguf", "mmproj-BF16.gguf", "config.json", "README.md")
    assert "only projectors (mmproj)" in error


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (("model_index.json", "unet/model.safetensors"), "diffusion model"),
        (("model_index.json", "config.json", "model.safetensors"), "diffusion model"),
        (("M-Q8_0.gguf.part1of2", "M-Q8_0.gguf.part2of2"), "cat MODEL.gguf.part*"),
        (("M-Q8_0.gguf-split-a", "M-Q8_0.gguf-split-b"), "cat MODEL.gguf.part*"),
        (("onnx/model.onnx", "config.json"), "ONNX"),
        (("llama-2-7b.ggmlv3.q4_0.bin", "config.json"), "old GGML"),
        (("config.json", "model-00001-of-00002.safetensors"), "some are missing"),
        (("adapter_config.json", "adapter_model.bin"), "adapter (LoRA)"),
        (("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"), "only pickled weights"),
        (("openvino_model.bin", "openvino_model.xml"), "OpenVINO"),
    ],
)
def test_what_is_there_instead_is_named(there: tuple[str, ...], says: str) -> None:
    assert says in refused(*there)


def test_quantized_weights_are_refused_by_the_configuration() -> None:
    config = b'{"architectures": ["LlamaForCausalLM"], "quantization_config": '
    config += b'{"quant_method": "awq", "bits": 4}}'
    with pytest.raises(PipelineError, match=r"org/Model-GGUF: .* with AWQ \(4 bits\)"):
        resolve(listing("config.json", "model.safetensors"), config=config)


@pytest.mark.parametrize("name", ["output.safetensors", "model-4bit.pt"])
def test_quantized_weights_of_another_name(name: str) -> None:
    config = b'{"quantization_config": {"quant_method": "exl2", "bits": 4.0}}'
    with pytest.raises(PipelineError, match=r"with EXL2"):
        resolve(listing("config.json", name), config=config)


def test_nothing_that_can_be_used() -> None:
    error = refused(listing("config.json", files=[file("model.xyz", 5_000_000_000)]))
    assert "neither GGUF nor safetensors" in error
    assert "model.xyz (5.0 GB)" in error


@pytest.mark.parametrize("filters", [{"filename": "M.gguf"}, {"pattern": "*.safetensors"}])
def test_a_name_where_there_is_no_gguf(filters: dict[str, str]) -> None:
    assert "the repository has none" in refused(*TENSORS, kind=UsageError, **filters)


def test_a_projector_where_there_is_no_gguf() -> None:
    refused(*TENSORS, kind=UsageError, mmproj="mmproj-F16.gguf")


@pytest.mark.parametrize(
    ("sha256", "blob", "fine"),
    [
        *(("a" * 64, "", True), ("", "b" * 40, True), ("a" * 64, "b" * 40, True)),
        *(("", "", False), ("a" * 63, "", False), ("A" * 64, "", False), ("", "b" * 39, False)),
        *(("a" * 64 + "\n", "", False), ("a" * 40, "b" * 40, False), ("", "z" * 40, False)),
    ],
)
def test_a_file_without_a_hash_that_could_be_checked(sha256: str, blob: str, fine: bool) -> None:
    resolved = listing(files=[ModelFile("M.gguf", 1, sha256, blob)])
    if fine:
        assert resolve(resolved).files == (resolved.files["M.gguf"],)
    else:
        assert "M.gguf" in refused(resolved)


def test_what_is_not_taken_needs_no_hash() -> None:
    resolved = listing(
        "M-Q8_0.gguf", files=[ModelFile("M-Q4_K_M.gguf", 1, ""), ModelFile("../x", 1, "")]
    )
    assert names(resolve(resolved, quant="Q8_0")) == ["M-Q8_0.gguf"]


@pytest.mark.parametrize(
    "commit",
    ["../../../../x", "..", "/etc", "a/b", "C:x"],
    ids=["up", "dots", "root", "sub", "drive"],
)
def test_a_commit_makes_no_path(commit: str) -> None:
    resolved = Listing(repo="org/m", commit=commit, files={"M.gguf": file("M.gguf")})
    folder = resolve(resolved).folder
    assert folder.parent == Path("home") / "models" / "gguf"
    assert ".." not in folder.parts


HOSTILE = (
    *("../x.gguf", "a/../x.gguf", "..", ".", "a/./x.gguf", "./x.gguf", "/x.gguf", "//x.gguf"),
    *("a//x.gguf", "a/", "C:x.gguf", "C:/x.gguf", "c:\\x.gguf", "\\\\host\\x.gguf", "a\\x.gguf"),
    *("x.gguf.", "x.gguf ", "a./x.gguf", "a /x.gguf", " x.gguf", "a/ x.gguf", "..\\x.gguf"),
    *("x.gguf:stream", "x\0.gguf", "x\n.gguf", "x\x1b[2J.gguf", "x\x7f.gguf", "x\u202egguf.exe"),
    *("x\ud800.gguf", "a*.gguf", "a?.gguf", 'a".gguf', "<a>.gguf", "a|b.gguf", ""),
    *("con", "CON.gguf", "nul.gguf", "a/Aux/x.gguf", "prn.x.gguf", "com1.gguf", "LPT9.gguf"),
    *("COM¹.gguf", "com0", "lpt³.gguf", ".x.gguf", "a/.x.gguf", ".git/config", "…/" + "x" * 201),
    *("é" * 101, "x" * 201 + ".gguf"),
)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_name_that_is_not_safe_to_write(name: str) -> None:
    with pytest.raises(PipelineError, match="not safe to write") as caught:
        require_safe(["fine.gguf", name], "org/model")
    assert repr(name) in caught.value.message, "shown without what it would do to a terminal"
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    "name",
    [
        *("x.gguf", "a/b/c.gguf", "Modell é.gguf", "模型-Q4_K_M.gguf", "con1.gguf", "console.gguf"),
        *("a..b.gguf", "a...gguf", "com.gguf", "com10.gguf", "nulls.json", "x" * 200, "é" * 100),
        *("M (1).gguf", "M+x=1,2.gguf", "M@Q4#1.gguf", "null", "auxiliary/config.json", "$HOME"),
    ],
)
def test_a_name_that_is_safe(name: str) -> None:
    require_safe([name, "other.gguf"], "org/model")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("M.gguf", "m.gguf"), ("A/x.gguf", "a/x.gguf"), ("x.GGUF", "x.gguf")),
        ("é.gguf", unicodedata.normalize("NFD", "é.gguf")),
        ("É.gguf", unicodedata.normalize("NFD", "é.gguf")),
        *(("straße.gguf", "STRASSE.gguf"), ("Å.gguf", "\u212b.gguf"), ("Σ", "ς")),
        *(("ǰ.gguf", "J̌.gguf"), ("M.gguf", "M.gguf")),
    ],
)
def test_two_names_of_one_file_on_some_disks(one: str, other: str) -> None:
    for pair in ((one, other), (other, one)):
        with pytest.raises(PipelineError, match="the same file on some disks") as caught:
            require_safe(["z.gguf", *pair], "org/model")
        assert repr(one) in caught.value.message
        assert repr(other) in caught.value.message


def test_names_that_are_alike_but_two() -> None:
    require_safe(["M.gguf", "a/M.gguf", "b/M.gguf", "M-1.gguf", "ı.gguf", "i.gguf"], "org/model")


@pytest.mark.parametrize("name", ["../M", "a/../M", "/M", "C:/M", "M\n", "a /M", "con", "..x"])
def test_a_hostile_name_that_is_chosen_is_refused(name: str) -> None:
    assert "not safe to write" in refused(f"{name}.gguf")
    chosen = resolve(listing(f"{name}.json", *TENSORS)) if "/" in name else None
    if chosen:  # what lies in folders is left out, wherever they may be
        assert names(chosen) == sorted(TENSORS)
    else:
        assert "not safe to write" in refused(f"{name}.json", *TENSORS)


@pytest.mark.parametrize(
    "name", ["../mmproj.gguf", "/mmproj.gguf", "C:mmproj.gguf", "mmproj\n.gguf"]
)
def test_a_hostile_name_of_a_projector_is_refused(name: str) -> None:
    assert "not safe to write" in refused(GGUF[0], name)
    assert names(resolve(listing(GGUF[0], name), mmproj="none")) == [GGUF[0]]


def test_hostile_parts_of_one_model_are_refused() -> None:
    assert "not safe to write" in refused("x /M-00001-of-00002.gguf", "x /M-00002-of-00002.gguf")
    assert "the same file on some disks" in refused(*TENSORS, "Config.json")


def test_a_configuration_that_its_weights_cannot_hold_is_refused_at_once() -> None:
    config = json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 16_001})
    with pytest.raises(PipelineError, match="vocab_size is 16001, and the weights have"):
        resolve(listing(*TENSORS), config=config.encode())
    resolve(listing(*TENSORS), config=config.replace("16001", "16000").encode())
