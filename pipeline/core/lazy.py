"""Modules that are imported when they are first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


def submodules(package: str) -> Callable[[str], object]:
    """The `__getattr__` of `package`: a name in it is a module of it."""

    def load(name: str) -> object:
        try:
            return import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{name}":
                raise
            raise AttributeError(f"{package} has no {name}") from None

    return load


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
