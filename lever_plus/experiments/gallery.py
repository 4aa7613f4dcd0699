"""The report's gallery: single queries with the demonstrations that v2 and v3 chose, and what came of them."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from lever_plus.experiments.samples import PICTURES, Samples
from open_mmicl.errors import LeverError
from open_mmicl.interface.images import load_rgb

SIDES = ("v3", "v2")
THUMBNAIL = 112  # pixels of the longer side
PER_OUTCOME = 12  # queries per outcome of the longest prompt
PER_SHOT = 4  # at least as many of each outcome at every other shot
PRINTED = 4  # of each outcome of the longest prompt that appear on paper, too
OUTCOMES = ("v3", "v2", "both", "none")
"""Who is right: v3 alone, v2 alone, both, neither. Right is an accuracy above 0."""


@dataclass(frozen=True)
class Demonstration:
    """One thumbnail."""

    image: str | None
    question: str
    answer: str


@dataclass(frozen=True)
class Side:
    """What one method chose (pick order) and answered at each shot."""

    method: str
    demonstrations: list[Demonstration]
    answers: dict[int, tuple[str, float]]


@dataclass(frozen=True)
class Card:
    """One query; ``outcome`` per shot is one of :data:`OUTCOMES`; ``printed``: on paper, too."""

    question_id: int
    question: str
    image: str | None
    answers: list[tuple[str, int]]
    sides: list[Side]
    outcome: dict[int, str]
    printed: bool


def cards(
    samples: Samples, here: Callable[[str], str] = str, limit: int = PER_OUTCOME, per_shot: int = PER_SHOT
) -> list[Card]:
    """Up to ``limit`` queries per outcome at the largest shot both methods have, and further ones until there are
    ``per_shot`` per outcome at every smaller shot, in the samples' order.

    ``here``: where an image that the samples name is now. Empty where the run lacks v3, v2, or the fields of pictures.
    Thumbnails are data URIs; None where an image cannot be read.
    """
    if any(side not in samples.methods for side in SIDES) or any(n not in r for r in samples.rows for n in PICTURES):
        return []
    shots = sorted(set(samples.shots("v3")) & set(samples.shots("v2")) - {0})
    by_side = {side: {k: samples.cells[side, k, None] for k in shots} for side in SIDES}
    outcomes = [
        {k: _outcome(by_side["v3"][k][i], by_side["v2"][k][i]) for k in shots} for i in range(len(samples.question_ids))
    ]
    taken: list[int] = []
    for k in reversed(shots):
        for wanted in OUTCOMES:
            lacking = (limit if k == shots[-1] else min(limit, per_shot)) - sum(outcomes[i][k] == wanted for i in taken)
            others = (i for i, by in enumerate(outcomes) if by[k] == wanted and i not in taken)
            taken += list(islice(others, max(0, lacking)))
    shown = sorted(taken, key=lambda i: (OUTCOMES.index(outcomes[i][shots[-1]]), i))
    printed = [i for wanted in OUTCOMES for i in [j for j in shown if outcomes[j][shots[-1]] == wanted][:PRINTED]]
    return [
        _card({side: {k: by_side[side][k][i] for k in shots} for side in SIDES}, outcomes[i], i in printed, here)
        for i in shown
    ]


def counts(samples: Samples) -> dict[int, dict[str, int]]:
    """{shot: {outcome: number of queries}} over all queries of the run."""
    if any(side not in samples.methods for side in SIDES):
        return {}
    found = {}
    for k in sorted(set(samples.shots("v3")) & set(samples.shots("v2")) - {0}):
        pairs = zip(samples.cells["v3", k, None], samples.cells["v2", k, None], strict=True)
        outcomes = [_outcome(a, b) for a, b in pairs]
        found[k] = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
    return found


@lru_cache(maxsize=4096)
def thumbnail(path: str) -> str | None:
    """A JPEG data URI of at most THUMBNAIL pixels a side; None where the file is gone or is no image."""
    if not Path(path).is_file():
        return None
    try:
        small = load_rgb(path)
    except LeverError:
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _outcome(v3: dict[str, Any], v2: dict[str, Any]) -> str:
    return {(True, False): "v3", (False, True): "v2", (True, True): "both", (False, False): "none"}[
        v3["score"] > 0, v2["score"] > 0
    ]


def _card(
    rows: dict[str, dict[int, dict[str, Any]]], outcome: dict[int, str], printed: bool, here: Callable[[str], str]
) -> Card:
    longest = max(outcome)
    first = rows["v3"][longest]
    given = list(dict.fromkeys(first["answers"]))
    return Card(
        question_id=first["question_id"],
        question=first["question"],
        image=thumbnail(here(first["image"])),
        answers=sorted(((a, first["answers"].count(a)) for a in given), key=lambda pair: -pair[1]),
        sides=[_side(side, rows[side], longest, here) for side in SIDES],
        outcome=outcome,
        printed=printed,
    )


def _side(method: str, rows: dict[int, dict[str, Any]], longest: int, here: Callable[[str], str]) -> Side:
    row = rows[longest]
    shown = zip(row["icd_images"], row["icd_questions"], row["icd_answers"], strict=True)
    return Side(
        method=method,
        demonstrations=[Demonstration(thumbnail(here(image)), question, answer) for image, question, answer in shown],
        answers={k: (r["answer"], r["score"]) for k, r in rows.items()},
    )
