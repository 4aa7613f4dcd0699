"""metrics.json from samples.jsonl: every number here is a function of the per-sample lines alone."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from lever_plus.experiments import stats
from open_mmicl.errors import DamagedInputError
from open_mmicl.inferencer import majority_vote
from open_mmicl.metrics.vqa import normalize_answer, vqa_accuracy

PAIRS = (
    ("v3", "v2"),
    ("v3", "random"),
    ("v3", "similarity"),
    ("v3", "zero_shot"),
    ("v2", "random"),
    ("v2", "similarity"),
    ("v2", "zero_shot"),
)
Samples = Sequence[dict[str, Any]]


class ScoreTable:
    """Accuracy per (method, shot) and query. A method with several seeds enters as each query's mean."""

    def __init__(self, samples: Samples) -> None:
        self.queries = list(dict.fromkeys(s["question_id"] for s in samples))
        self.images = [{s["question_id"]: s["image_id"] for s in samples}[q] for q in self.queries]
        index = {q: i for i, q in enumerate(self.queries)}
        cells: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for s in samples:
            cells[s["method"], s["shot"]][index[s["question_id"]]].append(s["score"])
        for (method, shot), by in cells.items():
            lacking = [q for q, i in index.items() if i not in by]
            if lacking:
                raise DamagedInputError(
                    f"samples: {method} at shot {shot} lacks {len(lacking)} queries, e.g. {lacking[0]}"
                )
        self.scores = {
            key: np.array([np.mean(by[i]) for i in range(len(self.queries))]) for key, by in cells.items()
        }  # (Q,)
        self.best = {key: np.array([max(by[i]) for i in range(len(self.queries))]) for key, by in cells.items()}

    def shots(self, method: str) -> list[int]:
        """The shots a method was evaluated at."""
        return sorted(shot for name, shot in self.scores if name == method)


def summarize(samples: Samples, resamples: int, seed: int) -> dict[str, Any]:
    """The part of metrics.json that the samples decide: accuracies, intervals, comparisons, copy rates.

    Accuracies, differences and intervals are in points (0-100). ``oracle`` is the best score among all
    demonstrations tried for a query at that shot; ``majority_vote_*`` answers with the demonstrations' most
    frequent answer, without the model.
    """
    table = ScoreTable(samples)
    rows = {**table.scores, **_majority(samples, table), **_oracle(table)}
    accuracy: dict[str, dict[str, float]] = defaultdict(dict)
    ci95: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for (method, shot), scores in rows.items():
        mean, low, high = stats.accuracy_interval(scores, table.images, resamples=resamples, seed=seed)
        accuracy[method][str(shot)], ci95[method][str(shot)] = mean, [low, high]
    return {
        "accuracy": dict(accuracy), "ci95": dict(ci95), "random_sd": _seed_sd(samples),
        "comparisons": compare_all(table, resamples, seed),
        "copy_rate": _share(samples, _copied), "icds_hold_answer": _share(samples, _holds_answer),
    }  # fmt: skip


def compare_all(table: ScoreTable, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Paired comparisons of all pairs that were evaluated, per shot; zero-shot is compared with every shot."""
    found = []
    for a, b in PAIRS:
        for shot in table.shots(a):
            other = (b, 0) if b == "zero_shot" else (b, shot)
            if other in table.scores:
                result = stats.compare(
                    table.scores[a, shot], table.scores[other], table.images, resamples=resamples, seed=seed
                )
                found.append({"a": a, "b": b, "shot": shot, **result.as_dict()})
    return found


def official_results(samples: Samples) -> dict[str, list[dict[str, Any]]]:
    """Files in the official result format, by name; seeds of the random baseline get a file each."""
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for s in samples:
        seed = "" if s["seed"] is None else f"_seed{s['seed']}"
        files[f"vqa_result_{s['method']}_shot{s['shot']}{seed}.json"].append(
            {"question_id": s["question_id"], "answer": s["cut_answer"]}
        )
    return dict(files)


def table(metrics: dict[str, Any]) -> str:
    """The accuracies as a text table for the terminal."""
    shots = sorted({int(k) for by in metrics["accuracy"].values() for k in by})
    lines = ["accuracy, points [95 % interval]   " + "".join(f"{f'shot {k}':>22}" for k in shots)]
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
    return "\n".join(lines)


def _majority(samples: Samples, scores: ScoreTable) -> dict[tuple[str, int], np.ndarray]:
    votes: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for s in samples:
        if s["method"] in ("v3", "v2", "similarity") and s["shot"] > 0:
            votes[f"majority_vote_{s['method']}", s["shot"]][s["question_id"]] = vqa_accuracy(
                majority_vote(s["icd_answers"]), s["answers"]
            )
    return {key: np.array([by[q] for q in scores.queries]) for key, by in votes.items()}


def _oracle(scores: ScoreTable) -> dict[tuple[str, int], np.ndarray]:
    shots = sorted({shot for _, shot in scores.best if shot > 0})
    return {
        ("oracle", k): np.max([best for (_, shot), best in scores.best.items() if shot == k], axis=0) for k in shots
    }


def _seed_sd(samples: Samples) -> dict[str, float]:
    """Standard deviation over seeds of the random baseline's accuracy, in points, per shot."""
    by: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for s in samples:
        if s["method"] == "random":
            by[s["shot"]][s["seed"]].append(s["score"])
    return {
        str(shot): float(100 * np.std([np.mean(v) for v in seeds.values()], ddof=1))
        for shot, seeds in by.items()
        if len(seeds) > 1
    }


def _share(samples: Samples, test: Any) -> dict[str, dict[str, float]]:
    """Share (0-100) of a method's samples with demonstrations for which ``test`` holds."""
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for s in samples:
        if s["shot"] > 0:
            found[s["method"]][str(s["shot"])].append(test(s))
    return {method: {shot: 100 * float(np.mean(v)) for shot, v in by.items()} for method, by in found.items()}


def _copied(s: dict[str, Any]) -> bool:
    return s["answer"] in {normalize_answer(a) for a in s["icd_answers"]}


def _holds_answer(s: dict[str, Any]) -> bool:
    return any(vqa_accuracy(a, s["answers"]) > 0 for a in s["icd_answers"])
