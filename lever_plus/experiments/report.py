"""report.html: one self-contained file for an experiment, the audit, or the whole plan."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from lever_plus import io
from lever_plus.experiments import charts, evidence, gallery, words
from lever_plus.experiments.findings import findings
from lever_plus.experiments.record import Run, conclusion, shots_of

TEMPLATES = Path(__file__).parent / "templates"
Shown = dict[str, tuple[dict[str, Any], Sequence[Run]]]


def write(
    path: Path, shown: Shown, lang: str = "zh", audit: dict[str, Any] | None = None, plan: dict[str, Any] | None = None
) -> None:
    """Write the report.

    Args:
        shown: name -> (record, runs) of the experiments, in the order to show them.
        audit: an audit's numbers; plan: the plan's record (decisions and verdict).
    """
    io.write_text(path, render(shown, lang, audit, plan))


def render(shown: Shown, lang: str, audit: dict[str, Any] | None = None, plan: dict[str, Any] | None = None) -> str:
    """The page's text."""
    texts = yaml.safe_load((TEMPLATES / "report.yaml").read_text(encoding="utf-8"))
    t = {key: words.pick(tuple(sides), lang) for key, sides in texts.items()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    sections = [_section(name, made, runs, lang) for name, (made, runs) in shown.items()]
    return environment.get_template("report.html").render(
        t=t, w=words, lang=lang, html_lang={"zh": "zh-CN", "en": "en"}[lang], sections=sections,
        heading=_heading(shown, lang, audit, plan), audit=_audit(audit, lang) if audit else None,
        plan=_plan(plan, lang) if plan else None, gallery=_gallery(shown, plan),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    )  # fmt: skip


def _heading(shown: Shown, lang: str, audit: dict[str, Any] | None, plan: dict[str, Any] | None) -> str:
    if plan:
        return words.pick(("v3 训练实验计划：结论", "The plan's experiments on v3: the verdict"), lang)
    if shown:
        return words.title(next(iter(shown)), lang)
    return words.title("exp5", lang)


def _section(name: str, made: dict[str, Any], runs: Sequence[Run], lang: str) -> dict[str, Any]:
    slug = re.sub(r"[^\w-]", "-", name)
    against_v2 = [c for c in made["comparisons"] if (c["a"], c["b"]) == ("v3", "v2")]
    labels = [_shot(c) for c in against_v2]
    logs = {f"seed {r.training.settings().get('SEED', i)}": r.training for i, r in enumerate(runs)}
    drawn = charts.curves({k: v.epochs("rce") + v.epochs("grpo") for k, v in logs.items()}, f"curves-{slug}")
    return {
        "name": name,
        "slug": slug,
        "title": words.title(name, lang),
        "record": made,
        "conclusion": conclusion(made, lang),
        "shots": shots_of(made),
        "accuracy_chart": Markup(charts.accuracy(made, f"accuracy-{slug}")),
        "forest": Markup(charts.forest(against_v2, labels, f"forest-{slug}")) if against_v2 else None,
        "against_v2": against_v2,
        "curves": Markup(drawn) if drawn else None,
        "curves_alt": _curves_alt(made, lang),
    }


def _curves_alt(made: dict[str, Any], lang: str) -> str:
    parts = []
    for training in made["training"]:
        for phase, p in training["phases"].items():
            if p["loss"]:
                first, last = p["loss"]
                parts.append(
                    words.pick((f"{phase.upper()} loss 从 {first:.3f} 到 {last:.3f}",
                                f"{phase.upper()} loss from {first:.3f} to {last:.3f}"), lang)
                )  # fmt: skip
    return words.pick(("训练曲线：", "Training curves: "), lang) + words.pick(("；", "; "), lang).join(parts)


def _audit(audit: dict[str, Any], lang: str) -> dict[str, Any]:
    labels = {"reward": "reward", "beam_score": "beam score (InfoScore)", "logprob_score": "log-probability"}
    figures = [
        {"svg": Markup(charts.histogram(values, labels[key], f"hist-{key}")), "label": labels[key],
         "correct": sum(values["correct"]), "wrong": sum(values["wrong"])}
        for key, values in audit["histograms"].items()
    ]  # fmt: skip
    positions = Markup(charts.bars(audit["positions"]["counts"], "pool position", "positions"))
    return {"findings": findings(audit, lang), "figures": figures, "positions": positions, "numbers": audit}


def _plan(plan: dict[str, Any], lang: str) -> dict[str, Any]:
    rows = plan["verdict"]["comparisons"]
    labels = [f"{c['a']} − {c['b']}, {_shot(c)}" for c in rows]
    others = plan["against_v2"]
    return {
        "record": plan,
        "forest": Markup(charts.forest(rows, labels, "forest-grpo")) if rows else None,
        "against_v2": Markup(charts.forest(others, [c["label"] for c in others], "forest-arms")) if others else None,
    }


def _gallery(shown: Shown, plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """Cards of the first seed of the plan's best recipe, or of the only experiment."""
    if not shown:
        return None
    name = plan["best"]["arm"] if plan and plan["best"]["arm"] in shown else next(iter(shown))
    samples = shown[name][1][0].samples
    made = gallery.cards(samples)
    if not made:
        return None
    return {"name": name, "cards": made, "counts": gallery.counts(samples), "shots": sorted(made[0].outcome)}


def _shot(comparison: dict[str, Any]) -> str:
    return "all shots" if comparison["shot"] == evidence.POOLED else f"shot {comparison['shot']}"
