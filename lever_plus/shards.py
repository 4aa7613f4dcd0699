"""Work over many queries that several processes share and that an interruption does not lose.

Each rank appends its finished results to a file of its own beside the output; a run that starts again
reads all of them, whatever the number of ranks was, and does only what is missing. The caller merges in
a fixed order, so the final file does not depend on ranks or interruptions.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from open_mmicl.errors import DamagedInputError


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def partial_dir(output: Path) -> Path:
    """Where the finished parts of an output lie until it is whole."""
    return output.with_name(f".{output.name}.parts")


def sharded_map(
    keys: Sequence[Hashable],
    work: Callable[[Any], Any],
    output: Path,
    fingerprint: str,
    desc: str,
    unit: str = "query",
) -> dict[str, Any] | None:
    """``{str(key): work(key)}`` over all keys; rank r does every ``world_size``-th missing key.

    Args:
        work: returns a JSON value.
        output: the file the results will go to; parts lie beside it until :func:`finish`.
        fingerprint: parts of another fingerprint are thrown away.

    Returns: all results on rank 0, None on the others.
    """
    parts = partial_dir(output)
    done = _read_parts(parts, fingerprint)
    missing = [key for key in keys if str(key) not in done]
    _barrier()  # every rank has read the same parts before any of them writes
    mine = missing[rank() :: world_size()]
    if done and rank() == 0:
        print(f"{desc}: {len(keys) - len(missing)} of {len(keys)} already done, going on")
    parts.mkdir(parents=True, exist_ok=True)
    path = parts / f"{fingerprint[:16]}-{time.time_ns()}-{rank()}.jsonl"
    with path.open("a", encoding="utf-8") as handle:
        bar = tqdm(mine, desc=desc, unit=unit, disable=rank() != 0, mininterval=1.0, dynamic_ncols=True)
        for key in bar:
            line = json.dumps(
                {"fingerprint": fingerprint, "key": str(key), "value": work(key)}, ensure_ascii=False, allow_nan=False
            )
            handle.write(line + "\n")
            handle.flush()
    _barrier()
    if rank() != 0:
        return None
    done = _read_parts(parts, fingerprint)
    return {str(key): done[str(key)] for key in keys}


def finish(output: Path) -> None:
    """Remove the parts once the output is written."""
    shutil.rmtree(partial_dir(output), ignore_errors=True)


def _read_parts(parts: Path, fingerprint: str) -> dict[str, Any]:
    done = {}
    for path in sorted(parts.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    continue  # the line that was being written when the process was killed
                raise DamagedInputError(
                    f"{path}: line {number} is damaged; remove the file to do its part again"
                ) from error
            if row["fingerprint"] == fingerprint:
                done[row["key"]] = row["value"]
    return done


def _barrier() -> None:
    if world_size() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    dist.barrier()
