"""What a set of finished runs shows: accuracies, paired comparisons, copy rates. A function of the samples alone.

The runs of an experiment are the training seeds of one recipe on the same queries. A method that every
run evaluated (v3) enters as each query's mean over the runs; record.json holds the runs' own numbers beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lever_plus.experiments import stats
from lever_plus.experiments.samples import ANY_LENGTH, VOTING_METHODS, Row, Samples, copied, holds_answer
from open_mmicl.errors import UsageError

DERIVED = ("oracle", "majority_vote_")
"""Beginnings of the names of what is made from other methods' answers: no rivals."""
ZERO_SHOT = "zero_shot"
POOLED = "pooled"
SEEDED = ("v3", "majority_vote_v3", "v3_adaptive", "v3_cascade")
"""Methods that differ between the runs of an experiment; the others are the same selector evaluated again."""


@dataclass(frozen=True)
class Table:
    """Scores of a set of runs: (method, shot) -> (runs, n) in [0, 1], of the runs that evaluated it.

    ``averaged`` holds the (method, shot) whose scores are means over seeds within a run (random).
    """

    images: np.ndarray
    scores: dict[tuple[str, int], np.ndarray]
    averaged: frozenset[tuple[str, int]]

    def shots(self, method: str) -> list[int]:
        """Shots of a method, ascending."""
        return sorted(shot for name, shot in self.scores if name == method)

    def columns(self, keys: Sequence[tuple[str, int]]) -> np.ndarray:
        """Scores of some (method, shot) as means over the runs, (n, m)."""
        return _bounded(np.stack([self.scores[key].mean(axis=0) for key in keys], axis=1))


def pairs(table: Table) -> list[tuple[str, str]]:
    """What is compared: v3 with every rival, the best rival first; then the supervised selectors with what needs no
    training.

    The best is that of the highest mean accuracy over its shots on these very queries, which favours it. Methods that
    choose the number of demonstrations are no rivals at a shot (:mod:`.adaptive` compares them).
    """
    names = dict.fromkeys(name for name, _ in table.scores)
    rivals = [m for m in names if not m.startswith(DERIVED) and m not in ("v3", *ANY_LENGTH)]
    by_mean = sorted(rivals, key=lambda m: -np.mean([table.scores[m, k].mean() for k in table.shots(m)]))
    found = [("v3", b) for b in by_mean] if table.shots("v3") else []
    supervised = [a for a in ("v2", "label") if a in rivals]
    return found + [(a, b) for a in supervised for b in by_mean if b not in ("v2", "label")]


def same_queries(runs: Sequence[Samples]) -> list[Samples]:
    """The runs with their queries in one order.

    Raises:
        UsageError: the runs were made on different queries.
    """
    first = runs[0].question_ids
    for run in runs[1:]:
        if set(run.question_ids) != set(first):
            raise UsageError(f"{run.path} and {runs[0].path} were made on different queries")
    place = {q: i for i, q in enumerate(first)}
    return [run if run.question_ids == first else _reordered(run, place) for run in runs]


def score_table(runs: Sequence[Samples], only: Sequence[str] = ()) -> Table:
    """Scores of every method and shot that a run evaluated, with majority votes and the oracle; or of the methods
    ``only``, without those. A method that no training seed changes (v2) and that scored alike in every run has one row.
    """
    scores: dict[tuple[str, int], list[np.ndarray]] = {}
    averaged = set()
    for run in runs:
        for method in only or run.methods:
            for shot in run.shots(method):
                scores.setdefault((method, shot), []).append(run.scores(method, shot))
                if len(run.seeds(method, shot)) > 1:
                    averaged.add((method, shot))
                if not only and method in VOTING_METHODS and shot > 0:
                    scores.setdefault((f"majority_vote_{method}", shot), []).append(run.majority(method, shot))
    for shot in sorted({shot for method, shot in scores if shot > 0 and not only and method not in ANY_LENGTH}):
        tried = [run.oracle(shot) for run in runs if any(k == shot and m not in ANY_LENGTH for m, k, _ in run.cells)]
        scores["oracle", shot] = [np.max(tried, axis=0)]
    for (method, _), rows in scores.items():
        if method not in SEEDED and all(np.array_equal(rows[0], row) for row in rows):
            del rows[1:]
    return Table(runs[0].images, {key: np.array(rows) for key, rows in scores.items()}, frozenset(averaged))


def summarize(runs: Sequence[Samples], drawn: stats.Resampling = stats.USUAL) -> dict[str, Any]:
    """Everything that a record states about accuracy.

    Returns: ``n_queries``, ``n_images``, ``accuracy`` {method: {shot: {mean, ci95, sd, each}}} (points; ``each``
    the runs' or, for random, its seeds' accuracies, ``sd`` over them), ``comparisons`` (:func:`compare_pair`
    per pair of :func:`pairs`, shot, and pooled over shots), ``groups`` (:func:`by_group`; where queries
    have them), ``copy_rate`` and ``icds_hold_answer`` {method: {shot: points}}.
    """
    runs = same_queries(runs)
    table = score_table(runs)
    comparisons = []
    for a, b in pairs(table):
        comparisons += compare_pair(table, a, b, drawn)
    groups = by_group(runs, drawn)
    return {
        "n_queries": len(table.images),
        "n_images": len(np.unique(table.images)),
        "accuracy": accuracies(runs, table, drawn),
        "comparisons": comparisons,
        **({"groups": groups} if groups else {}),
        "copy_rate": shares(runs, copied),
        "icds_hold_answer": shares(runs, holds_answer),
    }


def by_group(runs: Sequence[Samples], drawn: stats.Resampling = stats.USUAL) -> dict[str, Any]:
    """{group: {n_queries, n_images, accuracy, comparisons}} as in :func:`summarize`; {} where queries have no groups.

    The runs' queries are in one order (:func:`same_queries`). Each group's comparisons stand for themselves: they are
    not corrected for the number of groups.
    """
    found = {}
    for name in runs[0].groups:
        of_group = [run.of_group(name) for run in runs]
        table = score_table(of_group)
        found[name] = {
            "n_queries": len(table.images),
            "n_images": len(np.unique(table.images)),
            "accuracy": accuracies(of_group, table, drawn),
            "comparisons": [c for a, b in pairs(table) for c in compare_pair(table, a, b, drawn)],
        }
    return found


def accuracies(runs: Sequence[Samples], table: Table, drawn: stats.Resampling) -> dict[str, Any]:
    """{method: {shot: {"mean", "ci95", "sd", "each"}}} in points."""
    columns = table.columns(list(table.scores))
    intervals = stats.accuracy_intervals(columns, table.images, resamples=drawn.resamples, seed=drawn.seed)
    found: dict[str, Any] = {}
    for (key, scores), (mean, low, high) in zip(table.scores.items(), intervals, strict=True):
        method, shot = key
        seeds = (
            next(run for run in runs if method in run.methods).by_seed(method, shot)
            if key in table.averaged
            else scores
        )
        each = (100 * seeds.mean(axis=1)).tolist()
        sd = stats.mean_sd(each)[1]
        found.setdefault(method, {})[str(shot)] = {"mean": mean, "ci95": [low, high], "sd": sd, "each": each}
    return found


def compare_pair(table: Table, a: str, b: str, drawn: stats.Resampling = stats.USUAL) -> list[dict[str, Any]]:
    """:func:`compare_pairs` of one pair."""
    return compare_pairs(table, [(a, b)], drawn)


def compare_pairs(
    table: Table, asked: Sequence[tuple[str, str]], drawn: stats.Resampling = stats.USUAL
) -> list[dict[str, Any]]:
    """a against b, pair by pair, at every shot both have (zero-shot against every shot), and pooled over them; one set
    of resamples serves them all.

    Returns: of each pair a dict per shot, then one with shot "pooled" where there are several: the fields of
    :class:`stats.Comparison`; both p-values after Holm over the shots; ``alpha``, which the corrected sign-flip p has
    to stay below; ``shots``; ``each``, ``mean`` and ``sd`` of the runs' differences; ``recipe_ci95`` over queries and
    runs (null with one run); ``word`` (better | worse | none), which asks all of them; ``withheld``
    (:func:`withheld`). ``p_value`` is null where a
    query's score is a mean over runs, seeds or shots: McNemar's test is about single answers. ``p_value_each``
    holds its p of every run, null for means over seeds within a run (random) or over shots.
    """
    columns = []
    for a, b in asked:
        shots = [k for k in table.shots(a) if (b, 0 if b == ZERO_SHOT else k) in table.scores]
        together = [shots] if len(shots) > 1 else []
        columns += [(a, b, some, *_paired(table, a, b, some)) for some in [*([k] for k in shots), *together]]
    if not columns:
        return []
    compared = stats.compare_columns(
        _bounded(np.stack([x.mean(axis=0) for *_, x, _ in columns], axis=1)),
        _bounded(np.stack([y.mean(axis=0) for *_, y in columns], axis=1)),
        table.images, resamples=drawn.resamples, seed=drawn.seed,
    )  # fmt: skip
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (a, b, of_shots, x, y), result in zip(columns, compared, strict=True):
        each = (100 * (x - y).mean(axis=1)).tolist()
        mean, sd = stats.mean_sd(each)
        recipe = stats.recipe_interval(100 * (x - y), table.images) if len(x) > 1 and result.n_images > 1 else None
        pooled = len(of_shots) > 1
        answers = not pooled and _single_answers(table, a, b, of_shots[0])
        exact = [stats.mcnemar_exact(i > 0, j > 0) for i, j in zip(x, y, strict=True)] if answers else None
        rows.setdefault((a, b), []).append({
            "a": a, "b": b, "shot": POOLED if pooled else of_shots[0], "shots": of_shots, **result.as_dict(),
            "p_value": exact[0] if answers and len(x) == 1 else None, "p_value_each": exact,
            "each": each, "mean": mean, "sd": sd,
            "recipe_ci95": None if recipe is None else list(recipe),
        })  # fmt: skip
    for of_pair in rows.values():
        judge(of_pair)
    return [row for of_pair in rows.values() for row in of_pair]


def shares(runs: Sequence[Samples], test: Callable[[Row], bool]) -> dict[str, dict[str, float]]:
    """{method: {shot: share of its lines for which ``test`` holds, in points, mean over the runs}}, shots above 0."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for method in run.methods:
            for shot in run.shots(method):
                if shot > 0:
                    found.setdefault(method, {}).setdefault(str(shot), []).append(run.share(method, shot, test))
    return {m: {shot: float(np.mean(v)) for shot, v in by.items()} for m, by in found.items()}


def find(comparisons: Sequence[dict[str, Any]], a: str, b: str, shot: int | str) -> dict[str, Any] | None:
    """The comparison of a pair at a shot; that of the only shot stands for "pooled"."""
    rows = [c for c in comparisons if (c["a"], c["b"]) == (a, b)]
    if shot == POOLED and len(rows) == 1:
        return rows[0]
    return next((c for c in rows if c["shot"] == shot), None)


def judge(rows: Sequence[dict[str, Any]]) -> None:
    """Add Holm's corrections, ``alpha``, ``word`` and ``withheld`` to the comparisons of one pair of methods: one per
    shot, then the pooled one where there is one. That, or the only shot, is the main statement (ALPHA_MAIN of stats).
    """
    main, shots = rows[-1], rows[:-1] if len(rows) > 1 else []
    _judge([main], stats.ALPHA_MAIN)
    named = main["word"] != "none"
    _judge(shots, stats.ALPHA_SHOTS + (stats.ALPHA_MAIN if named else 0.0))
    for row in shots:
        if not named and row["recipe_ci95"] is not None and row["word"] != "none":
            row["word"], row["withheld"] = "none", "main"


def withheld(row: dict[str, Any]) -> str | None:
    """Why a comparison whose own interval excludes 0 is still no result; None for any other comparison.

    ``images``: too few; ``signs``: the sign-flip test does not agree; ``shots``: it agrees for this shot alone, but
    not after Holm's correction for several; ``seeds``: the interval with the variation between seeds includes 0;
    ``main`` (:func:`judge`): the seeds' intervals of single shots are not corrected for their number, so with several
    seeds a shot is named only beside a main statement that is.
    """
    if row["word"] != "none" or not stats.excludes_zero(row["ci95"]):
        return None
    if row["n_images"] < stats.MIN_IMAGES:
        return "images"
    if row["p_permutation"] >= row["alpha"]:
        return "signs"
    return "shots" if row["p_permutation_holm"] >= row["alpha"] else "seeds"


def _single_answers(table: Table, a: str, b: str, shot: int) -> bool:
    """Whether every run's scores of the pair are single answers: no means over seeds within a run or over runs."""
    keys = [(a, shot), (b, 0 if b == ZERO_SHOT else shot)]
    runs = [len(table.scores[key]) for key in keys]
    return not table.averaged.intersection(keys) and (runs[0] == runs[1] or min(runs) == 1)


def _judge(rows: Sequence[dict[str, Any]], alpha: float) -> None:
    permutation = stats.holm([row["p_permutation"] for row in rows])
    mcnemar = stats.holm([row["p_value"] for row in rows]) if all(row["p_value"] is not None for row in rows) else None
    for i, row in enumerate(rows):
        row["p_permutation_holm"], row["p_value_holm"] = permutation[i], None if mcnemar is None else mcnemar[i]
        word = stats.direction(row["ci95"], permutation[i], row["n_images"], alpha)
        if row["recipe_ci95"] is not None and not stats.excludes_zero(row["recipe_ci95"]):
            word = "none"
        row["alpha"], row["word"] = alpha, word
        row["withheld"] = withheld(row)


def _paired(table: Table, a: str, b: str, shots: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(runs, n) of each method, mean over the shots; a method of fewer runs enters each run as its mean."""
    x = np.mean([table.scores[a, k] for k in shots], axis=0)
    y = np.mean([table.scores[b, 0 if b == ZERO_SHOT else k] for k in shots], axis=0)
    if len(x) != len(y):
        runs = max(len(x), len(y))
        x, y = (v if len(v) == runs else np.repeat(v.mean(axis=0)[None], runs, axis=0) for v in (x, y))
    return x, y


def _bounded(scores: np.ndarray) -> np.ndarray:
    """Means of scores in [0, 1] can leave it by rounding."""
    return np.clip(scores, 0, 1)


def _reordered(run: Samples, place: dict[int, int]) -> Samples:
    return Samples(sorted(run.rows, key=lambda row: place[row["question_id"]]), run.path)
