"""What the numbers allow to be said, in Chinese and English (4-evidence): pure functions of a record's entries."""

import re
from typing import Any

from lever_plus.experiments import stats

LANGUAGES = ("zh", "en")
SEEDS_DOMINATE = 2.0  # a recipe's interval this many times as wide as the queries' is the seeds' doing
Sides = tuple[str, str]  # Chinese, English

TITLES: dict[str, Sides] = {
    "1": ("实验1：只使用 RCE（不进行 GRPO）", "Experiment 1: RCE only (no GRPO)"),
    "2": ("实验2：增加 RCE epochs", "Experiment 2: more RCE epochs"),
    "3": ("实验3：RCE + 少量 GRPO", "Experiment 3: RCE and a little GRPO"),
    "4a": ("实验4A：奖励只用 correctness", "Experiment 4A: reward from correctness alone"),
    "4b": ("实验4B：增加 beam_score 权重", "Experiment 4B: more weight on the beam score"),
    "5": ("实验5：检查训练数据质量", "Experiment 5: quality of the training data"),
}
METHODS: dict[str, Sides] = {
    "v3": ("v3（RL 选择器）", "v3 (RL selector)"),
    "v2": ("v2（监督选择器）", "v2 (supervised selector)"),
    "random": ("随机示例", "random demonstrations"),
    "similarity": ("相似度 top-k", "similarity top-k"),
    "zero_shot": ("零样本（无示例）", "zero-shot (no demonstrations)"),
    "majority_vote_v3": ("v3 示例答案的多数票", "majority vote of v3's demonstrations"),
    "majority_vote_v2": ("v2 示例答案的多数票", "majority vote of v2's demonstrations"),
    "majority_vote_similarity": ("相似度示例答案的多数票", "majority vote of the similar demonstrations"),
    "v2_rival": ("同等代价的 v2", "v2 at equal price"),
    "oracle": ("oracle（试过的示例中最好的）", "oracle (best of all demonstrations tried)"),
}
REPORTED_EARLIER: dict[str, dict[str, list[float]]] = {
    "okvqa": {
        "v2": [56.7, 56.1, 55.5, 54.7],
        "v3, RCE 25 + GRPO 25": [57.3, 50.2, 48.3, 49.6],
        "v3, RCE 3 + GRPO 8": [51.6, 48.0, 47.2, 46.0],
    }
}
"""The plan's own numbers (200 OK-VQA queries, shots 1 to 4), by data set: shown beside measured ones, never mixed."""


def pick(sides: Sides, lang: str) -> str:
    """The side of a language."""
    return sides[LANGUAGES.index(lang)]


def title(experiment: str, lang: str) -> str:
    """The plan's title of an experiment name such as ``exp4a`` or ``exp1_seed2``; else the name itself."""
    found = re.match(r"exp(\d[ab]?)(?![0-9a-z])", experiment.lower())
    if found and found[1] in TITLES:
        return pick(TITLES[found[1]], lang)
    return pick((f"实验：{experiment}", f"Experiment: {experiment}"), lang)


def method(name: str, lang: str) -> str:
    """A method's name for readers."""
    return pick(METHODS[name], lang) if name in METHODS else name


def shot_name(shot: int | str, lang: str) -> str:
    """``shot_num=1``, or the words for all shots together."""
    return f"shot_num={shot}" if shot != "pooled" else pick(("各 shot 合并", "all shots together"), lang)


def points(value: float) -> str:
    """Points with sign, one decimal, and a real minus."""
    return f"{value:+.1f}".replace("-", "−")


def interval(ends: list[float | None]) -> str:
    """``[−2.1, +2.9]``."""
    return "[" + ", ".join("?" if end is None else points(end) for end in ends) + "]"


def count(value: int | None, lang: str) -> str:
    """A number with thousands separated; "not recorded" for None."""
    return pick(("未记录", "not recorded"), lang) if value is None else f"{value:,}"


def needed_n(comparison: dict[str, Any], delta: float) -> tuple[float, int | None]:
    """(target, n): the difference that further queries would have to show, at least ``delta`` points, and how many
    queries show it at 80 % power.
    """
    target = max(abs(comparison["diff"]), delta)
    if comparison["se"] is None:
        return target, None
    return target, stats.needed_n(comparison["se"], comparison["n"], target)


def rounded_n(n: int) -> str:
    """Two significant digits: an estimate of an estimate."""
    digits = max(0, len(str(n)) - 2)
    return f"{round(n, -digits):,}"


def verdict(comparison: dict[str, Any], delta: float, lang: str) -> str:
    """What a paired comparison allows to be said, with its numbers."""
    a, b, n = method(comparison["a"], lang), method(comparison["b"], lang), comparison["n"]
    numbers = pick(
        (f"{points(comparison['diff'])} 点，95% 区间 {interval(comparison['ci95'])}",
         f"{points(comparison['diff'])} points, 95 % interval {interval(comparison['ci95'])}"), lang,
    )  # fmt: skip
    if comparison["word"] == "better":
        return pick((f"{a}好于{b}：{numbers}，n={n}", f"{a} is better than {b}: {numbers}, n = {n}"), lang)
    if comparison["word"] == "worse":
        return pick((f"{a}差于{b}：{numbers}，n={n}", f"{a} is worse than {b}: {numbers}, n = {n}"), lang)
    rest = numbers + why_none(comparison, lang) + more_queries(comparison, delta, lang)
    return pick(
        (f"{a}与{b}在 n={n} 时未显示差异：{rest}", f"no difference shown at n = {n} between {a} and {b}: {rest}"), lang
    )


def more_queries(comparison: dict[str, Any], delta: float, lang: str) -> str:
    """How many queries would show the difference; empty where that cannot be said. Where the variation between
    training seeds is what makes the interval wide, it says that queries alone will not do.
    """
    target, n = needed_n(comparison, delta)
    if n is None:
        return ""
    recipe, (low, high) = comparison["recipe_ci95"], comparison["ci95"]
    if recipe is not None and recipe[1] - recipe[0] > SEEDS_DOMINATE * (high - low):
        return pick(
            ("；种子间差异是主要的不确定性，需要更多训练种子，只加查询不够",
             "; the variation between seeds is the main uncertainty: more training seeds are needed, not only queries"),
            lang,
        )  # fmt: skip
    return pick(
        (f"；要显示 {target:.1f} 点的差异约需 n≈{rounded_n(n)}",
         f"; n ≈ {rounded_n(n)} would be needed to show one of {target:.1f} points"), lang,
    )  # fmt: skip


def why_none(comparison: dict[str, Any], lang: str) -> str:
    """Why an interval that excludes 0 is still no result; empty where it includes 0."""
    low, high = comparison["ci95"]
    if low is None or low <= 0 <= high:
        return ""
    if comparison["n_images"] < stats.MIN_IMAGES:
        return pick(
            (f"；只有 {comparison['n_images']} 张图，不足以下结论", f"; only {comparison['n_images']} images, too few"),
            lang,
        )
    recipe = comparison["recipe_ci95"]
    if recipe is not None and recipe[0] <= 0 <= recipe[1]:
        return pick(
            (f"；但计入训练种子间差异后区间为 {interval(recipe)}，含 0",
             f"; with the variation between training seeds the interval is {interval(recipe)} and includes 0"), lang,
        )  # fmt: skip
    p = comparison["p_permutation_holm"]
    return pick(
        (f"；区间不含 0，但多重比较校正后的置换检验 p={p:.2f}，不足以下结论",
         f"; the interval excludes 0, but the sign-flip test, corrected for several shots, does not, p = {p:.2f}"),
        lang,
    )  # fmt: skip


def mark(word: str, lang: str) -> str:
    """One word for a table cell."""
    sides = {"better": ("好于", "better"), "worse": ("差于", "worse"), "none": ("未显示差异", "no difference shown")}
    return pick(sides[word], lang)
