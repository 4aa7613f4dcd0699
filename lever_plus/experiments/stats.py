"""Statistics of paired comparisons: pure functions of arrays, no settings, no files.

Legend of shapes: n queries, C images (clusters), R resamples, m columns that are treated alike, S seeds.
Scores are VQA accuracies in [0, 1]; what the functions return is in the unit of what they are given,
except :func:`compare_columns` and :func:`accuracy_intervals`, which speak in points (0 to 100).

Why three devices stand side by side (docs/evidence.md): the bootstrap gives the interval; with few discordant
queries its lower end leaves 0 too easily, so a difference also has to survive a sign-flip test, which is
exact when the two methods are exchangeable; McNemar's test looks at "accuracy > 0" alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from open_mmicl.lazy import lazy

scipy_stats = lazy("scipy.stats")

RESAMPLES = 10_000
LEVEL = 0.95
POWER = 0.80
ALPHA_MAIN, ALPHA_SHOTS = 0.04, 0.01
"""What is said about a pair of methods shares one 5 % of false alarms: the main statement (all shots together, or the
only shot) has 4 %; the single shots share 1 %, and all 5 % once the main statement names a direction (the fallback
procedure; Wiens, Pharmaceutical Statistics 2, 2003)."""
POINTS = 100.0
MIN_IMAGES = 20
"""With fewer images no interval is trusted: :attr:`Comparison.word` then never says better or worse."""
_CHUNK = 500
_TIE = 1e-9

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn: BOOTSTRAP resamples, by DATA_SEED."""

    resamples: int = RESAMPLES
    seed: int = 0


USUAL = Resampling()


@dataclass(frozen=True)
class Comparison:
    """a minus b on the same queries, in points; see :func:`compare_columns`.

    ``p_value`` is McNemar's exact p on accuracy > 0, ``p_permutation`` the sign-flip p of the mean
    difference. ``smallest_detectable`` is what a single test at 5 % could have shown at this n with 80 % power;
    ``n_needed`` the queries at which it would show the observed difference (None where it is 0).
    """

    diff: float
    ci95: tuple[float, float]
    p_value: float
    p_permutation: float
    n: int
    n_images: int
    se: float
    smallest_detectable: float
    n_needed: int | None

    def as_dict(self) -> dict:
        """The fields as JSON values; what is infinite (a single image) is null."""
        fields = {**asdict(self), "ci95": [end if math.isfinite(end) else None for end in self.ci95]}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}

    @property
    def word(self) -> str:
        """:func:`direction` of this comparison alone, as the only statement about the pair."""
        return direction(self.ci95, self.p_permutation, self.n_images)


def direction(ci95: Sequence[float | None], p_permutation: float, n_images: int, alpha: float = ALPHA_MAIN) -> str:
    """``better``, ``worse`` or ``none`` (no difference shown).

    A direction only where the interval excludes 0, the sign-flip test's p (adjusted by the caller where there
    are several) is below ``alpha``, and there are at least :data:`MIN_IMAGES` images.
    """
    if not excludes_zero(ci95) or n_images < MIN_IMAGES or p_permutation >= alpha:
        return "none"
    return "better" if ci95[0] > 0 else "worse"


def excludes_zero(interval: Sequence[float | None]) -> bool:
    """Whether 0 lies outside an interval. An end that is 0 but for rounding counts as 0, an unknown end as infinite."""
    low, high = interval
    return low is not None and high is not None and (low > _TIE or high < -_TIE)


def compare_columns(
    scores_a: ArrayLike, scores_b: ArrayLike, image_ids: Sequence[int], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Comparison]:
    """Compare pairs of methods on the same queries, column by column of (n, m) and (n, m); all with one set of
    resamples, so that many cost little more than one.

    Args:
        scores_a, scores_b: accuracy per query in [0, 1], in the same order of queries. A method with several seeds
            (random ICDs) or several shots (pooled) enters as each query's mean.
        image_ids: (n,) image of each query; queries of one image are resampled together.
        resamples: bootstrap resamples and sign flips.
        seed: of both; equal inputs give equal results.

    Returns: differences a − b in points with everything that docs/evidence.md asks for. ``.as_dict()`` is an
    entry of metrics.json's ``comparisons`` once ``a``, ``b`` and ``shot`` are added.

    Raises:
        ValueError: no queries, lengths differ, or a score lies outside [0, 1].
    """
    a, b, images = _scores(scores_a), _scores(scores_b), np.asarray(image_ids)
    if a.shape != b.shape:
        raise ValueError(f"scores of the two methods differ in number: {a.shape}, {b.shape}")
    _check_images(a, images)
    differences = (a - b) * POINTS  # (n, m)
    low, high = bootstrap_interval(differences, images, resamples, seed)
    p_permutation = sign_flip_p(differences, images, resamples, seed)
    se, mean, n_images = cluster_se(differences, images), differences.mean(axis=0), len(np.unique(images))
    return [
        Comparison(
            diff=float(mean[j]),
            ci95=(float(low[j]), float(high[j])),
            p_value=mcnemar_exact(a[:, j] > 0, b[:, j] > 0),
            p_permutation=float(p_permutation[j]),
            n=len(a),
            n_images=n_images,
            se=float(se[j]),
            smallest_detectable=smallest_detectable(float(se[j])),
            n_needed=needed_n(float(se[j]), len(a), float(mean[j])),
        )
        for j in range(a.shape[1])
    ]


def accuracy_intervals(
    scores: ArrayLike, image_ids: Sequence[int], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[tuple[float, float, float]]:
    """Accuracy in points of each column of (n, m), a method each, and its 95 % interval by bootstrap over images;
    one set of resamples serves all columns.

    Args: as in :func:`compare_columns`. Returns: (accuracy, low, high) of each. Raises: ValueError as there.
    """
    values, images = _scores(scores) * POINTS, np.asarray(image_ids)
    _check_images(values, images)
    low, high = bootstrap_interval(values, images, resamples, seed)
    return [(float(m), float(lo), float(hi)) for m, lo, hi in zip(values.mean(axis=0), low, high, strict=True)]


def cluster_totals(values: ArrayLike, clusters: ArrayLike) -> tuple[Floats, Floats]:
    """Sum and number of the values of each cluster: (C, m) or (C,), and (C,)."""
    values = np.asarray(values, dtype=np.float64)
    _, codes = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(codes).astype(np.float64)  # (C,)
    totals = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(totals, codes, values)
    return totals, counts


def bootstrap_means(values: ArrayLike, clusters: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Means of ``resamples`` bootstrap samples that draw whole clusters with replacement.

    Args: values: (n,) or (n, m), the columns drawn together; clusters: (n,). Returns: (R,) or (R, m).
    """
    totals, counts = cluster_totals(values, clusters)
    blocks = [
        (drawn @ totals) / (drawn @ counts).reshape(-1, *[1] * (totals.ndim - 1))
        for drawn in _draws(len(counts), resamples, seed)
    ]
    return np.concatenate(blocks)


def bootstrap_interval(
    values: ArrayLike, clusters: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Floats, Floats]:
    """Percentile interval of the mean under :func:`bootstrap_means`, widened for few clusters.

    The tails are those of Student's t with C − 1 degrees of freedom times sqrt(C / (C − 1)) (the expanded
    percentile interval; Hesterberg, The American Statistician 69, 2015, section 4). With one cluster the
    interval is everything (−inf, inf).

    Returns: (low, high), scalars or (m,).
    """
    n_clusters = len(np.unique(np.asarray(clusters)))
    shape = np.asarray(values).shape[1:]
    if n_clusters < 2:
        return np.full(shape, -np.inf), np.full(shape, np.inf)
    quantile = scipy_stats.t.ppf((1 - LEVEL) / 2, n_clusters - 1) * math.sqrt(n_clusters / (n_clusters - 1))
    tail = scipy_stats.norm.cdf(quantile)
    low, high = np.quantile(bootstrap_means(values, clusters, resamples, seed), [tail, 1 - tail], axis=0)
    return low, high


def cluster_se(values: ArrayLike, clusters: ArrayLike) -> Floats:
    """Cluster-robust standard error of the mean: sqrt(C/(C−1) · Σ_c (total_c − count_c · mean)²) / n.

    With clusters of one it is the usual sd/sqrt(n). inf with a single cluster. Scalar or (m,).
    """
    values = np.asarray(values, dtype=np.float64)
    totals, counts = cluster_totals(values, clusters)
    n_clusters = len(counts)
    if n_clusters < 2:
        return np.full(values.shape[1:], np.inf)
    residuals = totals - counts.reshape(-1, *[1] * (totals.ndim - 1)) * values.mean(axis=0)
    return np.sqrt(n_clusters / (n_clusters - 1) * (residuals**2).sum(axis=0)) / len(values)


def sign_flip_p(differences: ArrayLike, clusters: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Two-sided randomisation p of a mean difference: the signs of whole clusters are flipped at random.

    Valid at any n when the methods are exchangeable. Never 0: (1 + hits) / (1 + R). Scalar or (m,).
    """
    totals, _ = cluster_totals(differences, clusters)
    observed = np.abs(totals.sum(axis=0))
    rng = np.random.default_rng([seed, 1])
    hits = np.zeros(totals.shape[1:])
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        signs = rng.integers(0, 2, (rows, len(totals))) * 2.0 - 1.0  # (rows, C)
        hits += (np.abs(signs @ totals) >= observed - _TIE * (1 + observed)).sum(axis=0)
    return (1 + hits) / (1 + resamples)


def mcnemar_exact(right_a: ArrayLike, right_b: ArrayLike) -> float:
    """McNemar's exact two-sided p: the discordant queries against a fair coin. 1 where there are none."""
    right_a, right_b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(scipy_stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm, Scand. J. Statistics 6, 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def smallest_detectable(se: float) -> float:
    """The difference that a two-sided test at 1 - :data:`LEVEL` finds with probability :data:`POWER`, given its
    standard error: (z_{1−α/2} + z_power) · se. In the unit of ``se``.
    """
    return (scipy_stats.norm.ppf(0.5 + LEVEL / 2) + scipy_stats.norm.ppf(POWER)) * float(se)


def needed_n(se: float, n: int, difference: float) -> int | None:
    """Queries that would show ``difference`` at this power, if its spread stays what it is at ``n``.

    None where the difference is 0, or its standard error is 0 or infinite: no n follows from that.
    """
    if difference == 0 or se == 0 or not math.isfinite(se):
        return None
    return math.ceil(n * (smallest_detectable(se) / abs(difference)) ** 2)


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1) over seeds; None for a single value."""
    if len(values) == 0:
        raise ValueError("mean_sd of no values")
    return float(np.mean(values)), (float(np.std(values, ddof=1)) if len(values) > 1 else None)


def recipe_interval(differences: ArrayLike, clusters: ArrayLike) -> tuple[float, float]:
    """Interval for a training *recipe*: over queries and over training seeds.

    The paired interval holds for the checkpoints at hand; what a new seed would give varies too. The variance
    of the mean over S seeds has two parts: that of the queries' common effect (clustered, without the seeds'
    own noise), and s² / S with s² the variance of the seeds' means. The half-width is the root of
    (t_{C−1})² · first + (t_{S−1})² · second, each part at its own degrees of freedom (after Graybill and Wang,
    JASA 75, 1980). Simulated coverage 95.5 to 98 % for S = 2 to 5, whichever part dominates.

    Args: differences: (S, n), seed by query; clusters: (n,). Returns: (low, high) in the unit given.

    Raises:
        ValueError: fewer than two seeds or clusters.
    """
    differences = np.asarray(differences, dtype=np.float64)
    seeds, _ = differences.shape
    n_clusters = len(np.unique(np.asarray(clusters)))
    if seeds < 2 or n_clusters < 2:
        raise ValueError("a recipe's interval needs at least two seeds and two images")
    mean_over_seeds = differences.mean(axis=0)  # (n,)
    centre = float(mean_over_seeds.mean())
    by_seed = (
        cluster_se(np.column_stack([mean_over_seeds, (differences - mean_over_seeds).T]), clusters) ** 2
    )  # (1 + S,)
    own_noise = float(by_seed[1:].sum()) / (seeds - 1)  # variance of one seed's mean from seed-query noise
    common = max(0.0, float(by_seed[0]) - own_noise / seeds)
    between = float(np.var(differences.mean(axis=1), ddof=1)) / seeds
    t_queries, t_seeds = (float(scipy_stats.t.ppf(0.5 + LEVEL / 2, df)) for df in (n_clusters - 1, seeds - 1))
    half = math.sqrt(t_queries**2 * common + t_seeds**2 * between)
    return centre - half, centre + half


def _draws(n_clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each cluster is drawn, (rows, C), in blocks."""
    rng = np.random.default_rng([seed, 0])
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        picks = rng.integers(0, n_clusters, (rows, n_clusters)) + n_clusters * np.arange(rows)[:, None]
        yield np.bincount(picks.ravel(), minlength=rows * n_clusters).reshape(rows, n_clusters).astype(np.float64)


def _check_images(values: Floats, images: NDArray) -> None:
    if images.shape != values.shape[:1]:
        raise ValueError(f"scores and images differ in number: {values.shape}, {images.shape}")


def _scores(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"scores must be non-empty, (n, m); got shape {array.shape}")
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError("scores must lie in [0, 1]")
    return array
