"""What else picks demonstrations without training, from the whole train split: the rivals that a selector has to beat.

``rices``: images most alike (Alayrac et al. 2022, Flamingo); ``question_knn``: questions most alike (Liu et al. 2022);
``mmices``: the most alike images, then of these the most alike questions (Chen et al. 2023); ``bm25``: questions by
BM25 (Robertson and Zaragoza 2009). An item that shares the query's image is never picked.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lever_plus.data.dataset import VqaSplit
from lever_plus.data.samplers import Excluded, top_k

MMICES_IMAGES = 200  # images that MMICES compares questions of, as in its paper


def whole_split_picks(
    method: str,
    queries: VqaSplit,
    rows: np.ndarray,
    train: VqaSplit,
    shots: int,
    query_features: Mapping[str, torch.Tensor],
    train_features: Mapping[str, torch.Tensor],
) -> np.ndarray:
    """Train rows for some queries, best first.

    Args:
        method: one of the above. rows: [Q] rows of ``queries``.
        query_features, train_features: {"image": [N, d], "text": [N, d]}, L2-normalised (bm25 reads none).

    Returns: [Q, shots] int64; equally good items by the lower row.
    """
    excluded, images = Excluded(np.asarray(train.image_ids)), queries.image_ids[rows]
    if method == "bm25":
        return _bm25(queries, rows, train, excluded, shots)

    def ranked(modality: str, count: int) -> np.ndarray:
        asking = query_features[modality][torch.from_numpy(rows)]
        return top_k(asking, train_features[modality], images, excluded, count)

    if method != "mmices":
        return ranked({"rices": "image", "question_knn": "text"}[method], shots)
    room = min(len(train) - len(excluded.rows(image)) for image in images)
    near = ranked("image", max(shots, min(MMICES_IMAGES, room)))  # (Q, n)
    asking, items = query_features["text"][torch.from_numpy(rows)], train_features["text"]
    picked = np.zeros((len(rows), shots), dtype=np.int64)
    for i, some in enumerate(near):
        alike = items[torch.from_numpy(some)] @ asking[i]  # (n,)
        order = torch.argsort(alike, descending=True, stable=True)[:shots]  # equals: the more alike image first
        picked[i] = some[order.numpy()]
    return picked


def _bm25(queries: VqaSplit, rows: np.ndarray, train: VqaSplit, excluded: Any, shots: int) -> np.ndarray:
    import bm25s

    words = {"stopwords": [], "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize([train.question(row) for row in range(len(train))], **words), show_progress=False)
    known = set(index.vocab_dict)
    picked = np.zeros((len(rows), shots), dtype=np.int64)
    for i, row in enumerate(rows):
        tokens = bm25s.tokenize([queries.question(int(row))], return_ids=False, **words)[0]
        tokens = [token for token in tokens if token in known]
        scores = index.get_scores(tokens) if tokens else np.zeros(len(train), dtype=np.float32)
        scores = scores.astype(np.float64)
        scores[excluded.rows(queries.image_ids[row])] = -np.inf
        picked[i] = np.argsort(-scores, kind="stable")[:shots]
    return picked
