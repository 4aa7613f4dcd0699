"""Lever-Plus: choose in-context demonstrations for vision-language models."""

import os
import sys
from typing import Any

__version__ = "0.1.0"


def _is_ours() -> bool:
    """Whether this process runs a command of ours, rather than a program that uses the package."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1 : words.index("-m") + 2] if "-m" in words else []
    started = {name.split(".")[0] for name in module} | {word.rsplit(os.sep, 1)[-1] for word in words[:3]}
    return bool(started & {"lever_plus", "benchmarks", "lever-plus"})


def tells_interruptions() -> bool:
    """Whether this process says that it was interrupted: else the command that started it does, or the first rank."""
    return "LEVER_CHILD" not in os.environ and os.environ.get("RANK", "0") == "0"


def _one_line(kind: type[BaseException], value: BaseException, where: Any) -> None:
    """Ctrl-C while modules are still being imported, before cli.guard takes over: no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, value, where)
    elif tells_interruptions():
        print("\ninterrupted: nothing had begun yet", file=sys.stderr)


if _is_ours() and sys.excepthook is sys.__excepthook__:
    sys.excepthook = _one_line
