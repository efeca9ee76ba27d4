"""Modules that are imported when they are first used."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


def load_modules_when_used(package: str) -> None:
    """Let `from package import module` not load the module yet. Called by the `__init__` of that
    package."""
    module = sys.modules[package]
    names = {entry.name.partition(".")[0] for path in module.__path__ for entry in os.scandir(path)}

    def find(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"{package} has no {name}")
        return _Lazy(f"{package}.{name}")

    module.__getattr__ = find  # type: ignore[method-assign]


def load(name: str) -> ModuleType:
    """A module, whichever thread imports it."""
    if name not in sys.modules:
        __import__(name)  # as a statement does: `-X importtime` does not see the next line
    return import_module(name)


def load_all() -> None:
    """Load what the loaded modules, and what they use, would load later: for a process that goes on
    while the project's files are replaced by another version's, which would not fit."""
    while names := {
        lazy.__name__
        for name, module in [*sys.modules.items()]
        if name.partition(".")[0] == __name__.partition(".")[0] and type(module) is ModuleType
        for lazy in [*vars(module).values()]
        if isinstance(lazy, _Lazy) and lazy.__name__ not in sys.modules
    }:
        for name in names:
            load(name)


class _Lazy(ModuleType):
    """Stands for a module that is loaded when something in it is used, in whichever thread: the
    import system makes sure that no thread sees half a module."""

    def __getattr__(self, name: str) -> object:
        return getattr(load(self.__name__), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(load(self.__name__), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(load(self.__name__), name)

    @property
    def __dict__(self) -> dict[str, object]:  # type: ignore[override]
        return vars(load(self.__name__))


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


@contextmanager
def missing(name: str) -> Iterator[None]:
    """The block cannot import this module, unless it is loaded already: for a package that does as
    well without it."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


class _Late(ModuleType):
    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: object, **options: object) -> object:
            return getattr(load(self.__name__), name)(*args, **options)

        return call
