"""quant=auto for what is made here: what is chosen from, and what an earlier decision holds for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.paths import Home
from pipeline.models import resolve
from pipeline.models.quants import QuantRequest
from pipeline.models.resolve import Resolved

PLAIN = QuantRequest(quant="AUTO")


@pytest.fixture
def resolved(tmp_path: Path) -> Resolved:
    return Resolved(
        kind="safetensors",
        name="tiny",
        slug="tiny",
        folder=tmp_path,
        local=True,
        source={},
        files=(),
        precision="BF16",
    )


@pytest.mark.parametrize(
    "wanted",
    [QuantRequest(quant="AUTO", keep_f16=True), QuantRequest(quant="AUTO", imatrix=Path("matrix"))],
)
def test_what_the_converter_writes_itself_is_no_candidate(
    tmp_path: Path, resolved: Resolved, wanted: QuantRequest
) -> None:
    assert resolve.auto_candidates(PLAIN)[0] == "Q8_0"
    assert resolve.auto_candidates(wanted)[0] == "Q6_K"
    home = Home(tmp_path)
    resolve.write(resolve.decision_path(resolved, PLAIN, None, home), {"quant": "Q8_0"})
    assert resolve.decided(resolve.decision_path(resolved, PLAIN, None, home)) == "Q8_0"
    assert resolve.decided(resolve.decision_path(resolved, wanted, None, home)) == ""
    assert resolve.decided(resolve.decision_path(resolved, PLAIN, 8192, home)) == ""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"quant": "Q9"}', '{"quant": ["Q8_0"]}'])
def test_a_decision_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    path = tmp_path / "auto.json"
    path.write_text(text)
    assert resolve.decided(path) == ""
