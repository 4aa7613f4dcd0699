"""How the processes of one run meet and wait for one another: for minutes, aloud, and open to signals.

torch waits inside C++, where no signal is seen, and for the first meeting as long as for every later one (days: a
process may still ask the LVLM). Here the first meeting has its own limit, and every wait is a loop of short looks.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lever_plus import ranks
from open_mmicl.errors import InterruptedRunError, UsageError
from open_mmicl.lazy import lazy

dist = lazy("torch.distributed")

LIMIT = 900.0  # seconds; processes start together, the slowest may still load its libraries from a network drive
TELL_AFTER = 10.0  # seconds
LOOK = 0.05  # seconds
WORK = timedelta(days=30)  # once all are there; one that died is noticed by its broken connection


def join(backend: str, limit: float = LIMIT) -> None:
    """Make the process group of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; returns once all processes are there.

    Raises:
        UsageError: one of them is wrong or missing, or not all processes came within ``limit`` seconds.
    """
    rank, world = ranks.rank(), ranks.world_size()
    deadline = time.monotonic() + limit
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not (port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 2**16):
        raise UsageError(_left(f"MASTER_ADDR={address} MASTER_PORT={port} name no place to meet", rank, world))
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts:
        _wait(lambda: _answers(address, int(port)), "process 0", deadline, rank, world)
    try:
        tcp = dist.TCPStore(
            address, int(port), world, is_master=hosts, timeout=timedelta(seconds=60), wait_for_workers=False,
            multi_tenant=hosts,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:  # the port is taken, or the name is nobody's
        said = " ".join(str(error).split())[:200]
        raise UsageError(_left(f"no meeting at {address}:{port} ({said})", rank, world)) from error
    store = dist.PrefixStore(f"lever_plus/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    store.set(f"here/{rank}", "1")
    missing = [other for other in range(world) if other != rank]

    def all_here() -> bool:
        missing[:] = [other for other in missing if not store.check([f"here/{other}"])]
        return not missing

    _wait(all_here, lambda: "process " + ", ".join(map(str, missing[:8])), deadline, rank, world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WORK)


def barrier() -> None:
    """Wait for all processes, however long they work.

    Raises:
        InterruptedRunError: one of them has ended.
    """
    try:
        work = dist.barrier(async_op=True)
        pause = 0.0005
        while not work.is_completed():
            time.sleep(pause)
            pause = min(pause * 1.5, LOOK)
        work.wait()
    except RuntimeError as error:
        raise InterruptedRunError("another process of this run has ended; what is done is kept") from error


def _wait(done: Callable[[], bool], whom: str | Callable[[], str], deadline: float, rank: int, world: int) -> None:
    started, told = time.monotonic(), False
    while not done():
        now = time.monotonic()
        name = whom if isinstance(whom, str) else whom()
        if now > deadline:
            raise UsageError(_left(f"{name} of {world} did not come", rank, world))
        if not told and now - started > TELL_AFTER:
            told = True
            left = f"{(deadline - now) / 60:.0f} more minutes"
            print(_left(f"waiting for {name} of {world}, {left}", rank, world), file=sys.stderr, flush=True)
        time.sleep(LOOK)


def _left(what: str, rank: int, world: int) -> str:
    return (
        f"{what} (RANK={rank} WORLD_SIZE={world} are set in the environment; where nobody starts the other processes, "
        "unset them)"
    )


def _answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except (OSError, UnicodeError):  # not there yet, or not a name at all
        return False


def gathered(value: Any, world: int) -> list[Any]:
    """``value`` of every process, in order of rank; those that are early wait open to signals."""
    barrier()
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Rank 0's ``value``, in every process."""
    world = ranks.world_size()
    return value if world == 1 else gathered(value, world)[0]
