"""Where the numbers of a training go besides its log: TensorBoard, Weights & Biases, Trackio (REPORT_TO)."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lever_plus.settings.word_lists import trackers
from open_mmicl.lazy import lazy

tensorboard = lazy("torch.utils.tensorboard")
tensorboard_summary = lazy("torch.utils.tensorboard.summary")


class TensorBoard:
    """Scalars by epoch in ``<folder>/tensorboard``, and the settings as hparams."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._writer = tensorboard.SummaryWriter(str(folder / "tensorboard"))
        self._config, self._told = hparams(config), False

    def log(self, scalars: Mapping[str, float], epoch: int) -> None:
        """Write the numbers of an epoch."""
        if not self._told and self._config:
            metrics = {name: 0.0 for name in scalars if name.endswith("/metric")} or {next(iter(scalars), "loss"): 0.0}
            for summary in tensorboard_summary.hparams(self._config, metrics):
                self._writer.file_writer.add_summary(summary)
            self._told = True
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Tracked:
    """A run of wandb or trackio, whose calls are the same; project ``lever-plus`` (WANDB_PROJECT names another)."""

    def __init__(self, tracker: str, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._module = importlib.import_module(tracker)
        project = os.environ.get(f"{tracker.upper()}_PROJECT") or "lever-plus"
        more = {"dir": str(folder)} if tracker == "wandb" else {}
        self._module.init(project=project, name=name, config=hparams(config), **more)

    def log(self, scalars: Mapping[str, float], epoch: int) -> None:
        """Send the numbers of an epoch."""
        self._module.log({**scalars, "epoch": epoch})

    def close(self) -> None:
        """End the run."""
        self._module.finish()


def hparams(config: Mapping[str, Any]) -> dict[str, int | float | bool | str]:
    """Of the settings those that are set: numbers and words, no paths."""
    return {k: v for k, v in config.items() if isinstance(v, (bool, int, float, str)) and v != "" and "/" not in str(v)}


def start(report_to: str, folder: Path, name: str, config: Mapping[str, Any]) -> list[Any]:
    """The trackers that REPORT_TO names, each with ``log(scalars, epoch)`` and ``close()``."""
    made: list[Any] = []
    for tracker in trackers(report_to):
        folder.mkdir(parents=True, exist_ok=True)
        usual = tracker == "tensorboard"
        made.append(TensorBoard(folder, name, config) if usual else Tracked(tracker, folder, name, config))
    return made


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """``<phase>/<name>`` of an epoch's numbers."""
    left_out = ("epoch", "step")
    numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in left_out}
    return {f"{record['phase']}/{name}": float(value) for name, value in numbers.items()}
