"""The report's figures: matplotlib to inline SVG that takes its ink from the page (light and dark)."""

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lever_plus.experiments import frontier, words

# Okabe-Ito: told apart with the common colour deficiencies; markers differ too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#B2A300", "#8C564B")
MARKERS = "osD^vP*Xh"
INK = "#010203"  # stands for the page's text colour; replaced by currentColor
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    "text.parse_math": False, "grid.color": INK, "grid.alpha": 0.15, "axes.grid": True, "savefig.facecolor": "none",
}  # fmt: skip
FLAT = 1e-5
LINEAR = 1000
"""Prompts up to which the axis is linear, so that methods that need none have a place; beyond it is logarithmic."""
PHASE_LINES = {"rce": "-", "grpo": "--"}


class StandIns:
    """Texts that matplotlib's font cannot measure (Chinese): a figure is laid out with stand-ins as wide as they are,
    and the page's font shows the texts.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """The text itself, or what stands for it while the figure is drawn."""
        wide = sum(ord(char) > 0x2E80 for char in text)
        if wide == 0:
            return text
        width = wide + 0.7 * (len(text) - wide)  # in units of the font size; "@" is one wide, a digit 0.64
        number = str(len(self.texts))
        stand_in = number + "@" * max(1, round(width - 0.64 * len(number)))
        self.texts[stand_in] = text
        return stand_in

    def restore(self, svg_text: str) -> str:
        """Put the texts in place of their stand-ins."""
        for stand_in, text in self.texts.items():
            svg_text = svg_text.replace(f">{stand_in}</text>", f">{html.escape(text)}</text>")
        return svg_text


Draw = Callable[[Figure, StandIns], None]


WIDE = 8.0
"""Inches of a figure for a desktop's page; on a phone and in print its narrow form is shown (report.css)."""


def svg(name: str, draw: Draw, width: float = 5.5, height: float = 3.8) -> str:
    """Draw a figure twice, as wide as a desktop's page and for a phone, and return both ``<svg>`` elements.

    ``name`` makes the ids in it unique within a page. Deterministic: equal data give equal text.
    """
    wide = _one(f"{name}-wide", draw, WIDE, height, "wide")
    return wide + _one(name, draw, min(width, 5.0), height, "narrow")


def _one(name: str, draw: Draw, width: float, height: float, kind: str) -> str:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        say = StandIns()
        draw(figure, say)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = say.restore(buffer.getvalue())
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg class="{kind}" aria-hidden="true" focusable="false"', 1)


def accuracy(
    record: dict[str, Any], name: str = "accuracy", lang: str = "en", only: Sequence[str] | None = None
) -> str:
    """Accuracy per shot with 95 % intervals, every method (or ``only`` some); zero-shot is a level line with its band.
    The axis begins where the intervals do: differences are what is to be seen.
    """

    def draw(figure: Figure, say: StandIns) -> None:
        axes: Axes = figure.subplots()
        methods = [m for m in record["accuracy"] if m != "zero_shot" and (only is None or m in only)]
        for i, method in enumerate(methods):
            cells = {int(k): c for k, c in record["accuracy"][method].items()}
            shots = np.array(sorted(cells))
            mean = np.array([cells[k]["mean"] for k in shots])
            ends = np.array([cells[k]["ci95"] for k in shots]).T
            minor = method not in ("v3", "v2", "random", "similarity")
            offset = (i - (len(methods) - 1) / 2) * 0.06
            axes.errorbar(
                shots + offset, mean, yerr=np.abs(ends - mean), label=say(words.method(method, lang)),
                color=PALETTE[i % len(PALETTE)],
                marker=MARKERS[i % len(MARKERS)], markersize=5, capsize=2, linewidth=1 if minor else 2,
                linestyle=":" if minor else "-", alpha=0.75 if minor else 1,
            )  # fmt: skip
        if "zero_shot" in record["accuracy"] and (only is None or "zero_shot" in only):
            cell = record["accuracy"]["zero_shot"]["0"]
            axes.axhline(
                cell["mean"], color=INK, linewidth=1, linestyle="-.", label=say(words.method("zero_shot", lang))
            )
            axes.axhspan(*cell["ci95"], color=INK, alpha=0.08, linewidth=0)
        axes.set_xlabel(say(words.named("labels", "shots", lang)))
        key = "accuracy" if words.is_official(record.get("metric")) else "other_accuracy"
        axes.set_ylabel(say(words.named("labels", key, lang)), rotation_mode="anchor")
        axes.set_xticks(sorted({int(k) for m in methods for k in record["accuracy"][m]}))
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)

    return svg(name, draw, height=3.6 if only else 5.0)


def forest(rows: Sequence[dict[str, Any]], labels: Sequence[str], name: str, lang: str = "en") -> str:
    """Paired differences, one row each, and a line at 0: thick the 95 % interval over queries, thin that over
    queries and training seeds, ticks the single seeds.
    """

    def draw(figure: Figure, say: StandIns) -> None:
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
        axes.set_yticks(range(len(rows)), [say(label) for label in labels])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(say(words.named("labels", "difference", lang)))

    return svg(name, draw, height=1.2 + 0.42 * len(rows))


def curves(lines_of: dict[str, list[dict[str, Any]]], name: str, lang: str = "en") -> str | None:
    """Training curves: one panel per quantity of words.yaml's ``curves``, a colour per seed, RCE solid and GRPO dashed.

    ``lines_of``: seed -> the epoch lines of its log. None where there is nothing to draw.
    """
    logged = {
        name for lines in lines_of.values() for line in lines for k in line for name in (k, f"{line['phase']}/{k}")
    }
    shown = [(key, label) for key, label in words.texts()["curves"].items() if key in logged]
    if not shown:
        return None

    def draw(figure: Figure, say: StandIns) -> None:
        columns, said = 2, {seed: say(f"{words.named('labels', 'seed', lang)} {seed}") for seed in lines_of}
        grid = figure.subplots(-(-len(shown) // columns), columns, squeeze=False)
        for place, (key, label) in zip(grid.flat, shown, strict=False):
            *only, field = key.split("/")
            for i, (seed, lines) in enumerate(lines_of.items()):
                offset = 0
                for phase, style in PHASE_LINES.items():
                    of_phase = [line for line in lines if line["phase"] == phase]
                    points = [(offset + line["epoch"], line[field]) for line in of_phase if field in line]
                    if points and phase in (only or PHASE_LINES):
                        colour = PALETTE[i % len(PALETTE)]
                        legend = (
                            said[seed]
                            if phase == of_phase[0]["phase"] and place is grid.flat[0] and not offset
                            else None
                        )
                        alone = "o" if len(points) == 1 else None  # one epoch: a line would not be seen
                        place.plot(
                            *zip(*points, strict=True), style, marker=alone, color=colour, linewidth=1.5, label=legend
                        )
                    offset += max((line["epoch"] for line in of_phase), default=0)
            place.set_title(say(words.pick(label, lang)), fontsize=10)
            place.set_xlabel(say(words.named("labels", "epoch", lang)), fontsize=9)
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


def histogram(values: dict[str, Any], label: str, name: str, lang: str = "en") -> str:
    """Stacked counts of right and wrong pointers over a score."""

    def draw(figure: Figure, say: StandIns) -> None:
        axes: Axes = figure.subplots()
        edges = np.array(values["edges"])
        wrong, right = np.array(values["wrong"]), np.array(values["correct"])
        axes.bar(
            edges[:-1], wrong, np.diff(edges), align="edge", color=PALETTE[1], hatch="///", alpha=0.8,
            label=say(words.named("labels", "wrong", lang)),
        )  # fmt: skip
        axes.bar(
            edges[:-1], right, np.diff(edges), align="edge", bottom=wrong, color=PALETTE[0],
            label=say(words.named("labels", "correct", lang)),
        )  # fmt: skip
        axes.set_xlabel(say(label))
        axes.set_ylabel(say(words.named("labels", "pointers", lang)), rotation_mode="anchor")
        figure.legend(loc="outside upper right", ncols=2, fontsize=9)

    return svg(name, draw, width=4.6, height=2.8)


def bars(
    counts: Sequence[float], label: str, name: str, unit: str, lang: str = "en", edges: Sequence[float] | None = None
) -> str:
    """Counts over whole numbers, with their mean as a line; with ``edges`` over bins, without the line."""

    def draw(figure: Figure, say: StandIns) -> None:
        axes: Axes = figure.subplots()
        if edges is None:
            axes.bar(range(len(counts)), counts, color=PALETTE[0])
            axes.axhline(float(np.mean(counts)), color=INK, linewidth=1, linestyle="--")
        else:
            axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=PALETTE[0], edgecolor=INK, linewidth=0.5)
        axes.set_xlabel(say(label))
        axes.set_ylabel(say(words.named("labels", unit, lang)), rotation_mode="anchor")

    return svg(name, draw, width=4.6, height=2.8)


def against_prompts(rows: Sequence[dict[str, Any]], name: str, lang: str = "en") -> str:
    """Accuracy against prompts. ``rows``: :func:`.frontier.rows`; those of unknown price are left out."""
    known = [row for row in rows if row["prompts"] is not None]

    def draw(figure: Figure, say: StandIns) -> None:
        axes: Axes = figure.subplots()
        best = [row for row in known if row["name"] in frontier.reached(known)]
        axes.plot(
            [row["prompts"] for row in best], [row["mean"] for row in best], color=INK, linewidth=1, linestyle="--"
        )
        for i, row in enumerate(known):
            ends = np.abs(np.array(row["ci95"]) - row["mean"])[:, None]
            axes.errorbar(
                row["prompts"], row["mean"], yerr=ends, color=PALETTE[i % len(PALETTE)],
                marker=MARKERS[i % len(MARKERS)], markersize=6, capsize=2, linestyle="none",
                label=say(f"{words.short(row['name'], lang)}{words.say('colon', lang)}{row['prompts']:,}"),
            )  # fmt: skip
        axes.set_xscale("symlog", linthresh=LINEAR)
        most = max([LINEAR, *(row["prompts"] for row in known)])
        axes.set_xlim(-LINEAR / 4, 2 * most)
        ticks = [0, *(LINEAR * 10**i for i in range(1 + int(np.log10(2 * most / LINEAR))))]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(say(words.named("labels", "prompts", lang)))
        axes.set_ylabel(say(words.named("labels", "other_accuracy", lang)), rotation_mode="anchor")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)

    return svg(name, draw, height=2.8 + 0.1 * len(rows))


def gains(found: dict[str, Any], name: str, lang: str = "en") -> str:
    """Number of demonstrations chosen against what these queries gain over the rivals, with 1.96 standard errors."""

    def draw(figure: Figure, say: StandIns) -> None:
        counts, points = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        numbers = [g["number"] for g in found["gained"]]
        counts.bar(numbers, [g["n"] for g in found["gained"]], color=PALETTE[4], width=0.6)
        counts.set_ylabel(say(words.named("labels", "queries", lang)), rotation_mode="anchor")
        for i, key in enumerate(("over_best_fixed", "over_zero_shot")):
            some = [g for g in found["gained"] if g[key] is not None]
            points.errorbar(
                [g["number"] + 0.1 * (2 * i - 1) for g in some], [g[key] for g in some],
                yerr=[1.96 * (g[f"{key}_se"] or 0.0) for g in some], color=PALETTE[i], marker=MARKERS[i],
                linestyle="", capsize=2, label=say(words.named("labels", key, lang)),
            )  # fmt: skip
        points.axhline(0, color=INK, linewidth=1)
        points.set_xticks(numbers)
        points.set_xlabel(say(words.named("labels", "number", lang)))
        points.set_ylabel(say(words.named("labels", "gained", lang)), rotation_mode="anchor")
        counts.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)

    return svg(name, draw, height=4.4)


def reliability(
    found: dict[str, Any], name: str, lang: str = "en", labels: tuple[str, str] = ("probability", "right")
) -> str:
    """Probabilities against what came true (:func:`adaptive.reliability`); larger markers are more decisions.

    By default P(STOP) against the share of decisions at which stopping was right; ``labels`` name the axes.
    """

    def draw(figure: Figure, say: StandIns) -> None:
        axes = figure.subplots()
        bins = found["bins"]
        most = max(b["n"] for b in bins)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
        axes.plot([b["mean"] for b in bins], [b["right"] for b in bins], color=PALETTE[0], linewidth=1.5)
        axes.scatter(
            [b["mean"] for b in bins], [b["right"] for b in bins], s=[20 + 120 * b["n"] / most for b in bins],
            color=PALETTE[0],
        )  # fmt: skip
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(say(words.named("labels", labels[0], lang)))
        axes.set_ylabel(say(words.named("labels", labels[1], lang)), rotation_mode="anchor")

    return svg(name, draw, width=4.2, height=3.6)
