import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_plus.data import neighbours, streamed
from lever_plus.data.samplers import sample_pools
from open_mmicl.errors import UsageError

SAMPLERS = ("RandSampler", "TextSimSampler", "ImgSimSampler", "MixSampler", "ChannelSimSampler")


def unit(rng, n, d):
    values = rng.normal(size=(n, d)).astype(np.float32)
    return torch.from_numpy(values / np.linalg.norm(values, axis=1, keepdims=True))


def world(n=300, d=16, images=90, seed=0):
    rng = np.random.default_rng(seed)
    image_ids = rng.integers(1000, 1000 + images, n)
    by_image = {i: v for i, v in zip(range(1000, 1000 + images), unit(rng, images, d), strict=True)}
    questions = unit(rng, n // 3, d)[torch.from_numpy(rng.integers(0, n // 3, n))]
    pictures = torch.stack([by_image[i] for i in image_ids])
    return image_ids, {"image": pictures, "text": questions, "channels": torch.cat([pictures, questions], 1)}


def draw(name, rows, image_ids, features, k=8, seed=5, **other):
    options = {"query_image_ids": image_ids, "query_features": features, "same_split": True, **other}
    return sample_pools(
        name, query_rows=np.array(rows), train_image_ids=image_ids, k=k, seed=seed, train_features=features, **options
    )


def brute_force(query, items, image, image_ids, k):
    """Every score, a plain sort: best first, ties by the lower row."""
    scores = [float((items[i].double() * query.double()).sum()) for i in range(len(items))]
    allowed = [i for i in range(len(items)) if image_ids[i] != image]
    return sorted(allowed, key=lambda i: (-scores[i], i))[:k]


@pytest.mark.parametrize("name", SAMPLERS)
def test_never_the_query_nor_its_image(name):
    image_ids, features = world()
    pools = draw(name, range(300), image_ids, features)
    assert pools.shape == (300, 8) and pools.dtype == np.int64
    for row, pool in enumerate(pools):
        assert len(set(pool)) == 8
        assert row not in pool and image_ids[row] not in image_ids[pool]


@pytest.mark.parametrize("name", SAMPLERS)
def test_fault_01_a_pool_depends_on_its_query_alone(name):
    image_ids, features = world()
    everyone = draw(name, range(300), image_ids, features)
    alone = np.concatenate([draw(name, [row], image_ids, features) for row in range(0, 300, 17)])
    assert np.array_equal(everyone[::17], alone)
    backwards = draw(name, range(299, -1, -1), image_ids, features)
    assert np.array_equal(everyone, backwards[::-1])


def test_fault_01_pools_are_the_querys_own():
    image_ids, features = world()
    pools = draw("RandSampler", range(300), image_ids, features)
    assert len({tuple(pool) for pool in pools}) == 300
    assert len(set(pools.ravel())) > 290  # from the whole train split, not its first K


@pytest.mark.parametrize(("name", "modality"), [("TextSimSampler", "text"), ("ImgSimSampler", "image")])
@pytest.mark.parametrize("blocks", [(128, 1 << 16), (4, 16)])
def test_similarity_is_exact(name, modality, blocks, monkeypatch):
    monkeypatch.setattr(neighbours, "QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(neighbours, "ITEM_BLOCK", blocks[1])
    monkeypatch.setattr(neighbours, "_CELL", 4)
    image_ids, features = world()
    pools = draw(name, range(0, 300, 7), image_ids, features)
    for row, pool in zip(range(0, 300, 7), pools, strict=True):
        items = features[modality]
        assert pool.tolist() == brute_force(items[row], items, image_ids[row], image_ids, 8)


@pytest.mark.parametrize("blocks", [(1024, 1 << 13), (7, 16), (300, 1)])
def test_channels_are_compared_exactly_block_by_block(blocks, monkeypatch):
    monkeypatch.setattr(streamed, "QUERY_ROWS", blocks[0])
    monkeypatch.setattr(streamed, "ITEM_ROWS", blocks[1])
    image_ids, features = world()
    channels = 3 * features["channels"] * torch.arange(1, 301)[:, None]  # their lengths do not count
    pools = draw("ChannelSimSampler", range(300), image_ids, {"channels": channels})
    for row, pool in zip(range(0, 300, 7), pools[::7], strict=True):
        items = torch.nn.functional.normalize(channels, dim=-1)
        assert pool.tolist() == brute_force(items[row], items, image_ids[row], image_ids, 8)


@pytest.mark.parametrize("items_at_once", [3, 64])
def test_channels_alike_go_to_the_lower_row(items_at_once, monkeypatch):
    monkeypatch.setattr(streamed, "ITEM_ROWS", items_at_once)
    rng = np.random.default_rng(3)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    items, image_ids = vectors[torch.from_numpy(rng.integers(0, 3, 40))], rng.integers(0, 25, 40)
    for k in (1, 5, 12):
        pools = draw("channel_sim_sampler", range(40), image_ids, {"channels": items}, k=k)
        for row, pool in enumerate(pools):
            assert pool.tolist() == brute_force(items[row], items, image_ids[row], image_ids, k)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), distinct=st.integers(1, 6), k=st.integers(1, 12))
def test_ties_go_to_the_lower_row(seed, distinct, k):
    rng = np.random.default_rng(seed)
    vectors = torch.from_numpy(rng.integers(-1, 2, size=(distinct, 3)).astype(np.float32))  # many equal scores
    items = vectors[torch.from_numpy(rng.integers(0, distinct, 40))]
    image_ids = rng.integers(0, 25, 40)
    features = {"image": items, "text": items}
    pools = draw("TextSimSampler", range(40), image_ids, features, k=k)
    for row, pool in enumerate(pools):
        assert pool.tolist() == brute_force(items[row], items, image_ids[row], image_ids, k)


def test_mix_is_half_image_half_text():
    image_ids, features = world()
    by_image, by_text = (draw(name, range(300), image_ids, features) for name in ("ImgSimSampler", "TextSimSampler"))
    for pool, image_rows, text_rows in zip(
        draw("MixSampler", range(300), image_ids, features), by_image, by_text, strict=True
    ):
        assert pool[:4].tolist() == image_rows[:4].tolist()
        expected = [row for row in text_rows if row not in pool[:4]][:4]
        assert pool[4:].tolist() == expected


def test_validation_queries_draw_from_the_train_split():
    image_ids, features = world()
    val_images, val_features = np.array([1, 2, 1003]), {name: value[:3] for name, value in features.items()}
    for name in SAMPLERS:
        pools = sample_pools(
            name,
            query_rows=np.arange(3),
            query_image_ids=val_images,
            train_image_ids=image_ids,
            k=8,
            seed=5,
            same_split=False,
            query_features=val_features,
            train_features=features,
        )
        assert 1003 not in image_ids[pools[2]]
        if name == "ImgSimSampler":  # validation row 0 has the features of train row 0, which is not left out
            assert image_ids[pools[0][0]] == image_ids[0]
        if name == "RandSampler":
            assert not np.array_equal(pools, draw(name, range(3), image_ids, features))


def test_random_pools_follow_the_seed():
    image_ids, features = world()
    assert np.array_equal(
        draw("rand_sampler", range(9), image_ids, None), draw("RandSampler", range(9), image_ids, features)
    )
    assert not np.array_equal(
        draw("RandSampler", range(9), image_ids, None, seed=6), draw("RandSampler", range(9), image_ids, None)
    )


def test_random_pools_are_uniform():
    image_ids = np.arange(20)
    counts = np.zeros(20)
    for seed in range(400):
        counts += np.bincount(draw("RandSampler", [3], image_ids, None, k=5, seed=seed)[0], minlength=20)
    assert counts[3] == 0
    expected = 400 * 5 / 19
    assert np.all(np.abs(np.delete(counts, 3) - expected) < 5 * np.sqrt(expected))


def test_too_few_candidates_and_unknown_names_are_refused():
    image_ids, features = world(n=12, images=4)
    with pytest.raises(UsageError, match="CANDIDATE_NUM=12"):
        draw("RandSampler", [0], image_ids, features, k=12)
    with pytest.raises(UsageError, match="unknown sampler 'best_sampler'"):
        draw("best_sampler", [0], image_ids, features)
    with pytest.raises(UsageError, match="export_embeddings.sh"):
        draw("MixSampler", [0], image_ids, None)


def test_no_queries():
    image_ids, features = world()
    for name in SAMPLERS:
        assert draw(name, np.zeros(0, dtype=np.int64), image_ids, features).shape == (0, 8)
