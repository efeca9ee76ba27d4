"""Packages whose modules are imported when they are first used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


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
