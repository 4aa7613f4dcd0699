"""A comparison of runs for readers: compare.md and compare.html."""

from typing import Any

from markupsafe import Markup

from lever_plus.experiments import charts, words
from lever_plus.experiments import markdown as md
from lever_plus.experiments.markdown import tame

TITLE = ("运行对比", "Runs side by side")


def shots(found: dict[str, Any]) -> list[int]:
    """All shots that a run was evaluated at; 0 is zero-shot."""
    return sorted({int(shot) for by in found["accuracy"].values() for shot in by})


def pairs(found: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The comparisons by pair: ("a − b", rows)."""
    by_pair: dict[str, list[dict[str, Any]]] = {}
    for row in found["comparisons"]:
        by_pair.setdefault(f"{row['a']} − {row['b']}", []).append(row)
    return list(by_pair.items())


def limits(found: dict[str, Any], lang: str) -> str:
    """When better and worse are said, and for how much that holds."""
    if len(found["runs"]) <= 2:
        return words.rule(False, lang)
    return words.rule(False, lang) + words.pick(
        ("以上界限对每一对各自成立：比较的对数多了，个别“好于/差于”可能是偶然。",
         " These limits hold for each pair by itself: among many pairs a single better or worse may be chance."), lang,
    )  # fmt: skip


def markdown(found: dict[str, Any], delta: float, lang: str) -> str:
    """compare.md."""
    columns = shots(found)
    head = [words.pick(("运行", "run"), lang), *(f"shot {shot}" for shot in columns)]
    lines = [f"# {words.pick(TITLE, lang)}", "", shared(found, lang), "", md.row(head), md.row(["---"] * len(head))]
    for label, by in found["accuracy"].items():
        lines.append(md.row([label, *(_cell(by.get(str(shot))) for shot in columns)]))
    for name, rows in pairs(found):
        lines += ["", f"## {tame(name)}", ""]
        lines += [f"- {words.shot_name(row['shot'], lang)}: {tame(words.verdict(row, delta, lang))}" for row in rows]
    lines += ["", limits(found, lang), ""]
    lines += [f"- {tame(label)}: {tame(run['folder'])} ({tame(run['method'])})" for label, run in found["runs"].items()]
    return "\n".join([*lines, ""])


def html(found: dict[str, Any], delta: float, lang: str) -> str:
    """compare.html, one file."""
    drawn = []
    for number, (name, rows) in enumerate(pairs(found)):
        labels = [words.shot_name(row["shot"], lang) for row in rows]
        drawn.append({"name": name, "forest": Markup(charts.forest(rows, labels, f"pair{number}", lang)),
                      "lines": [words.verdict(row, delta, lang) for row in rows]})  # fmt: skip
    return md.page(
        "compare.html", lang, title=words.pick(TITLE, lang), found=found, shots=shots(found), cell=_cell,
        shared=shared(found, lang), limits=limits(found, lang), pairs=drawn,
        accuracy=Markup(charts.accuracy(found, "accuracy", lang)),
    )  # fmt: skip


def shared(found: dict[str, Any], lang: str) -> str:
    """How many queries all runs have."""
    return words.pick((f"共有查询 n = {found['n_shared']}", f"shared queries, n = {found['n_shared']}"), lang)


def _cell(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else f"{cell['mean']:.1f} [{cell['ci95'][0]:.1f}, {cell['ci95'][1]:.1f}]"
