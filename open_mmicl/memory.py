"""How much memory is free, how much of it visual features may take, and what is freed but kept."""

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from open_mmicl.lazy import lazy

torch = lazy("torch")

if TYPE_CHECKING:
    import torch

_OF_DEVICE = 0.35  # of what the weights leave free; the rest is for keys, values and activations
_OF_HOST = 0.5  # of what is available, over all processes of a launch
_KEPT = {-3: 32 << 20, -1: 256 << 20}  # glibc's M_MMAP_THRESHOLD (its largest) and M_TRIM_THRESHOLD [bytes]


class Budget(NamedTuple):
    """Bytes of features that are kept on the model's device, and further ones in host memory."""

    device: int
    host: int = 0


def host_free() -> int:
    """Bytes that this machine (or its control group) has available."""
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    try:
        allowed = int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return free
    return max(0, min(free, allowed))


def device_free(device: "torch.device") -> int:
    """Bytes free on a GPU (what torch holds unused counts as free), or on the host for ``cpu``."""
    if device.type != "cuda":
        return host_free()

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def image_budget(device: "torch.device", megabytes: int) -> Budget:
    """What the features of images may take; call it once the weights are loaded.

    Args:
        megabytes: what the user set [MiB], all of it on the device; 0: a share of the free memory, and where the device
            is a GPU as much again as half the host's free memory holds, divided among the processes on this machine.
    """
    if megabytes:
        return Budget(megabytes << 20)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = int(_OF_HOST * host_free()) // processes
    return Budget(int(_OF_DEVICE * device_free(device)), host) if device.type == "cuda" else Budget(host)


def keep_freed() -> bool:
    """Let this process keep up to 256 MiB that it frees; whether its C library can (glibc).

    A forward pass on a CPU frees and takes the same blocks of a few MiB again and again. glibc gives each back to the
    system, which clears it before it is used again: 5 % of a pass's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and all([mallopt(name, size) for name, size in _KEPT.items()])
