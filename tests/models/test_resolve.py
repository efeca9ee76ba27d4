"""Folders and GGUFs of the user's own: what is in them, and every way in which they are refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.models import repository, resolve, staging
from pipeline.models.checkpoint import INDEX
from pipeline.models.reference import parse
from pipeline.models.resolve import ModelFile
from pipeline.models.safetensors import own_precision

KNOWN = frozenset({"LlamaForCausalLM", "BertModel", "Qwen3ForCausalLM"})


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder as the hub lays it out: two weight files and their index."""
    from safetensors.numpy import save_file

    folder = tmp_path / "My Model"
    (folder / "1_Pooling").mkdir(parents=True)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file({"a": np.zeros((4, 4), np.float16)}, folder / names[0])
    save_file({"b": np.zeros(2, np.float32)}, folder / names[1])
    write(folder / INDEX, {"weight_map": {"a": names[0], "b": names[1]}})
    write(folder / "config.json", {"architectures": ["LlamaForCausalLM"]})
    write(folder / "1_Pooling" / "config.json", {})
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of the model ran')")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    return folder


def write(path: Path, value: Any) -> None:
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def weights(folder: Path) -> list[str]:
    """The names of a folder's weight files."""
    inputs, _ = resolve.check_folder(folder, KNOWN)
    return [file.name for file in inputs if file.suffix == ".safetensors"]


def refusal(folder: Path, known: frozenset[str] = KNOWN) -> str:
    with pytest.raises(PipelineError) as caught:
        resolve.check_folder(folder, known)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_folder_is_the_files_that_the_converter_reads(model: Path, home: Home) -> None:
    resolved = resolve.folder(model, home, KNOWN)
    assert (resolved.kind, resolved.name, resolved.precision, resolved.local) == (
        *("safetensors", "My-Model", "F16"),
        True,
    )
    names = [file.name for file in resolved.files]
    assert names == [
        *("1_Pooling/config.json", "config.json", "model-00001-of-00002.safetensors"),
        *("model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"),
    ]
    for file in resolved.files:
        data = (model / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert resolved.bytes == sum(file.size for file in resolved.files)


def test_a_tokenizer_in_a_folder_of_its_own(model: Path, home: Home, tmp_path: Path) -> None:
    words = model / "tokenizer"
    words.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "config.json"):
        write(words / name, {})
    with_own = {file.name for file in resolve.folder(model, home, KNOWN).files}
    assert not with_own & {"tokenizer/tokenizer.model", "tokenizer/tokenizer_config.json"}

    (model / "tokenizer.model").unlink()
    names = [file.name for file in resolve.folder(model, home, KNOWN).files]
    assert {"tokenizer/tokenizer.model", "tokenizer/tokenizer_config.json"} <= {*names}
    side = {name for name in names if not name.endswith(".safetensors")}
    assert {*repository.side_files(names)} == side, "of a repository the same"

    staging.stage({name: model / name for name in names}, tmp_path / "in")
    assert (tmp_path / "in" / "tokenizer.model").read_bytes() == b"{}"
    assert (tmp_path / "in" / "tokenizer_config.json").is_file()
    own = (model / "config.json").read_bytes()
    assert (tmp_path / "in" / "config.json").read_bytes() == own


def test_a_folder_without_index_is_all_its_weights(model: Path) -> None:
    (model / INDEX).unlink()
    assert [name[-10:] for name in weights(model)] == ["afetensors"] * 2


def test_weights_that_the_index_leaves_out_are_left_out(model: Path) -> None:
    shutil.copy(model / "model-00001-of-00002.safetensors", model / "consolidated.safetensors")
    assert "consolidated.safetensors" not in weights(model)


def test_files_are_hashed_once_for_each_stamp(model: Path, home: Home) -> None:
    first = resolve.folder(model, home, KNOWN)
    file = model / "tokenizer.model"
    stat = file.stat()
    file.write_bytes(b"PIECES")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert resolve.folder(model, home, KNOWN) == first  # not read again
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = {f.name: f.sha256 for f in resolve.folder(model, home, KNOWN).files}
    assert changed["tokenizer.model"] == hashlib.sha256(b"PIECES").hexdigest()
    assert changed["config.json"] == first.files[1].sha256


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_file_beside_the_weights_that_is_too_large_is_not_read(model: Path, name: str) -> None:
    os.truncate(model / name, 6 * 10**9)  # a hole
    assert f"{model / name}: has 6.0 GB, which is too large" in refusal(model)


def test_a_folder_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    assert "has no config.json" in refusal(model)


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    assert "holds no files" in refusal(tmp_path)


def test_pickled_weights_are_refused_and_named(model: Path) -> None:
    for path in [*model.glob("*.safetensors"), model / INDEX]:
        path.unlink()
    message = refusal(model)
    assert "only pickled weights (pytorch_model.bin)" in message
    assert "run code" in message
    (model / "pytorch_model.bin").unlink()
    assert "neither GGUF nor safetensors" in refusal(model)


def test_missing_weights_are_named(model: Path) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()
    message = refusal(model)
    assert "1 of the 2 files" in message
    assert "model-00002-of-00002.safetensors" in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("consolidated.safetensors", ["its weights are consolidated.safetensors", "model*."]),
        ("pytorch_model.safetensors", ["its weights are pytorch_model.safetensors"]),
        ("weights.00.safetensors", ["its weights are weights.00.safetensors"]),
        ("adapter_model.safetensors", ["adapter (LoRA)", "this as lora="]),
        ("model-00001-of-00002.safetensors", ["some are missing", INDEX]),
        ("sub/model.safetensors", ["only in folders (sub/model.safetensors)"]),
        ("model-q4_k_m.gguf", ["holds GGUF files: model-q4_k_m.gguf", "model-q4_k_m.gguf"]),
        ("model.gguf.part1of2", ["in pieces", "cat "]),
        ("model.onnx", ["ONNX"]),
        ("onnx/model.onnx", ["ONNX"]),
        ("ggml-model-q4_0.bin", ["old GGML"]),
        ("llama.ggmlv3.q4_0.bin", ["old GGML"]),
        ("tf_model.h5", ["Keras"]),
        ("pytorch_model.pth", ["only pickled weights"]),
        ("model.zip", ["archive", "unpack"]),
    ],
)
def test_other_weights_are_named_for_what_they_are(
    tmp_path: Path, name: str, says: list[str]
) -> None:
    folder = tmp_path / "m"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes((2).to_bytes(8, "little") + b"{}")
    write(folder / "config.json", {"architectures": ["LlamaForCausalLM"]})
    message = refusal(folder)
    for words in says:
        assert words in message


def test_quantized_weights_of_another_name(model: Path) -> None:
    for path in [*model.glob("*.safetensors"), model / INDEX]:
        path.unlink()
    (model / "output.safetensors").write_bytes(b"not read")
    config = {"quantization_config": {"quant_method": "exl2", "bits": 4.0}}
    write(model / "config.json", config)
    assert "quantized with EXL2 (4.0 bits)" in refusal(model)


def test_a_diffusion_model_is_none_even_with_weights(model: Path) -> None:
    write(model / "model_index.json", {"_class_name": "FluxPipeline"})
    assert "diffusion model" in refusal(model)


def test_copies_in_another_layout_are_left_out(model: Path) -> None:
    (model / "consolidated.safetensors").write_bytes(b"not read")
    (model / "adapter_model.safetensors").write_bytes(b"not read")
    assert len(weights(model)) == 2


def test_an_index_that_names_fewer_tensors_than_there_are(model: Path) -> None:
    write(model / INDEX, {"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    assert "names 1 of the 2 parts" in refusal(model)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    write(model / INDEX, {"weight_map": {"a": names[0], "b": names[1], "c": names[1]}})
    assert f"lack 1 of its tensors ({names[1]})" in refusal(model)
    write(model / INDEX, {"weight_map": {"a": names[0], "c": names[1]}})
    assert "lack 1 of its tensors" in refusal(model)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"


@pytest.mark.parametrize(
    "name",
    ["config.json", INDEX, "model-00002-of-00002.safetensors", "tokenizer.model", "vocab.json"],
)
def test_a_pointer_in_place_of_any_file(model: Path, name: str) -> None:
    write(model / name, POINTER)
    message = refusal(model)
    assert f"{name}: is a Git LFS pointer" in message and "git lfs pull" in message


def test_a_download_that_aria2_has_not_finished(model: Path, home: Home, tmp_path: Path) -> None:
    for name in ("model-00002-of-00002.safetensors", "config.json"):
        control = model / f"{name}.aria2"
        control.touch()
        assert f"{name}: aria2 has not finished it" in refusal(model)
        control.unlink()
    path = a_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf.aria2").touch()
    with pytest.raises(PipelineError, match="aria2 has not finished it"):
        resolve.gguf_path(path, home)


def test_weights_without_a_tensor(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", (2).to_bytes(8, "little") + b"{}")
    write(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    assert "hold no tensor" in refusal(tmp_path)


def test_a_repository_of_a_cache_names_its_commit(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--model"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    model.rename(cache / "snapshots" / "abc")
    assert f"model={cache / 'snapshots' / 'abc'}" in refusal(cache)


def test_an_empty_file_is_named_where_none_can_be(model: Path) -> None:
    (model / "merges.txt").touch()
    resolve.check_folder(model, KNOWN)
    (model / "tokenizer.json").touch()
    assert f"{model / 'tokenizer.json'}: is empty" in refusal(model)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_another_encoding_is_read(model: Path, encoding: str) -> None:
    for name in ("config.json", INDEX):
        text = (model / name).read_text("utf-8")
        write(model / name, text.encode(encoding))
    assert len(weights(model)) == 2
    write(model / "config.json", '{"architectures": ["LlamaForCausalLN"]}'.encode(encoding))
    assert "did you mean LlamaForCausalLM?" in refusal(model)


def test_cut_weights_are_refused(model: Path) -> None:
    path = model / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model-00002" in refusal(model)


def test_an_index_cannot_reach_outside_of_its_folder(model: Path) -> None:
    whole = model / "model-00001-of-00002.safetensors"
    outside = model.parent / "outside.safetensors"
    shutil.copy(whole, outside)
    (model / "sub").mkdir()
    for name in ("../outside.safetensors", "sub/../../outside.safetensors", str(outside)):
        write(model / INDEX, {"weight_map": {"a": name}})
        assert "outside.safetensors" in refusal(model)


@pytest.mark.parametrize(
    "index",
    [
        *(b"", b"{", b"\xff", b"[" * 100_000, [], "text", 1, {}, {"weight_map": []}),
        *({"weight_map": None}, {"weight_map": {"a": 5}}, {"weight_map": {"a": None}}),
        *({"weight_map": {"a": []}}, {"weight_map": {"a": 5, "b": "c"}}, {"weight_map": {}}),
    ],
    ids=lambda index: str(index)[:40],
)
def test_hostile_indexes_are_errors_and_no_crash(model: Path, index: Any) -> None:
    (model / "5").write_bytes(b"")  # a number names a file here
    write(model / INDEX, index)
    refusal(model)


def test_an_unknown_architecture_names_the_nearest(model: Path) -> None:
    write(model / "config.json", {"architectures": ["LlamaForCausalLN"]})
    with pytest.raises(UsageError, match="did you mean LlamaForCausalLM"):
        resolve.check_folder(model, KNOWN)
    _, read = resolve.check_folder(model, frozenset())  # not known yet: not refused
    assert read.architecture == "LlamaForCausalLN" and own_precision(read.dtypes) == "F16"


@pytest.mark.parametrize(
    "config",
    [
        *(b"", b"{", b"\xff\xfe", b"[" * 100_000, [], [1], "text", 7, None, {}),
        *({"architectures": None}, {"architectures": []}, {"architectures": [1]}),
        *({"architectures": [[]]}, {"architectures": 5}, {"architectures": {"a": 1}}),
    ],
    ids=lambda config: str(config)[:40],
)
def test_hostile_configs_are_errors_and_no_crash(model: Path, config: Any) -> None:
    write(model / "config.json", config)
    assert "config.json" in refusal(model)


def test_an_architecture_that_is_no_list_is_not_taken_for_its_first_letter(model: Path) -> None:
    write(model / "config.json", {"architectures": "LlamaForCausalLM"})
    try:
        resolve.check_folder(model, KNOWN)
    except PipelineError as error:
        assert "architecture L " not in str(error)


def a_gguf(path: Path, fill: Callable[[Any], None] = lambda writer: None) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_file_type(1)
    fill(writer)
    writer.add_tensor("token_embd.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_is_used_in_place(tmp_path: Path, home: Home) -> None:
    path = a_gguf(tmp_path / "Some model.gguf", lambda writer: writer.add_name("Its name"))
    resolved = resolve.gguf_path(path, home)
    assert (resolved.kind, resolved.name, resolved.precision, resolved.local) == (
        *("gguf", "Some-model", "F16"),
        True,
    )
    assert resolved.folder == tmp_path
    assert resolved.files == (ModelFile("Some model.gguf", path.stat().st_size, ""),)
    assert resolve.gguf_path(a_gguf(tmp_path / "b.gguf"), home).name == "b"


def test_a_split_gguf_is_all_its_parts(tmp_path: Path, home: Home) -> None:
    for n in (1, 2):
        a_gguf(
            tmp_path / f"m-0000{n}-of-00002.gguf",
            lambda writer: writer.add_uint16("split.count", 2),
        )
    first = tmp_path / "m-00001-of-00002.gguf"
    assert [f.name[-21:-5] for f in resolve.gguf_path(first, home).files] == [
        *("m-00001-of-00002", "m-00002-of-00002")
    ]
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(PipelineError, match="one of 2 parts"):
        resolve.gguf_path(tmp_path / "renamed.gguf", home)


def test_a_part_under_the_name_of_another_is_refused(tmp_path: Path, home: Home) -> None:
    def part(writer: Any) -> None:
        writer.add_uint16("split.count", 2)
        writer.add_uint16("split.no", 0)

    for n in (1, 2):
        a_gguf(tmp_path / f"m-0000{n}-of-00002.gguf", part)
    with pytest.raises(PipelineError, match=r"m-00002-of-00002\.gguf: is part 1 by its header"):
        resolve.gguf_path(tmp_path / "m-00001-of-00002.gguf", home)


def test_a_broken_gguf_is_refused(tmp_path: Path, home: Home) -> None:
    path = a_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(PipelineError, match="not a usable GGUF"):
        resolve.gguf_path(path, home)


@pytest.mark.parametrize(
    "text",
    [
        *("org/model", "a b?c*d", 'x<>:"|y', "..", "...", "", "/", "-", " lead", "trail. ", "ü/é"),
        *("tab\tnew\nline", "C:\\x", "\0", "con/nul"),
    ],
)
def test_slugs_are_names_on_every_file_system(text: str, tmp_path: Path) -> None:
    slug = resolve.slug(text)
    assert slug
    assert not set(slug) & set('<>:"/\\|?* \t\n\0')
    assert slug[-1] not in ". "
    assert slug[0] not in "-."
    assert slug.upper() not in ("CON", "NUL", "AUX", "PRN")
    (tmp_path / slug).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [slug]


def test_the_slug_of_a_path_tells_paths_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "a" / "model", tmp_path / "b" / "model"
    one.mkdir(parents=True)
    two.mkdir(parents=True)
    assert resolve.local_slug(one) != resolve.local_slug(two)
    assert resolve.local_slug(one) == resolve.local_slug(tmp_path / "b" / ".." / "a" / "model")


def test_the_slug_of_a_long_name_can_be_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / ("m" * 250)
    folder.mkdir()
    assert len(os.fsencode(resolve.local_slug(folder))) <= 200  # `.state.json.lock` and such follow


@pytest.fixture
def resolved(home: Home) -> resolve.Resolved:
    return replace(
        resolve.demo("demo-embed", home),
        source={"type": "hf", "ref": "org/ü", "revision": "c" * 40},
        files=(ModelFile("a/b.json", 3, "", "blob"), ModelFile("w.safetensors", 9, "sha")),
    )


def test_stored_and_read_back(resolved: resolve.Resolved, home: Home, tmp_path: Path) -> None:
    path = resolve.stored_path(parse("hf:org/model"), [], home)
    resolve.store(path, resolved)
    assert resolve.stored(path) == resolved
    # The home may be moved as a whole.
    shutil.move(home.root, tmp_path / "moved")
    moved = resolve.stored(tmp_path / "moved" / path.relative_to(home.root))
    relative = resolved.folder.relative_to(home.root)
    assert moved == replace(resolved, folder=tmp_path / "moved" / relative)


def test_each_question_has_its_own_answer(home: Home) -> None:
    questions = [
        *(("hf:org/model", ["", ""]), ("hf:org/model@v1", ["", ""]), ("hf:org/other", ["", ""])),
        *(("hf:org/model", ["Q8_0", ""]), ("hf:org/model", ["", "Q8_0"])),
    ]
    paths = {resolve.stored_path(parse(ref), more, home) for ref, more in questions}
    assert len(paths) == len(questions)


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"", b"{", b"\xff", b"null", b"[]", b"3", b"{}", b'{"files": null}'),
        *(b'{"files": [], "folder": 3}', b'{"files": [1], "folder": "a"}'),
        *(b'{"files": [], "folder": "a"}', b'{"files": [{"name": "a"}], "folder": "a"}'),
        b'{"files": [], "folder": "a", "unheard": 1}',
    ],
)
def test_an_unreadable_answer_counts_as_none(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "models" / "resolved" / "a.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(garbage)
    assert resolve.stored(path) is None
    assert resolve.stored(tmp_path / "none.json") is None


def test_recipes_name_files_by_identity(resolved: resolve.Resolved) -> None:
    assert resolved.recipe() == {"a/b.json": "git:blob", "w.safetensors": "sha256:sha"}
    recipe = resolved.fetch_recipe(resolved.files[1])
    assert recipe["file"] == "sha256:sha"
    assert recipe["revision"] == "c" * 40


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["SmolLM2-135M-Instruct.Q4_1.gguf"], "SmolLM2-135M-Instruct"),
        (["Qwen3-8B-GGUF"], "Qwen3-8B"),
        (["Qwen3-8B-UD-Q4_K_XL-00001-of-00002.gguf"], "Qwen3-8B"),
        (["Model.i1-Q4_K_M.gguf"], "Model"),
        (["Model-imatrix-GGUF"], "Model"),
        (["Model-Q4_K_M-v2.gguf"], "Model-v2"),
        (["gpt-oss-20b-mxfp4.gguf"], "gpt-oss-20b"),
        (["gemma 3, 4b (new).gguf"], "gemma-3-4b-new"),
        (["größe.Q8_0.gguf"], "größe"),
        (["all-MiniLM-L6-v2"], "all-MiniLM-L6-v2"),
        (["Q4_K_M.gguf", "Qwen3-8B"], "Qwen3-8B"),
        (["Q4_K_M.gguf", ""], "model"),
    ],
)
def test_a_name_in_the_api_is_short_and_typeable(names: list[str], short: str) -> None:
    assert resolve.short_name(*names) == short


def test_a_folder_in_the_hubs_cache_has_its_repositorys_name(tmp_path: Path) -> None:
    commit = tmp_path / "models--org--Some-Model" / "snapshots" / ("0" * 40)
    assert resolve.folder_name(commit) == "Some-Model"
    assert resolve.folder_name(tmp_path / "snapshots" / "mine") == "mine"


def test_the_demo_is_pinned(home: Home) -> None:
    demo = resolve.demo("demo-embed", home)
    assert "config.json" in demo.recipe()
    assert all(len(file.sha256) == 64 and file.size for file in demo.files)
    assert home.root in demo.folder.parents


def test_a_link_out_of_the_folder_is_refused(model: Path, home: Home, tmp_path: Path) -> None:
    secret = tmp_path / "their home" / "id_rsa"
    secret.parent.mkdir()
    secret.write_text("secret")
    (model / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(PipelineError, match=r"is a link to .*id_rsa, which is not in the model"):
        resolve.folder(model, home, KNOWN)


def test_links_within_a_folder_and_into_a_caches_blobs_are_followed(
    model: Path, home: Home, tmp_path: Path
) -> None:
    repository = tmp_path / "models--org--m"
    snapshot = repository / "snapshots" / ("1" * 40)
    shutil.copytree(model, snapshot)
    (repository / "blobs").mkdir()
    (snapshot / "config.json").rename(repository / "blobs" / "b")
    (snapshot / "config.json").symlink_to(Path("..", "..", "blobs", "b"))
    (snapshot / "chat_template.jinja").symlink_to("config.json")
    names = {file.name for file in resolve.folder(snapshot, home, KNOWN).files}
    assert {"config.json", "chat_template.jinja"} <= names
