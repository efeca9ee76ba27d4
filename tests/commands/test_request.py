"""The command line's variables and what they add up to; every error is found before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.bins.binaries import program_file
from pipeline.bins.build_options import BuildOptions
from pipeline.commands.request import Request, request
from pipeline.core.errors import UsageError
from pipeline.models.quants import QuantRequest
from pipeline.models.reference import FileFilter, split_scale


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user types in: a GGUF, a model folder, a matrix."""
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "folder").mkdir()
    (tmp_path / "imatrix.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    (tmp_path / "keys").write_text("secret")
    (tmp_path / "marked").write_text("\ufeffsecret", encoding="utf-8")
    return tmp_path


def ask(**given: Any) -> Request:
    """`server.x` is written `server__x`."""
    return request({name.replace("__", "."): str(value) for name, value in given.items()})


def refusal(**given: Any) -> str:
    with pytest.raises(UsageError) as caught:
        ask(**given)
    return str(caught.value)


def test_nothing_asked_is_the_defaults() -> None:
    assert ask() == Request()
    assert ask().bins == BuildOptions(
        source="prebuilt" if os.name == "nt" else "build", backend="auto"
    )
    assert (ask().ready_timeout, ask().stop_timeout) == (600, 10)
    assert (ask().host, ask().port) == ("127.0.0.1", 8080)


def test_everything_asked_arrives(here: Path) -> None:
    parsed = ask(
        model="org/model@v1",
        quant="iq2_xs",
        imatrix="imatrix.gguf",
        port=9,
        filename="x.gguf",
        mmproj="none",
        host="::",
        threads=3,
        gpu_layers="all",
        parallel=2,
        batch_size=64,
        ctx_size=4096,
        device="CUDA0",
        alias="a",
        format="json",
        api_key_file="keys",
        ready_timeout=7,
        stop_timeout=0,
        keep_f16="yes",
        force=1,
        refresh="on",
        server__flash_attn="on",
    )
    assert parsed.reference
    assert (parsed.reference.repo, parsed.reference.revision) == ("org/model", "v1")
    assert parsed.file_filter == FileFilter(quant="IQ2_XS", filename="x.gguf", mmproj="none")
    assert parsed.wanted == QuantRequest(
        quant="IQ2_XS", keep_f16=True, imatrix=here / "imatrix.gguf"
    )
    assert (parsed.host, parsed.port, parsed.device) == ("::", 9, "CUDA0")
    assert (parsed.threads, parsed.gpu_layers, parsed.parallel) == (3, "all", 2)
    assert (parsed.batch_size, parsed.ctx_size, parsed.alias) == (64, 4096, "a")
    assert parsed.api_key_file == str(here / "keys")
    assert parsed.server == {"flash_attn": "on"}
    assert (parsed.ready_timeout, parsed.stop_timeout) == (7, 0)
    assert (parsed.force, parsed.refresh, parsed.offline, parsed.json) == (True, True, False, True)
    parsed = ask(offline="TRUE")
    assert (parsed.refresh, parsed.offline) == (False, True)


def test_unknown_names_name_the_nearest() -> None:
    message = refusal(modle="demo", prt=1, zzzzz=1)
    assert "modle: there is no such variable; did you mean model?" in message
    assert "prt: there is no such variable; did you mean port?" in message
    assert "zzzzz: there is no such variable\n" in message
    assert "docs/variables.md" in message


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("max_model_len", "ctx_size"), ("quantization", "quant"), ("server_port", "port")),
        *(("n_gpu_layers", "gpu_layers"), ("hf_file", "filename"), ("flash_attn", "server.flash")),
        *(("size", "quant"), ("bpw", "quant")),
    ],
)
def test_names_of_other_programs_lead_to_ours(name: str, meant: str) -> None:
    assert f"{name}: there is no such variable; here it is {meant}" in refusal(**{name: "1"})


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        *(("port", 1, 65535), ("threads", -1, 4096)),
        *(("ready_timeout", 1, 86400), ("stop_timeout", 0, 3600)),
    ],
)
def test_ranges(name: str, low: int, high: int) -> None:
    for value in (low, high):
        parsed = ask(**{name: value})
        assert value == getattr(parsed, name)
    for wrong in (low - 1, high + 1, "", "x", "1.5", "1e3"):
        assert f"must be a whole number from {low} to {high}" in refusal(**{name: wrong})


@pytest.mark.parametrize(
    ("name", "right", "wrong", "allowed"),
    [
        ("parallel", (1, 256, -1), ("0", "257"), " from 1 to 256, or -1"),
        ("ctx_size", (2, 1 << 30, 0), ("1", "-1"), ", at least 2, or 0"),
        ("batch_size", (2, 1 << 24), ("1", "0"), ", at least 2"),
    ],
)
def test_numbers_of_the_server_are_those_of_a_file(
    name: str, right: tuple[int, ...], wrong: tuple[str, ...], allowed: str
) -> None:
    for value in right:
        assert value == getattr(ask(**{name: value}), name)
    for text in (*wrong, "-2", 1 << 31, "", "x", "1.5", "1e3"):
        assert f"{name}={text}: must be a whole number{allowed}" in refusal(**{name: text})


def test_tokens_may_have_a_unit_and_a_host_brackets() -> None:
    parsed = ask(ctx_size="32k", batch_size="1K", host="[::1]")
    assert (parsed.ctx_size, parsed.batch_size, parsed.host) == (32768, 1024, "::1")
    for wrong in ("32kb", "32,768", "-32k", "32k5"):
        assert "ctx_size=" in refusal(ctx_size=wrong)
    assert "host=a:1: must be one host name or address alone" in refusal(host="a:1")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("0", "0"), ("99", "99"), ("auto", "auto"), (" ALL ", "all"), ("-1", "-1")],
)
def test_gpu_layers(written: str, meant: str) -> None:
    assert ask(gpu_layers=written).gpu_layers == meant


@pytest.mark.parametrize("wrong", ["-3", "1.5", "1e3", "", "most", "1_0", "all,all"])
def test_gpu_layers_that_mean_nothing(wrong: str) -> None:
    why = f"gpu_layers={wrong}: must be a whole number, at least -2, or auto, or all"
    assert why in refusal(gpu_layers=wrong)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("port", "8080"), ("threads", "4"), ("ctx_size", "32k"), ("ctx_size", "4096")),
        *(("gpu_layers", "3"), ("lines", "5"), ("jobs", "2"), ("cuda_architectures", "89")),
        *(("gpus", "1"), ("replicas", "1-4"), ("storage", "50Gi"), ("quant", "tq2")),
        *(("quant", "4.8bpw"), ("quant", "3GiB"), ("budget", "90"), ("budget", "5m")),
        *(("chunks", "32"), ("max_kld", "0.1"), ("min_cosine", ".9")),
    ],
)
def test_numbers_are_written_in_ascii(name: str, value: str) -> None:
    """llama-server, Kubernetes and CMake read no other digits."""
    assert ask(**{name: value})
    for digits in ("٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９", "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗"):
        wrong = value.translate(str.maketrans("0123456789", digits))
        assert f"{name}={wrong}: must be" in refusal(**{name: wrong})


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal(
        port=0, quant="q44_k_m", backend="cuda13", force="maybe", format="xml", model=" "
    )
    for part in (
        "port=0: must be a whole number",
        "quant=q44_k_m: must be auto, fit, a size such as 4.8bpw or 3GiB, or a type of "
        "llama-quantize; did you mean Q4_K_M?",
        "backend=cuda13: must be one of auto, cuda",
        "force=maybe: must be 1 or 0",
        "format=xml: must be one of text, json",
        "model= : must be a value",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "demo", "gguf_path": "m.gguf"}, "model and gguf_path all name a model"),
        ({"hf_model": "a/b", "safetensors_dir": "folder"}, "hf_model and safetensors_dir"),
        ({"device": "cuda", "backend": "cpu"}, "device=cuda and backend=cpu contradict"),
        ({"model": "a/b:Q4_K_M", "quant": "q8_0"}, "quant=q8_0 and :Q4_K_M contradict"),
        ({"model": "a/b:UD-Q4_K_XL", "quant": "q4_k_m"}, "contradict each other"),
        ({"model": "hf.co/a/b/blob/main/x.gguf", "filename": "y"}, "filename= and the address"),
        ({"model": "hf.co/a/b/blob/main/mmproj-x.gguf"}, "is a projector"),
        ({"gguf_path": "https://hf.co/a/b/blob/main/x.gguf"}, "is an address"),
        ({"model": "a/b@v1", "revision": "v2"}, "revision=v2 and @v1 contradict"),
        ({"model": "demo", "revision": "v2"}, "revision: is for Hugging Face repositories"),
        ({"gguf_path": "m.gguf", "filename": "x"}, "filename: is for Hugging Face repositories"),
        ({"gguf_path": "none.gguf"}, "does not exist"),
        ({"gguf_path": "folder"}, "is a folder"),
        ({"safetensors_dir": "m.gguf"}, "is a gguf"),
        ({"imatrix": "none"}, "imatrix=none: "),
        ({"api_key_file": "folder"}, "is not a file\n  hint: it is a folder; name the file in it"),
        ({"imatrix": "https://hub/x.gguf"}, "is not a file\n  hint: it is an address; download it"),
        ({"api_key_file": "marked"}, "begins with a byte order mark"),
        ({"model": "nothing"}, "not a valid reference"),
        ({"refresh": "1", "offline": "1"}, "refresh= and offline= contradict each other"),
        ({"refresh": "1", "frozen": "1"}, "refresh= and frozen= contradict each other"),
        ({"model": "a/b", "filename": "x", "pattern": "*"}, "filename= and pattern= contradict"),
        ({"gguf_path": "m.gguf", "pattern": "*"}, "pattern: is for Hugging Face repositories"),
        ({"gguf_path": "m.gguf", "mmproj": "p.gguf"}, "p.gguf is not a file"),
        ({"model": "a/b", "mmproj": "projector"}, "projector is not a file"),
        ({"device": "CUDA", "backend": "cpu"}, "device=cuda and backend=cpu contradict"),
        (
            {"cuda_architectures": "90", "backend": "vulkan"},
            "cuda_architectures= and backend=vulkan contradict",
        ),
        ({"cuda_toolkit": "auto", "backend": "cpu"}, "cuda_toolkit= and backend=cpu contradict"),
        ({"cuda_architectures": "ninety"}, "cuda_architectures=ninety: must be such as 89"),
        ({"cuda_toolkit": "/nowhere"}, "cuda_toolkit=/nowhere: there is no bin/nvcc in it"),
        ({"jobs": "0"}, "jobs=0: must be a whole number from 1"),
        (
            {"bins": "prebuilt", "attestation": "maybe"},
            "maybe is not a file\n  hint: auto, required, off, or a bundle's path",
        ),
        ({"bins": "prebuilt", "jobs": "2"}, "jobs: is for what is compiled, not for bins=prebuilt"),
    ],
)
def test_contradictions_and_impossible_wishes(given: dict[str, str], said: str) -> None:
    assert said in refusal(**given)


def test_an_address_of_a_file_is_that_file() -> None:
    parsed = request({"model": "https://huggingface.co/a/b/blob/v1/Q4/x-Q4_K_M.gguf"})
    assert parsed.reference and (parsed.reference.repo, parsed.reference.revision) == ("a/b", "v1")
    assert parsed.file_filter.filename == "Q4/x-Q4_K_M.gguf"
    assert parsed.model_words == {"model": "a/b", "revision": "v1", "filename": "Q4/x-Q4_K_M.gguf"}
    assert request({"hf_model": "hf.co/a/b:q8_0"}).file_filter.quant == "Q8_0"


def test_the_same_said_twice_is_no_contradiction() -> None:
    assert ask(model="a/b:q4_k_m", quant="Q4_K_M").wanted.quant == "Q4_K_M"
    assert ask(model="a/b:Q4_K", quant="q4_k_m").wanted.quant == "Q4_K_M"
    assert ask(model="a/b@v1", revision="v1").reference.revision == "v1"  # type: ignore[union-attr]
    for device in ("cpu", "CPU"):
        parsed = ask(device=device, backend="cpu")
        assert (parsed.bins.backend, parsed.device) == ("cpu", None)
    assert ask(refresh=0, offline=1).offline


def test_quants_as_repositories_name_them() -> None:
    parsed = ask(model="a/b", quant="ud-q4_k_xl")
    assert (parsed.file_filter.quant, parsed.model_words) == (
        "UD-Q4_K_XL",
        {"model": "a/b", "quant": "ud-q4_k_xl"},
    )
    assert ask(model="a/b", quant="auto").wanted.quant == "AUTO"
    # llama-quantize's alias is kept for a repository that has a file of that very name
    assert ask(model="a/b:q4_k").file_filter.quant == "Q4_K"
    assert ask(model="a/b:q4_k").wanted.quant == "Q4_K_M"


def test_a_projector_of_ones_own_or_of_the_repository(here: Path) -> None:
    parsed = ask(model="a/b", mmproj="m.gguf")  # a path that exists wins
    assert (parsed.mmproj, parsed.file_filter.mmproj) == (here / "m.gguf", "none")
    parsed = ask(model="a/b", mmproj="mmproj-F16.gguf")
    assert (parsed.mmproj, parsed.file_filter.mmproj) == (None, "mmproj-F16.gguf")


@pytest.mark.parametrize(
    ("lora", "meant"),
    [
        ("style.gguf", [("style.gguf", 1)]),
        ("style.gguf:0.5, org/repo", [("style.gguf", 0.5), ("org/repo", 1)]),
        ("org/repo:Q8_0", [("org/repo:Q8_0", 1)]),
        ("org/repo:Q8_0:-2", [("org/repo:Q8_0", -2)]),
        ("org/repo@v1.0:0", [("org/repo@v1.0", 0)]),
        ("hf:org/repo:.5", [("hf:org/repo", 0.5)]),
        ("https://huggingface.co/org/repo:1", [("https://huggingface.co/org/repo", 1)]),
        ("none", []),
    ],
)
def test_adapters_with_scales(here: Path, lora: str, meant: list[tuple[str, float]]) -> None:
    (here / "style.gguf").touch()
    adapters = ask(model="m.gguf", lora=lora, force=1).adapters
    assert [(a.reference and a.reference.text, a.scale) for a in adapters] == meant
    assert all(a.force for a in adapters), "they are made as the model is"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (r"C:\loras\a.gguf", (r"C:\loras\a.gguf", 1)),
        (r"C:\loras\a.gguf:0.5", (r"C:\loras\a.gguf", 0.5)),
        ("a:1e3", ("a:1e3", 1)),
        ("a:inf", ("a:inf", 1)),
        ("a:٠.٥", ("a:٠.٥", 1)),
        (":1", (":1", 1)),
    ],
)
def test_what_is_a_scale(text: str, meant: tuple[str, float]) -> None:
    assert split_scale(text) == meant


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("gone.gguf:0.5", "lora=gone.gguf: {}/gone.gguf does not exist"),
        ("m.gguf:0,5", "lora=5: "),  # a decimal comma
        ("m.gguf:much", "lora=m.gguf:much: "),
        ("demo", "lora=demo: is a model"),
        ("odd:2", "lora=odd:2: is a path that exists, or odd with the scale 2"),
    ],
)
def test_adapters_that_are_none(here: Path, lora: str, said: str) -> None:
    (here / "odd:2").mkdir()
    wrong = refusal(model="m.gguf", lora=lora)
    assert said.format(here) in wrong
    assert ("lora=odd:2:1" if lora == "odd:2" else "style.gguf:0.5") in wrong


def test_adapters_are_for_a_model() -> None:
    assert "pass model=… too" in refusal(lora="org/repo")
    assert "server.lora: is a variable of its own" in refusal(
        model="org/a", lora="org/b", server__lora="c.gguf"
    )


def test_the_hubs_own_switch_means_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ask(model="a/b").offline


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("q4_k_m", "Q4_K_M"),
        ("Q8_0", "Q8_0"),
        ("iQ4_xS", "IQ4_XS"),
        ("q5_k", "Q5_K_M"),
        ("bf16", "BF16"),
    ],
)
def test_quants_in_any_letter_case(written: str, meant: str) -> None:
    assert ask(model="demo-embed", quant=written).wanted.quant == meant
    assert ask(model=f"a/b:{written}").wanted.quant == meant


def test_other_words_in_any_letter_case() -> None:
    assert ask(backend="CPU").bins.backend == "cpu"
    assert ask(format="JSON").json
    assert ask(force="Yes").force
    assert not ask(force="OFF").force


def test_a_repositorys_own_quant_name_is_kept() -> None:
    assert ask(model="a/b", quant="q4_k_p").wanted.quant == "Q4_K_P"
    assert "no such type; did you mean Q4_K" in refusal(model="demo-embed", quant="q4_k_p")
    assert ask(model="a/b:ud-q4_k_xl").wanted.quant == "UD-Q4_K_XL"


@pytest.mark.parametrize("quant", ["iq1_s", "IQ2_XXS", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s"])
def test_quants_that_need_an_importance_matrix(quant: str) -> None:
    message = refusal(model="folder", quant=quant)
    assert f"quant={quant.lower()}: needs an importance matrix" in message
    assert "imatrix=PATH" in message
    assert ask(model="folder", quant=quant, imatrix="imatrix.gguf").wanted.quant == quant.upper()


def test_a_gguf_that_somebody_else_made_needs_no_matrix() -> None:
    """It is downloaded, not quantized here."""
    assert ask(model="org/model-GGUF:IQ2_XXS").wanted.quant == "IQ2_XXS"
    assert ask(hf_model="org/model-GGUF", quant="iq2_xxs").wanted.quant == "IQ2_XXS"


def test_options_of_the_server() -> None:
    given = {"server__flash_attn": "on", "server__no-mmap": 1, "server__threads": 4}
    assert ask(**given).server == {"flash_attn": "on", "no-mmap": "1", "threads": "4"}


@pytest.mark.parametrize("name", ["model", "host", "port", "ctx_size", "ctx-size", "alias"])
def test_options_with_a_variable_of_their_own(name: str) -> None:
    message = refusal(**{f"server__{name}": "1"})
    assert f"server.{name}: is a variable of its own" in message
    assert f"write {name.replace('-', '_')}=" in message


def test_an_option_given_in_both_ways() -> None:
    assert "server.batch-size" in refusal(**{"server__batch-size": 1, "batch_size": 2})


def test_models_said_explicitly(here: Path) -> None:
    for given in ({"gguf_path": "m.gguf"}, {"model": "m.gguf"}):
        parsed = ask(**given).reference
        assert parsed
        assert (parsed.kind, parsed.path) == ("gguf", here / "m.gguf")
    for given in ({"safetensors_dir": "folder"}, {"model": "./folder"}):
        parsed = ask(**given).reference
        assert parsed
        assert (parsed.kind, parsed.path) == ("folder", here / "folder")
    (here / "org" / "model").mkdir(parents=True)
    for text in ("org/model", "hf:org/model"):
        parsed = ask(hf_model=text, revision="v1").reference
        assert parsed
        assert (parsed.kind, parsed.repo, parsed.revision) == ("hub", "org/model", "v1")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("89", "89"),
        ("8.9", "89"),
        ("86-real, 90-virtual", "86-real;90-virtual"),
        ("12.0a;120f-real", "120a;120f-real"),
        ("ALL-major", "all-major"),
        ("native", "native"),
    ],
)
def test_cuda_architectures(given: str, meant: str) -> None:
    wanted = ask(cuda_architectures=given, portable=True, jobs=3).bins
    assert (wanted.architectures, wanted.backend) == (meant, "cuda")
    assert (wanted.portable, wanted.jobs, wanted.is_for_elsewhere) == (True, 3, True)


def test_a_toolkit_of_ones_own(here: Path) -> None:
    (here / "cuda" / "bin").mkdir(parents=True)
    (here / "cuda" / "bin" / program_file("nvcc")).touch()
    assert ask(cuda_toolkit="cuda").bins.toolkit == str(here / "cuda")
    assert ask(cuda_toolkit="system").bins.toolkit == "system"
    assert not ask(cuda_toolkit="system").bins.is_for_elsewhere
