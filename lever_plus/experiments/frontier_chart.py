"""The report's figure of accuracy against prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lever_plus.experiments import frontier, words
from lever_plus.experiments.charts import INK, MARKERS, PALETTE, StandIns, svg

LINEAR = 1000
"""Prompts up to which the axis is linear, so that methods that need none have a place; beyond it is logarithmic."""


def drawn(rows: Sequence[dict[str, Any]], name: str, lang: str = "en") -> str:
    """Inline SVG. ``rows``: :func:`.frontier.rows`; those of unknown price are left out."""
    known = [row for row in rows if row["prompts"] is not None]

    def draw(figure: Figure, say: StandIns) -> None:
        axes = figure.subplots()
        best = [row for row in known if row["name"] in frontier.reached(known)]
        axes.plot(
            [row["prompts"] for row in best], [row["mean"] for row in best], color=INK, linewidth=1, linestyle="--"
        )
        for i, row in enumerate(known):
            ends = np.abs(np.array(row["ci95"]) - row["mean"])[:, None]
            axes.errorbar(
                row["prompts"], row["mean"], yerr=ends, color=PALETTE[i % len(PALETTE)],
                marker=MARKERS[i % len(MARKERS)], markersize=6, capsize=2, linestyle="none",
                label=say(f"{words.short(row['name'], lang)}{words.pick(('：', ': '), lang)}{row['prompts']:,}"),
            )  # fmt: skip
        axes.set_xscale("symlog", linthresh=LINEAR)
        most = max([LINEAR, *(row["prompts"] for row in known)])
        axes.set_xlim(-LINEAR / 4, 2 * most)
        ticks = [0, *(LINEAR * 10**i for i in range(1 + int(np.log10(2 * most / LINEAR))))]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(say(words.pick(("训练用的 LVLM 提示数", "LVLM prompts for training"), lang)))
        axes.set_ylabel(say(words.pick(("准确率（%）", "accuracy (%)"), lang)), rotation_mode="anchor")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)

    return svg(name, draw, height=2.8 + 0.1 * len(rows))
