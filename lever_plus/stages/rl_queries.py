"""Which train queries get RL data, and what their pools hold: data from which something can be learned.

RL_BALANCE probes more queries than are wanted and keeps those on which some pointers are right and some wrong;
POSITIVE_MINING puts a right demonstration into a pool that has none.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lever_plus.data.dataset import VqaSplit
from open_mmicl.metrics.vqa import normalize_answer, vqa_accuracy

MINED_FROM = 1024  # right items compared at most, drawn by (seed, row): an answer such as "yes" has far more


def mined_pools(
    train: VqaSplit, rows: np.ndarray, pools: np.ndarray, tables: Any, seed: int
) -> tuple[np.ndarray, int, int]:
    """Pools in which every query that any train item can help has a right demonstration.

    Right is what the annotations say, without a prompt, as in :mod:`lever_plus.data.labels`: the candidate's own answer
    would score under the query's annotators. A pool without one gets, in a place drawn by (seed, row), the train item
    of another image with the highest score; among equals the one of the highest cosine with what the query shows.

    Args:
        rows: [Q] train rows of the queries. pools: [Q, K] train rows, left as they are.
        tables: what the selector sees of every train item; ``queries`` (N, d_q).

    Returns: the pools, how many were changed, how many still hold no right demonstration (the split has none).
    """
    pools, mined, without = pools.copy(), 0, 0
    answers = [normalize_answer(train.answer(row)) for row in range(len(train))]
    holders: dict[str, list[int]] = defaultdict(list)
    for item, answer in enumerate(answers):
        holders[answer].append(item)
    for i, row in enumerate(rows.tolist()):
        truth = train.answers(row)
        worth = {answer: vqa_accuracy(answer, truth) for answer in sorted({normalize_answer(a) for a in truth} - {""})}
        if any(worth.get(answers[item], 0.0) > 0 for item in pools[i].tolist()):
            continue
        image = train.image_ids[row]
        others = {a: [k for k in holders[a] if train.image_ids[k] != image] for a in worth if a in holders}
        best = max((worth[a] for a, items in others.items() if items), default=0.0)
        right = sorted(k for a, items in others.items() if worth[a] == best for k in items)
        if best == 0.0:
            without += 1
            continue
        draw = np.random.default_rng([seed, row])
        if len(right) > MINED_FROM:
            right = np.sort(draw.choice(right, MINED_FROM, replace=False)).tolist()
        pools[i, draw.integers(pools.shape[1])] = _nearest(tables, row, right)
        mined += 1
    return pools, mined, without


def _nearest(tables: Any, row: int, items: list[int]) -> int:
    """Of some items the one of the highest cosine with what the query shows; equals: the lower row."""
    own = torch.nn.functional.normalize(tables.queries[torch.tensor([row])].double(), dim=1)  # (1, d)
    others = torch.nn.functional.normalize(tables.queries[torch.tensor(items)].double(), dim=1)  # (n, d)
    return items[int(np.argmax((others @ own[0]).numpy()))]  # argmax takes the first of equals


def balanced(correct: Sequence[Sequence[float]], wanted: int) -> list[int]:
    """The queries whose share of right answers is nearest to one half.

    Args:
        correct: [Q][M] VQA accuracies in [0, 1] of each query's probed pointers.

    Returns: [wanted] positions in the order given; among equally near ones the earlier are taken.
    """
    shares = np.array([np.mean(query) for query in correct])
    order = np.argsort(np.round(np.abs(shares - 0.5), 9), kind="stable")  # rounded: 1/3 and 2/3 are equally near
    return sorted(order[:wanted].tolist())
