"""best.json of a v3 folder: which checkpoint validation chose, of all and of each phase."""

from pathlib import Path
from typing import Any

from lever_plus import io
from open_mmicl.errors import DamagedInputError

PHASES = ("rce", "grpo")  # of v3, in their order
MAKE = "bash scripts/train_v3.sh"
UNCOMPARED = "none (nothing held out): the last epoch of the last phase"
"""best.json's ``metric`` where there were no held-out queries: training losses of two phases are no common measure,
so nothing is compared, and every ``value`` is null.
"""
_FIELDS = {"file": str, "phase": str, "epoch": int, "value": (int, float)}


def read_best(path: Path) -> dict[str, Any]:
    """``{"metric", "file", "phase", "epoch", "value", "per_phase": {phase: {"file", "phase", "epoch", "value"}}}``.

    ``value`` is None where ``metric`` is :data:`UNCOMPARED`. Every entry is checked, whichever of them is used: a
    file lies in the folder itself, nowhere else.

    Raises:
        MissingInputError: no such file. DamagedInputError: an entry is missing, of the wrong type, or names a file
        of another folder.
    """
    best = io.read_object(path, "best.json", MAKE)

    def damaged(problem: str) -> DamagedInputError:
        return DamagedInputError(f"{path} is not a best.json ({problem}); remove it and run {MAKE}")

    per_phase = best.get("per_phase")
    if not isinstance(per_phase, dict) or not isinstance(best.get("metric"), str) or not io.is_plain(best["metric"]):
        raise damaged("per_phase or metric is missing or of the wrong type")
    for entry in (best, *per_phase.values()):
        for name, kind in _FIELDS.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if name == "value" and value is None and isinstance(entry, dict) and best["metric"] == UNCOMPARED:
                continue
            if not isinstance(value, kind) or isinstance(value, bool) or not io.is_plain(value):
                raise damaged(f"{name} is missing or of the wrong type")
        if not io.is_file_name(entry["file"]):
            raise damaged(f"{entry['file'][:60]!r} is no file of this folder")
    return best


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint that a v3 folder's best.json names.

    Raises:
        MissingInputError, DamagedInputError: see :func:`read_best`.
    """
    return folder / read_best(folder / "best.json")["file"]
