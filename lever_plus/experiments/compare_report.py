"""A comparison of runs for readers: compare.md and compare.html."""

from typing import Any

from markupsafe import Markup

from lever_plus.experiments import charts, words
from lever_plus.experiments import markdown as md
from lever_plus.experiments.markdown import tame


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
    return words.rule(False, lang) + words.say("many_pairs", lang)


def markdown(found: dict[str, Any], delta: float, lang: str) -> str:
    """compare.md."""
    columns = shots(found)
    head = [words.say("run", lang), *(f"shot {shot}" for shot in columns)]
    title, ruled = words.say("side_by_side", lang), md.row(["---"] * len(head))
    lines = [f"# {title}", "", shared(found, lang), "", md.row(head), ruled]
    for label, by in found["accuracy"].items():
        lines.append(md.row([label, *(words.accuracy(by.get(str(shot))) for shot in columns)]))
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
        "compare.html", lang, title=words.say("side_by_side", lang), found=found, shots=shots(found),
        cell=words.accuracy, shared=shared(found, lang), limits=limits(found, lang), pairs=drawn,
        accuracy=Markup(charts.accuracy(found, "accuracy", lang)),
    )  # fmt: skip


def shared(found: dict[str, Any], lang: str) -> str:
    """How many queries all runs have."""
    return words.say("shared_queries", lang, n=found["n_shared"])
