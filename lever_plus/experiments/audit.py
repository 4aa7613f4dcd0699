"""Experiment 5 of the plan, the data audit: what the RL data can and cannot teach. Pure functions, no LVLM.

``audit`` measures; ``findings`` says what each number means for RCE and for GRPO, and warns past a threshold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lever_plus.data.rl_data import RlCandidate, RlData
from lever_plus.rl.rewards import RewardRule, reward
from open_mmicl.errors import DamagedInputError
from open_mmicl.lazy import lazy
from open_mmicl.metrics.vqa import normalize_answer

scipy_stats = lazy("scipy.stats")

BINS, SHARES = 30, 10
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
TIE = 1e-9
"""Rewards closer than this are equal: a group without larger differences gives GRPO no gradient."""


def audit(
    data: RlData,
    rule: RewardRule,
    taus: Sequence[float] = (2.0, 0.5),
    answer_of: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """Everything experiment 5 asks about RL data.

    Args:
        rule: how rewards are made. taus: RCE's first and last temperature.
        answer_of: annotated answer of a train row, for the copy rate; None leaves it out.

    Returns: JSON values; shares in points (0 to 100), accuracies in points, rewards and scores as they are.

    Raises:
        DamagedInputError: plain beam data, which no LVLM has answered.
    """
    groups = [q.candidates for q in data.queries]
    if any(c.vqa_correct is None for group in groups for c in group):
        raise DamagedInputError("the audit needs RL data with answers; this is plain beam data (make RL data first)")
    rewards = [
        np.array([reward(c, rule=rule, where=f"query {q.query_idx}") for c in q.candidates]) for q in data.queries
    ]  # [Q][M]
    correct = [np.array([c.vqa_correct for c in group], dtype=float) for group in groups]
    found = {
        "n_queries": len(groups),
        "n_pointers": sum(map(len, groups)),
        "pool_size": len(data.queries[0].pool_ids),
        "shots": data.max_shot or len(groups[0][0].pointer),
        "prompt_order": data.prompt_order,
        "notes": data.notes,
        "rule": {"mode": rule.mode, "alpha": rule.alpha, "beta": rule.beta, "correctness": rule.correctness},
        "correct": correctness(groups),
        "queries": query_kinds(correct),
        "per_query": per_query(correct),
        "scores": score_summaries(groups),
        "reward": reward_scale(groups, rewards, correct, rule),
        "rce": rce_targets(rewards, correct, taus),
        "ties": ties(rewards),
        "duplicates": duplicates(groups),
        "positions": positions(groups, len(data.queries[0].pool_ids)),
        "oracle": oracle(groups),
        "histograms": histograms(groups, rewards),
    }
    if answer_of is not None:
        found["answers"] = copies(data, answer_of)
    return found


def correctness(groups: Sequence[Sequence[RlCandidate]]) -> dict[str, Any]:
    """Share of correct pointers and mean accuracy, overall and per generation method."""

    def share(candidates: list[RlCandidate]) -> dict[str, float]:
        return {
            "n": len(candidates),
            "correct": 100 * float(np.mean([c.vqa_correct for c in candidates])),
            "accuracy": 100 * float(np.mean([c.vqa_acc_score for c in candidates])),
        }

    everything = [c for group in groups for c in group]
    methods = dict.fromkeys(c.gen_method for c in everything)
    return {"all": share(everything)} | {m: share([c for c in everything if c.gen_method == m]) for m in methods}


def query_kinds(correct: Sequence[np.ndarray]) -> dict[str, float]:
    """Share of queries whose pointers are never, sometimes and always correct."""
    rates = np.array([c.mean() for c in correct])
    return {
        "none": 100 * float((rates == 0).mean()),
        "some": 100 * float(((rates > 0) & (rates < 1)).mean()),
        "only": 100 * float((rates == 1).mean()),
        "group_size": float(np.mean([len(c) for c in correct])),
    }


def per_query(correct: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """How many queries have which share of correct pointers: {"edges": [SHARES + 1] in points, "counts": [SHARES]}."""
    counts, edges = np.histogram([100 * c.mean() for c in correct], SHARES, (0.0, 100.0))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def score_summaries(groups: Sequence[Sequence[RlCandidate]]) -> dict[str, Any]:
    """Quantiles of beam score and log-probability, how many pointers have them, and whether they know what is right.

    ``auc``: probability that within a query a correct pointer has the higher score than a wrong one (ties 1/2);
    None where no query has both.
    """
    return {name: _score_summary(groups, name) for name in ("beam_score", "logprob_score")}


def _score_summary(groups: Sequence[Sequence[RlCandidate]], name: str) -> dict[str, Any]:
    values = [getattr(c, name) for group in groups for c in group]
    there = np.array([v for v in values if v is not None])
    wins = pairs = 0.0
    for group in groups:
        right = np.array([getattr(c, name) for c in group if c.vqa_correct and getattr(c, name) is not None])
        wrong = np.array([getattr(c, name) for c in group if not c.vqa_correct and getattr(c, name) is not None])
        difference = right[:, None] - wrong[None, :]
        wins += float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        pairs += difference.size
    quantiles = np.quantile(there, QUANTILES).tolist() if len(there) else None
    return {
        "missing": 100 * (1 - len(there) / len(values)),
        "quantiles": quantiles,
        "sd": float(there.std()) if len(there) else None,
        "auc": wins / pairs if pairs else None,
    }


def reward_scale(
    groups: Sequence[Sequence[RlCandidate]],
    rewards: Sequence[np.ndarray],
    correct: Sequence[np.ndarray],
    rule: RewardRule,
) -> dict[str, Any]:
    """How much of the rewards' spread within groups comes from quality and how much from correctness.

    ``quality_share``: variance of alpha x quality as a share of the two parts' variances (points; None for modes
    without parts). ``inverted``: share of (right, wrong) pairs of a group in which the wrong pointer has the
    higher reward. ``clipped``: share of rewards that stand at the clip.
    """
    inverted = pairs = 0.0
    for r, c in zip(rewards, correct, strict=True):
        difference = r[c == 1][:, None] - r[c == 0][None, :]
        inverted += float((difference < -TIE).sum())
        pairs += difference.size
    everything = np.concatenate(rewards)
    found = {
        "mean": float(everything.mean()),
        "sd": float(everything.std()),
        "min": float(everything.min()),
        "max": float(everything.max()),
        "quantiles": np.quantile(everything, QUANTILES).tolist(),
        "sd_within": float(np.sqrt(np.mean([r.var() for r in rewards]))),
        "inverted": 100 * inverted / pairs if pairs else None,
        "quality_share": None,
    }
    if rule.mode == "plan":
        quality = [rule.alpha * np.array([c.beam_score or 0.0 for c in group]) for group in groups]
        hard = [rule.beta * (2 * c - 1 if rule.correctness == "pm1" else c) for c in correct]
        by_quality = float(np.mean([q.var() for q in quality]))
        by_correctness = float(np.mean([h.var() for h in hard]))
        total = by_quality + by_correctness
        found["quality_share"] = 100 * by_quality / total if total else None
        unclipped = np.concatenate([q + h for q, h in zip(quality, hard, strict=True)])
        found["clipped"] = 100 * float((np.abs(unclipped - everything) > TIE).mean())
    return found


def rce_targets(rewards: Sequence[np.ndarray], correct: Sequence[np.ndarray], taus: Sequence[float]) -> dict[str, Any]:
    """RCE's weights softmax(r / tau): how much goes to wrong pointers, and how many pointers share it effectively."""
    found: dict[str, Any] = {"taus": list(taus), "on_wrong": [], "effective": [], "on_wrong_where_some_right": []}
    for tau in taus:
        wrong, effective, mixed = [], [], []
        for r, c in zip(rewards, correct, strict=True):
            weights = np.exp((r - r.max()) / tau)
            weights /= weights.sum()
            wrong.append(float(weights[c == 0].sum()))
            effective.append(1 / float((weights**2).sum()))
            if 0 < c.mean():
                mixed.append(wrong[-1])
        found["on_wrong"].append(100 * float(np.mean(wrong)))
        found["on_wrong_where_some_right"].append(100 * float(np.mean(mixed)) if mixed else None)
        found["effective"].append(float(np.mean(effective)))
    return found


def ties(rewards: Sequence[np.ndarray]) -> dict[str, float]:
    """Groups of which all rewards are equal (or that have one member), and tied pairs within groups."""
    equal = [float(np.ptp(r)) <= TIE for r in rewards]
    tied = pairs = 0
    for r in rewards:
        close = np.abs(r[:, None] - r[None, :]) <= TIE
        tied += (int(close.sum()) - len(r)) // 2
        pairs += len(r) * (len(r) - 1) // 2
    return {
        "zero_variance": 100 * float(np.mean(equal)),
        "single": 100 * float(np.mean([len(r) == 1 for r in rewards])),
        "tied_pairs": 100 * tied / pairs if pairs else 0.0,
    }


def duplicates(groups: Sequence[Sequence[RlCandidate]]) -> dict[str, float]:
    """Share of pointers that repeat another of the query: exactly, or with the same picks in another order."""
    total = sum(map(len, groups))
    exact = sum(len(g) - len({c.pointer for c in g}) for g in groups)
    as_sets = sum(len(g) - len({frozenset(c.pointer) for c in g}) for g in groups)
    return {"exact": 100 * exact / total, "reordered": 100 * (as_sets - exact) / total}


def positions(groups: Sequence[Sequence[RlCandidate]], pool_size: int) -> dict[str, Any]:
    """Which pool positions are picked by policy and beam search (random pointers and prefixes left out).

    ``counts`` per position over all picks; ``ratio`` of the most picked position to an even share; ``p_value`` of a
    chi-square test against even picking, on one pick per query (picks within a query are not independent);
    ``spread``: entropy of the counts relative to its maximum, 1 is even.
    """
    chosen = [[c for c in group if c.gen_method not in ("random", "prefix") and c.pointer] for group in groups]
    counts = _counts([p for group in chosen for c in group for p in c.pointer], pool_size)
    firsts = _counts([group[0].pointer[0] for group in chosen if group], pool_size)
    if counts.sum() == 0:
        return {"counts": counts.tolist(), "ratio": None, "p_value": None, "spread": None}
    shares = counts / counts.sum()
    return {
        "counts": counts.tolist(),
        "ratio": float(shares.max() * pool_size),
        "p_value": float(scipy_stats.chisquare(firsts).pvalue),
        "spread": float(scipy_stats.entropy(shares) / np.log(pool_size)) if pool_size > 1 else 1.0,
    }


def _counts(positions_of: Sequence[int], pool_size: int) -> np.ndarray:
    return np.bincount(np.array(positions_of, dtype=np.int64), minlength=pool_size)


def oracle(groups: Sequence[Sequence[RlCandidate]]) -> dict[str, Any]:
    """Accuracy of the proposing policy's own choice, of a pointer drawn from the group, and of the group's best.

    The own choice is the best beam (``beam_rank`` 0), else the pointer of highest log-probability; queries
    with neither are left out of all three.
    """
    own, mean, best, regained = [], [], [], []
    for group in groups:
        choice = next((c for c in group if c.beam_rank == 0), None)
        if choice is None:
            scored = [c for c in group if c.logprob_score is not None]
            choice = max(scored, key=lambda c: c.logprob_score, default=None)
        if choice is None:
            continue
        accuracies = [c.vqa_acc_score for c in group]
        own.append(choice.vqa_acc_score)
        mean.append(np.mean(accuracies))
        best.append(max(accuracies))
        regained.append(max(accuracies) > choice.vqa_acc_score)
    if not own:
        return {"n": 0}
    return {
        "n": len(own),
        "own_choice": 100 * float(np.mean(own)),
        "group_mean": 100 * float(np.mean(mean)),
        "best": 100 * float(np.mean(best)),
        "headroom": 100 * float(np.mean(best) - np.mean(own)),
        "queries_with_better": 100 * float(np.mean(regained)),
    }


def copies(data: RlData, answer_of: Callable[[int], str]) -> dict[str, Any]:
    """How often the LVLM's answer is a demonstration's, and how often that is right.

    ``copied``: of all pointers. ``correct_if_copied`` and ``correct_if_not``: share correct. None where there are none.
    """
    copied, right = [], []
    for q in data.queries:
        for c in q.candidates:
            if c.vqa_pred_answer is not None:
                shown = {normalize_answer(answer_of(int(q.pool_ids[p]))) for p in c.pointer}
                copied.append(normalize_answer(c.vqa_pred_answer) in shown)
                right.append(bool(c.vqa_correct))
    if not copied:
        return {"n": 0}
    was, ok = np.array(copied), np.array(right)
    return {
        "n": len(copied),
        "copied": 100 * float(was.mean()),
        "correct_if_copied": 100 * float(ok[was].mean()) if was.any() else None,
        "correct_if_not": 100 * float(ok[~was].mean()) if (~was).any() else None,
    }


def histograms(groups: Sequence[Sequence[RlCandidate]], rewards: Sequence[np.ndarray]) -> dict[str, Any]:
    """{name: {"edges": [BINS + 1], "correct": [BINS], "wrong": [BINS]}} of reward, beam score and log-probability."""
    flat = [c for group in groups for c in group]
    columns = {
        "reward": np.concatenate(rewards).tolist(),
        "beam_score": [c.beam_score for c in flat],
        "logprob_score": [c.logprob_score for c in flat],
    }
    found = {}
    for name, values in columns.items():
        there = np.array([v for v in values if v is not None], dtype=float)
        if len(there) == 0:
            continue
        edges = np.histogram_bin_edges(there, BINS)
        right = np.array([c.vqa_correct for c, v in zip(flat, values, strict=True) if v is not None], dtype=bool)
        found[name] = {
            "edges": edges.tolist(),
            "correct": np.histogram(there[right], edges)[0].tolist(),
            "wrong": np.histogram(there[~right], edges)[0].tolist(),
        }
    return found
