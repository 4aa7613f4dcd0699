"""The report's figures: matplotlib to inline SVG that takes its ink from the page (light and dark)."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe-Ito: told apart with the common colour deficiencies; markers differ too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#B2A300", "#8C564B")
MARKERS = "osD^vP*Xh"
INK = "#010203"  # stands for the page's text colour; replaced by currentColor
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    "grid.color": INK, "grid.alpha": 0.15, "axes.grid": True, "savefig.facecolor": "none",
}  # fmt: skip
CURVES = (
    ("rce/loss", "RCE loss"), ("grpo/loss", "GRPO loss"), ("kl", "KL to the reference"), ("entropy", "entropy (nats)"),
    ("clip_high", "clip fraction (high)"),
    ("clip_low", "clip fraction (low)"), ("reward_mean", "mean reward of the data"),
    ("val_expected_reward", "validation: expected reward"), ("val_expected_accuracy", "validation: expected accuracy"),
    ("val_rce_loss", "validation: RCE loss"), ("grad_norm", "gradient norm"),
)  # fmt: skip
"""Key of the training log (``phase/key`` for one phase alone) -> label; shown where the log has it."""
FLAT = 1e-5
PHASE_LINES = {"rce": "-", "grpo": "--"}


def svg(name: str, draw: Callable[[Figure], None], width: float = 7.2, height: float = 3.8) -> str:
    """Draw a figure and return it as an ``<svg>`` element.

    ``name`` makes the ids in it unique within a page. Deterministic: equal data give equal text.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def accuracy(record: dict[str, Any], name: str = "accuracy") -> str:
    """Accuracy per shot with 95 % intervals, every method; zero-shot is a level line with its band."""

    def draw(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        methods = [m for m in record["accuracy"] if m != "zero_shot"]
        for i, method in enumerate(methods):
            cells = {int(k): c for k, c in record["accuracy"][method].items()}
            shots = np.array(sorted(cells))
            mean = np.array([cells[k]["mean"] for k in shots])
            ends = np.array([cells[k]["ci95"] for k in shots]).T
            minor = method not in ("v3", "v2", "random", "similarity")
            offset = (i - (len(methods) - 1) / 2) * 0.06
            axes.errorbar(
                shots + offset, mean, yerr=np.abs(ends - mean), label=method, color=PALETTE[i % len(PALETTE)],
                marker=MARKERS[i % len(MARKERS)], markersize=5, capsize=2, linewidth=1 if minor else 2,
                linestyle=":" if minor else "-", alpha=0.75 if minor else 1,
            )  # fmt: skip
        if "zero_shot" in record["accuracy"]:
            cell = record["accuracy"]["zero_shot"]["0"]
            axes.axhline(cell["mean"], color=INK, linewidth=1, linestyle="-.", label="zero_shot")
            axes.axhspan(*cell["ci95"], color=INK, alpha=0.08, linewidth=0)
        axes.set(xlabel="demonstrations (shot_num)", ylabel="VQA accuracy (%)")
        axes.set_xticks(sorted({int(k) for m in methods for k in record["accuracy"][m]}))
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)

    return svg(name, draw, height=4.6)


def forest(rows: Sequence[dict[str, Any]], labels: Sequence[str], name: str) -> str:
    """Paired differences, one row each, and a line at 0: thick the 95 % interval over queries, thin that over
    queries and training seeds, ticks the single seeds.
    """

    def draw(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        for i, row in enumerate(rows):
            low, high = (row["diff"] if end is None else end for end in row["ci95"])
            colour = {"better": PALETTE[2], "worse": PALETTE[1], "none": PALETTE[6]}[row["word"]]
            axes.plot([low, high], [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
            if row["recipe_ci95"] is not None:
                axes.plot(row["recipe_ci95"], [i, i], color=colour, linewidth=0.8)
            marker = {"better": "^", "worse": "v", "none": "o"}[row["word"]]
            axes.plot([row["diff"]], [i], marker=marker, color=colour, markersize=7)
            if row["sd"] is not None:
                axes.plot(row["each"], [i + 0.22] * len(row["each"]), "|", color=INK, markersize=7, alpha=0.6)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("difference in points, 95 % intervals")

    return svg(name, draw, height=1.2 + 0.42 * len(rows))


def curves(lines_of: dict[str, list[dict[str, Any]]], name: str) -> str | None:
    """Training curves: one panel per quantity of :data:`CURVES`, a colour per run, RCE solid and GRPO dashed.

    ``lines_of``: the epoch lines of each run's log. None where there is nothing to draw.
    """
    logged = {
        name for lines in lines_of.values() for line in lines for k in line for name in (k, f"{line['phase']}/{k}")
    }
    shown = [(key, label) for key, label in CURVES if key in logged]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        columns = 2
        grid = figure.subplots(-(-len(shown) // columns), columns, squeeze=False)
        for place, (key, label) in zip(grid.flat, shown, strict=False):
            *only, field = key.split("/")
            for i, (run, lines) in enumerate(lines_of.items()):
                offset = 0
                for phase, style in PHASE_LINES.items():
                    of_phase = [line for line in lines if line["phase"] == phase]
                    points = [(offset + line["epoch"], line[field]) for line in of_phase if field in line]
                    if points and phase in (only or PHASE_LINES):
                        colour = PALETTE[i % len(PALETTE)]
                        legend = run if phase == of_phase[0]["phase"] and place is grid.flat[0] and not offset else None
                        place.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.5, label=legend)
                    offset += max((line["epoch"] for line in of_phase), default=0)
            place.set_title(label, fontsize=10)
            place.set_xlabel("epoch", fontsize=9)
            place.xaxis.set_major_locator(MaxNLocator(integer=True))
            place.ticklabel_format(axis="y", useOffset=False)
            low, high = place.get_ylim()
            if high - low < FLAT * max(abs(low), abs(high)):  # a constant, not a curve: no zoom into rounding
                middle = (low + high) / 2
                place.set_ylim(middle - max(abs(middle), 1) / 10, middle + max(abs(middle), 1) / 10)
        for place in list(grid.flat)[len(shown) :]:
            place.set_visible(False)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)

    return svg(name, draw, height=0.6 + 2.0 * -(-len(shown) // 2))


def histogram(values: dict[str, Any], label: str, name: str) -> str:
    """Stacked counts of correct and wrong pointers over a score."""

    def draw(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        edges = np.array(values["edges"])
        wrong, right = np.array(values["wrong"]), np.array(values["correct"])
        axes.bar(
            edges[:-1], wrong, np.diff(edges), align="edge", color=PALETTE[1], label="wrong", hatch="///", alpha=0.8
        )
        axes.bar(edges[:-1], right, np.diff(edges), align="edge", bottom=wrong, color=PALETTE[0], label="correct")
        axes.set(xlabel=label, ylabel="pointers")
        axes.legend(fontsize=9)

    return svg(name, draw, width=4.6, height=2.8)


def bars(counts: Sequence[float], label: str, name: str) -> str:
    """Counts per pool position, with the even share as a line."""

    def draw(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        axes.bar(range(len(counts)), counts, color=PALETTE[0])
        axes.axhline(float(np.mean(counts)), color=INK, linewidth=1, linestyle="--")
        axes.set(xlabel=label, ylabel="picks")

    return svg(name, draw, width=4.6, height=2.8)
