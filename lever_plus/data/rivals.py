"""What else picks demonstrations without training, from the whole train split: the rivals that a selector has to beat.

Each is one function of what is asked (:class:`Asking`). An item that shares the query's image is never picked.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lever_plus.data.dataset import VqaSplit
from lever_plus.data.neighbours import top_k
from lever_plus.data.samplers import Excluded
from lever_plus.registries import RIVALS
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

bm25s = lazy("bm25s")

MMICES_IMAGES = 200  # images that MMICES compares questions of, as in its paper


@dataclass(frozen=True)
class Asking:
    """What a rival picks for, and from: some queries, and every train item.

    ``rows`` [Q] rows of ``queries``; ``shots`` the picks wanted; ``features`` reads {"image": [N, d], "text": [N, d]},
    L2-normalised CLIP embeddings, of a split ("queries" or "train").
    """

    queries: VqaSplit
    rows: np.ndarray
    train: VqaSplit
    shots: int
    features: Callable[[str], Mapping[str, torch.Tensor]]

    @functools.cached_property
    def excluded(self) -> Excluded:
        """The train items of each image: those of a query's own are never picked."""
        return Excluded(np.asarray(self.train.image_ids))

    def nearest(self, modality: str, count: int) -> np.ndarray:
        """[Q, count] train rows most alike in CLIP's "image" or "text" (the question), best first."""
        asking = self.features("queries")[modality][torch.from_numpy(self.rows)]
        images = self.queries.image_ids[self.rows]
        return top_k(asking, self.features("train")[modality], images, self.excluded, count)


def picks(method: str, asking: Asking) -> np.ndarray:
    """Train rows for some queries, [Q, shots] int64, best first; equally good items by the lower row.

    Raises:
        UsageError: no such rival, or one of a user's file gives something else, picks an item twice or one that
            shares the query's image.
    """
    found = np.asarray(RIVALS.get(method)(asking))
    if RIVALS.file_of(method) is not None:
        _check(method, found, asking)
    return found


def _check(method: str, found: np.ndarray, asking: Asking) -> None:
    wanted = (len(asking.rows), asking.shots)
    if found.shape != wanted or not np.issubdtype(found.dtype, np.integer):
        raise UsageError(f"rival {method}: expected whole numbers of shape {wanted}, got {found.dtype} {found.shape}")
    if found.size and not (0 <= found.min() and found.max() < len(asking.train)):
        raise UsageError(f"rival {method}: picks are rows of the train split, 0 to {len(asking.train) - 1}")
    images = asking.queries.image_ids[asking.rows]
    for row, some, image in zip(asking.rows, found, images, strict=True):
        if len(set(some.tolist())) < len(some) or (asking.train.image_ids[some] == image).any():
            raise UsageError(f"rival {method}: query {row} gets an item twice, or one that shares its image")


@RIVALS.add("rices", "images most alike, whole train split")
def rices(asking: Asking) -> np.ndarray:
    """RICES (Alayrac et al. 2022, Flamingo)."""
    return asking.nearest("image", asking.shots)


@RIVALS.add("question_knn", "questions most alike, whole train split")
def question_knn(asking: Asking) -> np.ndarray:
    """Nearest questions by their embeddings (Liu et al. 2022)."""
    return asking.nearest("text", asking.shots)


@RIVALS.add("mmices", "of the most alike images the most alike questions, whole train split")
def mmices(asking: Asking) -> np.ndarray:
    """MMICES (Chen et al. 2023)."""
    images = asking.queries.image_ids[asking.rows]
    room = min(len(asking.train) - len(asking.excluded.rows(image)) for image in images)
    near = asking.nearest("image", max(asking.shots, min(MMICES_IMAGES, room)))  # (Q, n)
    questions = asking.features("queries")["text"][torch.from_numpy(asking.rows)]
    items = asking.features("train")["text"]
    picked = np.zeros((len(asking.rows), asking.shots), dtype=np.int64)
    for i, some in enumerate(near):
        alike = items[torch.from_numpy(some)] @ questions[i]  # (n,)
        order = torch.argsort(alike, descending=True, stable=True)[: asking.shots]  # equals: the more alike image first
        picked[i] = some[order.numpy()]
    return picked


@RIVALS.add("bm25", "questions by BM25, whole train split")
def bm25(asking: Asking) -> np.ndarray:
    """Okapi BM25 over the questions' words (Robertson and Zaragoza 2009)."""
    queries, train, excluded = asking.queries, asking.train, asking.excluded
    words = {"stopwords": [], "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize([train.question(row) for row in range(len(train))], **words), show_progress=False)
    known = set(index.vocab_dict)
    picked = np.zeros((len(asking.rows), asking.shots), dtype=np.int64)
    for i, row in enumerate(asking.rows):
        tokens = bm25s.tokenize([queries.question(int(row))], return_ids=False, **words)[0]
        tokens = [token for token in tokens if token in known]
        scores = index.get_scores(tokens) if tokens else np.zeros(len(train), dtype=np.float32)
        scores = scores.astype(np.float64)
        scores[excluded.rows(queries.image_ids[row])] = -np.inf
        picked[i] = np.argsort(-scores, kind="stable")[: asking.shots]
    return picked
