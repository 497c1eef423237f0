"""Packages that take long to import and that most commands do not use."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """Stands for a module, which is imported when something of it is first used.

    For a type checker it is imported under `TYPE_CHECKING`; at run time the name is a `Lazy`.
    """

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._module), name)
