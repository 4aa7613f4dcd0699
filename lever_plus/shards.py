"""Work over many queries that several processes share and that an interruption does not lose.

Each rank appends its finished results to a file of its own beside the output; a run that starts again
reads all of them, whatever the number of ranks was, and does only what is missing. The caller merges in
a fixed order, so the final file does not depend on ranks or interruptions. Two runs for one output may work
at once: a rank holds a lock on its file, and :func:`finish` leaves locked files to their owner.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from lever_plus import io, meeting
from lever_plus.ranks import rank, world_size
from open_mmicl.errors import DamagedInputError
from open_mmicl.lazy import lazy

dist = lazy("torch.distributed")


def partial_dir(output: Path) -> Path:
    """Where the finished parts of an output lie until it is whole."""
    return output.with_name(f".{output.name}.parts")


def sharded_map(
    keys: Sequence[Hashable],
    work: Callable[[Any], Any],
    output: Path,
    fingerprint: str,
    desc: str,
    each: int = 1,
    total: int | None = None,
) -> dict[str, Any] | None:
    """``{str(key): work(key)}`` over all keys; rank r does every ``world_size``-th missing key.

    Args:
        work: returns a JSON value.
        output: the file the results will go to; parts lie beside it until :func:`finish`.
        fingerprint: parts of another fingerprint are thrown away.
        each: queries behind a key, ``total`` of them behind all keys: what the progress bar counts.

    Returns: all results on rank 0, None on the others.
    """
    parts = partial_dir(output)
    done = _read_parts(parts, fingerprint)
    missing = [key for key in keys if str(key) not in done]
    _barrier()  # every rank has read the same parts before any of them writes
    mine = missing[rank() :: world_size()]
    queries = len(keys) * each if total is None else total
    if done and rank() == 0:
        print(f"{desc}: {min(queries, (len(keys) - len(missing)) * each)} of {queries} queries already done, going on")
    with _open_part(parts / f"{fingerprint[:16]}-{time.time_ns()}-{os.getpid()}.jsonl") as handle:
        progress = _Progress(parts, fingerprint)
        bar = tqdm(
            total=queries, initial=min(queries, (len(keys) - len(missing)) * each), desc=desc, unit="query",
            disable=rank() != 0, mininterval=1.0, dynamic_ncols=True,
        )  # fmt: skip

        def do(some: Sequence[Hashable]) -> None:
            for key in some:
                row = {"fingerprint": fingerprint, "key": str(key), "value": work(key)}
                handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                handle.flush()
                if not bar.disable:  # what all processes have done, not this one alone
                    bar.update(min(queries, progress.rows() * each) - bar.n)

        do(mine)
        _barrier()
        if not bar.disable:
            bar.update(queries - bar.n)
        bar.close()
        if rank() == 0:
            done.update(_read_parts(parts, fingerprint))
            left = [key for key in keys if str(key) not in done]
            if left:  # another run wrote results while the ranks were dividing the keys, so nobody took these
                do(left)
                done.update(_read_parts(parts, fingerprint))
        _barrier()  # until rank 0 has read it, every rank's file stays locked
    return {str(key): done[str(key)] for key in keys} if rank() == 0 else None


class _Progress:
    """Counts the finished rows of all processes, reading of each file only what is new."""

    def __init__(self, parts: Path, fingerprint: str) -> None:
        self.parts, self.pattern = parts, f"{fingerprint[:16]}-*.jsonl"
        self.seen: dict[Path, tuple[int, int]] = {}  # file: bytes read, rows among them

    def rows(self) -> int:
        """The rows there are now."""
        for path in self.parts.glob(self.pattern):
            offset, rows = self.seen.get(path, (0, 0))
            with contextlib.suppress(FileNotFoundError), path.open("rb") as handle:
                handle.seek(offset)
                new = handle.read()
                self.seen[path] = offset + len(new), rows + new.count(b"\n")
        return sum(rows for _, rows in self.seen.values())


def finish(output: Path) -> None:
    """Remove the parts once the output is written, but for those that another run is still writing."""
    parts = partial_dir(output)
    for path in parts.glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("a") as handle:
            io.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    with contextlib.suppress(OSError):  # not empty, or gone already
        parts.rmdir()


def _open_part(path: Path) -> TextIO:
    """A new file, locked for as long as it is open."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # another run has just removed the folder
            continue
        io.flock(handle.fileno(), fcntl.LOCK_SH)
        if path.exists():
            return handle
        handle.close()  # removed by another run before it was locked


def _read_parts(parts: Path, fingerprint: str) -> dict[str, Any]:
    done = {}
    for path in sorted(parts.glob("*.jsonl")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:  # another run has finished with it
            continue
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            row = _row(line)
            if row is None:
                if number == len(lines):
                    continue  # the line that was being written when the process was killed
                raise DamagedInputError(f"{path}: line {number} is damaged; remove the file to do its part again")
            if row["fingerprint"] == fingerprint:
                done[row["key"]] = row["value"]
    return done


def _row(line: str) -> dict[str, Any] | None:
    """A line of a part; None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and "value" in row and all(type(row.get(n)) is str for n in ("fingerprint", "key"))
    return row if whole else None


def _barrier() -> None:
    if world_size() == 1:
        return

    if not dist.is_initialized():
        meeting.join("gloo")
    meeting.barrier()
