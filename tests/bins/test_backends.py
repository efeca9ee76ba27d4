from __future__ import annotations

import pytest

from pipeline.bins import backends
from pipeline.core.errors import UsageError


def test_auto() -> None:
    assert backends.choose("auto") is backends.BACKENDS["cpu"]
    assert backends.BACKENDS["cpu"].name == "cpu"


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_asked_for(name: str) -> None:
    assert backends.choose(name) is backends.BACKENDS[name]
    assert backends.choose(name).name == name
    assert name in backends.NAMES


@pytest.mark.parametrize(
    "name", [*(set(backends.NAMES) - set(backends.BACKENDS) - {"auto"}), "tpu", "", "CPU"]
)
def test_no_silent_fallback(name: str) -> None:
    with pytest.raises(UsageError, match=f"backend={name}: this version builds .*cpu") as caught:
        backends.choose(name)
    assert "LLAMA_SERVER_BINS_DIR" in caught.value.hint
