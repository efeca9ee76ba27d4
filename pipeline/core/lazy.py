"""Modules that are imported when they are first used."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


def submodules(package: str, paths: Iterable[str]) -> Callable[[str], ModuleType]:
    """The `__getattr__` of `package`, with its `__path__`: a name in it is a module of it, which
    `from package import module` does not load yet."""
    names = {entry.name.partition(".")[0] for path in paths for entry in os.scandir(path)}

    def find(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"{package} has no {name}")
        return _Lazy(f"{package}.{name}")

    return find


class _Lazy(ModuleType):
    """Stands for a module that is loaded when something in it is used, in whichever thread: the
    import system makes sure that no thread sees half a module."""

    def __getattr__(self, name: str) -> object:
        return getattr(import_module(self.__name__), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(import_module(self.__name__), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(import_module(self.__name__), name)

    @property
    def __dict__(self) -> dict[str, object]:  # type: ignore[override]
        return vars(import_module(self.__name__))


@contextmanager
def imported_when_called(*names: str) -> Iterator[None]:
    """What the block imports from these modules are functions that import them when they are
    called: for a package that imports at its top what it needs only at times."""
    late = [name for name in names if name not in sys.modules]
    sys.modules.update({name: _Late(name) for name in late})
    try:
        yield
    finally:
        for name in late:
            del sys.modules[name]


class _Late(ModuleType):
    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: object, **options: object) -> object:
            return getattr(import_module(self.__name__), name)(*args, **options)

        return call
