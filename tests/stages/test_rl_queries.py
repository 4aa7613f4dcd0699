"""Which queries get RL data, and what is put into their pools."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lever_plus.settings.data import RlDataSettings
from lever_plus.stages import work
from lever_plus.stages.generate_rl_data import first_picks
from lever_plus.stages.rl_queries import balanced, mined_pools
from open_mmicl.metrics.vqa import vqa_accuracy

SCORES = st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), min_size=1, max_size=4)


@given(st.lists(SCORES, min_size=1, max_size=7), st.data())
def test_no_other_choice_is_nearer_to_half_right(correct, data):
    wanted = data.draw(st.integers(1, len(correct)))
    kept = balanced(correct, wanted)
    far = [abs(float(np.mean(query)) - 0.5) for query in correct]
    best = min(sum(far[i] for i in some) for some in itertools.combinations(range(len(correct)), wanted))
    assert kept == sorted(set(kept)) and len(kept) == wanted
    assert sum(far[i] for i in kept) == pytest.approx(best)


def test_of_equally_near_queries_the_earlier_are_kept():
    thirds = [[0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0]]
    assert balanced(thirds, 2) == [1, 2]
    assert balanced(thirds, 4) == [0, 1, 2, 3]


def split_of(answers, images=None):
    """A train split of ``answers`` [N][annotators]."""
    images = range(len(answers)) if images is None else images

    class Split(SimpleNamespace):
        def __len__(self):
            return len(answers)

    return Split(
        image_ids=np.array(list(images)),
        answers=lambda row: answers[row],
        answer=lambda row: max(answers[row], key=answers[row].count),
    )


@pytest.mark.parametrize("seed", range(20))
def test_every_pool_that_can_be_helped_is_and_no_other_changes(seed):
    draw = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(12)]
    answers = [list(draw.choice(words, 10, p=_skew(draw, 12))) for _ in range(40)]
    train = split_of(answers, draw.integers(0, 30, 40))
    rows = draw.permutation(40)[:15]
    pools = np.stack([draw.permutation(np.setdiff1d(np.arange(40), [row]))[:4] for row in rows])
    before = pools.copy()
    queries = torch.from_numpy(draw.normal(size=(40, 6)))
    found, mined, without = mined_pools(train, rows, pools, SimpleNamespace(queries=queries), seed)
    assert (pools == before).all()
    changed = 0
    for row, old, new in zip(rows, pools, found, strict=True):
        worth = [vqa_accuracy(train.answer(item), answers[row]) for item in range(40)]
        usable = [item for item in range(40) if train.image_ids[item] != train.image_ids[row]]
        if any(worth[item] > 0 for item in old) or max(worth[item] for item in usable) == 0:
            assert (old == new).all()
            continue
        changed += 1
        (place,) = np.flatnonzero(old != new)
        best = [item for item in usable if worth[item] == max(worth[i] for i in usable)]
        cosine = torch.nn.functional.cosine_similarity(queries[row][None], queries[best])
        assert new[place] == best[int(cosine.argmax())]
    right = sum(any(vqa_accuracy(train.answer(i), answers[r]) > 0 for i in p) for r, p in zip(rows, found, strict=True))
    assert mined == changed and right + without == len(rows)


def _skew(draw, n):
    weights = draw.random(n) ** 6
    return weights / weights.sum()


def test_a_place_in_the_pool_says_nothing():
    answers = [["x"] * 10, ["x"] * 10, *[[f"b{i}"] * 10 for i in range(20)]]
    queries = torch.eye(len(answers))
    places = set()
    for seed in range(60):
        found, mined, _ = mined_pools(
            split_of(answers), np.array([0]), np.arange(2, 10)[None], SimpleNamespace(queries=queries), seed
        )
        places |= set(np.flatnonzero(found[0] == 1).tolist())
        assert mined == 1
    assert places == set(range(8))


def test_first_picks_are_distinct_and_in_order():
    assert first_picks([[3, 1], [], [2], [3, 4]]) == [(3,), (2,)]


@pytest.mark.parametrize("prefixes", [False, True])
def test_the_price_names_the_probes(prefixes):
    shape = {"rl_query_num": 10, "rl_beams": 2, "rl_samples_low": 1, "rl_samples_high": 0, "rl_random": 1, "rl_shot": 3}
    plain = work.rl_data(RlDataSettings(**shape, rl_prefixes=prefixes))
    probed = work.rl_data(RlDataSettings(**shape, rl_prefixes=prefixes, rl_balance=3))
    firsts = 4 * 10 * (2 if prefixes else 3)  # a kept query's own first picks are among its prefixes
    assert 10 * (probed.per_query - plain.per_query) == firsts + 20
