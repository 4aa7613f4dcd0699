"""How many demonstrations: what a policy that decides their number per query is worth, from its samples alone.

The policy's picks are the same whether it may stop or not, so its answer after n picks is that of the fixed shot n (of
the zero-shot prompt for n = 0). Every query's answers at all lengths 0 to S are therefore known, S being the most
demonstrations that it may take, and so is whether stopping where it did was right.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lever_plus.data import methods
from lever_plus.experiments import evidence, stats
from lever_plus.experiments.samples import Samples
from open_mmicl.errors import DamagedInputError

METHOD = methods.ADAPTIVE
BINS = 10  # of a reliability curve, over probabilities from 0 to 1


def limit(samples: Samples, method: str = METHOD) -> int:
    """S, the most demonstrations that may be taken: a policy's own limit, else all of the fixed shots'."""
    return (samples.shots(method) or samples.shots(methods.fixed_of(method)))[-1]


def lengths(samples: Samples, method: str = METHOD) -> list[tuple[str, int]]:
    """(method, shot) of the answers with 0 to S demonstrations.

    Raises:
        DamagedInputError: the run lacks the zero-shot answers or a fixed shot.
    """
    fixed = methods.fixed_of(method)
    wanted = [(evidence.ZERO_SHOT, 0), *((fixed, k) for k in range(1, limit(samples, method) + 1))]
    lacking = [f"{name} at shot {k}" for name, k in wanted if k not in samples.shots(name)]
    if lacking:
        raise DamagedInputError(f"{samples.path}: {method} is there without {', '.join(lacking)}")
    return wanted


def by_length(samples: Samples, method: str = METHOD) -> np.ndarray:
    """Scores of the method's own pointer after 0 to S picks, (n, S + 1) in [0, 1]. Raises: as :func:`lengths`."""
    return np.stack([samples.scores(name, k) for name, k in lengths(samples, method)], axis=1)


def chosen(samples: Samples, method: str = METHOD) -> np.ndarray:
    """Number of demonstrations that were chosen, (n,)."""
    return np.array([len(row["icd_ids"]) for row in samples.cells[method, limit(samples, method), None]])


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


def best_fixed_shot(choice: Samples, fixed: str = "v3") -> dict[str, Any]:
    """The fixed shot with the highest accuracy on the queries that choices are made on, the smaller one on a tie.

    Returns: ``shot``, ``n_queries``, ``accuracy`` {shot: points} with zero-shot as shot 0.
    """
    accuracy = {k: 100 * float(choice.scores(fixed, k).mean()) for k in choice.shots(fixed)}
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
    return {
        "stopped": int(stops.sum()), "stopped_right": int((stops & right).sum()),
        "went_on": int(goes_on.sum()), "went_on_right": int((goes_on & ~right).sum()),
        **reliability(probabilities[decided], right[decided]),
    }  # fmt: skip


def reliability(p: np.ndarray, outcome: np.ndarray) -> dict[str, Any]:
    """Whether probabilities (m,) are worth their name, against what came true (m,), 0 to 1.

    Returns: ``bins``: a dict per bin of p that is not empty: ``n``, ``mean`` probability, ``right`` (mean outcome);
    ``brier`` and ``calibration_error`` (mean distance of the bins' two numbers, weighted by n).
    """
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = [
        {"n": int(inside.sum()), "mean": float(p[inside].mean()), "right": float(outcome[inside].mean())}
        for inside in (place == b for b in range(BINS))
        if inside.any()
    ]
    distance = sum(b["n"] * abs(b["mean"] - b["right"]) for b in bins) / len(p)
    return {"bins": bins, "brier": float(np.mean((p - outcome) ** 2)), "calibration_error": float(distance)}


def gained(samples: Samples, best_shot: int, method: str = METHOD) -> list[dict[str, Any]]:
    """Per number of demonstrations chosen: queries, and accuracy gained over the best fixed shot and over zero-shot.

    Returns: a dict per number 0 to S: ``number``, ``n``, and for both rivals the mean difference in points and its
    standard error (null below 2 queries).
    """
    most = limit(samples, method)
    number, own = chosen(samples, method), samples.scores(method, most)
    fixed = samples.scores(methods.fixed_of(method), best_shot)
    rivals = {"over_best_fixed": fixed, "over_zero_shot": by_length(samples, method)[:, 0]}
    found = []
    for k in range(most + 1):
        here = number == k
        row: dict[str, Any] = {"number": k, "n": int(here.sum())}
        for name, scores in rivals.items():
            difference = 100 * (own - scores)[here]
            row[name] = float(difference.mean()) if len(difference) else None
            row[f"{name}_se"] = float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else None
        found.append(row)
    return found


def summarize(
    samples: Samples, choice: Samples, tokens_per_second: float | None, method: str = METHOD
) -> dict[str, Any]:
    """What metrics.json says about a run's adaptive policy (docs/formats.md), or another method that decides how many,
    but for the comparisons.

    ``choice``: held-out train queries, on which the best fixed shot is chosen. ``tokens_per_second``: the LVLM's
    measured rate, None where there is none.
    """
    number, shots, fixed = chosen(samples, method), limit(samples, method), methods.fixed_of(method)
    best = best_fixed_shot(choice, fixed)
    cells = [(evidence.ZERO_SHOT, 0), *((fixed, k) for k in samples.shots(fixed)), (method, shots)]
    tokens: dict[str, dict[str, float]] = {}
    for name, k in cells:
        tokens.setdefault(name, {})[str(k)] = mean_tokens(samples, name, k)
    seconds = tokens_per_second and {
        name: {k: value / tokens_per_second for k, value in by.items()} for name, by in tokens.items()
    }
    scores = by_length(samples, method)
    return {
        "shots": shots,
        "accuracy": 100 * float(samples.scores(method, shots).mean()),
        "zero_shot": 100 * float(scores[:, 0].mean()),
        "best_fixed": {**best, "test_accuracy": 100 * float(samples.scores(fixed, best["shot"]).mean())},
        "perfect_choice": 100 * float(scores.max(axis=1).mean()),
        "mean_demonstrations": float(number.mean()),
        "abstentions": 100 * float((number == 0).mean()),
        "chosen": np.bincount(number, minlength=shots + 1).tolist(),
        "prompt_tokens": tokens,
        "tokens_per_second": tokens_per_second,
        "seconds_per_query": seconds,
        "gained": gained(samples, best["shot"], method),
        **({"stopping": stopping(samples)} if method == METHOD else {}),
    }


def comparisons(
    runs: Sequence[Samples],
    best_shots: Sequence[int],
    drawn: stats.Resampling,
    method: str = METHOD,
    rivals: Sequence[str] = (evidence.ZERO_SHOT,),
) -> list[dict[str, Any]]:
    """A method that decides how many against the best fixed shot of each run, and against ``rivals``, paired and over
    the runs.

    ``runs``: with their queries in one order. Returns: fields of :func:`evidence.compare_pair`; ``shot`` is S.
    """
    fixed, best_fixed = methods.fixed_of(method), f"{methods.fixed_of(method)}_best_fixed"
    scores = {
        (name, 0): np.array([run.scores(name, 0 if name == evidence.ZERO_SHOT else limit(run, name)) for run in runs])
        for name in (method, *rivals)
    }
    scores[best_fixed, 0] = np.array([run.scores(fixed, k) for run, k in zip(runs, best_shots, strict=True)])
    table = evidence.Table(runs[0].images, scores, frozenset())
    rows = [row for b in (best_fixed, *rivals) for row in evidence.compare_pair(table, method, b, drawn)]
    most = limit(runs[0], method)
    return [{**row, "shot": most, "shots": [most]} for row in rows]


def of_runs(
    runs: Sequence[Samples], choices: Sequence[Samples | None], rates: Sequence[float | None]
) -> dict[str, Any] | None:
    """A record's part about the adaptive policy: each run's summary, and their means; None where a run has none.

    ``choices`` and ``rates``: each run's arguments of :func:`summarize`.
    """
    if any(choice is None or METHOD not in run.methods for run, choice in zip(runs, choices, strict=True)):
        return None
    each = [summarize(run, choice, rate) for run, choice, rate in zip(runs, choices, rates, strict=True)]
    return {**means(each), "stopping": _pooled([m["stopping"] for m in each])}


def means(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs' summaries (:func:`summarize`) as one, with their own numbers beside."""
    names = ("accuracy", "zero_shot", "perfect_choice", "mean_demonstrations", "abstentions")
    return {
        "shots": each[0]["shots"], **{name: float(np.mean([m[name] for m in each])) for name in names},
        "best_fixed": [m["best_fixed"] for m in each],
        "best_fixed_accuracy": float(np.mean([m["best_fixed"]["test_accuracy"] for m in each])),
        "chosen": np.mean([m["chosen"] for m in each], axis=0).tolist(),
        "gained": _mean_gains([m["gained"] for m in each]),
        "prompt_tokens": _mean_of(each, "prompt_tokens"),
        "seconds_per_query": _mean_of(each, "seconds_per_query"),
        "each": [{name: m[name] for name in names} for m in each],
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
    """Decisions of several runs together."""
    counts = ("stopped", "stopped_right", "went_on", "went_on_right")
    return {key: sum(r[key] for r in runs) for key in counts} | pooled_bins(runs)


def pooled_bins(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs' :func:`reliability` as one: bins of one place are one."""
    bins: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        for b in run["bins"]:
            bins.setdefault(min(int(b["mean"] * BINS), BINS - 1), []).append(b)
    pooled = []
    for _, some in sorted(bins.items()):
        n = sum(b["n"] for b in some)
        pooled.append({"n": n, **{key: sum(b["n"] * b[key] for b in some) / n for key in ("mean", "right")}})
    total = sum(b["n"] for b in pooled)
    weights = [sum(b["n"] for b in r["bins"]) for r in runs]
    return {
        "bins": pooled, "brier": float(np.average([r["brier"] for r in runs], weights=weights)),
        "calibration_error": sum(b["n"] * abs(b["mean"] - b["right"]) for b in pooled) / total,
    }  # fmt: skip


def csv_rows(shown: Any) -> list[dict[str, Any]]:
    """adaptive.csv: one row per experiment."""
    kept = ("stopped", "stopped_right", "went_on", "went_on_right", "brier", "calibration_error")
    parts = {name: made["adaptive"] for name, (made, _) in shown.items() if "adaptive" in made}
    return [{**csv_row(name, a), **{key: a["stopping"][key] for key in kept}} for name, a in parts.items()]


def csv_row(experiment: str, a: dict[str, Any]) -> dict[str, Any]:
    """What :func:`means` tells, flat."""
    return {
        "experiment": experiment, "most_demonstrations": a["shots"], "accuracy": a["accuracy"],
        "zero_shot": a["zero_shot"], "best_fixed_accuracy": a["best_fixed_accuracy"],
        "best_fixed_shot": " ".join(str(b["shot"]) for b in a["best_fixed"]),
        "perfect_choice": a["perfect_choice"], "mean_demonstrations": a["mean_demonstrations"],
        "abstentions": a["abstentions"],
        **{f"prompt_tokens_{m}_{k}": v for m, by in a["prompt_tokens"].items() for k, v in by.items()},
        **{f"seconds_{m}_{k}": v for m, by in (a["seconds_per_query"] or {}).items() for k, v in by.items()},
        **{f"queries_with_{k}": n for k, n in enumerate(a["chosen"])},
    }  # fmt: skip
