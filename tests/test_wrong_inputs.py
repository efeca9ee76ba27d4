"""Wrong input: one clear error, the right exit status, and no work done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import REPOSITORY, Doit, with_programs
from disks import disk

from pipeline.models import safetensors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["modle=x"], ["modle", "did you mean model?"]),
        (["model=demo-embed", "port=eighty"], ["port=eighty", "from 1 to 65535"]),
        (["model=demo-embed", "port=70000"], ["port=70000", "from 1 to 65535"]),
        (["model=demo-embed", "quant=q4_k_x"], ["quant=q4_k_x", "Q4_K_"]),
        (["model=demo-embed", "quant=iq1_s"], ["iq1_s", "importance matrix", "imatrix="]),
        (["model=demo-embed", "gguf_path=x.gguf"], ["model and gguf_path"]),
        (["model=/no/such/path"], ["/no/such/path", "does not exist"]),
        (["model=./here.gguf"], ["here.gguf", "does not exist"]),
        (["model=demo-embed", "backend=coda"], ["backend=coda", "did you mean cuda?"]),
        (["model=demo-embed", "backend=cpu", "device=cuda"], ["device=cuda", "backend=cpu"]),
        (["model=demo-embed", "imatrix=/no/matrix"], ["imatrix=/no/matrix", "is not a file"]),
        (["model=demo-embed", "server.port=1"], ["server.port", "port="]),
        (["model=what"], ["model=what", "org/model"]),
        ([], ["no model given; pass model=… (try model=demo)"]),
        (["modle=x", "port=0"], ["modle", "port=0"]),
    ],
)
@pytest.mark.parametrize("task", ["serve", "plan"])
def test_wrong_usage(bare: Doit, task: str, words: list[str], says: list[str]) -> None:
    wrong = bare(task, *words, status=3)
    for text in says:
        assert text in wrong.err
    assert "Traceback" not in wrong.err
    assert wrong.steps == [] and list(bare.home.iterdir()) == []


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard_missing(folder: Path) -> None:
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / weights["a"])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))


def config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["cannot be read as JSON"]),
        (only_pickled, ["pickled", "pytorch_model.bin"]),
        (shard_missing, ["1 of the 2 files", "model-00002-of-00002.safetensors"]),
        (cut, ["model.safetensors", "its header needs"]),
        (config(architectures=None), ["names no architecture"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["neither GGUF"]),
    ],
)
def test_a_folder_that_is_no_model(
    bare: Doit, own_tiny: Path, damage: Callable[[Path], None], says: list[str]
) -> None:
    damage(own_tiny)
    wrong = bare("serve", f"model={own_tiny}", status=1)
    for text in says:
        assert text in wrong.err
    assert "Traceback" not in wrong.err
    assert wrong.steps == [], "nothing was begun"


@pytest.mark.build
def test_an_unknown_architecture(doit: Doit, own_tiny: Path) -> None:
    config(architectures=["LlamaForCausalLN"])(own_tiny)
    wrong = doit("serve", f"model={own_tiny}", status=3)
    assert "LlamaForCausalLN" in wrong.err and "did you mean LlamaForCausalLM?" in wrong.err
    assert "convert" not in wrong.steps


@pytest.mark.build
@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_a_conversion_that_lacks_weights_is_not_published(
    doit: Doit, own_tiny: Path, converter: Path, quant: str
) -> None:
    """The converter writes what it is given, and ends well."""
    weights = own_tiny / "model.safetensors"
    header = safetensors.read(weights)
    content = weights.read_bytes()
    table = json.loads(content[8 : header.length])
    ordered = sorted(header.shapes, key=lambda name: table[name]["data_offsets"])
    head = json.dumps({name: table[name] for name in ordered[:15]}).encode()
    end = table[ordered[14]]["data_offsets"][1]
    data = content[header.length :][:end]
    weights.write_bytes(len(head).to_bytes(8, "little") + head + data)
    wrong = doit("prepare", f"model={own_tiny}", f"quant={quant}", status=1)
    assert "llama.cpp cannot load what was converted" in wrong.err and "not kept" in wrong.err
    assert list(doit.home.rglob("*.gguf")) == []


@pytest.mark.build
def test_json_with_a_byte_order_mark_is_converted(
    doit: Doit, own_tiny: Path, converter: Path
) -> None:
    for name, encoding in (("config.json", "utf-16"), ("tokenizer_config.json", "utf-8-sig")):
        text = (own_tiny / name).read_text("utf-8")
        (own_tiny / name).write_bytes(text.encode(encoding))
    doit("prepare", f"model={own_tiny}", "quant=q8_0")
    assert len(list(doit.home.rglob("*.gguf"))) == 1


@pytest.mark.build
def test_ggufs_that_are_none(doit: Doit, gguf: Path, tmp_path: Path) -> None:
    whole = gguf.read_bytes()
    for name, data, says in (
        ("text.gguf", b"this is a page, not a model", "does not start with GGUF"),
        ("short.gguf", whole[: len(whole) // 2], "is cut short"),
        ("head.gguf", whole[:1000], "ends inside its header"),
        ("empty.gguf", b"", "is empty"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        wrong = doit("serve", f"model={path}", status=1)
        assert says in wrong.err and str(path) in wrong.err
        assert wrong.steps == []


@pytest.mark.build
def test_verify_of_a_file_from_elsewhere(bare: Doit, gguf: Path, tmp_path: Path) -> None:
    """Nothing here made it, so there is no step to run again."""
    file = tmp_path / "own.gguf"
    file.write_bytes(gguf.read_bytes())
    fine = bare("verify", f"model={file}")
    assert "no receipt says what it should be; its header was checked" in fine.err
    file.write_bytes(gguf.read_bytes()[:-1])
    wrong = bare("verify", f"model={file}", status=1)
    assert "is cut short" in wrong.err and "forget" not in wrong.err
    assert "get the file again from where it came from" in wrong.err


@pytest.mark.build
def test_options_that_llama_server_has_not(doit: Doit, tiny: Path) -> None:
    wrong = doit("serve", f"model={tiny}", "server.ctx_sise=5", "server.jinja=maybe", status=3)
    assert "llama-server has no --ctx-sise; did you mean ctx_size?" in wrong.err
    assert "--jinja takes no value" in wrong.err
    wrong = doit("serve", f"model={tiny}", "gpu_layers=1", "server.n_gpu_layers=2", status=3)
    assert "server.n_gpu_layers and gpu_layers are one option; write one of them" in wrong.err
    assert "convert" not in wrong.steps, "before any work on the model"


@pytest.mark.build
def test_a_device_that_llama_server_has_not(doit: Doit, tiny: Path, tmp_path: Path) -> None:
    says = "llama-server refuses it: invalid device: CUDA9; here it has none"
    for step in ("serve", "tune", "quality", "compare"):
        wrong = doit(step, f"model={tiny}", "device=CUDA9", status=3)
        assert f"error: device=CUDA9: {says}" in wrong.err and "convert" not in wrong.steps
    file = tmp_path / "a.toml"
    file.write_text(f"[instance.a.model]\nref = '{tiny}'\n[instance.a.server]\ndevice = 'CUDA9'\n")
    for task in ("plan", "up"):
        wrong = doit(task, f"config={file}", status=3)
        assert f'a.toml: instance.a.server.device = "CUDA9": {says}' in wrong.err
        assert "convert" not in wrong.steps


@pytest.mark.build
@pytest.mark.parametrize("option", ["control_vector", "control_vector_scaled", "lora", "mmproj"])
def test_what_plan_says_of_a_file_that_does_not_fit(
    doit: Doit, gguf: Path, tmp_path: Path, option: str
) -> None:
    """llama-server would go on without the control vector, and end with the others."""
    scale = ":0.5" if option.endswith("scaled") else ""
    file = tmp_path / "a.toml"
    file.write_text(
        f"[instance.a.server]\nmodel = '{gguf}'\n{option} = '{gguf}{scale}'\n", encoding="utf-8"
    )
    for words in ([f"config={file}"], [f"model={gguf}", f"server.{option}={gguf}{scale}"]):
        wrong = doit("plan", *words, status=3)
        assert "error: " in wrong.err and ": is no" in wrong.err


@pytest.mark.build
def test_a_taken_port_is_said_before_anything(doit: Doit, tiny: Path) -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        wrong = doit("serve", f"model={tiny}", f"port={port}", status=1)
    assert f"error: port {port} on 127.0.0.1 is in use by" in wrong.err, "no hidden step's name"
    assert f"pid {os.getpid()}" in wrong.err
    assert wrong.steps == []


@pytest.fixture
def small_disk(built: Path, tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB of its own."""
    with disk(tmp_path / "smäll", "size=96m"):
        yield tmp_path / "smäll"


@pytest.mark.build
def test_a_full_disk_is_said_and_nothing_is_published(
    small_disk: Path, built: Path, own_tiny: Path, converter: Path
) -> None:
    home = small_disk / "home"
    home.mkdir()
    doit = Doit(home)
    doit.env["LLAMA_SERVER_BINS_DIR"] = str(next(built.glob("*-cpu")))
    (home / "bins").mkdir()
    (home / "bins" / ".source").symlink_to(built / ".source")
    # It fits by the estimate, and the disk fills up while it runs.
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(b"\0" * (free - 70 * 1024 * 1024))
    refused = doit("prepare", "model=demo-embed", status=1)
    assert "are needed there and" in refused.err
    assert not list(home.rglob("*.gguf")) and not list(home.rglob(".*.part"))
    filler.unlink()


@pytest.mark.build
def test_a_disk_that_fills_up_while_quantizing(
    small_disk: Path, built: Path, tiny: Path, converter: Path
) -> None:
    from pipeline.core.errors import PipelineError
    from pipeline.core.paths import Home
    from pipeline.core.store import publish
    from pipeline.models import quantize, resolve

    doit = with_programs(built, small_disk.parent / "elsewhere")
    doit("prepare", f"model={tiny}", "quant=f16")
    source = next(doit.home.rglob("*.f16.gguf"))
    home = Home(small_disk / "home")
    (small_disk / "home").mkdir()
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"\0" * (free - 200_000))
    program = next(built.glob("*-cpu")) / "llama-quantize"
    target = home.models / "gguf" / "x" / "model.q8_0.gguf"
    wanted = quantize.Quantization(
        resolved=resolve.gguf_path(source, Home(doit.home)),
        target=target,
        input=source,
        conversion=None,
        quant="Q8_0",
        imatrix=None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "SPARE_BYTES", -(1 << 40))  # the estimate lets it through
        with pytest.raises(PipelineError):
            quantize.make(wanted, home, program, {})
    assert not target.exists() and not list(target.parent.glob("*.part"))


@pytest.mark.build
def test_a_disk_that_is_full_while_the_types_of_a_mix_are_tried(
    small_disk: Path, built: Path, tiny: Path, converter: Path
) -> None:
    from pipeline.core.errors import PipelineError
    from pipeline.models import tensor_errors

    doit = with_programs(built, small_disk.parent / "elsewhere")
    doit("prepare", f"model={tiny}", "quant=f16")
    source = next(doit.home.rglob("*.f16.gguf"))
    sample = small_disk.parent / "sample.gguf"
    tensors = tensor_errors.read(source).tensors.values()
    matrices = [tensor.name for tensor in tensors if len(tensor.shape) > 1]
    tensor_errors.write_sample([source], matrices, sample)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"\0" * (free - 8192))
    program = next(built.glob("*-cpu")) / "llama-quantize"
    with pytest.raises(PipelineError, match="No space left on device") as full:
        tensor_errors.measure(program, sample, {}, sample, {}, small_disk, lambda done, all: None)
    assert "free some space" in full.value.hint


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    home = tmp_path / "read only"
    with ExitStack() as stack:
        if os.geteuid() == 0:  # root may write anywhere but on a read-only mount
            stack.enter_context(disk(home, "ro"))
        else:
            home.mkdir(mode=0o500)
        wrong = Doit(home)("serve", "model=demo-embed", status=1)
    assert "cannot be written to" in wrong.err
    assert "LLAMA_PIPELINE_HOME" in wrong.err
    assert "Traceback" not in wrong.err


@pytest.mark.parametrize("words", [["build_bins"], ["serve", "model=demo-embed"]])
def test_no_compiler_is_said_before_anything_is_fetched(bare: Doit, words: list[str]) -> None:
    bare.env["CXX"] = "/no/such/c++"
    wrong = bare(*words, status=1)
    assert "no C++ compiler" in wrong.err
    for way in ("apt install", "dnf install", "xcode-select", "winget"):
        assert way in wrong.err
    assert wrong.steps == []


def test_bare_doit_helps_and_starts_nothing(bare: Doit) -> None:
    told = bare()
    assert "doit serve model=demo" in told.out
    assert list(bare.home.iterdir()) == []


def test_listing_needs_no_network_and_makes_nothing(bare: Doit) -> None:
    bare.env |= {"PIP_NO_INDEX": "1", "https_proxy": "http://127.0.0.1:1"}
    names = {line.split()[0] for line in bare("list").out.splitlines()}
    assert names >= {
        "source",
        "build_bins",
        "resolve",
        "fetch",
        "converter",
        "convert",
        "quantize",
        "prepare",
        "verify",
        "plan",
        "serve",
        "test",
    }
    status = bare("list", "--status", "model=org/model").out
    assert "R resolve" in status and "R build_bins" in status
    assert list(bare.home.iterdir()) == []


def test_no_network_is_said(bare: Doit, tmp_path: Path) -> None:
    bare.env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    bare.env["LLAMA_PIPELINE_CACHE"] = str(tmp_path / "no cache")
    wrong = bare("source", status=1)
    assert "could not be downloaded" in wrong.err and "pip" in wrong.err
    assert "Traceback" not in wrong.err
    assert not list(tmp_path.rglob("*.tar.gz"))
    assert REPOSITORY.name not in wrong.out


@pytest.mark.build
def test_an_index_names_only_files_beside_it(bare: Doit, own_tiny: Path) -> None:
    (own_tiny / "model.safetensors").rename(own_tiny.parent / "evil.safetensors")
    index = own_tiny / "model.safetensors.index.json"
    for name in ("../evil.safetensors", str(own_tiny.parent / "evil.safetensors"), 5):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        wrong = bare("prepare", f"model={own_tiny}", status=1)
        assert "which is not a file beside it" in wrong.err and "Traceback" not in wrong.err


def test_a_hub_that_does_not_answer(bare: Doit) -> None:
    bare.env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    wrong = bare("resolve", "model=org/model", status=1)
    assert "http://127.0.0.1:9" in wrong.err and "Traceback" not in wrong.err
    assert bare("resolve", "model=-a-/b", status=3).err.count("Traceback") == 0


def test_closed_output_ends_quietly(bare: Doit) -> None:
    with bare.start("list", stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.read()
    closed = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", *bare.command("plan", "modle=x")],
        cwd=REPOSITORY,
        env=bare.env,
        capture_output=True,
        check=False,
    )
    assert closed.returncode == 3


@pytest.mark.build
def test_what_cannot_be_meant_is_said_before_a_build(
    bare: Doit, gguf: Path, tmp_path: Path
) -> None:
    own = shutil.copy(gguf, tmp_path / "own.gguf")
    for words, says in (
        (["quant=q5_0"], "quantizing it again"),
        (["quant=q8_0", "keep_f16=1"], "keep_f16: not used: the GGUF is served as it is"),
        ([f"imatrix={own}"], "imatrix: not used"),
    ):
        wrong = bare("prepare", f"model={own}", *words, status=3)
        assert wrong.steps == [] and says in wrong.err
        assert not (bare.home / "bins" / ".source").exists()


@pytest.mark.parametrize(
    "words",
    [
        *("gguf_path={}.gguf", "safetensors_dir={}", "model=demo mmproj={}.gguf"),
        *("model=demo imatrix={}", "model=demo api_key_file={}", "config={}"),
    ],
)
def test_a_path_that_cannot_even_be_looked_for(bare: Doit, words: str) -> None:
    written = words.format("a" * 300).split()
    wrong = bare("plan", *written, status=3)
    assert "error: " in wrong.err and "File name too long" in wrong.err
    assert "config=" in words or f"error: {written[-1]}: " in wrong.err
    assert "Traceback" not in wrong.err


@pytest.mark.skipif(os.name == "nt", reason="devices and pipes of POSIX")
@pytest.mark.build
@pytest.mark.parametrize("task", ["plan", "up"])
def test_a_log_that_cannot_be_written(doit: Doit, tmp_path: Path, task: str) -> None:
    """Nothing is started, renamed or replaced."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    file = tmp_path / "a.toml"
    for key, name, why in (
        ("log_file", "pipe", "is a pipe, not a file"),
        ("log_file", "link", "/dev/null is a device, not a file"),
        ("log_dir", "m.gguf", "is a file, not a folder"),
    ):
        control = f"[instance.a.control]\n{key} = '{name}'\n"
        file.write_text(f"{control}[instance.a.server]\nmodel = 'm.gguf'\n")
        wrong = doit(task, f"config={file}", status=3)
        assert f"a.toml: instance.a.control.{key}: " in wrong.err and why in wrong.err
        assert wrong.steps == [] or task == "plan"
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_memory_of_a_device_that_is_not_there(bare: Doit, tmp_path: Path) -> None:
    """It is said before a program or a model is made."""
    file = tmp_path / "a.toml"
    file.write_text("[master]\nmemory = {gpu99 = '1GiB'}\n[instance.a.model]\nref = 'demo'\n")
    wrong = bare("up", f"config={file}", status=3)
    assert wrong.steps == []
    assert "a.toml: master.memory.gpu99: this machine has no such device; it has ram" in wrong.err
