"""The items most similar to queries, exactly, in blocks."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from lever_plus.data.samplers import Excluded

QUERY_BLOCK = 128  # queries per matrix product; padded, so a query's scores do not depend on how many there are
ITEM_BLOCK = 1 << 16  # items per matrix product
_CELL = 64  # scores whose largest is found first, when the K-th best is looked for
_SLACK = 1e-5  # scores within this (times the norms) of the K-th are compared again in double precision


def top_k(
    queries: torch.Tensor, items: torch.Tensor, query_images: np.ndarray, excluded: "Excluded", k: int
) -> np.ndarray:
    """The k items most similar to each query (dot product), those that share its image left out. Exact.

    Items with equal embeddings are scored once, so that equals tie exactly; ties go to the lower row.
    Memory: one block of scores, QUERY_BLOCK x distinct items, beside the embeddings.

    Args:
        queries: [Q, d] float; items: [N, d] float; query_images: [Q] image ids.

    Returns: [Q, k] int64 rows of ``items``, best first.
    """
    groups = _Groups.of(items)
    pools = np.zeros((len(queries), k), dtype=np.int64)
    for start, block, scores in _score_blocks(queries.float(), groups.vectors):
        banned = [excluded.rows(image) for image in query_images[start : start + len(block)]]
        # banned rows empty at most as many groups, so these many of the best groups hold the answer
        bounds = _lower_bounds(scores, k + max(len(rows) for rows in banned))
        slack = _SLACK * block.norm(dim=1) * groups.longest
        for i, rows in enumerate(banned):
            near = torch.nonzero(scores[i, : len(groups.vectors)] >= bounds[i] - slack[i]).ravel()
            pools[start + i] = _best_rows(near, block[i], groups, rows, k)
    return pools


def _lower_bounds(scores: torch.Tensor, wanted: int) -> torch.Tensor:
    """[B] values that at least ``wanted`` scores of each row reach (or all scores, where there are fewer)."""
    maxima = scores.view(len(scores), -1, _CELL).amax(dim=2)  # (B, U / _CELL)
    few = maxima if maxima.shape[1] > wanted else scores
    return torch.topk(few, min(wanted, few.shape[1]), dim=1).values[:, -1]


def _best_rows(near: torch.Tensor, query: torch.Tensor, groups: "_Groups", banned: np.ndarray, k: int) -> np.ndarray:
    exact = (groups.vectors[near].double() * query.double()).sum(dim=1).numpy()
    rows, counts = groups.members(near.numpy())
    row_scores = np.repeat(exact, counts)
    keep = ~np.isin(rows, banned)
    rows, row_scores = rows[keep], row_scores[keep]
    return rows[np.lexsort((rows, -row_scores))[:k]]


def _score_blocks(queries: torch.Tensor, vectors: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first query, queries [B, d], scores [B, U padded with -inf to whole cells]), block by block."""
    padded = -(-len(vectors) // _CELL) * _CELL
    scores = torch.full((QUERY_BLOCK, padded), -torch.inf)
    block = torch.zeros(QUERY_BLOCK, queries.shape[1])
    for start in range(0, len(queries), QUERY_BLOCK):
        size = min(QUERY_BLOCK, len(queries) - start)
        block.zero_()
        block[:size] = queries[start : start + size]
        for first in range(0, len(vectors), ITEM_BLOCK):
            part = vectors[first : first + ITEM_BLOCK]
            scores[:, first : first + len(part)] = block @ part.T
        yield start, block[:size], scores[:size]


@dataclass
class _Groups:
    """Items with equal embeddings, gathered.

    ``vectors`` [U, d] the distinct ones, in the order of their first rows; the members of group u are
    ``rows[starts[u] : starts[u + 1]]``, ascending; ``longest`` is the largest norm.
    """

    vectors: torch.Tensor
    rows: np.ndarray
    starts: np.ndarray
    longest: float

    @classmethod
    def of(cls, items: torch.Tensor) -> "_Groups":
        values = items.detach().float().contiguous().numpy()
        keys = np.frombuffer(
            b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in values), np.int64
        )
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        group = rank[inverse]
        starts = np.concatenate([[0], np.cumsum(np.bincount(group))])
        vectors = torch.from_numpy(values if len(first) == len(values) else values[np.sort(first)])
        return cls(vectors, np.argsort(group, kind="stable"), starts, float(vectors.norm(dim=1).max()))

    def members(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the given groups one after the other, how many each has)."""
        counts = self.starts[groups + 1] - self.starts[groups]
        return np.concatenate([self.rows[self.starts[g] : self.starts[g + 1]] for g in groups]), counts
