"""Statistics against closed forms, naive loops, scipy, and simulated worlds of which the truth is known."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from lever_plus.experiments import stats

VQA_STEPS = np.array([0.0, 0.3, 0.6, 0.9, 1.0])


def compare(a, b, images, **options):
    """One pair of methods."""
    columns = (np.asarray(values, dtype=np.float64)[:, None] for values in (a, b))
    return stats.compare_columns(*columns, np.asarray(images), **options)[0]


def naive_bootstrap_mean(values, clusters, picks):
    """The mean of one resample, by listing what was drawn."""
    names = np.unique(clusters)
    drawn = [v for pick in picks for v, c in zip(values, clusters, strict=True) if c == names[pick]]
    return sum(drawn) / len(drawn)


def test_bootstrap_equals_listing_what_is_drawn():
    rng = np.random.default_rng(0)
    values, clusters = rng.random(17), rng.integers(0, 6, 17) * 11
    n_clusters, resamples = len(np.unique(clusters)), 40
    picks = np.random.default_rng([5, 0]).integers(0, n_clusters, (resamples, n_clusters))
    expected = [naive_bootstrap_mean(values, clusters, row) for row in picks]
    assert stats.bootstrap_means(values, clusters, resamples, seed=5) == pytest.approx(expected, abs=1e-12)


def test_columns_equal_one_at_a_time():
    rng = np.random.default_rng(1)
    values, clusters = rng.random((30, 3)), rng.integers(0, 12, 30)
    together = stats.bootstrap_means(values, clusters, 1100, seed=3)
    assert together.shape == (1100, 3)
    for column in range(3):
        assert together[:, column] == pytest.approx(stats.bootstrap_means(values[:, column], clusters, 1100, seed=3))
    together_p = stats.sign_flip_p(values - 0.5, clusters, 1100, seed=3)
    assert together_p[1] == pytest.approx(float(stats.sign_flip_p(values[:, 1] - 0.5, clusters, 1100, seed=3)))


def test_interval_is_student_t_where_the_data_are_normal():
    values = np.random.default_rng(2).normal(3.0, 2.0, 400)
    low, high = stats.bootstrap_interval(values, np.arange(400), 20_000)
    expected = scipy_stats.t.interval(0.95, 399, values.mean(), values.std(ddof=1) / 20)
    assert (float(low), float(high)) == pytest.approx(expected, abs=0.02)


def test_repeating_every_query_of_an_image_adds_no_certainty():
    values = np.random.default_rng(3).random(50)
    once = stats.bootstrap_interval(values, np.arange(50))
    thrice = stats.bootstrap_interval(np.repeat(values, 3), np.repeat(np.arange(50), 3))
    assert thrice == pytest.approx(once)
    assert stats.cluster_se(np.repeat(values, 3), np.repeat(np.arange(50), 3)) == pytest.approx(
        float(stats.cluster_se(values, np.arange(50)))
    )


def test_cluster_se_closed_forms():
    values = np.random.default_rng(4).random(60)
    assert float(stats.cluster_se(values, np.arange(60))) == pytest.approx(values.std(ddof=1) / np.sqrt(60))
    assert np.isinf(stats.cluster_se(values, np.zeros(60)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5))
def test_mcnemar_is_the_exact_binomial(only_a, only_b, both):
    right_a = [True] * only_a + [False] * only_b + [True] * both
    right_b = [False] * only_a + [True] * only_b + [True] * both
    total = only_a + only_b
    tail = min(only_a, only_b)
    expected = min(1.0, 2 * sum(scipy_stats.binom.pmf(k, total, 0.5) for k in range(tail + 1))) if total else 1.0
    assert stats.mcnemar_exact(right_a, right_b) == pytest.approx(expected)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([0.2]) == [0.2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_raw_and_bonferroni(p_values):
    for raw, adjusted in zip(p_values, stats.holm(p_values), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p_values)) + 1e-12


def test_sign_flip_equals_enumeration():
    totals = np.array([3.0, 1.0, -2.0, 4.0, 0.5])
    flips = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1)
    exact = (np.abs(flips.T @ totals) >= abs(totals.sum()) - 1e-9).mean()
    assert float(stats.sign_flip_p(totals, np.arange(5), 40_000)) == pytest.approx(exact, abs=0.01)


def test_detectable_difference_and_needed_n():
    assert stats.smallest_detectable(1.0) == pytest.approx(1.959964 + 0.841621, abs=1e-5)
    assert stats.needed_n(2.0, 200, stats.smallest_detectable(2.0)) == 200
    assert stats.needed_n(2.0, 200, stats.smallest_detectable(2.0) / 2) == 800
    assert stats.needed_n(2.0, 200, 0.0) is None
    assert stats.needed_n(0.0, 200, 1.0) is None


def test_power_is_what_it_says():
    rng, n, worlds = np.random.default_rng(6), 400, 1500
    shift = stats.smallest_detectable(1 / np.sqrt(n))
    worlds_mean = rng.normal(shift, 1, (worlds, n)).mean(axis=1)
    found = (worlds_mean - 1.959964 / np.sqrt(n) > 0).mean()
    assert found == pytest.approx(0.80, abs=0.035)


def test_seed_summary():
    assert stats.mean_sd([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert stats.mean_sd([5.0]) == (5.0, None)
    with pytest.raises(ValueError, match="no values"):
        stats.mean_sd([])


def test_compare_in_points_and_reproducible():
    rng = np.random.default_rng(7)
    a, b, images = rng.choice(VQA_STEPS, 200), rng.choice(VQA_STEPS, 200), np.arange(200) // 2
    first = compare(a, b, images, seed=4)
    assert first == compare(a, b, images, seed=4)
    assert first.diff == pytest.approx(100 * (a.mean() - b.mean()))
    back = compare(b, a, images, seed=4)
    assert back.diff == pytest.approx(-first.diff)
    assert back.ci95 == pytest.approx((-first.ci95[1], -first.ci95[0]))
    assert back.p_permutation == first.p_permutation
    assert first.n == 200 and first.n_images == 100
    assert set(first.as_dict()) >= {"diff", "ci95", "p_value", "n", "smallest_detectable", "n_needed"}


@pytest.mark.parametrize(
    ("a", "b", "images"), [([], [], []), ([0.5], [0.5, 1.0], [1]), ([1.5], [0.0], [1]), ([float("nan")], [0.0], [1])]
)
def test_wrong_input_is_refused(a, b, images):
    with pytest.raises(ValueError, match="scores"):
        compare(a, b, images)


def test_accuracy_interval_holds_the_accuracy():
    scores = np.random.default_rng(8).choice(VQA_STEPS, 300)
    ((accuracy, low, high),) = stats.accuracy_intervals(scores[:, None], np.arange(300))
    assert accuracy == pytest.approx(100 * scores.mean())
    assert low < accuracy < high
    half = 100 * 1.966 * scores.std(ddof=1) / np.sqrt(300)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def words_of_worlds(a, b, images, resamples=10_000):
    """The word of :attr:`Comparison.word` for many worlds at once; a, b: (n, worlds)."""
    difference = (a - b) * 100
    low, high = stats.bootstrap_interval(difference, images, resamples)
    p = stats.sign_flip_p(difference, images, resamples)
    return np.where((p >= 0.05) | ((low <= 0) & (high >= 0)), 0, np.sign(low + high))


def test_vectorised_words_are_those_of_compare():
    rng = np.random.default_rng(9)
    images = np.arange(120) // 2
    a, b = rng.choice(VQA_STEPS, (120, 12), p=[0.2, 0.1, 0.1, 0.1, 0.5]), rng.choice(VQA_STEPS, (120, 12))
    words = words_of_worlds(a, b, images, 1000)
    alone = [compare(a[:, i], b[:, i], images, resamples=1000).word for i in range(12)]
    assert [{0: "none", 1: "better", -1: "worse"}[int(w)] for w in words] == alone
    assert set(alone) == {"none", "better"}


def null_worlds(rng, n, worlds, discordant):
    """Two copies of one selector whose answers differ on a share of the queries; images hold two queries."""
    images = np.arange(n) // 2
    base = rng.choice(VQA_STEPS, (n, worlds), p=[0.35, 0.1, 0.1, 0.1, 0.35])
    image_shift = rng.random((n // 2, worlds)) < discordant  # the queries of an image change together
    changed = np.repeat(image_shift, 2, axis=0)
    a = np.where(changed, rng.permuted(base, axis=0), base)
    b = np.where(changed, rng.permuted(base, axis=0), base)
    return a, b, images


@pytest.mark.parametrize(("n", "discordant"), [(200, 0.02), (200, 0.3), (400, 0.5)])
def test_two_copies_of_a_checkpoint_show_no_difference(n, discordant):
    a, b, images = null_worlds(np.random.default_rng(n), n, 500, discordant)
    assert (words_of_worlds(a, b, images) == 0).mean() >= 0.94


def test_identical_scores_are_no_difference():
    scores = np.random.default_rng(11).choice(VQA_STEPS, 200)
    same = compare(scores, scores, np.arange(200))
    assert same.word == "none" and same.diff == 0 and same.p_value == 1 and same.p_permutation == 1


def test_a_planted_ten_point_effect_at_400_is_found():
    rng, n, worlds = np.random.default_rng(12), 400, 500
    b = rng.choice(VQA_STEPS, (n, worlds), p=[0.4, 0.05, 0.05, 0.05, 0.45])
    rescored = rng.random((n, worlds)) < 0.15  # both ways, so that there is noise beside the effect
    a = np.where(rescored, rng.permuted(b, axis=0), b)
    lifted = (a == 0) & (rng.random((n, worlds)) < 0.10 / (a == 0).mean())
    a = np.where(lifted, 1.0, a)
    assert (a - b).mean() == pytest.approx(0.10, abs=0.005)
    assert (words_of_worlds(a, b, np.arange(n)) == 1).mean() >= 0.95


def test_few_discordant_queries_are_not_a_result():
    a, b = np.zeros(400), np.zeros(400)
    a[:4] = 1.0  # 4 against 0: a fair coin does that in 1 of 8 cases
    found = compare(a, b, np.arange(400))
    assert found.ci95[0] > 0 and found.word == "none"


def test_columns_of_pairs_equal_single_pairs():
    rng = np.random.default_rng(15)
    a, b, images = rng.choice(VQA_STEPS, (90, 4)), rng.choice(VQA_STEPS, (90, 4)), np.arange(90) // 3
    together = stats.compare_columns(a, b, images, resamples=1500, seed=2)
    assert together == [compare(a[:, j], b[:, j], images, resamples=1500, seed=2) for j in range(4)]
    accuracies = stats.accuracy_intervals(a, images, resamples=1500, seed=2)
    assert accuracies == [stats.accuracy_intervals(a[:, [j]], images, resamples=1500, seed=2)[0] for j in range(4)]


def test_few_images_are_not_a_result():
    assert compare([1.0] * 8, [0.0] * 8, range(8)).word == "none"
    assert compare([1.0] * 30, [0.0] * 30, [0] * 30).word == "none"
    assert compare([1.0] * 30, [0.0] * 30, range(30)).word == "better"
    json.dumps(compare([1.0] * 30, [0.0] * 30, [0] * 30).as_dict(), allow_nan=False)


@pytest.mark.parametrize(("seeds", "seed_sd"), [(2, 1.0), (3, 0.0), (3, 3.0), (5, 1.0)])
def test_recipe_interval_covers_the_recipe(seeds, seed_sd):
    rng, worlds, n = np.random.default_rng(13), 400, 300
    covered = narrow = 0
    for _ in range(worlds):
        seed_effect = rng.normal(0, seed_sd, (seeds, 1))
        differences = seed_effect + rng.normal(0, 30, (1, n)) + rng.normal(0, 20, (seeds, n))
        low, high = stats.recipe_interval(differences, np.arange(n))
        covered += low <= 0 <= high
        mean = differences.mean(axis=0)
        narrow += abs(mean.mean()) <= 1.97 * mean.std(ddof=1) / np.sqrt(n)
    assert covered / worlds >= 0.945
    if seed_sd == 3.0:
        assert narrow / worlds < 0.92  # what leaving the seeds out would claim


def test_recipe_interval_without_seed_effect_is_the_paired_one():
    one = np.random.default_rng(14).normal(2, 30, 500)
    low, high = stats.recipe_interval(np.stack([one, one, one]), np.arange(500))
    half = 1.9647 * one.std(ddof=1) / np.sqrt(500)
    assert (low, high) == pytest.approx((one.mean() - half, one.mean() + half), abs=1e-3)
    with pytest.raises(ValueError, match="two seeds"):
        stats.recipe_interval(one[None], np.arange(500))


def test_recipe_interval_of_constant_seeds_is_students_t_over_seeds():
    means = np.array([1.0, 2.0, 6.0])
    low, high = stats.recipe_interval(np.repeat(means[:, None], 40, axis=1), np.arange(40))
    assert (low, high) == pytest.approx(scipy_stats.t.interval(0.95, 2, means.mean(), means.std(ddof=1) / np.sqrt(3)))
