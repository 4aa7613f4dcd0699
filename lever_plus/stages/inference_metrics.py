"""metrics.json from samples.jsonl: every number here is a function of the per-sample lines alone."""

from collections import defaultdict
from typing import Any

from lever_plus.experiments import evidence, stats
from lever_plus.experiments.samples import Samples, copied, holds_answer


def summarize(samples: Samples, resamples: int, seed: int) -> dict[str, Any]:
    """The part of metrics.json that the samples decide: accuracies, intervals, comparisons, copy rates, and
    ``groups`` (:func:`by_group`) where the queries have groups.

    Accuracies, differences and intervals are in points (0-100). ``oracle`` is the best score among all
    demonstrations tried for a query at that shot; ``majority_vote_*`` answers with the demonstrations' most
    frequent answer, without the model.

    Raises:
        DamagedInputError: a method lacks queries, or has one twice.
    """
    return {
        **_accuracies(samples, resamples, seed),
        "copy_rate": evidence.shares([samples], copied),
        "icds_hold_answer": evidence.shares([samples], holds_answer),
        **({"groups": by_group(samples, resamples, seed)} if samples.groups else {}),
    }


def by_group(samples: Samples, resamples: int, seed: int) -> dict[str, Any]:
    """{group: its "n_queries", and its own accuracies, intervals and comparisons}."""
    parts = {name: samples.of_group(name) for name in samples.groups}
    return {n: {"n_queries": len(s.question_ids), **_accuracies(s, resamples, seed)} for n, s in parts.items()}


def _accuracies(samples: Samples, resamples: int, seed: int) -> dict[str, Any]:
    table = evidence.score_table([samples])
    found = evidence.accuracies([samples], table, resamples, seed)
    return {
        "accuracy": {m: {shot: cell["mean"] for shot, cell in by.items()} for m, by in found.items()},
        "ci95": {m: {shot: cell["ci95"] for shot, cell in by.items()} for m, by in found.items()},
        "random_sd": {k: cell["sd"] for k, cell in found.get("random", {}).items() if cell["sd"] is not None},
        "comparisons": compare_all(table, resamples, seed),
    }


def compare_all(table: evidence.Table, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Paired comparisons of all pairs that were evaluated, per shot; zero-shot is compared with every shot."""
    pairs = [
        (a, b, shot, (b, 0) if b == evidence.ZERO_SHOT else (b, shot))
        for a, b in evidence.PAIRS
        for shot in table.shots(a)
    ]
    pairs = [pair for pair in pairs if pair[3] in table.scores]
    if not pairs:
        return []
    columns = [table.columns(keys) for keys in ([(a, k) for a, _, k, _ in pairs], [other for *_, other in pairs])]
    compared = stats.compare_columns(*columns, table.images, resamples=resamples, seed=seed)
    return [{"a": a, "b": b, "shot": k, **c.as_dict()} for (a, b, k, _), c in zip(pairs, compared, strict=True)]


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
    lines = ["accuracy, points [95 % interval]   " + "".join(f"{f'shot {k}':>22}" for k in shots)]
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
    for c in metrics["comparisons"]:
        if (c["a"], c["b"]) == ("v3", "v2"):
            low, high = c["ci95"]
            lines.append(f"  v3 - v2, shot {c['shot']}: {c['diff']:+.1f} [{low:+.1f}, {high:+.1f}], n = {c['n']}")
    return lines
