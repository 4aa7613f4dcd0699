"""Retrievers: distinct positions, nested shots, right direction, independent of the batch."""

import numpy as np
import pytest
import torch

from open_mmicl.errors import UsageError
from open_mmicl.retriever import RandomRetriever, SelectorRetriever, SimilarityRetriever, ZeroRetriever


class Descending:
    """A selector that picks the highest position first."""

    def select(self, query_emb, cand_emb, shots):
        return torch.arange(cand_emb.shape[1] - 1, -1, -1).expand(len(query_emb), -1)[:, :shots]


PICKERS = [RandomRetriever(0), SimilarityRetriever(), SelectorRetriever("v3", Descending())]


@pytest.mark.parametrize("picker", PICKERS, ids=lambda p: p.name)
def test_distinct_nested_and_independent_of_the_batch(picker) -> None:
    generator = torch.Generator().manual_seed(0)
    query, pool = torch.randn(7, 5, generator=generator), torch.randn(7, 9, 5, generator=generator)
    ids = list(range(20, 27))
    whole = picker.retrieve(query, pool, ids, 9)
    assert all(sorted(row) == list(range(9)) for row in whole.tolist())
    for shots in (1, 4):
        assert torch.equal(picker.retrieve(query, pool, ids, shots), whole[:, :shots])
    order = torch.tensor([3, 0, 6])
    assert torch.equal(picker.retrieve(query[order], pool[order], [ids[i] for i in order], 9), whole[order])


def test_similarity_is_cosine_most_similar_first() -> None:
    query = torch.tensor([[1.0, 0.0]])
    pool = torch.tensor([[[0.0, 1.0], [10.0, 10.0], [0.5, 0.0], [-1.0, 0.0]]])
    assert SimilarityRetriever().retrieve(query, pool, [0], 4).tolist() == [[2, 1, 0, 3]]


def test_random_seeds_differ_and_positions_are_uniform() -> None:
    empty = torch.zeros(2000, 8, 1)
    first = RandomRetriever(1).retrieve(empty[:, 0], empty, list(range(2000)), 1)
    assert not torch.equal(first, RandomRetriever(2).retrieve(empty[:, 0], empty, list(range(2000)), 1))
    counts = np.bincount(first[:, 0].numpy(), minlength=8)
    assert ((counts - 250) ** 2 / 250).sum() < 24.3  # chi-squared, 7 degrees of freedom, p = 0.001


def test_zero_picks_none_and_a_small_pool_is_refused() -> None:
    pool = torch.zeros(2, 3, 4)
    assert ZeroRetriever().retrieve(pool[:, 0], pool, [1, 2], 4).shape == (2, 0)
    for picker in PICKERS:
        with pytest.raises(UsageError, match="pool of 3"):
            picker.retrieve(pool[:, 0], pool, [1, 2], 4)
