"""Modules that are imported when something of them is first used.

A command's help, its checks and its "done before" need no torch, which alone takes seconds to import. Modules that
only the work needs are named at the top like any other, ``torch = lazy("torch")``, and come in with the first use.
"""

import importlib
import importlib.util
from typing import Any


class LazyModule:
    """Stands for a module; see :func:`lazy`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(self._name)
        try:
            return getattr(module, attribute)
        except AttributeError:  # a module of the package that nobody has imported yet, as ``from … import`` finds it
            if not hasattr(module, "__path__") or importlib.util.find_spec(f"{self._name}.{attribute}") is None:
                raise
        return importlib.import_module(f"{self._name}.{attribute}")

    def __repr__(self) -> str:
        return f"<lazy module {self._name}>"


def lazy(name: str) -> Any:
    """The module ``name``, imported with the first use of one of its attributes."""
    return LazyModule(name)
