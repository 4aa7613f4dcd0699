"""Finished inference runs side by side, paired on the queries they share.

    python -m lever_plus.experiments.compare RUN[:METHOD] RUN[:METHOD] … [--NAME value …]

A run is a folder under icl_inference (its name), a path, or the EXP_NAME it was made with; several joined by commas are
the training seeds of one recipe, whose intervals are over queries and seeds. METHOD is v3 where a run has it, else its
first. Writes experiments/compare_<runs>/ (compare_<EXP_NAME>/ where that is set): compare.md, compare.html,
compare.json, accuracy.csv and comparisons.csv, and prints the table.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import cli, config, io, paths
from lever_plus.cli import log
from lever_plus.experiments import compare_report, evidence, stats, words
from lever_plus.experiments.export import flat, write_csv
from lever_plus.experiments.record import Run, load_run
from lever_plus.experiments.samples import ANY_LENGTH, Samples
from lever_plus.settings.experiment import ExperimentSettings
from lever_plus.settings.inference import InferenceSettings
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError

PROMPT_SETTINGS = ("PROMPT_ORDER", "MAX_NEW_TOKENS", "NUM_BEAMS", "LENGTH_PENALTY", "EVAL_SPLIT")
"""Settings that make the same demonstrations another prompt, or another answer."""

LONGEST_LABEL = 28


@dataclass(frozen=True)
class Side:
    """One run and the method of it that is compared, or the runs of one recipe's training seeds (``more``)."""

    label: str
    run: Run
    method: str
    more: tuple[Run, ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs of all seeds."""
        return (self.run, *self.more)


def compare(sides: Sequence[Side], drawn: stats.Resampling = stats.USUAL) -> dict[str, Any]:
    """Accuracy of each side and all paired comparisons, on the queries that every run has; a side of several seeds
    enters as each query's mean over them, and its comparisons have ``recipe_ci95``.

    Returns: ``n_shared``, ``n_each``, ``runs``, ``accuracy`` {label: {shot: {mean, ci95}}}, ``comparisons`` (fields of
    :func:`evidence.compare_pair`).

    Raises:
        UsageError: the runs differ in data set, model or prompts, or share no query (says in what).
    """
    check(sides)
    shared = set.intersection(*(set(run.samples.question_ids) for side in sides for run in side.runs))
    if not shared:
        raise UsageError("the runs share no query")
    flat_runs = iter(evidence.same_queries([_only(run.samples, shared) for side in sides for run in side.runs]))
    kept = [[next(flat_runs) for _ in side.runs] for side in sides]
    scores, averaged = {}, set()
    fixed = sorted({k for side, seeds in zip(sides, kept, strict=True) if side.method not in ANY_LENGTH
                    for k in seeds[0].shots(side.method)})  # fmt: skip
    for side, seeds in zip(sides, kept, strict=True):
        shots = seeds[0].shots(side.method)
        if any(samples.shots(side.method) != shots for samples in seeds):
            raise UsageError(f"{side.label}: the seeds have not all been evaluated with the same shots")
        if side.method in ANY_LENGTH:  # compared with the others at each of their shots
            own = np.stack([samples.scores(side.method, shots[0]) for samples in seeds])
            scores |= {(side.label, shot): own for shot in fixed or shots}
            continue
        for shot in shots:
            scores[side.label, shot] = np.stack([samples.scores(side.method, shot) for samples in seeds])
            if len(seeds[0].seeds(side.method, shot)) > 1:
                averaged.add((side.label, shot))
    table = evidence.Table(kept[0][0].images, scores, frozenset(averaged))
    pairs = itertools.combinations([side.label for side in sides], 2)
    rows = [row for a, b in pairs for row in evidence.compare_pair(table, a, b, drawn)]
    columns = np.stack([values.mean(axis=0) for values in scores.values()], axis=1)
    intervals = stats.accuracy_intervals(columns, table.images, resamples=drawn.resamples, seed=drawn.seed)
    accuracy: dict[str, Any] = {}
    for (label, shot), (mean, low, high) in zip(scores, intervals, strict=True):
        accuracy.setdefault(label, {})[str(shot)] = {"mean": mean, "ci95": [low, high]}
    return {
        "n_shared": len(shared),
        "n_each": {side.label: len(side.run.samples.question_ids) for side in sides},
        "runs": {side.label: _identity_of(side) for side in sides},
        "accuracy": accuracy,
        "comparisons": rows,
    }


def check(sides: Sequence[Side]) -> None:
    """Refuse runs that are not comparable.

    Raises:
        UsageError: names the runs and what differs.
    """
    first = sides[0]
    for side, run in [(one, run) for one in sides for run in one.runs][1:]:
        differ = [
            f"{what} ({ours} and {theirs})"
            for what, ours, theirs in zip(_IDENTITY, _identity(first.run), _identity(run), strict=True)
            if ours != theirs
        ]
        if not differ:
            texts = _texts(first.run.samples)
            other = _texts(run.samples)
            changed = [q for q in texts.keys() & other.keys() if texts[q] != other[q]]
            differ = [f"question or annotations of {len(changed)} shared queries"] if changed else []
        if differ:
            raise UsageError(f"{first.label} and {side.label} cannot be compared, they differ in: {'; '.join(differ)}")


def text(found: dict[str, Any], delta: float, lang: str) -> str:
    """The table for the terminal."""
    shots = compare_report.shots(found)
    width = max(len(label) for label in found["accuracy"])
    lines = [compare_report.shared(found, lang), " " * (width + 2) + "".join(f"{f'shot {k}':>19}" for k in shots)]
    for name, by in found["accuracy"].items():
        told = [words.accuracy(by.get(str(k))) for k in shots]
        lines.append(f"{name:<{width + 2}}" + "".join(f"{cell:>19}" for cell in told))
    for row in found["comparisons"]:
        lines.append(f"{words.shot_name(row['shot'], lang)}: {words.verdict(row, delta, lang)}")
    return "\n".join([*lines, compare_report.limits(found, lang)])


def sides_of(names: Sequence[str], s: InferenceSettings) -> list[Side]:
    """Load the runs.

    Raises:
        UsageError: fewer than two, one named twice, or an unknown method. MissingInputError: no such run (names those
        there are). DamagedInputError.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(f"name at least two different runs to compare; there are: {there(s)}")
    sides = []
    for name in names:
        found = find_seeds(name, s)
        seeds = [load_run(folder) for folder, _ in found]
        run, method = seeds[0], found[-1][1]
        method = method or ("v3" if "v3" in run.samples.methods else run.samples.methods[0])
        for one in seeds:
            if method not in one.samples.methods:
                raise UsageError(f"{name}: the run has no method {method!r}; it has: {', '.join(one.samples.methods)}")
        told = label(name, run, method) + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else "")
        sides.append(Side(told, run, method, tuple(seeds[1:])))
    if len({side.label for side in sides}) < len(sides):
        sides = [dataclasses.replace(side, label=name) for name, side in zip(names, sides, strict=True)]
    return sides


def find_seeds(name: str, s: InferenceSettings) -> list[tuple[Path, str]]:
    """:func:`find` of a name, or of each of several with commas between (a method stands after the last).

    Raises:
        MissingInputError. UsageError: the same run twice.
    """
    words = name.split(",")
    if len(words) == 1 or Path(name).is_dir():
        return [find(name, s)]
    found = [find(word, s) for word in words]
    if len({folder for folder, _ in found}) < len(found) or any(method for _, method in found[:-1]):
        raise UsageError(f"{name}: name each seed's run once, and the method after the last")
    return found


def find(name: str, s: InferenceSettings) -> tuple[Path, str]:
    """(folder, method or "") of a run: a path, a folder under icl_inference, or an EXP_NAME, each with or without
    :METHOD. Of several runs of an EXP_NAME the one of most queries.

    Raises:
        MissingInputError: no such run; names those there are.
    """
    for place, method in ((name, ""), tuple(name.rpartition(":")[::2])):
        own = [paths.inference_dir(s, place)] if config.is_name(place) else []
        for folder in (Path(place), *own) if place else ():
            if (folder / "metrics.json").is_file():
                return folder, method
        own = [(n, folder) for folder, exp, n in runs(s) if exp and exp == place]
        if own:
            return max(own)[1], method
    raise MissingInputError(f"no run {name!r}; there are: {there(s)}")


def runs(s: InferenceSettings) -> list[tuple[Path, str, int]]:
    """(folder, EXP_NAME, number of queries) of the finished runs of the data set; what cannot be read is left out."""
    found = []
    for file in sorted(paths.inference_dir(s, "x").parent.glob("*/metrics.json")):
        try:
            metrics = io.read_object(file, "metrics")
            found.append((file.parent, str(metrics["run"]["settings"].get("EXP_NAME", "")), int(metrics["n_queries"])))
        except (DamagedInputError, MissingInputError, KeyError, TypeError, ValueError, AttributeError):
            continue
    return found


def label(name: str, run: Run, method: str) -> str:
    """What a run is called in tables and charts: its name as given, or something shorter where that is long."""
    exp = str(run.settings.get("EXP_NAME") or "")
    if len(name) <= LONGEST_LABEL or not exp:
        return name
    return f"{exp}:{method}"


def output_dir(s: InferenceSettings, names: Sequence[str], sides: Sequence[Side]) -> Path:
    """Where the comparison goes; another comparison of a name like it is never overwritten."""
    told = s.exp_name or "_vs_".join(re.sub(r"[^\w.-]+", "-", Path(name).name) for name in names)
    identity = {side.label: _identity_of(side) for side in sides}
    whole = f"compare_{told}"
    room = config.LONGEST_NAME - len("_999")  # bytes, of a name that a number may follow
    if len(whole.encode()) > room:
        digest = _digest(identity)
        whole = f"{whole.encode()[: room - len(digest) - 1].decode(errors='ignore')}_{digest}"
    for number in itertools.count(1):
        out = paths.experiment_dir(s, whole if number == 1 else f"{whole}_{number}")
        file = out / "compare.json"
        if not file.is_file() or io.read_object(file, "comparison").get("runs") == identity:
            return out
    raise AssertionError


def _identity_of(side: Side) -> dict[str, Any]:
    seeds = {"seeds": [str(run.folder) for run in side.runs]} if side.more else {}
    return {"folder": str(side.run.folder), "method": side.method, **seeds}


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def there(s: InferenceSettings) -> str:
    """The finished runs of the data set, in words."""
    told = [
        f"{folder.name} (EXP_NAME={exp}, n = {n})" if exp else f"{folder.name} (n = {n})" for folder, exp, n in runs(s)
    ]
    return ", ".join(told) or f"none in {paths.inference_dir(s, 'x').parent}"


_IDENTITY = ("data set", "LVLM", "LVLM fingerprint", "prompt format", *PROMPT_SETTINGS)


def _identity(run: Run) -> tuple[Any, ...]:
    lvlm, recipe = run.metrics["lvlm"], run.metrics.get("run", {}).get("recipe", {}).get("values", {})
    words_of_prompt = recipe.get("prompt_format")
    rest = (run.settings.get(name) for name in PROMPT_SETTINGS)
    return (run.metrics["dataset"], lvlm["name"], lvlm["fingerprint"], words_of_prompt, *rest)


def _texts(samples: Samples) -> dict[int, tuple[Any, ...]]:
    return {r["question_id"]: (r["question"], r["image_id"], tuple(r["answers"])) for r in samples.rows}


def _only(samples: Samples, wanted: set[int]) -> Samples:
    return Samples([row for row in samples.rows if row["question_id"] in wanted], samples.path)


def command(names: list[str], s: ExperimentSettings, dry_run: bool) -> int:
    """``compare A B …``: check, compare, write. Raises: as :func:`check` and :func:`sides_of`."""
    sides = sides_of(names, s)
    if dry_run:
        check(sides)
        log.info(f"dry run: would compare {', '.join(side.label for side in sides)}")
        return 0
    found = compare(sides, stats.Resampling(s.bootstrap, s.data_seed))
    out = output_dir(s, names, sides)
    io.write_json(out / "compare.json", found, indent=1)
    write_csv(
        out / "accuracy.csv",
        [{"run": label, "shot": int(k), "accuracy": c["mean"], "ci95_low": c["ci95"][0], "ci95_high": c["ci95"][1]}
         for label, by in found["accuracy"].items() for k, c in by.items()],
    )  # fmt: skip
    io.write_text(out / "compare.md", compare_report.markdown(found, s.delta, s.record_lang))
    io.write_text(out / "compare.html", compare_report.html(found, s.delta, s.record_lang))
    write_csv(out / "comparisons.csv", [flat(row) for row in found["comparisons"]])
    log.info(f"{text(found, s.delta, s.record_lang)}\n{out / 'compare.md'}\n{out / 'compare.html'}")
    return 0


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    return cli.command_main(ExperimentSettings, command, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
