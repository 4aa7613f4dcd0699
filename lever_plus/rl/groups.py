"""RL data as padded tensors: one row per query, its pool, its pointers, their rewards.

Shape legend: Q queries, B queries of a batch, M pointers, S picks, K pool positions, d embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lever_plus.cli import log
from lever_plus.data.channels import Rows
from lever_plus.data.dataset import split_by_image
from lever_plus.data.rl_data import RlCandidate, RlData, RlQuery
from open_mmicl.errors import DamagedInputError, UsageError


@dataclass
class Groups:
    """Padded groups. Rows of ``table`` are the candidates in use; ``pool_rows`` index it."""

    table: Tensor  # float (N_used, d)
    items: Tensor  # int64 (N_used,), rows of the train split
    query_idx: Tensor  # int64 (Q,), rows of the train split
    queries: Tensor  # float (Q, d_q)
    pool_rows: Tensor  # int64 (Q, K), 0 where absent
    pool_mask: Tensor  # bool (Q, K)
    pointers: Tensor  # int64 (Q, M, S), -1 after a pointer's end; S is the most picks that a policy may make
    rewards: Tensor  # float (Q, M)
    accuracy: Tensor  # float (Q, M), VQA accuracy in [0, 1]; NaN where the data has none
    mask: Tensor  # bool (Q, M)

    def __len__(self) -> int:
        return self.query_idx.shape[0]

    @property
    def full_pools(self) -> bool:
        """Whether no pool is padded."""
        return bool(self.pool_mask.all())

    def take(self, rows: Tensor | slice) -> "Groups":
        """The groups at ``rows``; the table is shared."""
        parts = {name: getattr(self, name)[rows] for name in _PER_QUERY}
        return Groups(table=self.table, items=self.items, **parts)

    def to(self, device: torch.device) -> "Groups":
        """On a device."""
        parts = {name: getattr(self, name).to(device) for name in _PER_QUERY}
        return Groups(table=self.table.to(device), items=self.items.to(device), **parts)

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(queries, pool rows, pointers, pool mask or None) with rows of the whole table."""
        return self.queries, self.pool_rows, self.pointers, None if self.full_pools else self.pool_mask

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What :meth:`PointerSelector.forward` takes: each distinct candidate of these groups is in it once."""
        rows, pools = self.pool_rows.unique(return_inverse=True)
        mask = None if self.full_pools else self.pool_mask
        return self.table.index_select(0, rows), self.queries, pools, self.pointers, mask


_PER_QUERY = ("query_idx", "queries", "pool_rows", "pool_mask", "pointers", "rewards", "accuracy", "mask")


def build_groups(
    data: RlData,
    table: Rows,
    reward_of: Callable[[RlCandidate, str], float],
    source: str = "RL data",
    query_table: Rows | None = None,
    stop: bool = False,
) -> Groups:
    """Pad RL data into tensors; only the train items that occur are kept of ``table`` ([N, d]).

    ``query_table`` ([N, d_q]): train items as queries, where they are seen otherwise than as candidates.

    ``reward_of(candidate, where)`` gives a pointer's reward; ``source`` names the file in errors. ``stop``: whether
    the policy chooses how many it picks. Then a query's pointers of all lengths are compared with each other; else
    each length of a query is a group of its own, without the empty pointer.

    Raises:
        DamagedInputError: a pool, query or pointer index that does not exist, or a non-finite reward; names it.
        UsageError: a pool smaller than its pointers are long, or no pointer at all.
    """
    queries = data.queries if stop else _by_length(data.queries)
    rows = len(table)
    members = max((len(q.candidates) for q in queries), default=0)
    if members == 0:
        raise UsageError(f"{source}: no query has a scored pointer; there is nothing to learn from")
    picks = max(data.max_shot or 1, *(len(c.pointer) for q in queries for c in q.candidates))
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
        _check(q, rows, where)
        pool_ids[i, : len(q.pool_ids)], pool_mask[i, : len(q.pool_ids)] = q.pool_ids, True
        for j, c in enumerate(q.candidates):
            pointers[i, j, : len(c.pointer)] = c.pointer
            rewards[i, j] = reward_of(c, where)
            accuracy[i, j] = np.nan if c.vqa_acc_score is None else c.vqa_acc_score
            mask[i, j] = True
    if not np.isfinite(rewards).all():
        bad = int(query_idx[np.argwhere(~np.isfinite(rewards))[0][0]])
        raise DamagedInputError(f"{source}, query {bad}: a reward is not finite")
    used, inverse = np.unique(pool_ids[pool_mask], return_inverse=True)
    pool_rows = np.zeros_like(pool_ids)
    pool_rows[pool_mask] = inverse
    arrays = (pool_rows, pool_mask, pointers, rewards, accuracy, mask)
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    whole = isinstance(table, Tensor) and len(used) == rows
    kept = table if whole else table[torch.from_numpy(used)]
    asking = torch.from_numpy(query_idx)
    of_queries = (table if query_table is None else query_table)[asking]
    return Groups(kept, torch.from_numpy(used), asking, of_queries, *tensors)


def _check(query: RlQuery, rows: int, where: str) -> None:
    """See that a query, its pool and its pointers name what there is: ``rows`` embeddings, positions in the pool."""
    ids = np.asarray(query.pool_ids)
    if not 0 <= query.query_idx < rows or ids.min() < 0 or ids.max() >= rows:
        raise DamagedInputError(f"{where}: an index is outside the {rows} rows of the embeddings")
    for c in query.candidates:
        if len(c.pointer) > len(ids):
            raise UsageError(f"{where}: a pointer of {len(c.pointer)} picks from a pool of {len(ids)} candidates")
        if any(not 0 <= p < len(ids) for p in c.pointer) or len(set(c.pointer)) < len(c.pointer):
            raise DamagedInputError(f"{where}: pointer {list(c.pointer)} is not a set of positions in its pool")


def _by_length(queries: list[RlQuery]) -> list[RlQuery]:
    """A group for each length of a query's pointers: without STOP a policy does not choose how many it picks."""
    found = []
    for q in queries:
        lengths: dict[int, list[RlCandidate]] = {}
        for c in q.candidates:
            if not c.pointer:
                continue
            lengths.setdefault(len(c.pointer), []).append(c)
        found += [RlQuery(q.query_idx, q.pool_ids, lengths[length]) for length in sorted(lengths)]
    return found


def split(groups: Groups, images: np.ndarray, val_fraction: float, seed: int) -> tuple[Groups, Groups]:
    """Training and validation groups; queries of one image fall on the same side.

    Args:
        images: image id of every train item. val_fraction, seed: VAL_FRACTION and DATA_SEED.

    Raises:
        UsageError: nothing is left to train on.
    """
    positions = np.arange(len(groups))
    of_query = images[groups.query_idx.numpy()]
    train, val = split_by_image(positions, of_query, val_fraction, seed)
    if len(train) == 0:
        raise UsageError(f"VAL_FRACTION={val_fraction} leaves none of the {len(groups)} queries for training")
    if len(val) == 0:
        log.warning("no query is held out: nothing is compared, the last epoch of the last phase is taken")
    return groups.take(torch.from_numpy(train)), groups.take(torch.from_numpy(val))
