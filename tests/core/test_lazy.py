from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.core.lazy import imported_when_called

LAZY = """
from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A lazy package with a module and one that cannot be loaded."""
    folder = tmp_path / "idle"
    folder.mkdir()
    (folder / "__init__.py").write_text(LAZY)
    (folder / "module.py").write_text("VALUE = 1\n\ndef value():\n    return VALUE\n")
    (folder / "broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "idle"]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("idle")


def test_a_module_is_loaded_when_something_in_it_is_used(package: ModuleType) -> None:
    from idle import broken, module  # type: ignore[import-not-found]

    assert "idle.module" not in sys.modules
    assert module.value() == 1
    assert package.module is sys.modules["idle.module"], "from now on the module itself"
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _ = broken.VALUE


def test_what_is_changed_in_a_lazy_module_is_changed_in_the_module(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from idle import module

    with monkeypatch.context() as patch:
        patch.setattr(module, "VALUE", 2)
        assert sys.modules["idle.module"].value() == 2
    assert module.value() == 1


def test_a_lazy_package_has_no_other_names(package: ModuleType) -> None:
    assert not hasattr(package, "missing") and not hasattr(package.module, "missing")
    with pytest.raises(ImportError):
        from idle import missing  # noqa: F401


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
