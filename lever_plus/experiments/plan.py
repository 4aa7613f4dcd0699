"""The plan's decision tree and its verdict: which experiment follows which result, and what GRPO is worth.

Pure functions of comparisons (evidence.py). The rules are those of the plan with the thresholds of docs/evidence.md:
experiment 1; if RCE - v2 > -delta experiment 3, else experiment 2; if 1 and 2 are both clearly below v2,
4A and 4B. Experiment 3 ends every path, since without it there is no verdict on GRPO.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lever_plus.experiments import words
from lever_plus.experiments.evidence import POOLED, Table, same_queries, score_table
from lever_plus.experiments.samples import Samples
from lever_plus.registries import RIVALS
from open_mmicl.errors import UsageError

Row = dict[str, Any]
SMALL_RATE = 1e-5  # the plan's learning rate


@dataclass(frozen=True)
class Decision:
    """One step of the tree: after which experiment, by which rule, the number that decided, what follows."""

    after: str
    rule: str
    number: str
    branch: str

    def as_dict(self) -> dict[str, str]:
        """JSON values."""
        return asdict(self)


def next_experiments(done: Mapping[str, Sequence[Row]], delta: float) -> list[str]:
    """The experiments that the tree asks for next; [] where it is finished.

    Args:
        done: per finished experiment (``1``, ``2``, ``3``, ``4a``, ``4b``) the comparison with v2, all shots
            pooled, of each of its arms.
        delta: smallest difference of interest, points.
    """
    if "1" not in done:
        return ["1"]
    path = ["1"]
    if not _reaches(done["1"], delta):
        path.append("2")
        if "2" in done and not _reaches(done["2"], delta) and _clearly_below(done["1"]) and _clearly_below(done["2"]):
            path += ["4a", "4b"]
        if "2" not in done:
            return ["2"]
    path.append("3")
    return [experiment for experiment in path if experiment not in done]


def decisions(done: Mapping[str, Sequence[Row]], delta: float, lang: str) -> list[Decision]:
    """The steps that were taken, each with its rule and the number that decided."""
    if "1" not in done:
        return []
    rule, one = words.say("reaches", lang, delta=delta), _reaches(done["1"], delta)
    steps = [_decision("1", rule, done["1"], "yes_3" if one else "no_2", lang)]
    if one or "2" not in done:
        return steps
    if _reaches(done["2"], delta):
        return [*steps, _decision("2", rule, done["2"], "yes_3", lang)]
    below = _clearly_below(done["1"]) and _clearly_below(done["2"])
    rule = words.say("both_below", lang)
    steps.append(_decision("2", rule, [*done["1"], *done["2"]], "yes_4" if below else "no_3", lang))
    four = [row for name in ("4a", "4b") for row in done.get(name, [])]
    if below and four:
        rule = words.say("reaches_reward", lang, delta=delta)
        steps.append(_decision("4", rule, four, "yes_3" if _reaches(four, delta) else "beyond_3", lang))
    return steps


def merged(arms: Mapping[str, Sequence[Samples]]) -> Table:
    """One table of all arms: v3 of arm ``exp3`` is the method ``exp3``; the other methods are the first arm's.

    Raises:
        UsageError: the arms were evaluated on different queries.
    """
    ordered = iter(same_queries([run for runs in arms.values() for run in runs]))
    first = score_table([next(ordered) for _ in next(iter(arms.values()))])
    rest = {name: score_table([next(ordered) for _ in runs], ("v3",)) for name, runs in list(arms.items())[1:]}
    tables = {next(iter(arms)): first, **rest}
    scores = {
        (name, shot): values
        for name, table in tables.items()
        for (method, shot), values in table.scores.items()
        if method == "v3"
    }
    others = {key: values for key, values in first.scores.items() if key[0] not in ("v3", "oracle")}
    return Table(first.images, {**scores, **others}, first.averaged)


def verdict(rows: Sequence[Row], delta: float, lang: str) -> tuple[str, str]:
    """(word, sentence) on GRPO from the comparisons of RCE + GRPO with RCE alone, per shot and pooled."""
    main = next((row for row in rows if row["shot"] == POOLED), rows[0])
    text = words.say("grpo", lang, diff=words.points(main["diff"]), interval=words.interval(main["ci95"]))
    if main["recipe_ci95"] is not None:
        text += words.say("grpo_seeds", lang, recipe=words.interval(main["recipe_ci95"]))
    text += words.say("grpo_n", lang, n=main["n"])
    if main["word"] == "none":
        text += words.why_none(main, lang) + words.more_queries(main, delta, lang)
    return main["word"], words.named("verdicts", main["word"], lang) + words.say("colon", lang) + text


def best_recipe(validation: Mapping[str, Sequence[float]], start: Sequence[float]) -> Row:
    """The recipe of the highest validation metric (mean over seeds), v2 among them; never by the test queries.

    Args:
        validation: arm -> its seeds' best validation metric. start: the seeds' metric before training (v2).

    Returns: {"arm": name or "v2", "validation": {name: mean}}. v2 wins a tie.
    """
    means = {"v2": sum(start) / len(start)} if start else {}
    means |= {name: sum(values) / len(values) for name, values in validation.items() if values}
    if not means:
        raise UsageError("no arm has a validation metric; the best recipe cannot be chosen without the test queries")
    return {"arm": max(means, key=lambda name: means[name]), "validation": means}


def advice(
    word: str,
    best: Row,
    against_rival: Row | None,
    audit_warnings: Sequence[str],
    lang: str,
    rates: Mapping[str, float],
    field: Sequence[Row] = (),
) -> list[str]:
    """What to run next, from the verdict, the best recipe, the fair rival, the names of the audit's warnings, and the
    learning rates by setting (``RCE_LR``, ``GRPO_LR``). ``field``: comparisons of the best v3 arm with other rivals.
    """
    texts = words.texts("advice")
    small = {name: rate for name, rate in rates.items() if rate <= SMALL_RATE} if word == "none" else {}
    keys = ["none_small_rates" if small else word]
    beaten_by = {row["b"] for row in field if row["word"] == "worse"}
    if "label" in beaten_by:
        keys.insert(0, "label_better")
    if beaten_by & set(RIVALS):  # these choose from all train items, not from the pools
        keys.insert(0, "pools")
    if best["arm"] == "v2":
        keys.append("v2_best")
    if against_rival is not None:
        keys.append(f"rival_{against_rival['word']}")
    told = " ".join(f"{name}={rate:g}".replace("e-0", "e-") for name, rate in small.items())
    tried = " ".join(f"{name}=1e-4" for name in small)
    lines = [words.pick(texts[key], lang).format(small=told, tried=tried) for key in keys]
    if audit_warnings:
        names = words.say("and", lang).join(audit_warnings)
        lines.insert(0, words.pick(texts["audit"], lang).format(names=names))
    return lines


def _reaches(rows: Sequence[Row], delta: float) -> bool:
    return max(row["diff"] for row in rows) > -delta


def _clearly_below(rows: Sequence[Row]) -> bool:
    return all(row["word"] == "worse" for row in rows)


def _decision(after: str, rule: str, rows: Sequence[Row], branch: str, lang: str) -> Decision:
    told = [
        f"{words.method(r['label'], lang)}: {words.points(r['diff'])} {words.interval(r['ci95'])} "
        f"{words.result(r, lang)}"
        for r in rows
    ]
    numbers = words.say("semicolon", lang).join(told)
    return Decision(words.say("step", lang, n=after), rule, numbers, words.say(branch, lang))
