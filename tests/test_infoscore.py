"""Beam search by InfoScore against brute force, and in the right direction."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_plus.infoscore import Beam, beam_search, prompt_order, prompts_per_query
from open_mmicl.errors import NumericError, UsageError


def scorer(table: dict, calls: list | None = None):
    def score(contexts):
        if calls is not None:
            calls.extend(contexts)
        return np.array([table[c] for c in contexts])

    return score


def random_table(pool: int, shots: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        c: -float(rng.exponential()) - 0.01 for k in range(shots + 1) for c in itertools.permutations(range(pool), k)
    }


@given(
    pool=st.integers(2, 6),
    shots=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    info=st.sampled_from(["logprob", "prob"]),
    left=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_an_exhaustive_beam_is_brute_force(pool: int, shots: int, seed: int, info: str, left: bool) -> None:
    shots = min(shots, pool)
    table = random_table(pool, shots, seed)
    found = beam_search(scorer(table), pool, 10_000, shots, "left" if left else "right", info)
    value = (lambda v: v) if info == "logprob" else np.exp
    truth = [
        Beam(p, float(value(table[tuple(reversed(p)) if left else p]) - value(table[()])))
        for p in itertools.permutations(range(pool), shots)
    ]
    truth.sort(key=lambda beam: (-beam.score, beam.pointer))
    assert [b.pointer for b in found] == [b.pointer for b in truth]
    assert np.allclose([b.score for b in found], [b.score for b in truth])


def test_a_narrow_beam_keeps_the_best_of_each_step_over_all_parents() -> None:
    table = random_table(8, 2, 3)
    found = beam_search(scorer(table), 8, 2, 2)
    first = sorted(range(8), key=lambda i: -table[(i,)])[:2]
    second = sorted(((a, b) for a in first for b in range(8) if b != a), key=lambda p: -table[(p[1], p[0])])[:2]
    assert [b.pointer for b in found] == second


def test_fault_03_the_demonstration_that_helps_is_kept_not_the_one_that_harms() -> None:
    """A model whose answer is known: demonstration 4 makes the answer certain, 2 makes it impossible."""
    gain = {4: 3.0, 2: -3.0}
    beams = beam_search(
        lambda contexts: np.array([-4.0 + sum(gain.get(i, 0.1 * i) for i in c) for c in contexts]), 6, 3, 1
    )
    assert beams[0].pointer == (4,) and beams[0].score == pytest.approx(3.0)
    assert (2,) not in [b.pointer for b in beams]


def test_the_first_pick_stands_next_to_the_query_with_construct_order_left() -> None:
    calls: list = []
    beam_search(scorer(random_table(3, 2, 0), calls), 3, 1, 2, "left")
    grown = [c for c in calls if len(c) == 2]
    assert len({c[-1] for c in grown}) == 1  # one parent: it is last in every prompt
    assert prompt_order((7, 3), "best_last") == (3, 7) and prompt_order((7, 3), "best_first") == (7, 3)


def test_number_of_prompts() -> None:
    calls: list = []
    beam_search(lambda contexts: (calls.extend(contexts), np.zeros(len(contexts)))[1], 64, 5, 2)
    assert len(calls) == prompts_per_query(64, 5, 2) == 1 + 64 + 5 * 63


def test_bad_numbers_and_small_pools_stop_the_search() -> None:
    with pytest.raises(NumericError):
        beam_search(lambda contexts: np.full(len(contexts), np.nan), 4, 2, 1)
    with pytest.raises(UsageError, match="pool of 1"):
        beam_search(lambda contexts: np.zeros(len(contexts)), 1, 2, 2)
