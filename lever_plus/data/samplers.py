"""Candidate samplers: the pool of K train items of each query.

The same pool is used in SFT, RL and inference: it depends on the query, the train split, the sampler and
the seed, on nothing else. Never in it: the query itself, and items that share its image.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lever_plus.data.streamed import top_k_rows
from lever_plus.settings.shared import SAMPLERS
from open_mmicl.errors import UsageError

QUERY_BLOCK = 128  # queries per matrix product; padded, so a query's scores do not depend on how many there are
ITEM_BLOCK = 1 << 16  # items per matrix product
_CELL = 64  # scores whose largest is found first, when the K-th best is looked for
_SLACK = 1e-5  # scores within this (times the norms) of the K-th are compared again in double precision
_SPLIT_STREAM = {True: 0, False: 1}  # train and validation queries with the same row draw differently


def sample_pools(
    sampler: str,
    *,
    query_rows: np.ndarray,
    query_image_ids: np.ndarray,
    train_image_ids: np.ndarray,
    k: int,
    seed: int,
    same_split: bool,
    query_features: Mapping[str, Any] | None = None,
    train_features: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """The pools of some queries.

    Args:
        sampler: ``RandSampler``, ``TextSimSampler``, ``ImgSimSampler``, ``MixSampler``, ``ChannelSimSampler`` or their
            other names.
        query_rows: [Q] rows of the queries' split.
        query_image_ids: [N_q] image id of every row of the queries' split.
        train_image_ids: [N] image id of every train row.
        k: candidates per pool.
        seed: of the random sampler; a query's draw comes from (seed, split, row).
        same_split: the queries are train items.
        query_features, train_features: {"image": [N, d], "text": [N, d]} of both splits, L2-normalised;
            the similarity samplers read them; ChannelSimSampler {"channels": what a query shows} of both, tables
            whose rows are read when they are asked for (:class:`.channels.Rows`).

    Returns: [Q, k] int64 train rows, distinct in each row; the similarity samplers' best first, equally
    similar items by the lower row.

    Raises:
        UsageError: an unknown sampler, missing features, or a query with fewer than ``k`` candidates.
    """
    name = SAMPLERS.get(sampler, sampler)
    if name not in SAMPLERS.values():
        raise UsageError(f"unknown sampler {sampler!r}; there are: {', '.join(SAMPLERS)}")
    rows = np.asarray(query_rows, dtype=np.int64)
    images = np.asarray(query_image_ids)[rows]
    excluded = Excluded(np.asarray(train_image_ids))
    _check_room(rows, images, excluded, k)
    if name == "RandSampler":
        pools = np.zeros((len(rows), k), dtype=np.int64)
        for i, (row, image) in enumerate(zip(rows.tolist(), images, strict=True)):
            pools[i] = _random_pool(row, image, excluded, k, seed, same_split)
        return pools
    if query_features is None or train_features is None:
        raise UsageError(f"{name} needs the CLIP embeddings: bash scripts/export_embeddings.sh")
    if name == "ChannelSimSampler":
        return top_k_rows(query_features["channels"], rows, train_features["channels"], images, excluded, k)

    def ranked(modality: str) -> np.ndarray:  # the embeddings of one modality are let go before the next are read
        items = train_features[modality]
        queries = (items if query_features is train_features else query_features[modality])[torch.from_numpy(rows)]
        return top_k(queries, items, images, excluded, k)

    if name == "MixSampler":
        return _mix(ranked("image"), ranked("text"))
    return ranked({"TextSimSampler": "text", "ImgSimSampler": "image"}[name])


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


class Excluded:
    """Train rows by image id."""

    def __init__(self, image_ids: np.ndarray) -> None:
        self.total = len(image_ids)
        self._order = np.argsort(image_ids, kind="stable")
        self._sorted = image_ids[self._order]

    def rows(self, image_id: int) -> np.ndarray:
        """The train rows with that image."""
        left, right = np.searchsorted(self._sorted, [image_id, image_id + 1])
        return self._order[left:right]


def _check_room(rows: np.ndarray, images: np.ndarray, excluded: Excluded, k: int) -> None:
    for row, image in zip(rows, images, strict=True):
        room = excluded.total - len(excluded.rows(image))
        if room < k:
            raise UsageError(f"CANDIDATE_NUM={k} is more than the {room} train items that query {row} can be given")


def _random_pool(row: int, image: int, excluded: Excluded, k: int, seed: int, same_split: bool) -> np.ndarray:
    banned = excluded.rows(image)
    rng = np.random.default_rng([seed, _SPLIT_STREAM[same_split], row])
    drawn = rng.choice(excluded.total, size=k + len(banned), replace=False)
    return drawn[~np.isin(drawn, banned)][:k].astype(np.int64)


def _mix(by_image: np.ndarray, by_text: np.ndarray) -> np.ndarray:
    """Half the pool by image, the rest by text; an item in both counts once, the text ranking fills up."""
    k = by_image.shape[1]
    half, pools = (k + 1) // 2, np.zeros_like(by_image)
    for i, (image_rows, text_rows) in enumerate(zip(by_image, by_text, strict=True)):
        head = image_rows[:half]
        rest = text_rows[~np.isin(text_rows, head)][: k - half]
        pools[i] = np.concatenate([head, rest])
    return pools
