"""The arms of one experiment side by side: what a sweep over settings has shown.

Writes experiments/exp<name>/sweep.md, sweep.csv and sweep.json from the arms' records.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lever_plus import io, paths
from lever_plus.cli import log
from lever_plus.experiments import evidence, words
from lever_plus.experiments.arms import Arm
from lever_plus.experiments.export import write_csv
from lever_plus.experiments.markdown import row as row_of
from lever_plus.experiments.markdown import tame


def rows(arms: Sequence[Arm], made: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm: the settings in which the arms differ, the validation metric of the evaluated checkpoints (mean
    over seeds; None where one has none), v3's accuracy per shot, and its pooled comparison with v2.
    """
    used = {arm.name: {**arm.settings, **arm.overridden} for arm in arms}
    varied = [n for n in used[arms[0].name] if len({values[n] for values in used.values()}) > 1]
    found = []
    for arm in arms:
        one = made[arm.name]
        values = [training["value"] for training in one["training"]]
        known = bool(values) and None not in values
        found.append({
            "arm": arm.name, "settings": {name: used[arm.name][name] for name in varied},
            "metric": one["training"][0]["metric"] if known else None,
            "validation": sum(values) / len(values) if known else None,
            "accuracy": {shot: cell["mean"] for shot, cell in one["accuracy"]["v3"].items()},
            "against_v2": evidence.find(one["comparisons"], "v3", "v2", evidence.POOLED),
        })  # fmt: skip
    return found


def best(found: Sequence[dict[str, Any]]) -> str | None:
    """The arm of the highest validation metric; None where one has none, or the metrics are not the same."""
    if any(row["validation"] is None for row in found) or len({row["metric"] for row in found}) > 1:
        return None
    return max(found, key=lambda row: row["validation"])["arm"]


def markdown(experiment: str, found: Sequence[dict[str, Any]], lang: str) -> str:
    """The table, and which arm validation chose."""
    shots = list(found[0]["accuracy"])
    chosen = best(found)
    heads = [words.say("arm", lang), words.say("validation_head", lang)]
    heads += [f"shot {shot}" for shot in shots] + ["v3 − v2"]
    lines = [f"# {tame(words.title(f'exp{experiment}', lang))}", "", row_of(heads), "| --- " * len(heads) + "|"]
    for row in found:
        told = " ".join(f"{name}={value}" for name, value in row["settings"].items())
        value = "—" if row["validation"] is None else f"{row['validation']:.4f}"
        against = row["against_v2"]
        shown = "—" if against is None else f"{words.points(against['diff'])} {words.interval(against['ci95'])}"
        mark = "**" if row["arm"] == chosen else ""
        cells = [f"{mark}{told}{mark}", value, *(f"{row['accuracy'][shot]:.1f}" for shot in shots), shown]
        lines.append(row_of(cells))
    if chosen is None:
        told = words.say("no_best", lang)
    else:
        told = words.say("bold", lang, name=words.validation(found[0]["metric"], lang))
    return "\n".join([*lines, "", told, ""])


def write(runner: Any, experiment: str, arms: Sequence[Arm], made: Mapping[str, dict[str, Any]]) -> None:
    """Write the sweep's files and print its table."""
    found, lang = rows(arms, made), runner.settings.record_lang
    out = paths.experiment_dir(runner.settings, f"exp{experiment}")
    io.write_json(out / "sweep.json", {"best": best(found), "arms": found}, indent=1)
    io.write_text(out / "sweep.md", markdown(experiment, found, lang))
    write_csv(out / "sweep.csv", [_flat(row) for row in found])
    log.info(f"{markdown(experiment, found, lang)}\n{out / 'sweep.md'}")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    against = row["against_v2"] or {"diff": None, "ci95": [None, None], "word": None}
    accuracy = {f"accuracy_shot{shot}": value for shot, value in row["accuracy"].items()}
    low, high = against["ci95"]
    return {"arm": row["arm"], **row["settings"], "validation": row["validation"], **accuracy,
            "v3_minus_v2": against["diff"], "ci95_low": low, "ci95_high": high, "word": against["word"]}  # fmt: skip
