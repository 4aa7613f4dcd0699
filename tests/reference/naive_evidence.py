"""Every number of a record from the lines of samples.jsonl, by plain loops and by listing what was drawn.

Shares no code with lever_plus.experiments; only the random draws are the documented ones, so that bootstrap and
sign-flip numbers can be compared digit by digit.
"""

import math
import re
from collections import Counter
from functools import cache

import numpy as np
from scipy import stats as scipy_stats

from tests.reference import official_vqa

CHUNK = 500
NOT_RIVALS = ("v3", "oracle", "majority_vote_v3", "majority_vote_v2", "majority_vote_similarity")  # fmt: skip
VOTERS = ("v3", "v2", "similarity")


def cut(raw):
    """A generated text ends where the model begins another question."""
    return re.split(r"Question|Answer|Short|, ", raw)[0]


@cache
def scored(raw, answers):
    return official_vqa.accuracy(cut(raw), list(answers))


def draws(seed, kind, resamples, images):
    """(resamples, images): what the bootstrap (kind 0: drawn images) or the sign flips (kind 1: 0 or 1) used."""
    rng = np.random.default_rng([seed, kind])
    sizes = [min(CHUNK, resamples - start) for start in range(0, resamples, CHUNK)]
    return np.concatenate([rng.integers(0, images if kind == 0 else 2, (rows, images)) for rows in sizes])


class World:
    """Scores of a set of runs from their lines: (method, shot) -> per run, per query."""

    def __init__(self, runs, resamples, seed):
        self.resamples, self.seed = resamples, seed
        self.queries = list(dict.fromkeys(x["question_id"] for x in runs[0]))
        image = {x["question_id"]: x["image_id"] for x in runs[0]}
        names = sorted(set(image.values()))
        self.image = [names.index(image[q]) for q in self.queries]
        self.scores, self.averaged, self.by_seed = {}, set(), {}
        for lines in runs:
            self._read(lines)
        for key, rows in self.scores.items():
            if key[0] not in ("v3", "majority_vote_v3") and all(row == rows[0] for row in rows):
                del rows[1:]
        self.members = [[i for i, c in enumerate(self.image) if c == name] for name in range(len(names))]
        self.drawn = draws(seed, 0, resamples, len(names))
        self.flips = draws(seed, 1, resamples, len(names))

    def _read(self, lines):
        cells, votes, best = {}, {}, {}
        for x in lines:
            score = scored(x["raw_answer"], tuple(x["answers"]))
            cells.setdefault((x["method"], x["shot"]), {}).setdefault(x["seed"], {})[x["question_id"]] = score
            if x["shot"] > 0:
                best.setdefault(x["shot"], {}).setdefault(x["question_id"], []).append(score)
                if x["method"] in VOTERS:
                    said = Counter(official_vqa.normalize(a) for a in x["icd_answers"]).most_common(1)[0][0]
                    key = f"majority_vote_{x['method']}", x["shot"]
                    votes.setdefault(key, {})[x["question_id"]] = scored(said, tuple(x["answers"]))
        for key, seeds in cells.items():
            self.scores.setdefault(key, []).append(
                [sum(by[q] for by in seeds.values()) / len(seeds) for q in self.queries]
            )
            if len(seeds) > 1:
                self.averaged.add(key)
                self.by_seed.setdefault(key, [100 * np.mean([by[q] for q in self.queries]) for by in seeds.values()])
        for key, by in votes.items():
            self.scores.setdefault(key, []).append([by[q] for q in self.queries])
        for shot, by in best.items():
            top = [max(by[q]) for q in self.queries]
            before = self.scores.get(("oracle", shot), [top])[0]
            self.scores["oracle", shot] = [[max(pair) for pair in zip(top, before, strict=True)]]

    def totals(self, values):
        return np.array([sum(values[i] for i in members) for members in self.members])

    def interval(self, values):
        """Percentile interval over images, with the tails of Student's t."""
        images = len(self.members)
        if images < 2:
            return [None, None]
        totals, counts = self.totals(values), np.array([len(m) for m in self.members])
        means = totals[self.drawn].sum(1) / counts[self.drawn].sum(1)
        tail = scipy_stats.norm.cdf(scipy_stats.t.ppf(0.025, images - 1) * math.sqrt(images / (images - 1)))
        return [float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))]

    def variance(self, values):
        """Clustered variance of the mean."""
        mean, images = sum(values) / len(values), len(self.members)
        residuals = [t - len(m) * mean for t, m in zip(self.totals(values), self.members, strict=True)]
        return images / (images - 1) * sum(r * r for r in residuals) / len(values) ** 2

    def sign_flip(self, values):
        totals = self.totals(values)
        flipped = np.abs((totals * (2 * self.flips - 1)).sum(1))
        return (1 + int((flipped >= abs(totals.sum()) - 1e-9).sum())) / (1 + self.resamples)


def pairs(world):
    """v3 with the others, the best on average first; then v2 with those that need no training."""
    means = {}
    for (method, _), runs in world.scores.items():
        means.setdefault(method, []).append(np.mean([np.mean(run) for run in runs]))
    order = sorted((m for m in means if m not in NOT_RIVALS), key=lambda m: -np.mean(means[m]))
    untrained = [m for m in order if m not in ("v2", "label")]
    return [("v3", m) for m in order] + [(a, m) for a in ("v2", "label") if a in means for m in untrained]


def mcnemar(x, y):
    only_x = sum(bool(a > 0 >= b) for a, b in zip(x, y, strict=True))
    only_y = sum(bool(b > 0 >= a) for a, b in zip(x, y, strict=True))
    total, few = only_x + only_y, min(only_x, only_y)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(few + 1)) / 2**total)


def holm(p_values):
    """By the definition: the j-th smallest of m times m - j + 1, never below that of a smaller one, at most 1."""
    ranked, m = sorted(p_values), len(p_values)
    return [max(min(1.0, (m - j) * q) for j, q in enumerate(ranked) if q <= p) for p in p_values]


def accuracies(world):
    found = {}
    for (method, shot), rows in world.scores.items():
        mean = [100 * sum(column) / len(column) for column in zip(*rows, strict=True)]
        each = world.by_seed.get((method, shot), [100 * float(np.mean(row)) for row in rows])
        found.setdefault(method, {})[str(shot)] = {
            "mean": float(np.mean(mean)), "ci95": world.interval(mean), "each": each,
            "sd": float(np.std(each, ddof=1)) if len(each) > 1 else None,
        }  # fmt: skip
    return found


def compared(world, a, b):
    """The comparisons of a pair: one per shot, then all shots together."""
    other = {k: 0 if b == "zero_shot" else k for method, k in world.scores if method == a}
    shots = sorted(k for k in other if (b, other[k]) in world.scores)
    rows = [_row(world, a, b, [k], other) for k in shots]
    if len(shots) > 1:
        rows.append(_row(world, a, b, shots, other))
    main, single = rows[-1], rows[:-1]
    _judge([main], 0.04)
    _judge(single, 0.01 if main["word"] == "none" else 0.05)
    for row in single:
        if main["word"] == "none" != row["word"] and row["recipe_ci95"]:
            row |= {"word": "none", "withheld": "main"}
    return rows


def _row(world, a, b, shots, other):
    sides = [np.mean([world.scores[a, k] for k in shots], 0), np.mean([world.scores[b, other[k]] for k in shots], 0)]
    runs, lengths = max(map(len, sides)), list(map(len, sides))
    x, y = (side if len(side) == runs else np.array([side.mean(0)] * runs) for side in sides)
    values = list(100 * (x - y).mean(0))
    n, images, diff = len(values), len(world.members), float(np.mean(values))
    se = math.sqrt(world.variance(values))
    power = scipy_stats.norm.ppf(0.975) + scipy_stats.norm.ppf(0.8)
    single = len(shots) == 1 and not {(a, shots[0]), (b, other[shots[0]])} & world.averaged
    exact = [mcnemar(i, j) for i, j in zip(x, y, strict=True)] if single and min(lengths) in (1, runs) else None
    each = [100 * float(np.mean(row)) for row in x - y]
    return {
        "a": a, "b": b, "shot": shots[0] if len(shots) == 1 else "pooled", "shots": shots, "diff": diff,
        "ci95": world.interval(values), "p_permutation": world.sign_flip(values), "n": n, "n_images": images, "se": se,
        "smallest_detectable": power * se,
        "n_needed": math.ceil(n * (power * se / abs(diff)) ** 2) if diff and se else None,
        "p_value": exact[0] if exact and runs == 1 else None, "p_value_each": exact, "each": each,
        "mean": float(np.mean(each)), "sd": float(np.std(each, ddof=1)) if runs > 1 else None,
        "recipe_ci95": _recipe(world, 100 * (x - y)) if runs > 1 else None,
    }  # fmt: skip


def _recipe(world, differences):
    seeds, _ = differences.shape
    middle = differences.mean(0)
    noise = sum(world.variance(list(row - middle)) for row in differences) / (seeds - 1)
    common = max(0.0, world.variance(list(middle)) - noise / seeds)
    between = float(np.var([np.mean(row) for row in differences], ddof=1)) / seeds
    t = [scipy_stats.t.ppf(0.975, df) for df in (len(world.members) - 1, seeds - 1)]
    half = math.sqrt(t[0] ** 2 * common + t[1] ** 2 * between)
    return [float(middle.mean()) - half, float(middle.mean()) + half]


def _judge(rows, alpha):
    ps = holm([r["p_permutation"] for r in rows])
    exact = holm([r["p_value"] for r in rows]) if all(r["p_value"] is not None for r in rows) else [None] * len(rows)
    for row, p, p_exact in zip(rows, ps, exact, strict=True):
        (low, high), recipe = row["ci95"], row["recipe_ci95"] or [1, 1]
        outside = low > 1e-9 or high < -1e-9
        reasons = {"images": row["n_images"] < 20, "signs": row["p_permutation"] >= alpha, "shots": p >= alpha,
                   "seeds": recipe[0] <= 1e-9 and recipe[1] >= -1e-9}  # fmt: skip
        against = [name for name, holds in reasons.items() if holds]
        named = "better" if low > 0 else "worse"
        row |= {"p_permutation_holm": p, "p_value_holm": p_exact, "alpha": alpha,
                "word": named if outside and not against else "none",
                "withheld": against[0] if outside and against else None}  # fmt: skip


def shares(runs, test):
    found = {}
    for lines in runs:
        here = {}
        for x in lines:
            if x["shot"] > 0:
                here.setdefault((x["method"], x["shot"]), []).append(test(x))
        for (method, shot), held in here.items():
            found.setdefault(method, {}).setdefault(str(shot), []).append(100 * sum(held) / len(held))
    return {method: {shot: sum(v) / len(v) for shot, v in by.items()} for method, by in found.items()}


def copied(x):
    return official_vqa.normalize(cut(x["raw_answer"])) in [official_vqa.normalize(a) for a in x["icd_answers"]]


def holds(x):
    return any(scored(a, tuple(x["answers"])) > 0 for a in x["icd_answers"])


def recompute(runs, resamples, seed):
    """Everything in a record that comes from samples.jsonl. ``runs``: the lines of each training seed's run."""
    world = World(runs, resamples, seed)
    return {
        "n_queries": len(world.queries), "n_images": len(world.members), "accuracy": accuracies(world),
        "comparisons": [row for a, b in pairs(world) for row in compared(world, a, b)],
        "copy_rate": shares(runs, copied), "icds_hold_answer": shares(runs, holds),
    }  # fmt: skip


def recompute_arms(arms, baseline, resamples, seed, rival=None):
    """A world in which v3 of every arm is a method of its own, beside v2 and the rival (v2 at equal price)."""

    def renamed(lines, old, new):
        return [{**x, "method": new} for x in lines if x["method"] == old]

    runs = []
    for i, lines in enumerate(baseline):
        mine = [x for x in lines if x["method"] != "v3"]
        for name, of in arms.items():
            mine += renamed(of[i], "v3", name)
        runs.append(mine + (renamed(rival, "v2", "v2_rival") if rival and i == 0 else []))
    return World(runs, resamples, seed)


def difference(ours, theirs, where=""):
    """The first place where two structures of JSON values differ by more than rounding; None where they agree."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return f"{where}: keys {sorted(map(str, ours.keys() ^ theirs.keys()))}"
        return next(filter(None, (difference(ours[k], theirs[k], f"{where}/{k}") for k in ours)), None)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            return f"{where}: {len(ours)} and {len(theirs)} entries"
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next(filter(None, (difference(a, b, f"{where}/{i}") for i, (a, b) in pairs)), None)
    if isinstance(ours, float) and isinstance(theirs, (int, float)):
        return None if math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-9) else f"{where}: {ours} and {theirs}"
    return None if ours == theirs else f"{where}: {ours!r} and {theirs!r}"
