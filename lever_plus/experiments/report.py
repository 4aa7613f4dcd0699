"""report.html, one self-contained file for an experiment, the audit or the whole plan; and all files of a record."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lever_plus import io
from lever_plus.experiments import charts, export, gallery, record, words
from lever_plus.experiments.findings import findings
from lever_plus.experiments.markdown import TEMPLATES, page
from lever_plus.experiments.record import Run, best_rival, conclusion, shots_of
from lever_plus.settings.inference import InferenceSettings

FIRST = ("v3", "v2", "zero_shot")
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


def write_record(settings: InferenceSettings, inference_dir: Path, v3_dir: Path, out_dir: Path) -> str:
    """Write the record of one inference run: record.md, record.json, report.html and the CSV files.

    Args:
        settings: the inference's settings. inference_dir: holds metrics.json and samples.jsonl.
        v3_dir: holds train_log.jsonl, best.json, run.json of the checkpoint that was evaluated.

    Returns: the table to print. Raises: MissingInputError, DamagedInputError.
    """
    out_dir, run = Path(out_dir), record.load_run(Path(inference_dir), Path(v3_dir))
    made = record.build_priced(settings, [run], out_dir.name)
    shown = {out_dir.name: (made, [run])}
    export.write_tables(out_dir, shown)
    write(out_dir / "report.html", shown, settings.record_lang)
    return record.write(made, out_dir, settings.record_lang)


def render(shown: Shown, lang: str, audit: dict[str, Any] | None = None, plan: dict[str, Any] | None = None) -> str:
    """The page's text."""
    t = {key: words.pick(sides, lang) for key, sides in words.texts("report").items()}
    sections = [_section(name, made, runs, lang) for name, (made, runs) in shown.items()]
    shown_gallery = _gallery(shown, plan, lang)
    return page(
        "report.html", lang, thumbnail=Thumbnails(shown_gallery["thumbnails"]) if shown_gallery else None,
        t=t, w=words, sections=sections, seeded=any(s["seeded"] for s in sections),
        heading=_heading(shown, lang, plan), audit=_audit(audit, t, lang) if audit else None,
        plan=_plan(plan, lang) if plan else None, gallery=shown_gallery,
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    )  # fmt: skip


class Thumbnails:
    """Numbers the pictures of a page, each once; called in the template for an image's attribute."""

    def __init__(self, pictures: list[str]) -> None:
        self.numbers = {picture: number for number, picture in enumerate(pictures)}

    def __call__(self, picture: str) -> Markup:
        """The attribute that the page's script puts the picture in place of, when it is looked at."""
        return Markup('data-thumbnail="{}"').format(self.numbers[picture])


def _heading(shown: Shown, lang: str, plan: dict[str, Any] | None) -> str:
    if plan:
        return words.say("plan_heading", lang)
    if shown:
        return words.title(next(iter(shown)), lang)
    return words.title("exp5", lang)


def _section(name: str, made: dict[str, Any], runs: Sequence[Run], lang: str) -> dict[str, Any]:
    slug = re.sub(r"[^\w-]", "-", name)
    against_v2 = [c for c in made["comparisons"] if (c["a"], c["b"]) == ("v3", "v2")]
    labels = [words.shot_name(c["shot"], lang) for c in against_v2]
    logs = {str(r.training.settings().get("SEED", i)): r.training for i, r in enumerate(runs)}
    drawn = charts.curves({k: v.epochs("rce") + v.epochs("grpo") for k, v in logs.items()}, f"curves-{slug}", lang)
    plan_settings, others = words.settings(made["configuration"])
    return {
        "name": name,
        "slug": slug,
        "title": words.title(name, lang),
        "record": made,
        "conclusion": conclusion(made, lang),
        "shots": shots_of(made),
        "settings": {**plan_settings, **others},
        "first": first_methods(made),
        "first_chart": Markup(charts.accuracy(made, f"first-{slug}", lang, first_methods(made))),
        "accuracy_chart": Markup(charts.accuracy(made, f"accuracy-{slug}", lang)),
        "forest": Markup(charts.forest(against_v2, labels, f"forest-{slug}", lang)) if against_v2 else None,
        **_adaptive(made.get("adaptive"), slug, lang),
        "cascades": [_cascade(name, part, slug, lang) for name, part in list(made.get("cascades", {}).items())[:1]],
        "against_v2": against_v2,
        "seeded": any(c["recipe_ci95"] for c in against_v2),
        "curves": Markup(drawn) if drawn else None,
        "curves_alt": _curves_alt(made, lang),
    }


def first_methods(made: dict[str, Any]) -> list[str]:
    """What the first chart shows: v3, the best of its rivals, v2 and zero-shot."""
    return [name for name in made["accuracy"] if name in (*FIRST, best_rival(made))]


def _adaptive(found: dict[str, Any] | None, slug: str, lang: str) -> dict[str, Any]:
    """The figures of the policy that decides how many, or None for each."""
    if found is None:
        return {"adaptive_gains": None, "adaptive_reliability": None}
    return {
        "adaptive_gains": Markup(charts.gains(found, f"gains-{slug}", lang)),
        "adaptive_reliability": Markup(charts.reliability(found["stopping"], f"reliability-{slug}", lang)),
    }


def _cascade(method: str, found: dict[str, Any], slug: str, lang: str) -> dict[str, Any]:
    """The figures of a cascade."""
    return {
        "name": method,
        "gains": Markup(charts.gains(found, f"gains-{method}-{slug}", lang)),
        "reliability": Markup(
            charts.reliability(found["certainty"], f"certainty-{method}-{slug}", lang, ("answer_prob", "right_answers"))
        ),
    }


def _curves_alt(made: dict[str, Any], lang: str) -> str:
    parts = []
    for training in made["training"]:
        told = []
        for phase, p in training["phases"].items():
            if p["loss"]:
                ends = " → ".join(f"{value:.3f}".replace("-", "−") for value in p["loss"])
                told.append(f"{phase.upper()} loss {ends}")
        if told:
            parts.append(words.say("seed", lang, seed=training["seed"]) + words.say("comma", lang).join(told))
    return words.say("semicolon", lang).join(parts)


def _audit(audit: dict[str, Any], t: dict[str, str], lang: str) -> dict[str, Any]:
    figures = [
        {"svg": Markup(charts.histogram(values, t[f"axis_{key}"], f"hist-{key}", lang)), "label": t[f"axis_{key}"],
         "correct": sum(values["correct"]), "wrong": sum(values["wrong"])}
        for key, values in audit["histograms"].items()
    ]  # fmt: skip
    per_query, position = audit["per_query"], audit["positions"]["counts"]
    return {
        "findings": findings(audit, lang),
        "figures": figures,
        "positions": Markup(charts.bars(position, t["axis_position"], "positions", "picks", lang)),
        "per_query": Markup(
            charts.bars(per_query["counts"], t["axis_share"], "per-query", "queries", lang, per_query["edges"])
        ),
        "numbers": audit,
    }


def _plan(plan: dict[str, Any], lang: str) -> dict[str, Any]:
    rows, others = plan["verdict"]["comparisons"], plan["against_v2"]
    labels = [words.shot_name(c["shot"], lang) for c in rows]
    arms = [words.method(c["label"], lang) for c in others]
    return {
        "record": plan,
        "shots": shots_of(plan),
        "seeded": any(c["recipe_ci95"] for c in rows),
        "forest": Markup(charts.forest(rows, labels, "forest-grpo", lang)) if rows else None,
        "against_v2": Markup(charts.forest(others, arms, "forest-arms", lang)) if others else None,
        "against_prompts": Markup(charts.against_prompts(plan["against_prompts"], "against-prompts", lang)),
    }


def _gallery(shown: Shown, plan: dict[str, Any] | None, lang: str) -> dict[str, Any] | None:
    """Cards of the first seed of the plan's best recipe, or of the only experiment."""
    if not shown:
        return None
    name = plan["best"]["arm"] if plan and plan["best"]["arm"] in shown else next(iter(shown))
    run = shown[name][1][0]
    made = gallery.cards(run.samples, run.places.here)
    if not made:
        return None
    chosen = [demonstration.image for card in made for side in card.sides for demonstration in side.demonstrations]
    pictures = [*(card.image for card in made), *chosen]
    return {
        "thumbnails": list(dict.fromkeys(picture for picture in pictures if picture)),
        "name": words.method(name, lang), "seed": run.training.settings().get("SEED"), "cards": made,
        "counts": gallery.counts(run.samples), "shots": sorted(made[0].outcome),
    }  # fmt: skip
