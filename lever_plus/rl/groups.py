"""RL data as padded tensors: one row per query, its pool, its pointers, their rewards.

Shape legend: Q queries, B queries of a batch, M pointers, S picks, K pool positions, d embedding width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lever_plus.data.rl_data import RlData
from lever_plus.rl.rewards import RewardRule, reward
from open_mmicl.errors import DamagedInputError, UsageError


@dataclass
class Groups:
    """Padded groups. Rows of ``table`` are the train items in use; ``query_rows`` and ``pool_rows`` index it."""

    table: Tensor  # float (N_used, d)
    query_idx: Tensor  # int64 (Q,), rows of the train split
    query_rows: Tensor  # int64 (Q,)
    pool_rows: Tensor  # int64 (Q, K), 0 where absent
    pool_mask: Tensor  # bool (Q, K)
    pointers: Tensor  # int64 (Q, M, S), -1 after a pointer's end
    rewards: Tensor  # float (Q, M)
    accuracy: Tensor  # float (Q, M), VQA accuracy in [0, 1]; NaN where the data has none
    mask: Tensor  # bool (Q, M)

    def __len__(self) -> int:
        return self.query_idx.shape[0]

    @property
    def full_pools(self) -> bool:
        """Whether no pool is padded."""
        return bool(self.pool_mask.all())

    def take(self, rows: Tensor) -> "Groups":
        """The groups at ``rows``; the table is shared."""
        parts = {name: getattr(self, name)[rows] for name in _PER_QUERY}
        return Groups(table=self.table, **parts)

    def to(self, device: torch.device) -> "Groups":
        """On a device."""
        parts = {name: getattr(self, name).to(device) for name in _PER_QUERY}
        return Groups(table=self.table.to(device), **parts)

    def embeddings(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(queries (B, d), pools (B, K, d), pool mask or None where no pool is padded)."""
        mask = None if self.full_pools else self.pool_mask
        return self.table[self.query_rows], self.table[self.pool_rows], mask


_PER_QUERY = ("query_idx", "query_rows", "pool_rows", "pool_mask", "pointers", "rewards", "accuracy", "mask")


def build_groups(data: RlData, table: Tensor, rule: RewardRule, source: str = "RL data") -> Groups:
    """Pad RL data into tensors; only the train items that occur are kept of ``table`` ([N, d]).

    Raises:
        DamagedInputError: a pool, query or pointer index that does not exist, or a non-finite reward; names it.
        UsageError: a pool smaller than its pointers are long, or no pointer at all.
    """
    queries = data.queries
    rows = len(table)
    members = max((len(q.candidates) for q in queries), default=0)
    if members == 0:
        raise UsageError(f"{source}: no query has a scored pointer; there is nothing to learn from")
    picks = max(len(c.pointer) for q in queries for c in q.candidates)
    pool = max(len(q.pool_ids) for q in queries)
    shape = (len(queries), members)
    pool_ids = np.zeros((len(queries), pool), dtype=np.int64)
    pool_mask = np.zeros((len(queries), pool), dtype=bool)
    pointers = np.full((*shape, picks), -1, dtype=np.int64)
    rewards, accuracy = np.zeros(shape, dtype=np.float32), np.full(shape, np.nan, dtype=np.float32)
    mask = np.zeros(shape, dtype=bool)
    query_idx = np.array([q.query_idx for q in queries], dtype=np.int64)
    for i, q in enumerate(queries):
        where = f"{source}, query {q.query_idx}"
        ids = np.asarray(q.pool_ids)
        if not 0 <= q.query_idx < rows or ids.min() < 0 or ids.max() >= rows:
            raise DamagedInputError(f"{where}: an index is outside the {rows} rows of the embeddings")
        pool_ids[i, : len(ids)], pool_mask[i, : len(ids)] = ids, True
        for j, c in enumerate(q.candidates):
            if len(c.pointer) > len(ids):
                raise UsageError(f"{where}: a pointer of {len(c.pointer)} picks from a pool of {len(ids)} candidates")
            if min(c.pointer) < 0 or max(c.pointer) >= len(ids) or len(set(c.pointer)) < len(c.pointer):
                raise DamagedInputError(f"{where}: pointer {list(c.pointer)} is not a set of positions in its pool")
            pointers[i, j, : len(c.pointer)] = c.pointer
            rewards[i, j] = reward(c, rule, where)
            accuracy[i, j] = np.nan if c.vqa_acc_score is None else c.vqa_acc_score
            mask[i, j] = True
    if not np.isfinite(rewards).all():
        bad = int(query_idx[np.argwhere(~np.isfinite(rewards))[0][0]])
        raise DamagedInputError(f"{source}, query {bad}: a reward is not finite")
    used, inverse = np.unique(np.concatenate([query_idx, pool_ids[pool_mask]]), return_inverse=True)
    pool_rows = np.zeros_like(pool_ids)
    pool_rows[pool_mask] = inverse[len(queries) :]
    arrays = (query_idx, inverse[: len(queries)], pool_rows, pool_mask, pointers, rewards, accuracy, mask)
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    kept = table if len(used) == rows else table[torch.from_numpy(used)]
    return Groups(kept, *tensors)


def split_by_image(images: Sequence[int], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and the validation part; queries of one image fall on the same side (fault 11).

    Each image is placed by a hash of its id and the seed, so that an item keeps its side when others come or
    go; the images with the smallest hashes are held out until they make up ``fraction`` of the queries.

    Args:
        images: image id of each query. fraction: share held out, in [0, 0.5].

    Returns: (training rows, validation rows), ascending. With fewer than two images, or fraction 0, the
    validation part is empty.
    """
    images = np.asarray(images, dtype=np.int64)
    distinct, inverse, counts = np.unique(images, return_inverse=True, return_counts=True)
    keys = [hashlib.sha256(f"{seed}:{image}".encode()).digest() for image in distinct.tolist()]
    order = sorted(range(len(distinct)), key=lambda i: keys[i])
    wanted, held, count = round(fraction * len(images)), set(), 0
    for i in order[:-1]:  # one image always stays for training
        if count >= wanted:
            break
        held.add(i)
        count += int(counts[i])
    in_validation = np.isin(inverse, sorted(held))
    return np.flatnonzero(~in_validation), np.flatnonzero(in_validation)
