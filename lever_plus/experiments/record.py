"""The experiment record in the plan's template: record.md for people, record.json for programs.

Accuracies and comparisons are made from samples.jsonl alone (evidence.py); configuration and training
result come from the v3 folder and metrics.json.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lever_plus import io, provenance
from lever_plus.data import methods
from lever_plus.experiments import adaptive, cascade, evidence, markdown, prices, stats, words
from lever_plus.experiments.places import Places
from lever_plus.experiments.samples import Samples, read_samples
from lever_plus.experiments.training import SETTINGS_SHOWN, Training, read_training
from lever_plus.settings.inference import InferenceSettings
from open_mmicl.errors import DamagedInputError, UsageError

DELTA = 1.0
"""The plan's smallest difference of interest, in points (docs/evidence.md)."""
RUN_SETTINGS_SHOWN = (
    "SAMPLER", "SAMPLE_NUM", "RL_QUERY_NUM", "RL_SHOT", "CANDIDATE_NUM", "PROMPT_ORDER", "TEST_DATA_NUM", "EVAL_SPLIT",
    "MAX_NEW_TOKENS", "NUM_BEAMS", "DATA_SEED",
)  # fmt: skip
ON_SCREEN = ("v3", "v2", "v1", "v2_lora", "label", "similarity", "random", "zero_shot")
"""Methods of the table on the screen, besides the best rival."""
BASELINES = ("zero_shot", "random", "similarity")
_MUST_AGREE = ("dataset", "lvlm", "split")


@dataclass(frozen=True)
class Run:
    """One finished inference run with the training behind it."""

    folder: Path
    samples: Samples
    metrics: dict[str, Any]
    training: Training
    places: Places = Places()
    choice: Samples | None = None  # held-out train queries, where a policy decides how many demonstrations

    @property
    def settings(self) -> dict[str, Any]:
        """The inference's settings, by environment name."""
        return self.metrics.get("run", {}).get("settings", {})


def load_run(inference_dir: Path, v3_dir: Path | None = None) -> Run:
    """Read a run's files.

    Raises:
        MissingInputError, DamagedInputError: a file is missing, unreadable, or metrics.json and samples.jsonl
        do not belong together.
    """
    metrics = _read_metrics(inference_dir / "metrics.json")
    places = Places.of_run(inference_dir, metrics)
    if (metrics.get("checkpoint") or {}).get("path"):
        metrics["checkpoint"]["path"] = places.here(metrics["checkpoint"]["path"])
    samples = read_samples(inference_dir / "samples.jsonl")
    for name, by_shot in metrics["accuracy"].items():
        for shot, value in by_shot.items() if name in samples.methods else ():
            of_samples = int(shot) in samples.shots(name) and 100 * samples.scores(name, int(shot)).mean()
            if of_samples is False or abs(of_samples - value) > 1e-6:
                raise DamagedInputError(
                    f"{inference_dir}: metrics.json and samples.jsonl disagree on {name}, shot {shot}; "
                    "run the inference again"
                )
    decided = any(methods.decides(name) for name in samples.methods)
    choice = read_samples(inference_dir / "choice_samples.jsonl") if decided else None
    training = read_training(_training_folder(metrics, v3_dir))
    return Run(inference_dir, samples, metrics, training, places, choice)


def _read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json, seen to hold what is read of it.

    Raises:
        MissingInputError, DamagedInputError.
    """
    metrics = io.read_object(path, "metrics", "bash scripts/inference_v3_best.sh")
    checkpoint, run = metrics.get("checkpoint") or {}, metrics.get("run", {})
    named = ("dataset", "split", "n_queries", "v2_checkpoint")
    try:
        numbers = [(shot, value) for by_shot in metrics["accuracy"].values() for shot, value in by_shot.items()]
        fits = (
            bool(numbers)
            and all(shot.isdecimal() and type(value) in (int, float) and io.is_plain(value) for shot, value in numbers)
            and all(isinstance(metrics["lvlm"][name], str) for name in ("name", "fingerprint"))
            and isinstance(metrics["dataset"], str)
            and isinstance(checkpoint.get("path") or "", str)
            and all(io.is_plain(value) for value in (*metrics["lvlm"].values(), *checkpoint.values()))
            and all(io.is_plain(metrics.get(name)) for name in named)
            and all(type(rate) in (int, float, type(None)) for rate in _rates(metrics))
            and all(io.is_plain(value) for value in run.get("settings", {}).values())
            and all(type(run.get("settings", {}).get(name, 1)) is int for name in ("BOOTSTRAP", "DATA_SEED"))
            and isinstance(run.get("recipe", {}).get("values", {}), dict)
        )
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise DamagedInputError(f"metrics {path}: not what an inference writes; run it again")
    return metrics


def _training_folder(metrics: dict[str, Any], v3_dir: Path | None) -> Path | None:
    """Where the checkpoint that was evaluated lies: a checkpoint named by the user has another training behind it.

    A folder that is gone, but of the name of ``v3_dir``, is that one: the results were moved as a whole.
    """
    path = (metrics.get("checkpoint") or {}).get("path")
    folder = Path(path).parent if path else Path()
    moved = v3_dir is not None and folder.name == v3_dir.name and not folder.is_dir()
    return v3_dir if folder == Path() or moved else folder


def build(
    runs: Sequence[Run], experiment: str, price: dict[str, Any], rivals: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """The content of record.json.

    Args:
        runs: one per training seed, on the same queries. price, rivals: from prices.py.
        options: ``delta`` (points), ``resamples``, ``seed`` of the bootstrap.

    Raises:
        UsageError: the runs differ in data set, LVLM, split or queries.
    """
    first = runs[0]
    for run in runs[1:]:
        for key in _MUST_AGREE:
            if run.metrics.get(key) != first.metrics.get(key):
                raise UsageError(
                    f"{run.folder} and {first.folder} differ in {key}: they are not seeds of one experiment"
                )
    delta = options.get("delta", DELTA)
    drawn = stats.Resampling(
        options.get("resamples", first.settings.get("BOOTSTRAP", stats.RESAMPLES)),
        options.get("seed", first.settings.get("DATA_SEED", 0)),
    )
    shown = evidence.summarize([run.samples for run in runs], drawn)
    shown |= adaptive_part(runs, shown["comparisons"], drawn)
    return {
        "experiment": experiment,
        "dataset": first.metrics["dataset"],
        "split": first.metrics.get("split", "val"),
        "metric": first.samples.metric,
        "lvlm": first.metrics["lvlm"],
        "delta": delta,
        "bootstrap": {**dataclasses.asdict(drawn), "clustered_by": "image"},
        "configuration": configuration(runs),
        "training": [training_of(run) for run in runs],
        **shown,
        "price": price,
        "fair_rivals": rivals,
        "reported_earlier": words.REPORTED_EARLIER.get(first.metrics["dataset"], {}),
        "runs": [
            {
                "inference": str(r.folder),
                "samples_sha256": io.sha256_file(r.samples.path),
                "n_lines": len(r.samples.rows),
            }
            for r in runs
        ],
        "provenance": provenance.provenance(),
    }


def adaptive_part(runs: Sequence[Run], comparisons: list[dict[str, Any]], drawn: stats.Resampling) -> dict[str, Any]:
    """``adaptive``, ``cascades`` and the longer ``comparisons``, where every run has methods that decide how many
    demonstrations a query gets; else nothing.
    """
    choices = [run.choice for run in runs if run.choice is not None]
    if len(choices) < len(runs):
        return {}
    ordered = evidence.same_queries([run.samples for run in runs])
    rates = [next(iter(_rates(run.metrics)), None) for run in runs]
    made: dict[str, Any] = {}
    own: list[dict[str, Any]] = []
    if (found := adaptive.of_runs(ordered, choices, rates)) is not None:
        own = adaptive.comparisons(ordered, [best["shot"] for best in found["best_fixed"]], drawn)
        made["adaptive"] = {**found, "comparisons": own}
    if cascades := cascade.of_runs(ordered, choices, rates, drawn):
        made["cascades"] = cascades
        own = own + [row for part in cascades.values() for row in part["comparisons"]]
    return {**made, "comparisons": comparisons + own}


def _rates(metrics: dict[str, Any]) -> list[Any]:
    """The LVLM's tokens a second in each part of metrics.json that has them."""
    parts = [metrics.get("adaptive") or {}, *(metrics.get("cascades") or {}).values()]
    return [part["tokens_per_second"] for part in parts if "tokens_per_second" in part]


def configuration(runs: Sequence[Run]) -> dict[str, Any]:
    """The settings that a reader needs; one that differs between the runs (SEED) is a list."""
    found: dict[str, Any] = {}
    for name in (*SETTINGS_SHOWN, *RUN_SETTINGS_SHOWN):
        source = [r.training.settings() if name in SETTINGS_SHOWN else r.settings for r in runs]
        values = [s[name] for s in source if name in s]
        if values:
            found[name] = values[0] if all(v == values[0] for v in values) else values
    return found


def training_of(run: Run) -> dict[str, Any]:
    """Losses from first to last epoch, the checkpoint that was evaluated, and its validation metric where
    best.json names it (null for a checkpoint that the user named).
    """
    best, checkpoint = run.training.best, run.metrics.get("checkpoint")
    named = Path((checkpoint or {}).get("path") or "").name
    chosen = next((e for e in (best, *best.get("per_phase", {}).values()) if e.get("file") == named), {})
    return {
        "phases": run.training.summary(),
        "checkpoint": checkpoint,
        "metric": chosen.get("metric", best.get("metric")) if chosen else None,
        "value": chosen.get("value"),
        "seed": run.training.settings().get("SEED"),
    }


def conclusion(record: dict[str, Any], lang: str) -> list[str]:
    """Sentences that the numbers allow, the main one first."""
    compared, delta = record["comparisons"], record["delta"]
    lines: list[str] = []
    first = best_rival(record)
    for b in dict.fromkeys(name for name in (first, "v2") if name is not None):
        main = evidence.find(compared, "v3", b, evidence.POOLED)
        if main is None:
            continue
        lines.append(words.verdict(main, delta, lang))
        each = [c for c in compared if (c["a"], c["b"]) == ("v3", b) and c["shot"] != evidence.POOLED]
        told = [
            f"{words.shot_name(c['shot'], lang)} {words.points(c['diff'])}{words.brackets(words.result(c, lang), lang)}"
            for c in each
        ]
        if told:
            lines.append(words.say("per_shot", lang) + words.say("comma", lang).join(told))
        lines.append(seeds_sentence(main, lang))
    for a, bases in (("v3", BASELINES), ("v2", BASELINES)):
        for base in bases:
            row = evidence.find(compared, a, base, evidence.POOLED)
            told_before = a == "v3" and base == first
            if row is not None and not told_before and (row["word"] != "none" or a == "v3"):
                lines.append(words.verdict(row, delta, lang))
    parts = [record.get("adaptive", {}), *record.get("cascades", {}).values()]
    lines += [words.verdict(row, delta, lang) for part in parts for row in part.get("comparisons", [])]
    below = [c for c in compared if c["b"] == "zero_shot" and c["shot"] == evidence.POOLED and c["word"] == "worse"]
    if below:
        lines.append(words.say("worse_than_none", lang, names=words.say("and", lang).join(c["a"] for c in below)))
    return [line for line in lines if line]


def best_rival(record: dict[str, Any]) -> str | None:
    """The rival of the highest accuracy (:func:`evidence.pairs` puts it first); None where v3 has no rival."""
    return next((c["b"] for c in record["comparisons"] if c["a"] == "v3"), None)


def seeds_sentence(main: dict[str, Any], lang: str) -> str:
    """Over how many training seeds the main comparison was made, and how they spread."""
    if main["sd"] is None:
        return words.say("one_seed", lang)
    each, mean = ", ".join(words.points(d) for d in main["each"]), words.points(main["mean"])
    recipe = words.interval(main["recipe_ci95"])
    return words.say("seeds", lang, n=len(main["each"]), each=each, mean=mean, sd=main["sd"], recipe=recipe)


def shots_of(record: dict[str, Any]) -> list[int]:
    """All shots that a method with demonstrations was evaluated at."""
    return sorted({int(k) for by in record["accuracy"].values() for k in by if int(k) > 0})


def render(record: dict[str, Any], lang: str) -> str:
    """record.md in a language (zh or en)."""
    against_v2 = [c for c in record["comparisons"] if (c["a"], c["b"]) == ("v3", "v2")]
    phases = [phase for training in record["training"] for phase in training["phases"].values()]
    return markdown.render(
        f"record.{lang}.md", r=record, w=words, lang=lang, shots=shots_of(record), conclusion=conclusion(record, lang),
        v2={str(c["shot"]): c for c in against_v2}, seeded=any(c["recipe_ci95"] for c in against_v2),
        title=words.title(record["experiment"], lang),
        validations=list(dict.fromkeys(name for p in phases for name in p["validation"])),
    )  # fmt: skip


def table(record: dict[str, Any], lang: str) -> str:
    """The table for the terminal: accuracy of the methods per shot, v3 against v2, for all queries and for each group
    of them, then the first sentences. At most 100 columns; the record has the rest.
    """
    shots = shots_of(record)
    head = words.say("accuracy_head", lang)
    lines = [f"{words.title(record['experiment'], lang)} · {record['dataset']} · n = {record['n_queries']}", ""]
    lines += [_row(head, [f"shot {k}" for k in shots]), *_table_rows(record, shots, lang)]
    for name, part in record.get("groups", {}).items():
        lines += ["", f"{words.group(name, lang)} · n = {part['n_queries']}", *_table_rows(part, shots, lang)]
    said = [line for line in conclusion(record, lang) if "shot_num=" not in line][:2]
    return "\n".join([*lines, "", *(wrapped for line in said for wrapped in words.wrap(line, 100))])


def _table_rows(record: dict[str, Any], shots: Sequence[int], lang: str) -> list[str]:
    """The rows of a record's, or of one group's, accuracies, and v3 - v2."""
    lines = []
    first = best_rival(record)
    for name, by_shot in record["accuracy"].items():
        if name in words.UPPER or "majority" in name or name in methods.known() and name not in (*ON_SCREEN, first):
            continue
        cells = [by_shot["0"]] if list(by_shot) == ["0"] else [by_shot.get(str(k)) for k in shots]
        lines.append(_row(words.short(name, lang), [words.accuracy(cell) for cell in cells]))
    for b in dict.fromkeys(name for name in (first, "v2") if name is not None):
        compared = {c["shot"]: c for c in record["comparisons"] if (c["a"], c["b"]) == ("v3", b)}
        if not compared:
            continue
        told = []
        for c in (compared.get(k) for k in shots):
            ends = "" if c is None else words.interval(c["ci95"]).replace(", ", ",")
            told.append("" if c is None else f"{words.points(c['diff'])} {ends}")
        lines.append(_row(f"v3 − {words.short(b, lang)}", told))
    return lines


def write(record: dict[str, Any], out_dir: Path, lang: str) -> str:
    """Write record.json and record.md; returns the table for the terminal."""
    io.write_json(out_dir / "record.json", record, indent=1)
    io.write_text(out_dir / "record.md", render(record, lang))
    return table(record, lang)


def build_priced(
    settings: InferenceSettings, runs: Sequence[Run], experiment: str, delta: float = DELTA
) -> dict[str, Any]:
    """:func:`build` with the price read from the provenance of the data and the runs."""
    online = sum(sum(r.training.run.get("prompts", {}).values()) for r in runs)
    price = prices.read_price(settings, [r.folder for r in runs], online)
    return build(runs, experiment, price, prices.fair_rivals(settings, price), delta=delta)


def _row(head: str, cells: Sequence[str]) -> str:
    return head + " " * max(0, 23 - words.columns(head)) + "".join(f" {cell:>18}" for cell in cells)
