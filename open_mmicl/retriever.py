"""Retrievers: which candidates of its pool go into a query's prompt, in pick order, best first."""

import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from open_mmicl.errors import UsageError


class Retriever(Protocol):
    """Anything that picks pool positions. Longer pointers extend shorter ones: shot k is the first k picks."""

    name: str

    def retrieve(self, query_emb: Tensor, cand_emb: Tensor, query_ids: list[int], shots: int) -> Tensor:
        """[B, d] queries, [B, K, d] pools, B ids -> LongTensor [B, shots] of distinct pool positions.

        -1 fills the row of a retriever that picks fewer.
        """
        ...


class Selects(Protocol):
    """The part of a selector that :class:`SelectorRetriever` uses."""

    def select(self, query_emb: Tensor, cand_emb: Tensor, shots: int) -> Tensor:
        """[B, d], [B, K, d] -> LongTensor [B, shots], -1 after the end of a shorter pointer."""
        ...


class ZeroRetriever:
    """No demonstrations."""

    name = "zero_shot"

    def retrieve(self, query_emb: Tensor, cand_emb: Tensor, query_ids: list[int], shots: int) -> Tensor:
        """LongTensor [B, 0], whatever ``shots`` is."""
        return torch.zeros(len(query_ids), 0, dtype=torch.long)


class RandomRetriever:
    """Random positions; each query's own come from (seed, query id), so they do not depend on the batch."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def retrieve(self, query_emb: Tensor, cand_emb: Tensor, query_ids: list[int], shots: int) -> Tensor:
        """LongTensor [B, shots]."""
        pool = _pool_size(cand_emb, shots)
        return torch.from_numpy(np.stack([self._order(i, pool)[:shots] for i in query_ids]))

    def _order(self, query_id: int, pool: int) -> np.ndarray:
        digest = hashlib.sha256(f"random retriever/{self.seed}/{query_id}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(pool)


class SimilarityRetriever:
    """The candidates whose embeddings are most similar to the query's (cosine), most similar first.

    Of candidates that show more than queries do, the dimensions that both have, which come first; or some ``of`` these.
    """

    name = "similarity"

    def __init__(self, of: slice | None = None) -> None:
        self.of = of

    def retrieve(self, query_emb: Tensor, cand_emb: Tensor, query_ids: list[int], shots: int) -> Tensor:
        """LongTensor [B, shots]; ties go to the lower position."""
        _pool_size(cand_emb, shots)
        of = self.of or slice(query_emb.shape[1])
        cosine = torch.nn.functional.cosine_similarity(query_emb[:, None, of], cand_emb[..., of], dim=-1)  # (B, K)
        return torch.argsort(cosine, dim=1, descending=True, stable=True)[:, :shots]


class SelectorRetriever:
    """A trained pointer selector, greedy."""

    def __init__(self, name: str, selector: Selects) -> None:
        self.name, self.selector = name, selector

    def retrieve(self, query_emb: Tensor, cand_emb: Tensor, query_ids: list[int], shots: int) -> Tensor:
        """LongTensor [B, shots], -1 after the end of a shorter pointer."""
        _pool_size(cand_emb, shots)
        return self.selector.select(query_emb, cand_emb, shots)


def _pool_size(cand_emb: Tensor, shots: int) -> int:
    if cand_emb.shape[1] < shots:
        raise UsageError(f"a pool of {cand_emb.shape[1]} candidates cannot give {shots} demonstrations")
    return cand_emb.shape[1]
