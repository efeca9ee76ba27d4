"""Command lines of the converter and of llama-quantize, and what the converter gets to see."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace
from packaging.requirements import Requirement

from pipeline.bins.compile import source
from pipeline.core import python_environment
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import receipts
from pipeline.models import convert, converter, quantize, resolve, staging
from pipeline.models.convert import Conversion
from pipeline.models.quantize import Quantization
from pipeline.models.resolve import ModelFile, Resolved

# As a version wrote it that did not look into the folder tokenizer/.
OLD_ANSWER = """{"kind": "safetensors", "name": "words", "slug": "org__words__0035d9d96da9",
"folder": "source/org__words__0035d9d96da9", "local": false, "source": {"type": "hf",
"ref": "org/words", "revision": "0035d9d96da99298ddd4a154a15ef20c3c25652f"}, "files": [
{"name": "config.json", "size": 509, "sha256": "",
"blob": "d79f58d0f4273f1f6133fd5997ba9acb2f867184"},
{"name": "model.safetensors", "size": 2888368,
"sha256": "e7fffc55ca72cfc4a1fcdedf58bc3128a1a723444c47907e5020218bea979fc8",
"blob": "fa4ccc14a518f9c5feb27edc692660d6fa0e2596"}], "precision": "BF16", "mmproj": "",
"architecture": "LlamaForCausalLM", "encoder": "", "why": "", "base": null, "base_name": ""}"""


@pytest.fixture
def conversion(tmp_path: Path) -> Conversion:
    resolved = Resolved(
        kind="safetensors",
        name="A model",
        slug="local__m",
        folder=tmp_path / "model",
        local=True,
        source={},
        files=(ModelFile("model.safetensors", 1_000_000, "s"),),
        precision="F32",
    )
    return Conversion(
        resolved=resolved,
        target=tmp_path / "model.f16.gguf",
        outtype="F16",
        script=Path("/src/convert_hf_to_gguf.py"),
        llama_cpp={"commit": "c1"},
        keep=True,
    )


def test_the_converters_command_line(conversion: Conversion) -> None:
    words = convert.argv(conversion, Path("/venv/bin/python"), Path("/in"), Path("/out.part"))
    assert words == [
        *("/venv/bin/python", str(converter.DRIVER), "/src/convert_hf_to_gguf.py"),
        *("/in", "--outfile", "/out.part"),
        *("--outtype", "f16", "--model-name=A model"),
    ]


@pytest.mark.parametrize(
    ("beside", "is_told"),
    [("tokenizer_config.json", True), ("tokenizer.json", False), ("spiece.model", False)],
)
def test_a_model_without_a_tokenizer_is_told_so(
    conversion: Conversion, tmp_path: Path, beside: str, is_told: bool
) -> None:
    folder, names = conversion.resolved.folder, ("config.json", "model.safetensors", beside)
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    files = tuple(ModelFile(name, 2, "s") for name in names)
    log = tmp_path / "x.log"
    log.write_text("NotImplementedError: BPE pre-tokenizer was not recognized")
    without = replace(conversion, resolved=replace(conversion.resolved, files=files))
    error = convert.failed(without, 1, log)
    assert ("it has no tokenizer" in error.hint) == is_told and str(log) in error.hint
    of_adapter = replace(without.resolved, base=conversion.resolved)
    error = convert.failed(replace(without, resolved=of_adapter), 1, log)
    assert error.hint == f"the whole log is {log}"


def test_a_tokenizer_that_an_older_version_did_not_choose_is_found_by_refresh(
    conversion: Conversion, tmp_path: Path
) -> None:
    """What was chosen of a repository stays chosen, so an update alone does not help."""
    stored = tmp_path / "resolved" / "org__words__f96c7db29e2c.json"
    stored.parent.mkdir()
    stored.write_text(OLD_ANSWER)
    resolved = resolve.stored(stored)
    assert resolved and resolved.source["revision"] and len(resolved.files) == 2
    log = tmp_path / "x.log"
    log.write_text("ValueError: Couldn't instantiate the backend tokenizer from one of:")
    resolved.folder.mkdir(parents=True)
    for file in resolved.files:
        (resolved.folder / file.name).write_text("{}")
    error = convert.failed(replace(conversion, resolved=resolved), 1, log)
    assert "refresh=1 looks there again" in error.hint and str(log) in error.hint


@pytest.mark.parametrize(
    ("outtype", "ratio"), [("F32", 1.0), ("F16", 0.5), ("BF16", 0.5), ("Q8_0", 0.27)]
)
def test_the_space_that_a_conversion_needs(
    conversion: Conversion, outtype: str, ratio: float
) -> None:
    need = replace(conversion, outtype=outtype).need
    assert 1_000_000 * ratio * 0.97 < need < 1_000_000 * ratio * 1.05


@pytest.mark.parametrize("matrix", [None, Path("/m/imatrix.gguf")])
def test_the_quantizers_command_line(conversion: Conversion, matrix: Path | None) -> None:
    quantization = Quantization(
        resolved=conversion.resolved,
        target=Path("/q.gguf"),
        input=conversion.target,
        conversion=conversion,
        quant="Q4_K_M",
        imatrix=matrix,
    )
    program, made = Path("/bin/llama-quantize"), Path("/q.part")
    assert quantize.argv(quantization, program, made, matrix) == [
        "/bin/llama-quantize",
        *(["--imatrix", "./imatrix.gguf"] if matrix else []),
        *(str(conversion.target), "/q.part", "Q4_K_M"),
    ]


def test_the_converter_sees_no_token_and_no_python_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    private = {
        "HF_TOKEN": "hf_x",
        "HF_HOME": "/h",
        "HF_ENDPOINT": "http://e",
        "HF_HUB_OFFLINE": "0",
        "HUGGING_FACE_HUB_TOKEN": "hf_x",
        "HUGGINGFACE_HUB_CACHE": "/h",
        "PYTHONPATH": "/evil",
        "PYTHONHOME": "/evil",
        "PYTHONSTARTUP": "/evil",
        "TRANSFORMERS_CACHE": "/h",
        "NO_LOCAL_GGUF": "1",
        "HTTPS_PROXY": "http://user:word@proxy",
        "AWS_SECRET_ACCESS_KEY": "a",
        "OPENAI_API_KEY": "o",
        "SSH_AUTH_SOCK": "/agent",
        "XDG_CACHE_HOME": "/h",
        "HF_MODULES_CACHE": "/h",
    }
    for name, value in {**private, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "3"}.items():
        monkeypatch.setenv(name, value)
    env = converter.environment(Path("/venv/bin/python"), tmp_path)
    assert not {*private.values(), str(Path.home())} - {"1", "0"} & set(env.values())
    assert env["PATH"] == "/venv/bin"
    assert env["LC_ALL"] == "C.UTF-8" and env["OMP_NUM_THREADS"] == "3"
    for name in ("HOME", "HF_HOME", "HF_MODULES_CACHE", "XDG_CACHE_HOME", "TMPDIR"):
        assert env[name] == str(tmp_path), name
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["PYTHONDONTWRITEBYTECODE"] == "1"


def test_only_the_named_files_are_laid_out(tmp_path: Path) -> None:
    model, into = tmp_path / "model", tmp_path / "in"
    (model / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "1_Pooling/config.json", "modeling.py", "pytorch_model.bin"):
        (model / name).write_text(f'"{name}"')
    link = model / "model.safetensors"
    link.symlink_to(tmp_path / "blob")  # as huggingface_hub's cache has it
    (tmp_path / "blob").write_text("weights")
    names = ("config.json", "1_Pooling/config.json", "model.safetensors")
    staging.stage({name: model / name for name in names}, into)
    laid = {p.relative_to(into).as_posix(): p.read_text() for p in into.rglob("*") if p.is_file()}
    assert laid == {names[0]: '"config.json"', names[1]: f'"{names[1]}"', names[2]: "weights"}


def test_torch_is_never_installed_with_what_it_asks_for() -> None:
    calls = converter.pip_arguments(Path("/venv/bin/python"))
    for call in calls:
        assert call[:3] == ["--python", "/venv/bin/python", "install"]
        assert "--no-deps" in call
    torch, rest = calls
    wanted = [Requirement(word) for word in torch if word.startswith("torch")]
    assert all(requirement.name == "torch" and requirement.marker for requirement in wanted)
    for platform in ("linux", "win32", "darwin"):
        (chosen,) = [
            r for r in wanted if r.marker and r.marker.evaluate({"sys_platform": platform})
        ]
        assert str(chosen.specifier) == f"=={pins().torch}" + "+cpu" * (platform != "darwin")
    assert torch[torch.index("--index-url") + 1] == pins().torch_index
    assert "--require-hashes" in rest


def test_everything_but_torch_is_pinned_by_hash() -> None:
    text = converter.REQUIREMENTS.read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) > 5
    for line in lines:
        name = line.split("==")[0]
        assert "==" in line, line
        assert "--hash=sha256:" in line, line
        assert name != "torch"
        assert not name.startswith(("nvidia", "triton", "cuda"))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """The converter's environment as pip leaves it, with a file of each package."""
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(python_environment, "_whole", set())
    home = Home(tmp_path / "home")
    python = converter.installed(home).python
    python.parent.mkdir(parents=True)
    for path in (python, converter.installed(home).folder / "pyvenv.cfg"):
        path.write_text("x")
    site = site_packages(home)
    for name in converter.required():
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(name)
        digest = base64.urlsafe_b64encode(hashlib.sha256(name.encode()).digest()).decode()
        row = f"{name}/__init__.py,sha256={digest.rstrip('=')},{len(name)}\n"
        (info / "RECORD").write_text(f"{row}{name}/x.pyc,,\n{info.name}/RECORD,,\n")
    return home


def site_packages(home: Home) -> Path:
    library = "Lib" if os.name == "nt" else "lib/python3"
    return converter.installed(home).folder / library / "site-packages"


def with_receipt(home: Home) -> None:
    stamp = converter.installed(home).folder / "environment"
    stamp.touch()
    receipts.change(stamp, receipts.stamp(stamp, converter.installed(home).recipe, seconds=0))


def test_the_environment_is_current_only_with_a_receipt(environment: Home) -> None:
    assert not converter.installed(environment).is_current()  # as a cut run leaves it
    with_receipt(environment)
    assert converter.installed(environment).is_current()
    converter.installed(environment).forget()
    assert (converter.installed(environment).folder / "environment").exists()
    assert not converter.installed(environment).is_current()


@pytest.mark.parametrize(
    ("path", "text", "why"),
    [
        ("numpy/__init__.py", "", "numpy/__init__.py has 0 bytes instead of 5"),
        ("numpy/__init__.py", None, "No such file or directory"),
        ("numpy-1.0.dist-info", None, "numpy is not there"),
        ("torch-1.0.dist-info/RECORD", "", "RECORD is empty"),
        ("torch-1.0.dist-info/RECORD", None, "No such file or directory"),
        ("torch-1.0.dist-info/RECORD", "torch/__init__.py", "not enough values to unpack"),
        ("../../../pyvenv.cfg", "", "pyvenv.cfg is empty"),
    ],
)
def test_a_power_cut_that_emptied_files_is_seen(
    environment: Home, path: str, text: str | None, why: str
) -> None:
    with_receipt(environment)
    damaged = site_packages(environment) / path
    if text is not None:
        damaged.write_text(text)
    elif damaged.is_dir():
        shutil.rmtree(damaged)
    else:
        damaged.unlink()
    assert why in converter.installed(environment).damage()
    assert not converter.installed(environment).is_current()
    with pytest.raises(PipelineError, match="is to be made"):
        converter.make(environment, offline=True)


def test_what_python_cannot_read_is_compared_with_what_was_installed(
    environment: Home, tmp_path: Path
) -> None:
    with_receipt(environment)
    (site_packages(environment) / "numpy" / "__init__.py").write_bytes(bytes(5))
    log = tmp_path / "log"
    log.write_text("ValueError: no such architecture\n")
    convert.require_whole_converter(environment, log)
    log.write_text("SyntaxError: source code string cannot contain null bytes\n")
    with pytest.raises(PipelineError, match="is not what was installed"):
        convert.require_whole_converter(environment, log)
    assert not converter.installed(environment).is_current(), "so that the next run makes it anew"


def test_architectures_are_read_without_running_the_converter(tmp_path: Path) -> None:
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "__init__.py").write_text(
        "raise SystemExit('it was run')\n"
        "OTHER: dict[str, str] = {'NoModel': 'x'}\n"
        "TEXT_MODEL_MAP: dict[str, str] = {\n    'BertModel': 'bert',\n    'LlamaModel': 'x',\n}\n"
    )
    assert converter.architectures(tmp_path) == {"BertModel", "LlamaModel"}
    assert converter.architectures(tmp_path / "none") == frozenset()
    (tmp_path / "conversion" / "__init__.py").write_text("MAP = {}\n")
    assert converter.architectures(tmp_path) == frozenset()


@pytest.mark.build
def test_the_real_converter_knows_the_usual_architectures(built: Path) -> None:
    known = converter.architectures(source.find(Home(built.parent)).folder)
    assert {"LlamaForCausalLM", "BertModel", "Qwen3ForCausalLM"} <= known
    assert len(known) > 100
