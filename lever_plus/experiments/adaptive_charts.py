"""Figures of the policy that decides how many demonstrations a query gets (adaptive.py)."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lever_plus.experiments import words
from lever_plus.experiments.charts import INK, MARKERS, PALETTE, StandIns, svg

LABELS: dict[str, words.Sides] = {
    "number": ("选择的示例数", "demonstrations chosen"),
    "queries": ("查询数", "queries"),
    "over_best_fixed": ("比最佳固定个数多的点数", "points over the best fixed number"),
    "over_zero_shot": ("比零样本多的点数", "points over zero-shot"),
    "gained": ("多得的点数", "points gained"),
    "probability": ("策略的 STOP 概率", "the policy's STOP probability"),
    "right": ("停止是对的比例", "share of stops that are right"),
}


def gains(found: dict[str, Any], name: str, lang: str = "en") -> str:
    """Number of demonstrations chosen against what these queries gain over the rivals, with 1.96 standard errors."""

    def draw(figure: Figure, say: StandIns) -> None:
        counts, points = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        numbers = [g["number"] for g in found["gained"]]
        counts.bar(numbers, [g["n"] for g in found["gained"]], color=PALETTE[4], width=0.6)
        counts.set_ylabel(say(_label("queries", lang)), rotation_mode="anchor")
        for i, key in enumerate(("over_best_fixed", "over_zero_shot")):
            some = [g for g in found["gained"] if g[key] is not None]
            points.errorbar(
                [g["number"] + 0.1 * (2 * i - 1) for g in some], [g[key] for g in some],
                yerr=[1.96 * (g[f"{key}_se"] or 0.0) for g in some], color=PALETTE[i], marker=MARKERS[i],
                linestyle="", capsize=2, label=say(_label(key, lang)),
            )  # fmt: skip
        points.axhline(0, color=INK, linewidth=1)
        points.set_xticks(numbers)
        points.set_xlabel(say(_label("number", lang)))
        points.set_ylabel(say(_label("gained", lang)), rotation_mode="anchor")
        counts.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)

    return svg(name, draw, height=4.4)


def reliability(found: dict[str, Any], name: str, lang: str = "en") -> str:
    """P(STOP) against the share of decisions at which stopping was right; larger markers are more decisions."""

    def draw(figure: Figure, say: StandIns) -> None:
        axes = figure.subplots()
        bins = found["stopping"]["bins"]
        most = max(b["n"] for b in bins)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
        axes.plot([b["mean"] for b in bins], [b["right"] for b in bins], color=PALETTE[0], linewidth=1.5)
        axes.scatter(
            [b["mean"] for b in bins], [b["right"] for b in bins], s=[20 + 120 * b["n"] / most for b in bins],
            color=PALETTE[0],
        )  # fmt: skip
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(say(_label("probability", lang)))
        axes.set_ylabel(say(_label("right", lang)), rotation_mode="anchor")

    return svg(name, draw, width=4.2, height=3.6)


def _label(key: str, lang: str) -> str:
    return words.pick(LABELS[key], lang)
