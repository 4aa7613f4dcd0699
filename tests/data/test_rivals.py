"""Rivals from the whole train split against the plainest forms of themselves, and the words of METHODS."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch

from lever_plus.data import methods
from lever_plus.data.rivals import Asking, picks
from lever_plus.registries import RIVALS
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from open_mmicl.errors import UsageError

WORDS = "what is the colour of this fish boat made from where does it live".split()


class Split:
    """The part of a split that rivals read."""

    def __init__(self, rows, images, rng):
        self.image_ids = rng.integers(0, images, rows)
        self.texts = [" ".join(rng.choice(WORDS, rng.integers(3, 7))) for _ in range(rows)]

    def __len__(self):
        return len(self.texts)

    def question(self, row):
        return self.texts[row]


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    train, val = Split(400, 250, rng), Split(30, 250, rng)

    def features(rows):
        values = torch.from_numpy(rng.normal(size=(rows, 8))).float()
        return torch.nn.functional.normalize(values, dim=1)

    return train, val, {m: features(400) for m in ("image", "text")}, {m: features(30) for m in ("image", "text")}


def naive_bm25(query, texts, k1=1.5, b=0.75):
    """BM25 with Lucene's idf, term by term."""
    docs = [text.split() for text in texts]
    mean = sum(map(len, docs)) / len(docs)
    counts = Counter(word for doc in docs for word in set(doc))
    scores = []
    for doc in docs:
        score = 0.0
        for word in query.split():
            tf = doc.count(word)
            idf = math.log(1 + (len(docs) - counts[word] + 0.5) / (counts[word] + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(doc) / mean))
        scores.append(score)
    return np.array(scores)


@pytest.mark.parametrize("method", list(RIVALS))
def test_picks_are_the_best_of_the_train_split_and_never_of_the_querys_image(world, method):
    train, val, items, asking = world
    rows = np.array([3, 7, 0, 29])
    picked = picks(method, Asking(val, rows, train, 4, {"queries": asking, "train": items}.__getitem__))
    assert picked.shape == (4, 4)
    for row, icds in zip(rows, picked, strict=True):
        allowed = train.image_ids != val.image_ids[row]
        assert allowed[icds].all() and len(set(icds.tolist())) == 4
        image = (items["image"] @ asking["image"][row]).numpy().astype(float)
        text = (items["text"] @ asking["text"][row]).numpy().astype(float)
        if method == "mmices":
            near = np.argsort(-np.where(allowed, image, -9), kind="stable")[:200]
            expected = sorted(near, key=lambda i: -text[i])[:4]
            assert icds.tolist() == [int(i) for i in expected]
            continue
        score = {"rices": image, "question_knn": text}.get(method)
        if score is None:
            score = naive_bm25(val.question(row), train.texts)
        score = np.where(allowed, score, -9)
        np.testing.assert_allclose(score[icds], np.sort(score)[::-1][:4], rtol=1e-5)


def test_auto_is_every_method_that_can_be_evaluated(tmp_path):
    settings = load(InferenceSettings, {}, {"DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path)})
    named_only = {*methods.VERSIONS, methods.ADAPTIVE, *methods.CASCADES}
    assert methods.chosen(settings) == [name for name in methods.known() if name not in named_only]
    plain = dataclasses.replace(settings, embedding="mean")
    assert not set(methods.chosen(plain)) & set(methods.CHANNEL_SIMILARITY)
    assert "label" not in methods.chosen(dataclasses.replace(settings, v2_mode="labels"))
    with pytest.raises(UsageError, match="sim_lvlm needs the channel lvlm"):
        methods.chosen(dataclasses.replace(plain, methods="sim_lvlm"))
    for wrong in ("v4", "", "v3 v3"):
        with pytest.raises(UsageError, match="METHODS="):
            methods.chosen(dataclasses.replace(settings, methods=wrong))
