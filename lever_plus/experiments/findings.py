"""What an audit's numbers mean for RCE and GRPO: one sentence each, a warning where a threshold is passed.

The sentences are in templates/findings.yaml; the thresholds and the numbers they hold are here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lever_plus.experiments import words

MIN_QUERIES = 300
MIN_CORRECT, MAX_CORRECT = 10.0, 90.0  # points of correct pointers
MIN_MIXED = 30.0  # points of queries with right and wrong pointers
MAX_WRONG_WEIGHT = 50.0  # points of RCE's weight on wrong pointers
MAX_INVERTED = 5.0  # points of (right, wrong) pairs whose rewards stand the wrong way round
MIN_QUALITY, MAX_QUALITY = 5.0, 80.0  # points of the rewards' spread within groups that quality makes up
MAX_CLIPPED = 1.0  # points of rewards
MIN_AUC = 0.55
MAX_ZERO_VARIANCE = 50.0  # points of groups without reward differences
MAX_DUPLICATES = 10.0  # points of pointers
MAX_POSITION_RATIO, POSITION_P = 3.0, 0.001
MIN_HEADROOM = 3.0  # points between the policy's choice and the best candidate
Audit = dict[str, Any]
Found = tuple[bool, dict[str, Any]]
"""Whether to warn, and the numbers for the texts."""


@dataclass(frozen=True)
class Finding:
    """One line of the audit: what was measured, its value, what that means, when it warns, whether it does."""

    key: str
    name: str
    value: str
    meaning: str
    threshold: str
    warning: bool


def findings(audit: Audit, lang: str) -> list[Finding]:
    """All findings of an audit (:func:`lever_plus.experiments.audit.audit`), in the order of the texts' file."""
    made = []
    for key, text in words.texts("findings").items():
        found = MAKERS[key](audit, lang)
        if found is not None:
            warning, numbers = found
            parts = {part: words.pick(text[part], lang).format(**numbers) for part in text}
            made.append(Finding(key=key, warning=warning, **parts))
    return made


def _amount(a: Audit, lang: str) -> Found:
    numbers = {"n_queries": a["n_queries"], "n_pointers": a["n_pointers"], "group_size": a["queries"]["group_size"]}
    return a["n_queries"] < MIN_QUERIES, {**numbers, "limit": MIN_QUERIES}


def _correct(a: Audit, lang: str) -> Found:
    share = a["correct"]["all"]["correct"]
    return not MIN_CORRECT <= share <= MAX_CORRECT, {"share": share, "low": MIN_CORRECT, "high": MAX_CORRECT}


def _kinds(a: Audit, lang: str) -> Found:
    return a["queries"]["some"] < MIN_MIXED, {**a["queries"], "limit": MIN_MIXED}


def _methods(a: Audit, lang: str) -> Found:
    by = {m: v for m, v in a["correct"].items() if m != "all"}
    listed = words.say("comma", lang).join(f"{m} {v['correct']:.1f}% (n={v['n']:,})" for m, v in by.items())
    others = [v["correct"] for m, v in by.items() if m != "random"]
    return "random" in by and bool(others) and max(others) <= by["random"]["correct"], {"list": listed}


def _rce(a: Audit, lang: str) -> Found:
    r = a["rce"]
    rows = zip(r["taus"], r["on_wrong"], r["effective"], strict=True)
    told = [words.say("on_wrong", lang, tau=tau, wrong=wrong, n=n) for tau, wrong, n in rows]
    return r["on_wrong"][-1] > MAX_WRONG_WEIGHT, {
        "list": words.say("comma", lang).join(told),
        "limit": MAX_WRONG_WEIGHT,
    }


def _inverted(a: Audit, lang: str) -> Found | None:
    share = a["reward"]["inverted"]
    return None if share is None else (share > MAX_INVERTED, {"share": share, "limit": MAX_INVERTED})


def _scale(a: Audit, lang: str) -> Found | None:
    r = a["reward"]
    if r["quality_share"] is None:
        return None
    numbers = {"share": r["quality_share"], "mean": r["mean"], "sd": r["sd"], "within": r["sd_within"]}
    return not MIN_QUALITY <= r["quality_share"] <= MAX_QUALITY, {**numbers, "low": MIN_QUALITY, "high": MAX_QUALITY}


def _clipped(a: Audit, lang: str) -> Found | None:
    share = a["reward"].get("clipped")
    return None if share is None else (share > MAX_CLIPPED, {"share": share, "limit": MAX_CLIPPED})


def _quality(a: Audit, lang: str) -> Found | None:
    s = a["scores"]["beam_score"]
    return None if s["auc"] is None else (s["auc"] < MIN_AUC, {**s, "limit": MIN_AUC})


def _ties(a: Audit, lang: str) -> Found:
    t = a["ties"]
    numbers = {"zero": t["zero_variance"], "single": t["single"], "tied": t["tied_pairs"], "limit": MAX_ZERO_VARIANCE}
    return t["zero_variance"] > MAX_ZERO_VARIANCE, numbers


def _duplicates(a: Audit, lang: str) -> Found:
    return a["duplicates"]["exact"] > MAX_DUPLICATES, {**a["duplicates"], "limit": MAX_DUPLICATES}


def _positions(a: Audit, lang: str) -> Found | None:
    p = a["positions"]
    if p["ratio"] is None:
        return None
    numbers = {"ratio": p["ratio"], "spread": p["spread"], "p": p["p_value"]}
    warning = p["ratio"] > MAX_POSITION_RATIO and p["p_value"] < POSITION_P
    return warning, {**numbers, "limit": MAX_POSITION_RATIO, "p_limit": POSITION_P}


def _oracle(a: Audit, lang: str) -> Found | None:
    o = a["oracle"]
    return None if o["n"] == 0 else (o["headroom"] < MIN_HEADROOM, {**o, "limit": MIN_HEADROOM})


def _copies(a: Audit, lang: str) -> Found | None:
    c = a.get("answers")
    if c is None or c["n"] == 0:
        return None
    right, other = c["correct_if_copied"], c["correct_if_not"]
    told = ["—" if share is None else f"{share:.1f}%" for share in (right, other)]
    warning = None not in (right, other) and right < other
    return warning, {"copied": c["copied"], "if_copied": told[0], "if_not": told[1]}


def _notes(a: Audit, lang: str) -> Found | None:
    return (True, {"list": "; ".join(a["notes"])}) if a["notes"] else None


MAKERS: dict[str, Callable[[Audit, str], Found | None]] = {
    "amount": _amount, "correct": _correct, "kinds": _kinds, "methods": _methods, "rce": _rce, "inverted": _inverted,
    "scale": _scale, "clipped": _clipped, "quality": _quality, "ties": _ties, "duplicates": _duplicates,
    "positions": _positions, "oracle": _oracle, "copies": _copies, "notes": _notes,
}  # fmt: skip
