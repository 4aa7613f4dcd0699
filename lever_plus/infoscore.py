"""Beam search by InfoScore: which demonstrations raise the LVLM's probability of the true answer most.

InfoScore of adding c to context C is log P(y | c, C, x) - log P(y | C, x) (or the difference of the
probabilities); higher is better, for every model. A beam's score is the sum over its steps, which
telescopes to log P(y | C, x) - log P(y | x).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from open_mmicl.errors import NumericError, UsageError

PROMPT_ORDERS = {"left": "best_last", "right": "best_first"}
"""Of each CONSTRUCT_ORDER: left puts a new demonstration before those there, right behind them."""
# log P(y | context, x) for contexts given as pool positions in PROMPT order: [(), (3,), (7, 3), …] -> float64 [n]
ScoreContexts = Callable[[Sequence[tuple[int, ...]]], np.ndarray]


@dataclass(frozen=True)
class Beam:
    """``pointer``: pool positions in pick order, best first; ``score``: its InfoScore; ``totals``: after each pick."""

    pointer: tuple[int, ...]
    score: float
    totals: tuple[float, ...] = field(default=(), compare=False)


def prompt_order(pointer: Sequence[int], order: str) -> tuple[int, ...]:
    """Pick order -> prompt order, and back: it is its own inverse. ``best_last``: the first pick next to the query."""
    if order == "best_last":
        return tuple(reversed(pointer))
    if order == "best_first":
        return tuple(pointer)
    raise UsageError(f"PROMPT_ORDER={order} is not allowed: best_last | best_first")


def beam_search(
    score_contexts: ScoreContexts,
    pool_size: int,
    beam_size: int = 5,
    max_shot: int = 2,
    construct_order: str = "left",
    infoscore: str = "logprob",
) -> list[Beam]:
    """Search pointers of ``max_shot`` positions out of ``pool_size``.

    Every step extends each kept pointer by every position it does not hold and keeps the ``beam_size``
    with the highest total InfoScore over all parents; ties go to the smaller pointer. With construct
    order ``left`` a new demonstration goes before those there, so the first pick stays next to the query.

    Returns: at most ``beam_size`` beams of ``max_shot`` positions, best first.

    Raises:
        UsageError: the pool is smaller than ``max_shot``. NumericError: a score is not finite.
    """
    if pool_size < max_shot:
        raise UsageError(f"a pool of {pool_size} candidates cannot give {max_shot} demonstrations")
    order = PROMPT_ORDERS[construct_order]

    def value(pointers: list[tuple[int, ...]]) -> np.ndarray:
        log_probs = np.asarray(score_contexts([prompt_order(p, order) for p in pointers]), dtype=np.float64)  # (n,)
        if not np.isfinite(log_probs).all():
            raise NumericError(
                "log-probability of the answer is not finite for pointer "
                f"{pointers[int(np.argmin(np.isfinite(log_probs)))]}"
            )
        return log_probs if infoscore == "logprob" else np.exp(log_probs)

    empty = float(value([()])[0])
    beams = [Beam((), 0.0)]
    for _ in range(max_shot):
        grown = [(*beam.pointer, i) for beam in beams for i in range(pool_size) if i not in beam.pointer]
        before = {beam.pointer: beam.totals for beam in beams}
        totals = value(grown) - empty
        ranked = sorted(zip(totals.tolist(), grown, strict=True), key=lambda pair: (-pair[0], pair[1]))
        beams = [Beam(p, total, (*before[p[:-1]], total)) for total, p in ranked[:beam_size]]
    return beams


def prompts_per_query(pool_size: int, beam_size: int, max_shot: int) -> int:
    """Prompts that :func:`beam_search` scores, the empty context included (64, 5, 2 -> 380)."""
    count, kept = 1, 1
    for step in range(max_shot):
        grown = kept * (pool_size - step)
        count += grown
        kept = min(beam_size, grown)
    return count
