"""Which of the processes that work together this is, as torchrun and job operators say it. No torch import."""

import contextlib
import os
import socket

from open_mmicl.errors import UsageError

LARGEST = 2**20
_LOOPBACKS = ("lo", "lo0")  # Linux, macOS


def _number(name: str, default: int, lo: int) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and lo <= int(text) <= LARGEST):
        raise UsageError(
            f"{name}={text} is not allowed: whole number >= {lo} (torchrun sets it; unset it where nobody starts "
            "several processes)"
        )
    return int(text)


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return _number("WORLD_SIZE", 1, 1)


def rank() -> int:
    """This process's number, 0 without torchrun.

    Raises:
        UsageError: not below the number of processes.
    """
    number = _number("RANK", 0, 0)
    if number >= world_size():
        raise UsageError(f"RANK={number} is not allowed: below WORLD_SIZE={world_size()}")
    return number


def local_rank() -> int:
    """This process's number on its machine."""
    return _number("LOCAL_RANK", 0, 0)


def local_world_size() -> int:
    """Number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, 1)


def stay_on_this_machine() -> None:
    """Have gloo talk over the loopback, for processes of one machine, unless GLOO_SOCKET_IFNAME is set.

    It would ask resolvers for the machine's own name, which need not be known to any: seconds to minutes of silence.
    """
    with contextlib.suppress(OSError):  # a system that lists no interfaces: gloo finds one itself
        there = {name for _, name in socket.if_nameindex()}
        for name in _LOOPBACKS:
            if name in there:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
