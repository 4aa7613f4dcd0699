"""How many demonstrations: what a policy that decides their number per query is worth, from its samples alone.

The policy's picks are the same whether it may stop or not, so its answer after n picks is that of the fixed shot n (of
the zero-shot prompt for n = 0). Every query's answers at all lengths 0 to S are therefore known, S being the most
demonstrations that it may take, and so is whether stopping where it did was right.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lever_plus.experiments import evidence, stats
from lever_plus.experiments.samples import Samples
from open_mmicl.errors import DamagedInputError

METHOD, FIXED, BEST_FIXED = "v3_adaptive", "v3", "v3_best_fixed"
BINS = 10  # of the reliability curve, over STOP probabilities from 0 to 1


def limit(samples: Samples) -> int:
    """S, the most demonstrations that the policy may take."""
    return samples.shots(METHOD)[0]


def by_length(samples: Samples) -> np.ndarray:
    """Scores of the policy's own pointer after 0 to S picks, (n, S + 1) in [0, 1].

    Raises:
        DamagedInputError: the run lacks the zero-shot answers or a fixed shot.
    """
    wanted = [(evidence.ZERO_SHOT, 0), *((FIXED, k) for k in range(1, limit(samples) + 1))]
    lacking = [f"{method} at shot {k}" for method, k in wanted if k not in samples.shots(method)]
    if lacking:
        raise DamagedInputError(f"{samples.path}: {METHOD} is there without {', '.join(lacking)}")
    return np.stack([samples.scores(method, k) for method, k in wanted], axis=1)


def chosen(samples: Samples) -> np.ndarray:
    """Number of demonstrations that the policy chose, (n,)."""
    return np.array([len(row["icd_ids"]) for row in samples.cells[METHOD, limit(samples), None]])


def stop_probabilities(samples: Samples) -> np.ndarray:
    """P(STOP) before each pick of the policy's pointer, (n, S).

    Raises:
        DamagedInputError: a line lacks them.
    """
    rows, shots = samples.cells[METHOD, limit(samples), None], limit(samples)
    found = [row.get("stop_probs") for row in rows]
    for row, values in zip(rows, found, strict=True):
        numbers = isinstance(values, list) and all(isinstance(p, (int, float)) and 0 <= p <= 1 for p in values)
        if not numbers or len(values) != shots:
            where = f"{samples.path}: question {row['question_id']}"
            raise DamagedInputError(f"{where}: stop_probs is not {shots} probabilities")
    return np.array(found, dtype=float).reshape(len(rows), shots)


def best_fixed_shot(choice: Samples) -> dict[str, Any]:
    """The fixed shot with the highest accuracy on the queries that choices are made on, the smaller one on a tie.

    Returns: ``shot``, ``n_queries``, ``accuracy`` {shot: points} with zero-shot as shot 0.
    """
    accuracy = {k: 100 * float(choice.scores(FIXED, k).mean()) for k in choice.shots(FIXED)}
    zero = {0: 100 * float(choice.scores(evidence.ZERO_SHOT, 0).mean())}
    shot = max(accuracy, key=lambda k: (accuracy[k], -k))
    told = {str(k): value for k, value in (zero | accuracy).items()}
    return {"shot": shot, "n_queries": len(choice.question_ids), "accuracy": told}


def mean_tokens(samples: Samples, method: str, shot: int) -> float:
    """Mean length of a method's prompts, in tokens.

    Raises:
        DamagedInputError: a line lacks it.
    """
    rows = samples.cells[method, shot, None]
    found = [row.get("prompt_tokens") for row in rows]
    for row, tokens in zip(rows, found, strict=True):
        if type(tokens) is not int or tokens < 0:
            raise DamagedInputError(f"{samples.path}: question {row['question_id']}: prompt_tokens is no count")
    return float(np.mean(found))


def stopping(samples: Samples) -> dict[str, Any]:
    """How often stopping was right, and what the policy's own STOP probability is worth.

    Stopping after n picks is right where no longer pointer of the policy would have scored higher. A decision is a step
    at which the policy stopped or went on; after S picks there is none.

    Returns: ``stopped`` and ``stopped_right``, ``went_on`` and ``went_on_right``: counts of decisions; ``bins``: a dict
    per bin of P(STOP) that has decisions: ``n``, ``mean`` probability, ``right`` (share, 0 to 1); ``brier`` and
    ``calibration_error`` (mean distance of the bins' two numbers, weighted by n).
    """
    scores, probabilities, number = by_length(samples), stop_probabilities(samples), chosen(samples)
    steps = np.arange(limit(samples))
    longer = np.stack([scores[:, step + 1 :].max(axis=1) for step in steps], axis=1)  # (n, S) the best after it
    right = scores[:, :-1] >= longer
    stops, goes_on = number[:, None] == steps, number[:, None] > steps
    decided = stops | goes_on
    p, outcome = probabilities[decided], right[decided]
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = [
        {"n": int(inside.sum()), "mean": float(p[inside].mean()), "right": float(outcome[inside].mean())}
        for inside in (place == b for b in range(BINS))
        if inside.any()
    ]
    return {
        "stopped": int(stops.sum()), "stopped_right": int((stops & right).sum()),
        "went_on": int(goes_on.sum()), "went_on_right": int((goes_on & ~right).sum()),
        "bins": bins, "brier": float(np.mean((p - outcome) ** 2)),
        "calibration_error": float(sum(b["n"] * abs(b["mean"] - b["right"]) for b in bins) / len(p)),
    }  # fmt: skip


def gained(samples: Samples, best_shot: int) -> list[dict[str, Any]]:
    """Per number of demonstrations chosen: queries, and accuracy gained over the best fixed shot and over zero-shot.

    Returns: a dict per number 0 to S: ``number``, ``n``, and for both rivals the mean difference in points and its
    standard error (null below 2 queries).
    """
    number, own = chosen(samples), samples.scores(METHOD, limit(samples))
    rivals = {"over_best_fixed": samples.scores(FIXED, best_shot), "over_zero_shot": by_length(samples)[:, 0]}
    found = []
    for k in range(limit(samples) + 1):
        here = number == k
        row: dict[str, Any] = {"number": k, "n": int(here.sum())}
        for name, scores in rivals.items():
            difference = 100 * (own - scores)[here]
            row[name] = float(difference.mean()) if len(difference) else None
            row[f"{name}_se"] = float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else None
        found.append(row)
    return found


def summarize(samples: Samples, choice: Samples, tokens_per_second: float | None) -> dict[str, Any]:
    """What metrics.json says about the adaptive policy of a run (docs/formats.md), but for the comparisons.

    ``choice``: held-out train queries, on which the best fixed shot is chosen. ``tokens_per_second``: the LVLM's
    measured rate, None where there is none.
    """
    number, shots = chosen(samples), limit(samples)
    best = best_fixed_shot(choice)
    cells = [(evidence.ZERO_SHOT, 0), *((FIXED, k) for k in samples.shots(FIXED)), (METHOD, shots)]
    tokens: dict[str, dict[str, float]] = {}
    for method, k in cells:
        tokens.setdefault(method, {})[str(k)] = mean_tokens(samples, method, k)
    seconds = tokens_per_second and {
        method: {k: value / tokens_per_second for k, value in by.items()} for method, by in tokens.items()
    }
    return {
        "shots": shots,
        "accuracy": 100 * float(samples.scores(METHOD, shots).mean()),
        "zero_shot": 100 * float(by_length(samples)[:, 0].mean()),
        "best_fixed": {**best, "test_accuracy": 100 * float(samples.scores(FIXED, best["shot"]).mean())},
        "perfect_choice": 100 * float(by_length(samples).max(axis=1).mean()),
        "mean_demonstrations": float(number.mean()),
        "abstentions": 100 * float((number == 0).mean()),
        "chosen": np.bincount(number, minlength=shots + 1).tolist(),
        "prompt_tokens": tokens,
        "tokens_per_second": tokens_per_second,
        "seconds_per_query": seconds,
        "gained": gained(samples, best["shot"]),
        "stopping": stopping(samples),
    }


def comparisons(runs: Sequence[Samples], best_shots: Sequence[int], drawn: stats.Resampling) -> list[dict[str, Any]]:
    """The adaptive policy against the best fixed shot of each run, and against zero-shot, paired and over the runs.

    ``runs``: with their queries in one order. Returns: fields of :func:`evidence.compare_pair`; ``shot`` is S.
    """
    scores = {
        (METHOD, 0): np.array([run.scores(METHOD, limit(run)) for run in runs]),
        (BEST_FIXED, 0): np.array([run.scores(FIXED, k) for run, k in zip(runs, best_shots, strict=True)]),
        (evidence.ZERO_SHOT, 0): np.array([run.scores(evidence.ZERO_SHOT, 0) for run in runs]),
    }
    table = evidence.Table(runs[0].images, scores, frozenset())
    rows = []
    for b in (BEST_FIXED, evidence.ZERO_SHOT):
        rows += evidence.compare_pair(table, METHOD, b, drawn)
    return [{**row, "shot": limit(runs[0]), "shots": [limit(runs[0])]} for row in rows]


def of_runs(
    runs: Sequence[Samples], choices: Sequence[Samples | None], rates: Sequence[float | None]
) -> dict[str, Any] | None:
    """A record's part about the adaptive policy: each run's summary, and their means; None where a run has none.

    ``choices`` and ``rates``: each run's arguments of :func:`summarize`.
    """
    if any(choice is None for choice in choices):
        return None
    metrics = [summarize(run, choice, rate) for run, choice, rate in zip(runs, choices, rates, strict=True)]
    names = ("accuracy", "zero_shot", "perfect_choice", "mean_demonstrations", "abstentions")
    means = {name: float(np.mean([m[name] for m in metrics])) for name in names}
    shots = limit(runs[0])
    return {
        "shots": shots, **means,
        "best_fixed": [m["best_fixed"] for m in metrics],
        "best_fixed_accuracy": float(np.mean([m["best_fixed"]["test_accuracy"] for m in metrics])),
        "chosen": np.mean([m["chosen"] for m in metrics], axis=0).tolist(),
        "gained": _mean_gains([m["gained"] for m in metrics]),
        "prompt_tokens": _mean_of(metrics, "prompt_tokens"),
        "seconds_per_query": _mean_of(metrics, "seconds_per_query"),
        "stopping": _pooled([m["stopping"] for m in metrics]),
        "each": [{name: m[name] for name in names} for m in metrics],
    }  # fmt: skip


def _mean_of(metrics: Sequence[dict[str, Any]], name: str) -> dict[str, dict[str, float]] | None:
    if any(m[name] is None for m in metrics):
        return None
    first = metrics[0][name]
    return {a: {k: float(np.mean([m[name][a][k] for m in metrics])) for k in by} for a, by in first.items()}


def _mean_gains(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Gains of several runs: means weighted by their queries; the error is that of the runs' queries taken as one."""
    found = []
    for rows in zip(*runs, strict=True):
        n = sum(r["n"] for r in rows)
        row: dict[str, Any] = {"number": rows[0]["number"], "n": n / len(rows)}
        for name in ("over_best_fixed", "over_zero_shot"):
            some = [r for r in rows if r["n"]]
            row[name] = sum(r["n"] * r[name] for r in some) / n if some else None
            errors = [(r["n"] / n, r[f"{name}_se"]) for r in some if r[f"{name}_se"] is not None]
            # Runs share their queries, so their errors are not independent: they add up.
            row[f"{name}_se"] = sum(share * se for share, se in errors) if errors else None
        found.append(row)
    return found


def _pooled(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Decisions of several runs together: counts add up, bins of one place are one."""
    bins: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        for b in run["bins"]:
            bins.setdefault(min(int(b["mean"] * BINS), BINS - 1), []).append(b)
    pooled = []
    for _, some in sorted(bins.items()):
        n = sum(b["n"] for b in some)
        pooled.append({"n": n, **{key: sum(b["n"] * b[key] for b in some) / n for key in ("mean", "right")}})
    total = sum(b["n"] for b in pooled)
    counts = {key: sum(r[key] for r in runs) for key in ("stopped", "stopped_right", "went_on", "went_on_right")}
    weights = [r["stopped"] + r["went_on"] for r in runs]
    return {
        **counts, "bins": pooled,
        "brier": float(np.average([r["brier"] for r in runs], weights=weights)),
        "calibration_error": sum(b["n"] * abs(b["mean"] - b["right"]) for b in pooled) / total,
    }  # fmt: skip


def csv_rows(shown: Any) -> list[dict[str, Any]]:
    """adaptive.csv: one row per experiment."""
    rows = []
    for name, (made, _) in shown.items():
        a = made.get("adaptive")
        if a is None:
            continue
        s = a["stopping"]
        rows.append({
            "experiment": name, "most_demonstrations": a["shots"], "accuracy": a["accuracy"],
            "zero_shot": a["zero_shot"], "best_fixed_accuracy": a["best_fixed_accuracy"],
            "best_fixed_shot": " ".join(str(b["shot"]) for b in a["best_fixed"]),
            "perfect_choice": a["perfect_choice"], "mean_demonstrations": a["mean_demonstrations"],
            "abstentions": a["abstentions"],
            **{f"prompt_tokens_{m}_{k}": v for m, by in a["prompt_tokens"].items() for k, v in by.items()},
            **{f"seconds_{m}_{k}": v for m, by in (a["seconds_per_query"] or {}).items() for k, v in by.items()},
            **{f"queries_with_{k}": n for k, n in enumerate(a["chosen"])},
            **{key: s[key] for key in ("stopped", "stopped_right", "went_on", "went_on_right", "brier",
                                       "calibration_error")},
        })  # fmt: skip
    return rows
