"""The pinned llama.cpp built for Vulkan, and run on Mesa's software device."""

from __future__ import annotations

import subprocess
from pathlib import Path

import kept
import pytest
from conftest import Doit, post, with_programs
from vulkan_sdk import Software

# With empty caches it is compiled beside the other builds: the time is for all of them.
pytestmark = [pytest.mark.build, pytest.mark.slow, pytest.mark.timeout(3600)]

# Mesa compiles each shader when it is first used, one for every number of tokens in a batch:
# seconds with these, minutes without.
FEW_SHADERS = ("server.ubatch_size=1", "server.flash_attn=off")
LOUD = "server.verbosity=4"  # else the log names no device
QUESTION = {
    "messages": [{"role": "user", "content": "hello there"}],
    "max_tokens": 16,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def vulkan(
    built: Path, vulkan_sdk: Path, software: Software, tmp_path_factory: pytest.TempPathFactory
) -> Doit:
    """doit on a home with both builds: minutes, unless an earlier run kept it."""
    doit = with_programs(built, tmp_path_factory.mktemp("vulkan") / "hôme ü")
    doit.env |= {"VULKAN_SDK": str(vulkan_sdk), **software.env}
    kept.build(doit, "backend=vulkan")
    return doit


@pytest.fixture(scope="module")
def model(vulkan: Doit, tiny: Path, converter: Path) -> Path:
    vulkan("prepare", f"model={tiny}", "quant=f16", "backend=cpu")
    return next((vulkan.home / "models").rglob("*.gguf"))


def test_the_build_lists_the_device(vulkan: Doit, software: Software) -> None:
    (server,) = vulkan.home.glob("bins/*-vulkan/llama-server")
    done = subprocess.run(
        [server, "--list-devices"], env=vulkan.env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert software.name in done.stdout


def test_the_second_build_does_nothing(vulkan: Doit) -> None:
    vulkan("source")  # kept programs come without it
    assert vulkan("build_bins", "backend=vulkan").steps == []


def test_it_answers_as_the_cpu_does(vulkan: Doit, model: Path, software: Software) -> None:
    answers = {}
    for backend in ("cpu", "vulkan"):
        words = (f"model={model}", f"backend={backend}", "ctx_size=2048", LOUD, *FEW_SHADERS)
        with vulkan.serving(*words) as url:
            answer = post(f"{url}/v1/chat/completions", QUESTION)
        answers[backend] = answer["choices"][0]["message"]["content"]
        summary = vulkan.summary
        assert summary["backend"].split()[0] == backend
        assert (software.name in summary["device"]) == (backend == "vulkan")
    assert answers["vulkan"] == answers["cpu"]
    assert "offloaded 3/3 layers" in Path(summary["log"]).read_text()
