"""Modules that are imported when something of them is first used.

A command's help, its checks and its "done before" need no torch, which alone takes seconds to import. Modules that
only the work needs are named at the top like any other, ``torch = lazy("torch")``, and come in with the first use.
"""

import importlib
from typing import Any


class LazyModule:
    """Stands for a module; see :func:`lazy`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)

    def __repr__(self) -> str:
        return f"<lazy module {self._name}>"


def lazy(name: str) -> Any:
    """The module ``name``, imported with the first use of one of its attributes."""
    return LazyModule(name)
