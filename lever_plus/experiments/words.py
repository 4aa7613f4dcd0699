"""What the numbers allow to be said, in Chinese and English (docs/evidence.md): functions of a record's entries.

The sentences are in templates/words.yaml.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import yaml

from lever_plus.data import methods
from lever_plus.experiments import stats
from lever_plus.experiments.markdown import TEMPLATES
from lever_plus.registries import RIVALS

LANGUAGES = ("zh", "en")
SEEDS_DOMINATE = 2.0  # a recipe's interval this many times as wide as the queries' is the seeds' doing
PLAN_SETTINGS = (
    "RCE_EPOCHS", "GRPO_EPOCHS", "BATCH_SIZE", "RCE_LR", "GRPO_LR", "KL_BETA", "REWARD_ALPHA", "REWARD_BETA", "SEED",
)  # fmt: skip
"""Settings that the plan speaks of: a record lists them one by one, the others in one line."""
GRPO_SETTINGS = ("GRPO_LR", "KL_BETA", "KL_REF", "KL_ADAPTIVE", "GRPO_MODE", "ADVANTAGE_SCALE", "EPS_LOW", "EPS_HIGH")
"""Of no effect without GRPO."""
REPORTED_EARLIER: dict[str, dict[str, list[float]]] = {
    "okvqa": {
        "v2": [56.7, 56.1, 55.5, 54.7],
        "v3, RCE 25 + GRPO 25": [57.3, 50.2, 48.3, 49.6],
        "v3, RCE 3 + GRPO 8": [51.6, 48.0, 47.2, 46.0],
    }
}
"""The plan's own numbers (200 OK-VQA queries, shots 1 to 4), by data set: shown beside measured ones, never mixed."""


@functools.cache
def texts(file: str = "words") -> dict[str, Any]:
    """A YAML file of templates/, whose texts are [Chinese, English]."""
    return yaml.safe_load((TEMPLATES / f"{file}.yaml").read_text(encoding="utf-8"))


def pick(sides: Sequence[str], lang: str) -> str:
    """The side of a language."""
    return sides[LANGUAGES.index(lang)]


def say(key: str, lang: str, **values: Any) -> str:
    """A sentence of words.yaml with its names filled in."""
    return pick(texts()["say"][key], lang).format(**values)


def named(kind: str, name: str, lang: str) -> str:
    """What readers are told of a name (``kind``: a part of words.yaml); the name itself where that is not there."""
    found = texts()[kind].get(name)
    return name if found is None else pick(found, lang)


def title(experiment: str, lang: str) -> str:
    """The plan's title of an experiment name such as ``exp4a`` or ``exp1_seed2``; else the name itself."""
    found = re.match(r"exp(\d[ab]?)(?:_rce_epochs(\d+))?(?![0-9a-z])", experiment.lower())
    if found and found[1] in texts()["titles"]:
        return named("titles", found[1], lang) + (say("epochs", lang, n=found[2]) if found[2] else "")
    return say("experiment", lang, name=experiment)


def method(name: str, lang: str) -> str:
    """A method's or an arm's name for readers."""
    if name not in texts()["methods"] and RIVALS.file_of(name) is not None:
        return RIVALS.helps()[name]
    found = re.fullmatch(r"exp(\d[ab]?)(?:_rce_epochs(\d+))?", name)
    if found is None or found[1] not in texts()["arms"]:
        return named("methods", name, lang)
    return say("arm_epochs", lang, arm=found[1], n=found[2]) if found[2] else named("arms", found[1], lang)


def group(name: str, lang: str) -> str:
    """A group of queries for readers; its own name where nothing more is known of it."""
    return named("groups", name, lang)


UPPER = ("oracle",)
"""Bounds that no method reaches: not in short tables."""


def short(name: str, lang: str) -> str:
    """A method's name without what stands in brackets."""
    return re.sub(r"\s*[（(].*[)）]$", "", method(name, lang))


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns, broken at blanks, or after wide characters."""
    lines, line = [], ""
    for piece in re.findall(r"[\u2e80-\uffef]|[^\s\u2e80-\uffef]+|\s+", text):
        if columns(line + piece.rstrip()) > width and line.strip() and piece not in "，。：；）、":
            lines.append(line.rstrip())
            line = "" if piece.isspace() else piece
        else:
            line += piece
    return [*lines, line.rstrip()] if line.strip() else lines


def validation(name: str, lang: str) -> str:
    """A validation number's name for readers."""
    return named("validation", name, lang)


def validation_meaning(name: str, lang: str) -> str:
    """What a validation number is; its name where that is not known."""
    return named("validation_meaning", name, lang)


def is_official(text: str | None) -> bool:
    """Whether a record's accuracy is the official VQA accuracy of ten annotators."""
    return text is None or re.fullmatch(texts()["metrics"][0][0], text) is not None


def metric(text: str | None, lang: str) -> str:
    """What a record's accuracy is (:func:`open_mmicl.metrics.vqa.metric_of`); None: of a record from before that was
    told, when it was always the official one.
    """
    if text is None or is_official(text):
        return say("official", lang)
    if lang != "zh":
        return text
    parts = []
    for part in text.split("; "):
        found = next(((m, to) for pattern, to in texts()["metrics"] if (m := re.fullmatch(pattern, part))), None)
        parts.append(found[0].expand(found[1]).replace(" 至  个", " 个") if found else part)
    return say("semicolon", lang).join(parts)


def metric_title(text: str | None, lang: str) -> str:
    """As :func:`metric`, where it begins a sentence."""
    said = metric(text, lang).removeprefix("the ")
    return said[:1].upper() + said[1:]


def why(text: str | None, lang: str) -> str:
    """Why a checkpoint was taken, in a language; "not recorded" for None."""
    if not text:
        return say("not_recorded", lang)
    for pattern, chinese in texts()["whys"] if lang == "zh" else ():
        if found := re.fullmatch(pattern, text):
            return found.expand(chinese).replace("  ", " ")
    return text


def settings(configuration: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a record that the plan speaks of, and the others; without GRPO none of GRPO's."""
    used = {k: v for k, v in configuration.items() if k not in GRPO_SETTINGS or configuration.get("GRPO_EPOCHS") != 0}
    return {k: v for k, v in used.items() if k in PLAN_SETTINGS}, {
        k: v for k, v in used.items() if k not in PLAN_SETTINGS
    }


def adaptive_rows(found: dict[str, Any], method: str = "v3_adaptive") -> list[dict[str, Any]]:
    """The rows of a record's table of how many demonstrations: what decides, its rivals and what each costs.

    A best fixed number that differs between runs is shown with all of them, its price at the mean of theirs.
    """
    tokens, seconds, shots = found["prompt_tokens"], found["seconds_per_query"], found["shots"]
    best, fixed = [b["shot"] for b in found["best_fixed"]], methods.fixed_of(method)

    def row(
        name: str, cells: list[tuple[str, int]], accuracy: float, number: float, note: str = ""
    ) -> dict[str, Any]:
        price = {
            kind: None if table is None else sum(table[m][str(k)] for m, k in cells) / len(cells)
            for kind, table in (("tokens", tokens), ("seconds", seconds))
        }
        return {"method": name, "note": note, "accuracy": accuracy, "number": number, "prompts": 1.0, **price}

    known = [(fixed, k) for k in best]
    return [
        row(method, [(method, shots)], found["accuracy"], found["mean_demonstrations"])
        | {"prompts": found.get("prompts", 1.0)},
        row(f"{fixed}_best_fixed", known, found["best_fixed_accuracy"], sum(best) / len(best),
            f" ({', '.join(str(k) for k in sorted(set(best)))})"),
        row("zero_shot", [("zero_shot", 0)], found["zero_shot"], 0.0),
    ]  # fmt: skip


def cascade_rows(cascades: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a record's table of cascades: each with its best fixed number, then zero-shot once."""
    rows = [row for method, found in cascades.items() for row in adaptive_rows(found, method)]
    return [row for row in rows if row["method"] != "zero_shot"] + [rows[-1]]


def p_value(value: float) -> str:
    """Three decimals; what would round to 0 is said to be below 0.001."""
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def mcnemar(comparison: dict[str, Any]) -> str:
    """McNemar's p of each training seed, with Holm's correction where there is one; a dash where it has none."""
    each = comparison["p_value_each"]
    if each is None:
        return "—"
    if comparison["p_value_holm"] is not None:
        return f"{p_value(each[0])} ({p_value(comparison['p_value_holm'])})"
    return " / ".join(p_value(p) for p in each)


def shot_name(shot: int | str, lang: str) -> str:
    """``shot_num=1``, or the words for all shots together."""
    return f"shot_num={shot}" if shot != "pooled" else say("all_shots", lang)


def points(value: float) -> str:
    """Points with sign, one decimal, and a real minus."""
    return f"{value:+.1f}".replace("-", "−")


def interval(ends: list[float | None]) -> str:
    """``[−2.1, +2.9]``."""
    return "[" + ", ".join("?" if end is None else points(end) for end in ends) + "]"


def accuracy(cell: dict[str, Any] | None) -> str:
    """``71.2 [68.2, 73.9]`` of a record's cell; "" for None."""
    return "" if cell is None else f"{cell['mean']:.1f} [{cell['ci95'][0]:.1f}, {cell['ci95'][1]:.1f}]"


def count(value: int | None, lang: str) -> str:
    """A number with thousands separated; "not recorded" for None."""
    return say("not_recorded", lang) if value is None else f"{value:,}"


def needed_n(comparison: dict[str, Any], delta: float) -> tuple[float, int | None]:
    """(target, n): the difference that further queries would have to show, at least ``delta`` points, and how many
    queries show it at 80 % power.
    """
    target = max(abs(comparison["diff"]), delta)
    if comparison["se"] is None:
        return target, None
    return target, stats.needed_n(comparison["se"], comparison["n"], target)


def rounded_n(n: int) -> str:
    """Two significant digits: an estimate of an estimate."""
    digits = max(0, len(str(n)) - 2)
    return f"{round(n, -digits):,}"


def verdict(comparison: dict[str, Any], delta: float, lang: str) -> str:
    """What a paired comparison allows to be said, with its numbers."""
    a, b = method(comparison["a"], lang), method(comparison["b"], lang)
    numbers = say("numbers", lang, diff=points(comparison["diff"]), interval=interval(comparison["ci95"]))
    if comparison["word"] == "none":
        numbers += why_none(comparison, lang) + more_queries(comparison, delta, lang)
    names = {"a": a, "b": b, "a_tight": _tight(a), "b_loose": _loose(b), "b_tight": _loose(_tight(b))}
    return say(f"verdict_{comparison['word']}", lang, **names, numbers=numbers, n=comparison["n"])


def brackets(text: str, lang: str) -> str:
    """A text in the language's brackets, with the blank that stands before them in English."""
    return say("brackets", lang, text=text)


def _tight(name: str) -> str:
    """A name with the space that Chinese text wants after Latin letters, and none after a wide bracket."""
    return name if name.endswith("）") else name + " "


def _loose(name: str) -> str:
    """A name with the space that Chinese text wants before Latin letters."""
    return " " + name if name[0].isascii() else name


def more_queries(comparison: dict[str, Any], delta: float, lang: str) -> str:
    """How many queries would show the difference; empty where that cannot be said, or where it is not the number of
    queries that is lacking. Where the variation between training seeds is what makes the interval wide, it says that
    queries alone will not do.
    """
    target, n = needed_n(comparison, delta)
    if n is None:
        return ""
    recipe, (low, high) = comparison["recipe_ci95"], comparison["ci95"]
    if recipe is not None and recipe[1] - recipe[0] > SEEDS_DOMINATE * (high - low):
        return say("more_seeds", lang)
    if n <= comparison["n"]:
        return ""
    return say("more_queries", lang, target=target, n=rounded_n(n))


def why_none(comparison: dict[str, Any], lang: str) -> str:
    """Why an interval that excludes 0 is still no result (:func:`evidence.withheld`); empty for other comparisons."""
    reason = comparison["withheld"]
    if reason is None:
        return ""
    numbers = {
        "images": comparison["n_images"], "alpha": f"{comparison['alpha']:.2f}",
        "p": p_value(comparison["p_permutation"]), "holm": p_value(comparison["p_permutation_holm"]),
        "recipe": interval(comparison["recipe_ci95"] or []),
    }  # fmt: skip
    return say("but", lang) + say(f"withheld_{reason}", lang, **numbers)


def rule(seeded: bool, lang: str) -> str:
    """When better and worse are said (evidence.judge)."""
    limits = {"main": stats.ALPHA_MAIN, "shots": stats.ALPHA_SHOTS, "both": 1 - stats.LEVEL}
    seeds = say("rule_seeds", lang) if seeded else ""
    return say("rule", lang, **limits, images=stats.MIN_IMAGES) + seeds + say("full_stop", lang)


def mark(word: str, lang: str) -> str:
    """One word for a table cell."""
    return say(word, lang)


def result(comparison: dict[str, Any], lang: str) -> str:
    """:func:`mark`, and why where the interval beside it seems to say otherwise."""
    return mark(comparison["word"], lang) + why_none(comparison, lang)
