"""What a training run writes down: train_log.jsonl, curves (REPORT_TO), one table row per epoch on the terminal."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lever_plus import io
from lever_plus.cli import log
from lever_plus.rl import reporters

TABLE = (
    ("epoch", "{:.0f}"), ("loss", "{:.4f}"), ("reward_mean", "{:.3f}"), ("zero_variance", "{:.3f}"), ("kl", "{:.4f}"),
    ("ratio_mean", "{:.3f}"), ("clip_low", "{:.3f}"), ("clip_high", "{:.3f}"), ("entropy", "{:.3f}"),
    ("grad_norm", "{:.3f}"), ("val_rce_loss", "{:.4f}"), ("val_pairwise_accuracy", "{:.4f}"),
    ("val_expected_reward", "{:.4f}"), ("metric", "{:.4f}"), ("seconds", "{:.2f}"),
)  # fmt: skip
HEADS = {
    "reward_mean": "reward",
    "ratio_mean": "ratio", "clip_low": "clip-", "clip_high": "clip+", "grad_norm": "grad", "zero_variance": "zerovar",
    "val_rce_loss": "val_rce", "val_pairwise_accuracy": "val_pair", "val_expected_reward": "val_rew", "seconds": "s",
}  # fmt: skip
START = ("val_rce_loss", "val_pairwise_accuracy", "val_expected_reward", "val_expected_accuracy",
         "val_answer_accuracy", "metric")


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """A record as JSON has it: a number that is not finite (k3 may overflow without KL_BETA) becomes None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


class RunLog:
    """Appends records; a resumed run first drops those of the epoch that was cut off.

    Steps of an epoch are written together at its end, so that the file never holds an epoch twice.
    """

    def __init__(self, folder: Path, report_to: str = "none", config: Mapping[str, Any] | None = None) -> None:
        """``report_to``: trackers, separated by commas; ``config``: the run's settings, by environment name."""
        self.path = folder / "train_log.jsonl"
        self._folder, self._report_to, self._config = folder, report_to, config or {}
        self._trackers: list[Any] | None = None
        self._steps: list[dict[str, Any]] = []
        self._headed = False

    def rewind(self, done: dict[str, int], order: list[str]) -> None:
        """Keep the records of phases before the current one and of its finished epochs.

        ``done``: finished epochs by phase; ``order``: the run's phases.
        """
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line being written when the run was cut off
                continue
            if record["phase"] in order and record["epoch"] <= done.get(record["phase"], -1):
                kept.append(line)
        io.write_text(self.path, "".join(line + "\n" for line in kept))

    def step(self, record: dict[str, Any]) -> None:
        """One optimiser step."""
        self._steps.append({"kind": "step", **plain(record)})

    def start_phase(self) -> None:
        """The next row is printed under the column names."""
        self._headed = False

    def epoch(self, record: dict[str, Any]) -> None:
        """One epoch (0: the policy that the phase starts from): appends its steps and itself; prints a row."""
        lines = [*self._steps, {"kind": "epoch", **record}]
        self._steps = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        self._scalars(record)
        if record["epoch"] == 0:
            known = ", ".join(f"{name} {record[name]:.4f}" for name in START if name in record)
            log.info(f"{record['phase']}: starts from {known or 'a policy that nothing is held out to judge'}")
            return
        cells = [
            (HEADS.get(name, name), form.format(record[name])) for name, form in TABLE if record.get(name) is not None
        ]
        width = [max(len(head), len(cell)) for head, cell in cells]
        if not self._headed:
            log.info("  ".join(f"{head:>{w}}" for (head, _), w in zip(cells, width, strict=True)))
        self._headed = True
        log.info("  ".join(f"{cell:>{w}}" for (_, cell), w in zip(cells, width, strict=True)))

    def _scalars(self, record: dict[str, Any]) -> None:
        if self._trackers is None:
            name = str(self._config.get("EXP_NAME") or "") or self._folder.name.removesuffix(".work")
            self._trackers = reporters.start(self._report_to, self._folder, name, self._config)
        for tracker in self._trackers:
            tracker.log(reporters.scalars(record), record["epoch"])

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers or ():
            tracker.close()
