"""Candidate samplers: the pool of K train items of each query (docs/extending.md). No torch until items are compared.

The same pool is used in SFT, RL and inference: it depends on the query, the train split, the sampler and
the seed, on nothing else. Never in it: the query itself, and items that share its image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lever_plus.registries import SAMPLERS
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

neighbours = lazy("lever_plus.data.neighbours")
streamed = lazy("lever_plus.data.streamed")
torch = lazy("torch")
IMAGE, TEXT, CHANNELS = "image", "text", "channels"
_SPLIT_STREAM = {True: 0, False: 1}  # train and validation queries with the same row draw differently


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


@dataclass(frozen=True)
class Asking:
    """What a sampler is asked: pools of ``k`` train rows for the queries ``rows`` (Q,) with image ids ``images`` (Q,).

    ``excluded.rows(image_id)``: the train rows with that image, which must not be in the pool. ``total``: the number
    of train rows.
    """

    rows: np.ndarray
    images: np.ndarray
    excluded: Excluded
    k: int
    seed: int
    same_split: bool
    query_features: Mapping[str, Any]
    train_features: Mapping[str, Any]

    @property
    def total(self) -> int:
        """Train rows there are."""
        return self.excluded.total

    def generator(self, row: int) -> np.random.Generator:
        """Random numbers of one query: they do not depend on the others."""
        return np.random.default_rng([self.seed, _SPLIT_STREAM[self.same_split], row])

    def nearest(self, what: str) -> np.ndarray:
        """[Q, k] train rows most similar to each query by ``image``, ``text`` or ``channels``, best first."""
        if what == CHANNELS:
            of_queries, items = self.query_features[what], self.train_features[what]
            return streamed.top_k_rows(of_queries, self.rows, items, self.images, self.excluded, self.k)
        items = self.train_features[what]  # of one modality; let go before the next are read
        source = items if self.query_features is self.train_features else self.query_features[what]
        return neighbours.top_k(source[torch.from_numpy(self.rows)], items, self.images, self.excluded, self.k)


def reads(*what: str) -> Callable[[Any], Any]:
    """Decorator under ``SAMPLERS.add``: the sampler compares items by these (``image``, ``text``, ``channels``)."""

    def mark(sampler: Any) -> Any:
        sampler.reads = what
        return sampler

    return mark


def read_by(sampler: str) -> tuple[str, ...]:
    """What a sampler compares items by; () for one that compares none."""
    return getattr(SAMPLERS.get(sampler), "reads", ())


@SAMPLERS.add("rand_sampler", "at random")
def rand_sampler(asking: Asking) -> np.ndarray:
    """A draw without replacement, the query's image left out."""
    pools = np.zeros((len(asking.rows), asking.k), dtype=np.int64)
    for i, (row, image) in enumerate(zip(asking.rows.tolist(), asking.images, strict=True)):
        banned = asking.excluded.rows(image)
        drawn = asking.generator(row).choice(asking.total, size=asking.k + len(banned), replace=False)
        pools[i] = drawn[~np.isin(drawn, banned)][: asking.k]
    return pools


@SAMPLERS.add("text_sim_sampler", "the most similar questions of the whole train split")
@reads(TEXT)
def text_sim_sampler(asking: Asking) -> np.ndarray:
    """By CLIP's question embeddings."""
    return asking.nearest(TEXT)


@SAMPLERS.add("img_sim_sampler", "the most similar images of the whole train split")
@reads(IMAGE)
def img_sim_sampler(asking: Asking) -> np.ndarray:
    """By CLIP's image embeddings."""
    return asking.nearest(IMAGE)


@SAMPLERS.add("mix_sampler", "half the pool by image, the rest by question")
@reads(IMAGE, TEXT)
def mix_sampler(asking: Asking) -> np.ndarray:
    """An item in both halves counts once; the text ranking fills up."""
    by_image, by_text = asking.nearest(IMAGE), asking.nearest(TEXT)
    half, pools = (asking.k + 1) // 2, np.zeros_like(by_image)
    for i, (image_rows, text_rows) in enumerate(zip(by_image, by_text, strict=True)):
        head = image_rows[:half]
        rest = text_rows[~np.isin(text_rows, head)][: asking.k - half]
        pools[i] = np.concatenate([head, rest])
    return pools


@SAMPLERS.add("channel_sim_sampler", "the items most similar in all that the selector sees of a query")
@reads(CHANNELS)
def channel_sim_sampler(asking: Asking) -> np.ndarray:
    """By the channels of EMBEDDING that a query has."""
    return asking.nearest(CHANNELS)


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
        sampler: a choice of ``SAMPLERS``, or its class name (``RandSampler``).
        query_rows: [Q] rows of the queries' split.
        query_image_ids: [N_q] image id of every row of the queries' split.
        train_image_ids: [N] image id of every train row.
        k: candidates per pool.
        seed: of the random sampler; a query's draw comes from (seed, split, row).
        same_split: the queries are train items.
        query_features, train_features: {"image": [N, d], "text": [N, d]} of both splits, L2-normalised, or
            {"channels": what a query shows} of both, tables whose rows are read when they are asked for
            (:class:`.channels.Rows`); those that the sampler reads.

    Returns: [Q, k] int64 train rows, distinct in each row; the similarity samplers' best first, equally
    similar items by the lower row.

    Raises:
        UsageError: an unknown sampler, missing features, or a query with fewer than ``k`` candidates.
    """
    sample = SAMPLERS.get(sampler)
    rows = np.asarray(query_rows, dtype=np.int64)
    images = np.asarray(query_image_ids)[rows]
    excluded = Excluded(np.asarray(train_image_ids))
    _check_room(rows, images, excluded, k)
    if read_by(sampler) and (query_features is None or train_features is None):
        raise UsageError(f"{sampler} needs the CLIP embeddings: bash scripts/export_embeddings.sh")
    asking = Asking(rows, images, excluded, k, seed, same_split, query_features or {}, train_features or {})
    pools = sample(asking)
    if SAMPLERS.file_of(sampler) is not None:
        pools = _checked(sampler, pools, asking)
    return pools


def _checked(sampler: str, pools: Any, asking: Asking) -> np.ndarray:
    """The pools of a sampler of the user's own.

    Raises:
        UsageError: of another shape, with a row that is none or is there twice, or with the query's own image.
    """
    pools = np.asarray(pools)
    shape = (len(asking.rows), asking.k)
    if pools.shape != shape or pools.dtype.kind not in "iu":
        raise UsageError(
            f"sampler {sampler}: gave {pools.dtype} {list(pools.shape)}, expected whole numbers {list(shape)}"
        )
    for row, image, pool in zip(asking.rows.tolist(), asking.images, pools, strict=True):
        if pool.min() < 0 or pool.max() >= asking.total or len(np.unique(pool)) < asking.k:
            raise UsageError(f"sampler {sampler}: the pool of query {row} is not {asking.k} distinct train rows")
        if np.isin(pool, asking.excluded.rows(image)).any():
            raise UsageError(f"sampler {sampler}: the pool of query {row} holds an item with the query's own image")
    return pools.astype(np.int64)
