"""The nearest items of a table that is read block by block: whole train splits of wide channels need not fit in memory.

Legend: Q queries, N items, d width, k wanted.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from lever_plus.data.channels import Rows
    from lever_plus.data.samplers import Excluded

QUERY_ROWS = 1024  # queries compared at once
ITEM_ROWS = 1 << 13  # items read at once
_SLACK = 1e-5  # cosines within this of the k-th are compared again in double precision


def top_k_rows(
    queries: "Rows", rows: np.ndarray, items: "Rows", query_images: np.ndarray, excluded: "Excluded", k: int
) -> np.ndarray:
    """The k items of the highest cosine with each query, those that share its image left out. Exact.

    Ties go to the lower row. Memory: QUERY_ROWS x ITEM_ROWS cosines and the rows of both blocks, whatever N is.

    Args:
        queries: table [N_q, d]; rows: [Q] rows of it; items: table [N, d]; query_images: [Q] image ids.

    Returns: [Q, k] int64 rows of ``items``, best first; every query has at least k that it may be given.
    """
    pools = np.zeros((len(rows), k), dtype=np.int64)
    for start in range(0, len(rows), QUERY_ROWS):
        block = _unit(queries[torch.tensor(rows[start : start + QUERY_ROWS])])  # (B, d)
        banned = [excluded.rows(image) for image in query_images[start : start + len(block)]]
        best: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64), np.zeros(0))] * len(block)
        for first, part in _blocks(items):
            best = [
                _merged(kept, found, k)
                for kept, found in zip(best, _best_of(block, part, first, banned, best, k), strict=True)
            ]
        pools[start : start + len(block)] = np.stack([found for found, _ in best])
    return pools


def _best_of(
    block: torch.Tensor,
    part: torch.Tensor,
    first: int,
    banned: list[np.ndarray],
    best: list[tuple[np.ndarray, np.ndarray]],
    k: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each query of a block (rows, exact cosines) of the part's items that may be among its k best."""
    cosines = block @ part.T  # (B, n)
    for i, rows in enumerate(banned):
        cosines[i, torch.from_numpy(rows[(rows >= first) & (rows < first + len(part))] - first)] = -torch.inf
    bounds = torch.topk(cosines, min(k, len(part)), dim=1).values[:, -1].tolist()
    vectors = part.numpy()
    for i, (bound, (_, kept)) in enumerate(zip(bounds, best, strict=True)):
        bound = max(bound, kept[-1] if len(kept) == k else -np.inf, -2.0)  # what is banned has -inf
        near = torch.nonzero(cosines[i] >= bound - _SLACK).ravel().numpy()
        query = block[i].numpy().astype(np.float64)
        yield near + first, (vectors[near].astype(np.float64) * query).sum(axis=1)


def _merged(
    kept: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    rows, cosines = (np.concatenate(pair) for pair in zip(kept, found, strict=True))
    order = np.lexsort((rows, -cosines))[:k]
    return rows[order], cosines[order]


def _blocks(items: "Rows") -> Iterator[tuple[int, torch.Tensor]]:
    for first in range(0, len(items), ITEM_ROWS):
        yield first, _unit(items[torch.arange(first, min(first + ITEM_ROWS, len(items)))])


def _unit(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(values.float(), dim=-1)
