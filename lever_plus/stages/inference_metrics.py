"""metrics.json from samples.jsonl: every number here is a function of the per-sample lines alone."""

import dataclasses
from collections import defaultdict
from typing import Any

from lever_plus.experiments import evidence, stats
from lever_plus.experiments.samples import Samples, copied, holds_answer
from open_mmicl.metrics.vqa import ANNOTATORS, metric_of


def summarize(samples: Samples, drawn: stats.Resampling) -> dict[str, Any]:
    """The part of metrics.json that the samples decide: accuracies, intervals, comparisons, copy rates, and
    ``groups`` (:func:`by_group`) where the queries have groups.

    Accuracies, differences and intervals are in points (0-100). ``oracle`` is the best score among all
    demonstrations tried for a query at that shot; ``majority_vote_*`` answers with the demonstrations' most
    frequent answer, without the model.

    Raises:
        DamagedInputError: a method lacks queries, or has one twice.
    """
    return {
        "metric": samples.metric,
        **_accuracies(samples, drawn),
        "copy_rate": evidence.shares([samples], copied),
        "icds_hold_answer": evidence.shares([samples], holds_answer),
        **({"groups": by_group(samples, drawn)} if samples.groups else {}),
    }


def by_group(samples: Samples, drawn: stats.Resampling) -> dict[str, Any]:
    """{group: its "n_queries", and its own accuracies, intervals and comparisons}."""
    parts = {name: samples.of_group(name) for name in samples.groups}
    return {n: {"n_queries": len(s.question_ids), **_accuracies(s, drawn)} for n, s in parts.items()}


def _accuracies(samples: Samples, drawn: stats.Resampling) -> dict[str, Any]:
    table = evidence.score_table([samples])
    found = evidence.accuracies([samples], table, drawn)
    return {
        "accuracy": {m: {shot: cell["mean"] for shot, cell in by.items()} for m, by in found.items()},
        "ci95": {m: {shot: cell["ci95"] for shot, cell in by.items()} for m, by in found.items()},
        "random_sd": {k: cell["sd"] for k, cell in found.get("random", {}).items() if cell["sd"] is not None},
        "comparisons": compare_all(table, drawn),
    }


def compare_all(table: evidence.Table, drawn: stats.Resampling) -> list[dict[str, Any]]:
    """Paired comparisons of :func:`evidence.pairs` per shot; zero-shot is compared with every shot. ``word`` (better |
    worse | none) is corrected for the pair's shots as the record corrects it.
    """
    keep = ("a", "b", "shot", *(field.name for field in dataclasses.fields(stats.Comparison)), "word")
    compared = evidence.compare_pairs(table, evidence.pairs(table), drawn)
    return [{name: row[name] for name in keep} for row in compared if row["shot"] != evidence.POOLED]


def official_results(samples: Samples) -> dict[str, list[dict[str, Any]]]:
    """Files in the official result format, by name; seeds of the random baseline get a file each."""
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for s in samples.rows:
        seed = "" if s["seed"] is None else f"_seed{s['seed']}"
        files[f"vqa_result_{s['method']}_shot{s['shot']}{seed}.json"].append(
            {"question_id": s["question_id"], "answer": s["cut_answer"]}
        )
    return dict(files)


def table(metrics: dict[str, Any]) -> str:
    """The accuracies as a text table for the terminal."""
    shots = sorted({int(k) for by in metrics["accuracy"].values() for k in by})
    shown = "" if metrics.get("metric") in (None, metric_of([ANNOTATORS])) else f"accuracy: {metrics['metric']}"
    lines = [shown] if shown else []
    lines += ["accuracy, points [95 % interval]   " + "".join(f"{f'shot {k}':>22}" for k in shots)]
    lines += _table_lines(metrics, shots)
    for name, part in metrics.get("groups", {}).items():
        lines += [f"group {name}, {part['n_queries']} queries", *_table_lines(part, shots)]
    return "\n".join(lines)


def _table_lines(metrics: dict[str, Any], shots: list[int]) -> list[str]:
    lines = []
    for method, by in metrics["accuracy"].items():
        cells = []
        for k in shots:
            low, high = metrics["ci95"][method].get(str(k), (0, 0))
            cells.append(f"{by[str(k)]:6.1f} [{low:5.1f}, {high:5.1f}]" if str(k) in by else "")
        lines.append(f"  {method:<33}" + "".join(f"{c:>22}" for c in cells))
    first = next((c["b"] for c in metrics["comparisons"] if c["a"] == "v3"), None)
    for c in metrics["comparisons"]:
        if c["a"] == "v3" and c["b"] in (first, "v2"):
            low, high = c["ci95"]
            said = {"none": "no difference shown"}.get(c["word"], c["word"])
            lines.append(
                f"  v3 - {c['b']}, shot {c['shot']}: {c['diff']:+.1f} [{low:+.1f}, {high:+.1f}], n = {c['n']}, {said}"
            )
    return lines
