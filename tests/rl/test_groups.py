import numpy as np
import pytest
import torch

from lever_plus.data.rl_data import RlCandidate, RlData, RlQuery
from lever_plus.rl.groups import build_groups
from open_mmicl.errors import DamagedInputError, UsageError


def data(*queries):
    made = []
    for query, pool, pointers in queries:
        candidates = [RlCandidate(p, "beam", beam_score=0.1 * len(made), vqa_acc_score=0.6) for p in pointers]
        made.append(RlQuery(query, np.array(pool), candidates))
    return RlData(made, "best_last")


def build(*queries, rows=20, reward=lambda candidate, where: float(sum(candidate.pointer))):
    table = torch.arange(rows * 2, dtype=torch.float32).view(rows, 2)
    return table, build_groups(data(*queries), table, reward)


def test_padding_keeps_every_pointer_and_reaches_the_right_embeddings():
    table, groups = build((3, [7, 1, 9], [(0, 2), (1, 0), (2, 1)]), (11, [3, 15], [(1, 0)]))
    assert groups.mask.tolist() == [[True] * 3, [True, False, False]]
    assert groups.rewards[groups.mask].tolist() == [2, 1, 3, 1]
    assert torch.equal(groups.queries, table[[3, 11]])
    assert torch.equal(groups.table[groups.pool_rows[0]], table[[7, 1, 9]])
    assert groups.pool_mask.tolist() == [[True] * 3, [True, True, False]]
    assert len(groups.table) == 5  # queries apart; items that nothing names are not kept
    embeddings, queries, pools, pointers, mask = groups.take(torch.tensor([1])).inputs()
    assert torch.equal(queries, table[[11]]) and torch.equal(embeddings[pools[0, :2]], table[[3, 15]])
    assert pointers[0, 0].tolist() == [1, 0] and mask.tolist() == [[True, True, False]]


def test_fault_05_an_index_that_is_not_a_pool_position_is_an_error():
    with pytest.raises(DamagedInputError, match=r"query 3: pointer \[0, 9\] is not a set of positions"):
        build((3, [7, 1, 9], [(0, 9)]))
    with pytest.raises(DamagedInputError, match=r"pointer \[1, 1\]"):
        build((3, [7, 1, 9], [(1, 1)]))
    with pytest.raises(DamagedInputError, match="query 3: an index is outside the 8 rows"):
        build((3, [7, 1, 9], [(0, 1)]), rows=8)


def test_a_pool_smaller_than_the_pointer_and_no_pointer_at_all_are_errors():
    with pytest.raises(UsageError, match="3 picks from a pool of 2"):
        build((3, [7, 1], [(0, 1, 0)]))
    with pytest.raises(UsageError, match="no query has a scored pointer"):
        build((3, [7, 1], []))


def test_a_reward_that_is_not_finite_is_an_error_that_names_the_query():
    with pytest.raises(DamagedInputError, match="query 11: a reward is not finite"):
        build((3, [7, 1], [(0,)]), (11, [7, 1], [(1,)]), reward=lambda c, where: float("nan") if "11" in where else 0.0)
