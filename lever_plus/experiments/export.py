"""The numbers of records as CSV files and TensorBoard scalars."""

import csv
import io as text_io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lever_plus import io
from lever_plus.best import PHASES
from lever_plus.experiments import adaptive, cascade
from lever_plus.experiments.record import Run
from open_mmicl.lazy import lazy

tensorboard = lazy("torch.utils.tensorboard")

Shown = dict[str, tuple[dict[str, Any], Sequence[Run]]]
"""Name of an experiment -> its record and its runs."""


def write(folder: Path, shown: Shown) -> None:
    """Write accuracy.csv, comparisons.csv, training.csv and a TensorBoard folder."""
    write_tables(folder, shown)
    write_tensorboard(folder / "tensorboard", shown)


def write_tables(folder: Path, shown: Shown) -> None:
    """Write accuracy.csv, comparisons.csv and training.csv; where a policy decides how many, adaptive.csv; where there
    are cascades, cascades.csv; where queries have groups, groups_accuracy.csv and groups_comparisons.csv, too.
    """
    write_csv(folder / "accuracy.csv", accuracy_rows(shown))
    write_csv(folder / "comparisons.csv", comparison_rows(shown))
    write_csv(folder / "training.csv", training_rows(shown))
    if rows := adaptive.csv_rows(shown):
        write_csv(folder / "adaptive.csv", rows)
    if rows := cascade.csv_rows(shown):
        write_csv(folder / "cascades.csv", rows)
    groups = {name: made["groups"] for name, (made, _) in shown.items() if "groups" in made}
    if groups:
        parts = [
            ({"experiment": name, "group": group}, part) for name, of in groups.items() for group, part in of.items()
        ]
        write_csv(folder / "groups_accuracy.csv", [row for head, part in parts for row in _accuracy_rows(head, part)])
        compared = [{**head, **flat(c)} for head, part in parts for c in part["comparisons"]]
        write_csv(folder / "groups_comparisons.csv", compared)


def accuracy_rows(shown: Shown) -> list[dict[str, Any]]:
    """One row per experiment, method and shot, points."""
    return [row for name, (made, _) in shown.items() for row in _accuracy_rows({"experiment": name}, made)]


def _accuracy_rows(head: dict[str, Any], made: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**head, "method": method, "shot": int(shot), "accuracy": cell["mean"], "ci95_low": cell["ci95"][0],
         "ci95_high": cell["ci95"][1], "sd": cell["sd"], "n": made["n_queries"]}
        for method, by_shot in made["accuracy"].items()
        for shot, cell in by_shot.items()
    ]  # fmt: skip


def comparison_rows(shown: Shown) -> list[dict[str, Any]]:
    """One row per paired comparison."""
    return [{"experiment": name, **flat(c)} for name, (made, _) in shown.items() for c in made["comparisons"]]


def flat(comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison as one row: intervals as two columns, no lists."""
    names = ("a", "b", "shot", "diff", "se", "p_value", "p_value_holm", "p_permutation", "p_permutation_holm", "alpha",
             "n", "n_images", "smallest_detectable", "n_needed", "sd", "word", "withheld")  # fmt: skip
    ends = {"ci95": comparison["ci95"], "recipe_ci95": comparison["recipe_ci95"] or [None, None]}
    bounds = {f"{k}_{end}": v[i] for k, v in ends.items() for i, end in enumerate(("low", "high"))}
    return {**{n: comparison[n] for n in names}, **bounds}


def training_rows(shown: Shown) -> list[dict[str, Any]]:
    """One row per line of the training logs."""
    return [
        {"experiment": name, "seed": run.training.settings().get("SEED"), **line}
        for name, (_, runs) in shown.items()
        for run in runs
        for line in run.training.lines
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of dicts; the columns are all keys in order of appearance, an absent value is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = text_io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    io.write_text(path, buffer.getvalue())


def write_tensorboard(folder: Path, shown: Shown) -> None:
    """Scalars ``accuracy/<method>`` and ``difference/<a>-<b>`` over the shots, a run per experiment, and the training
    curves over the epochs, a run per seed of it; replaces what an earlier call wrote.
    """
    for name, (made, runs) in shown.items():
        place = folder / name
        for old in place.rglob("events.out.tfevents.*"):
            old.unlink()
        for number, run in enumerate(runs):
            with tensorboard.SummaryWriter(str(place / f"seed{run.training.settings().get('SEED', number)}")) as writer:
                for phase in PHASES:
                    for line in run.training.epochs(phase):
                        for key, value in line.items():
                            if isinstance(value, float):
                                writer.add_scalar(f"{phase}/{key}", value, line["epoch"])
        with tensorboard.SummaryWriter(str(place)) as writer:
            for method, by_shot in made["accuracy"].items():
                for shot, cell in by_shot.items():
                    writer.add_scalar(f"accuracy/{method}", cell["mean"], int(shot))
            for c in made["comparisons"]:
                if isinstance(c["shot"], int):
                    writer.add_scalar(f"difference/{c['a']}-{c['b']}", c["diff"], c["shot"])
