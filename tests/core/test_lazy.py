from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.core.lazy import imported_when_called


def test_a_function_imports_its_module_when_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late.py").write_text("def twice(number, more=0):\n    return 2 * number + more\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late", raising=False)
    with imported_when_called("late"):
        from late import twice  # type: ignore[import-not-found]
    assert "late" not in sys.modules
    assert twice(20, more=2) == 42
    assert Path(sys.modules["late"].__file__ or "") == tmp_path / "late.py"


def test_what_is_loaded_is_left_alone() -> None:
    with imported_when_called("sys"):
        import sys as same
    assert same is sys is sys.modules["sys"]
