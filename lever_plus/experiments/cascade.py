"""How many demonstrations, decided by the LVLM's certainty: more are asked for only while it is not sure of its answer.

A *cascade* asks with the method's first ``start`` picks. Where the LVLM gives its answer a probability of at least
``threshold`` the answer stands; else it is asked again with one pick more, up to S, and where no answer is as certain
the most certain one stands. Both numbers are chosen on held-out train queries (:func:`fit`). It needs nothing of the
policy (no STOP) and costs further prompts, which are counted. To ask a costlier model only where a cheaper one is not
certain is known from cascades of models (FrugalGPT, Chen et al. 2023); here it is one model and more demonstrations.

All of it is a function of the samples: the answers at each length are those of the fixed shots (:mod:`.adaptive`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lever_plus.data import methods
from lever_plus.experiments import adaptive, evidence, stats
from lever_plus.experiments.samples import Row, Samples
from open_mmicl.errors import DamagedInputError

ERRORS = 0.5  # standard errors by which a fixed number has to be better to be taken instead


@dataclass(frozen=True)
class Rule:
    """From how many demonstrations on is asked, and how certain (probability of the answer, 0 to 1) is enough."""

    start: int
    threshold: float

    def follow(self, certainty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the rule does, from the probabilities (n, S + 1) of the answers with 0 to S demonstrations.

        Returns: the number of demonstrations of the answer that stands (n,), and how many prompts were asked (n,).
        """
        seen = certainty[:, self.start :]
        enough = seen >= self.threshold
        found = enough.any(axis=1)
        place = np.where(found, enough.argmax(axis=1), seen.argmax(axis=1))
        return self.start + place, np.where(found, place + 1, seen.shape[1])


def fit(scores: np.ndarray, certainty: np.ndarray) -> Rule:
    """The rule that queries choose, by the scores and certainty (n, S + 1) of their answers with 0 to S demonstrations.

    The measure is to ask with every number, from 0 or from 1 on, whichever scores better, and to take the most certain
    answer. Where a fixed number scores better than that by :data:`ERRORS` standard errors it is taken (a threshold of
    0). Else the threshold is the lowest at which no query scores less than by the measure. Few queries cannot tell
    thresholds apart by their mean score: the best mean of a few hundred gained nothing on others (results/LOG.md).
    """
    rows = np.arange(len(scores))

    def score(rule: Rule) -> np.ndarray:
        return scores[rows, rule.follow(certainty)[0]]

    def is_better(a: np.ndarray, b: np.ndarray, errors: float) -> bool:
        gain = a - b
        deviation = gain.std(ddof=1) if len(gain) > 1 else 0.0
        return bool(gain.mean() > errors * deviation / len(gain) ** 0.5 + 1e-12)

    rule = Rule(0 if is_better(score(Rule(0, 1.0)), score(Rule(1, 1.0)), 0.0) else 1, 1.0)
    measure, number = score(rule), int(scores.mean(axis=0).argmax())
    if is_better(scores[:, number], measure, ERRORS):
        return Rule(number, 0.0)
    for threshold in np.unique(np.append(certainty[:, rule.start :], 0.0))[::-1]:
        lower = Rule(rule.start, float(threshold))
        if (score(lower) < measure).any():
            break
        rule = lower
    return rule


def certainties(samples: Samples, method: str) -> np.ndarray:
    """Probability that the LVLM gives its own answer with 0 to S demonstrations, (n, S + 1); ``method``: a cascade.

    Raises:
        DamagedInputError: a line lacks it.
    """
    columns = []
    for name, shot in adaptive.lengths(samples, method):
        rows = samples.cells[name, shot, None]
        found = [row.get("answer_prob") for row in rows]
        for row, value in zip(rows, found, strict=True):
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise DamagedInputError(f"{samples.path}: question {row['question_id']}: answer_prob is no probability")
        columns.append(np.array(found, dtype=float))
    return np.stack(columns, axis=1)


def rule_of(choice: Samples, method: str) -> Rule:
    """The rule that held-out train queries choose for a cascade."""
    return fit(adaptive.by_length(choice, method), certainties(choice, method))


def rows(samples: Samples, choice: Samples, method: str) -> list[Row]:
    """The lines of a cascade: for each query the line of the answer that stands.

    ``asked`` says with how many demonstrations it was asked, ``prompt_tokens`` is the sum over these prompts.
    """
    rule = rule_of(choice, method)
    number, asked = rule.follow(certainties(samples, method))
    by_length = [samples.cells[name, shot, None] for name, shot in adaptive.lengths(samples, method)]
    made = []
    for q, (k, count) in enumerate(zip(number.tolist(), asked.tolist(), strict=True)):
        tried = list(range(rule.start, rule.start + count))
        tokens = sum(by_length[n][q]["prompt_tokens"] for n in tried)
        line = {**by_length[k][q], "method": method, "shot": len(by_length) - 1, "asked": tried}
        made.append({**line, "prompt_tokens": tokens})
    return made


def summarize(samples: Samples, choice: Samples, tokens_per_second: float | None, method: str) -> dict[str, Any]:
    """What metrics.json says about a cascade: as :func:`adaptive.summarize`, with ``rule``, ``prompts`` (a query) and
    ``certainty``: whether the LVLM's probability of an answer is that of its being right (:func:`adaptive.reliability`
    over the answers asked for, "right" being the official score).
    """
    found, rule = adaptive.summarize(samples, choice, tokens_per_second, method), rule_of(choice, method)
    seen, scores = certainties(samples, method), adaptive.by_length(samples, method)
    _, asked = rule.follow(seen)
    lengths = np.arange(seen.shape[1])
    used = (lengths >= rule.start) & (lengths < rule.start + asked[:, None])
    return {
        **found, "rule": {"start": rule.start, "threshold": rule.threshold}, "prompts": float(asked.mean()),
        "certainty": adaptive.reliability(seen[used], scores[used]),
    }  # fmt: skip


def of_runs(
    runs: Sequence[Samples], choices: Sequence[Samples], rates: Sequence[float | None], drawn: stats.Resampling
) -> dict[str, dict[str, Any]]:
    """A record's part about the cascades that every run has: {method: means over the runs, comparisons}."""
    names = [m for m in runs[0].methods if m in methods.CASCADES and all(m in run.methods for run in runs)]
    made = {}
    for method in names:
        each = [summarize(r, c, rate, method) for r, c, rate in zip(runs, choices, rates, strict=True)]
        rivals = [evidence.ZERO_SHOT, *(names[1:] if method == names[0] else [])]
        made[method] = {
            **adaptive.means(each),
            "rules": [m["rule"] for m in each],
            "prompts": float(np.mean([m["prompts"] for m in each])),
            "certainty": adaptive.pooled_bins([m["certainty"] for m in each]),
            "comparisons": adaptive.comparisons(runs, [m["best_fixed"]["shot"] for m in each], drawn, method, rivals),
        }
    return made


def csv_rows(shown: Any) -> list[dict[str, Any]]:
    """cascades.csv: one row per experiment and cascade; rules of several runs are separated by blanks."""
    rows = []
    for name, (made, _) in shown.items():
        for method, a in made.get("cascades", {}).items():
            own = {
                "method": method, "prompts": a["prompts"], "calibration_error": a["certainty"]["calibration_error"],
                **{key: " ".join(str(rule[key]) for rule in a["rules"]) for key in ("start", "threshold")},
            }  # fmt: skip
            rows.append({**adaptive.csv_row(name, a), **own})
    return rows
