"""Which accelerator a run uses. ``select_gpu`` runs before torch is imported."""

import os
import sys
import time

from lever_plus import ranks
from lever_plus.programs import ask
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

torch = lazy("torch")

_MATRIX = {"cpu": 1024, "cuda": 8192}


def gpus_here() -> list[str]:
    """Indices of the machine's NVIDIA GPUs, [] where there are none."""
    return (ask(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]) or "").split()


def cores() -> int:
    """Cores that this process may use, where the system tells; else all."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def select_gpu(device: str, gpu_id: str) -> None:
    """Make ``gpu_id`` the visible GPU, or none (DEVICE=cpu). ``CUDA_VISIBLE_DEVICES`` set by the user wins.

    On a machine without a GPU: a warning, and the run continues on the CPU.

    Raises:
        UsageError: the machine has GPUs but not this one; lists those there are.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    there = gpus_here()
    if not there:
        if device == "cuda":
            raise UsageError("DEVICE=cuda, but this machine shows no NVIDIA GPU; allowed here: auto | cpu")
        print(f"warning: no GPU on this machine (gpu_id {gpu_id} asked for); running on the CPU", file=sys.stderr)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    wanted = [part.strip() for part in gpu_id.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in there]
    if unknown or not wanted:
        raise UsageError(f"gpu_id {gpu_id} does not exist on this machine; there are: {', '.join(there)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(wanted)


def torch_device(device: str, threads: int | None = None) -> str:
    """``cuda:<local rank>`` or ``cpu`` for this process; also sets the CPU threads once.

    On the CPU each process takes ``threads``, or its share of the cores, unless OMP_NUM_THREADS says otherwise.

    Raises:
        UsageError: DEVICE=cuda and torch cannot use a GPU here.
    """
    if device != "cpu" and torch.cuda.is_available():
        index = ranks.local_rank() % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return f"cuda:{index}"
    if device == "cuda":
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        raise UsageError(f"DEVICE=cuda, but torch finds no usable GPU (CUDA_VISIBLE_DEVICES={shown!r})")
    if "OMP_NUM_THREADS" not in os.environ:
        share = cores() // ranks.local_world_size()
        torch.set_num_threads(threads or max(1, share))
    return "cpu"


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: "torch.dtype") -> float:
    """Floating-point operations a second of a large matrix product: what this device can do at best."""
    size, repeats = _MATRIX["cuda" if device.startswith("cuda") else "cpu"], 10
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(3):  # the first calls cost extra
        matrix @ matrix
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        matrix @ matrix
    synchronise(device)
    return repeats * 2.0 * size**3 / (time.perf_counter() - started)
