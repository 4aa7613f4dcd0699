"""Labels from the annotations alone: would a candidate's own answer be right for the query? No LVLM, no prompt.

A demonstration whose answer is the query's is what a frozen LVLM can copy; where the annotations of the train split say
so, a retriever can be trained on that (``V2_MODE=labels``), and its picks compared on held-out train queries.
"""

import math
from collections.abc import Iterable

import numpy as np

from lever_plus.data.dataset import VqaSplit
from lever_plus.data.rl_data import RlCandidate, RlData, RlQuery
from open_mmicl.metrics.vqa import vqa_accuracy


def label_data(train: VqaSplit, rows: Iterable[int], pools: np.ndarray) -> RlData:
    """Every right candidate of each query as a pointer of one pick.

    Args:
        rows: [Q] train rows of the queries. pools: [Q, K] train rows.

    Returns: queries that have a right candidate; ``vqa_acc_score`` in (0, 1] is the official accuracy that the
    candidate's most frequent answer would get under the query's annotations.
    """
    queries = []
    for row, pool in zip(rows, pools, strict=True):
        truth = train.answers(int(row))
        worth: dict[str, float] = {}
        candidates = []
        for position, item in enumerate(pool.tolist()):
            answer = train.answer(item)
            if answer not in worth:
                worth[answer] = vqa_accuracy(answer, truth)
            if worth[answer] > 0:
                candidates.append(RlCandidate((position,), "label", vqa_acc_score=worth[answer]))
        if candidates:
            queries.append(RlQuery(int(row), pool, candidates))
    return RlData(queries, "best_last", "labels")


def label_reward(candidate: RlCandidate, where: str) -> float:
    """The logarithm of the label: RCE at temperature 1 then weighs candidates in proportion to it."""
    return math.log(candidate.vqa_acc_score)
