"""What a v3 folder tells about its training: train_log.jsonl, best.json, run.json."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lever_plus import io
from lever_plus.best import PHASES, read_best
from open_mmicl.errors import DamagedInputError

SETTINGS_SHOWN = (
    "RCE_EPOCHS", "GRPO_EPOCHS", "BATCH_SIZE", "RCE_LR", "GRPO_LR", "KL_BETA", "KL_REF", "KL_ADAPTIVE", "REWARD_MODE",
    "REWARD_ALPHA", "REWARD_BETA", "REWARD_CORRECTNESS", "RCE_OBJECTIVE", "RCE_REWARDS", "RCE_TAU_START", "RCE_TAU_END",
    "GRPO_MODE", "ADVANTAGE_SCALE", "EPS_LOW", "EPS_HIGH", "LR_SCHEDULE", "PATIENCE", "ZERO_STAGE", "NPROC",
    "SEED",
)  # fmt: skip
"""Training settings that a record lists, in this order."""

_NUMBERS = ("RCE_EPOCHS", "GRPO_EPOCHS", "RCE_LR", "GRPO_LR")


@dataclass(frozen=True)
class Training:
    """The log's lines in order, best.json and run.json; empty where a folder has none (a checkpoint from elsewhere)."""

    lines: list[dict[str, Any]]
    best: dict[str, Any]
    run: dict[str, Any]

    def epochs(self, phase: str) -> list[dict[str, Any]]:
        """The lines of a phase's epochs, in order."""
        return [line for line in self.lines if line["kind"] == "epoch" and line["phase"] == phase]

    def steps(self, phase: str) -> list[dict[str, Any]]:
        """The lines of a phase's optimiser steps, in order."""
        return [line for line in self.lines if line["kind"] == "step" and line["phase"] == phase]

    def settings(self) -> dict[str, Any]:
        """The settings of the training, by environment name."""
        return self.run.get("settings", {})

    def summary(self) -> dict[str, Any]:
        """Per phase that ran: epochs, first and last training loss, and validation from before it to its end.

        ``{"rce": {"epochs": 10, "loss": [first, last], "validation": {name: [first, last]}}, …}``
        """
        found = {}
        for phase in PHASES:
            lines = [line for line in self.epochs(phase) if line["epoch"] > 0]
            if lines:
                found[phase] = {
                    "epochs": len(lines),
                    "loss": _ends(lines, "loss"),
                    "validation": {
                        n: _ends(self.epochs(phase), n)
                        for n in _numbers(lines[-1])
                        if n.startswith("val_") and not n.endswith("_prompts")  # a price, no measure
                    },
                }
        return found


def read_training(folder: Path | None) -> Training:
    """Read a v3 folder; a missing folder or file gives an empty part.

    Raises:
        DamagedInputError: a file is there but not of the known form (says where).
    """
    if folder is None or not Path(folder).is_dir():
        return Training([], {}, {})
    folder = Path(folder)
    best, run, log = (folder / name for name in ("best.json", "run.json", "train_log.jsonl"))
    about = io.read_object(run, "run file") if io.is_there(run) else {}
    for name in ("settings", "prompts"):
        values = about.get(name, {})
        if not isinstance(values, dict) or not all(io.is_plain(value) for value in values.values()):
            raise DamagedInputError(f"run file {run}: {name} is no object of numbers and texts")
        wrong = [n for n, v in values.items() if (n in _NUMBERS or name == "prompts") and not _is_number(v)]
        if wrong:
            raise DamagedInputError(f"run file {run}: {wrong[0][:60]!r} in {name} is no number")
    return Training(read_log(log) if io.is_there(log) else [], read_best(best) if io.is_there(best) else {}, about)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of train_log.jsonl.

    A resumed run may log a step again: the last line of a (phase, kind, epoch, step) counts. A last line that breaks
    off (a killed writer) is left out.

    Raises:
        DamagedInputError: any other line is not JSON or lacks ``phase`` or ``kind``.
    """
    lines: dict[tuple, dict[str, Any]] = {}
    texts = io.read_text(path, "training log").split("\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        line = _line(text)
        if line is None:
            if number == len(texts) and lines and _breaks_off(text):
                break
            raise DamagedInputError(f"{path}: line {number} is not a line of a training log")
        key = (line["phase"], line["kind"], line.get("epoch"), line.get("step"))
        lines.pop(key, None)
        lines[key] = line
    return list(lines.values())


def _line(text: str) -> dict[str, Any] | None:
    """A line of the log; None where it is none."""
    try:
        line = json.loads(text, object_pairs_hook=lambda items: io.distinct_keys(items, ""))
    except (ValueError, RecursionError, DamagedInputError):
        return None
    known = isinstance(line, dict) and all(isinstance(line.get(name), str) for name in ("phase", "kind"))
    known = known and all(isinstance(value, (list, dict)) or io.is_plain(value) for value in line.values())
    whole = known and all(type(line[name]) is int for name in ("epoch", "step") if line.get(name) is not None)
    return line if whole and (line["kind"] != "epoch" or line.get("epoch") is not None) else None


def _is_number(value: Any) -> bool:
    """A number, or a text of one: a setting comes as it was given."""
    try:
        return value is not None and math.isfinite(float(value))
    except ValueError:
        return False


def _breaks_off(text: str) -> bool:
    """Whether a line is the beginning of a JSON object and no whole value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text.lstrip().startswith("{")
    return False


def _numbers(line: dict[str, Any]) -> list[str]:
    return [k for k, v in line.items() if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def _ends(lines: list[dict[str, Any]], name: str) -> list[float] | None:
    values = [line[name] for line in lines if isinstance(line.get(name), int | float)]
    return [values[0], values[-1]] if values else None
