"""Walks the whole plan: audit, decision tree, fair rival, verdict; writes its record and report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lever_plus import io, paths, provenance
from lever_plus.cli import log
from lever_plus.experiments import evidence, export, frontier, markdown, plan, prices, record, report, stats, words
from lever_plus.experiments.arms import Arm, seeds_of
from lever_plus.experiments.findings import findings
from lever_plus.experiments.runner import Runner
from lever_plus.experiments.samples import Samples, read_samples
from lever_plus.settings.experiment import ExperimentSettings
from open_mmicl.errors import MissingInputError, UsageError

RIVAL, GRPO, RCE = "v2_rival", "exp3", "exp1"
BASELINES = ("zero_shot", "random", "similarity", "v2")
Shown = dict[str, tuple[dict[str, Any], list[record.Run]]]


def walk(runner: Runner, arms: Mapping[str, Sequence[Arm]]) -> dict[str, Any]:
    """Run what the tree asks for, then the fair rival, and write experiments/plan/; returns the plan's record.

    Every result is read from its files, so that a plan that was interrupted finds its way again.
    """
    settings = runner.settings
    audit = runner.audit()
    shown: Shown = {}
    told = 0
    done: dict[str, list[dict[str, Any]]] = {}
    while wanted := plan.next_experiments(done, settings.delta):
        experiment = wanted[0]
        for arm in arms[experiment]:
            runs = runner.evaluate(arm)
            shown[arm.name] = runner.write(arm.name, runs), runs
        table = plan.merged(_samples(shown))
        done[experiment] = [against_v2(table, arm.name, runner.drawn) for arm in arms[experiment]]
        taken = plan.decisions(done, settings.delta, settings.record_lang)
        for decision in taken[told:]:
            log.info(f"=== {decision.after}: {decision.rule} {decision.number} {decision.branch}")
        told = len(taken)
    return finish(runner, audit, shown, done, {arm.name: arm for group in arms.values() for arm in group})


def against_v2(table: evidence.Table, name: str, drawn: stats.Resampling) -> dict[str, Any]:
    """The pooled comparison of an arm with v2, with its label."""
    rows = evidence.compare_pair(table, name, "v2", drawn)
    return {**evidence.find(rows, name, "v2", evidence.POOLED), "label": name}


def against_rivals(
    table: evidence.Table, arm: str, of_arm: dict[str, Any], drawn: stats.Resampling
) -> list[dict[str, Any]]:
    """The pooled comparisons of the best v3 arm with the best rival, and the label retriever where that is another,
    which has the same pools, the same inputs and no prompt to learn from. ``of_arm``: the arm's record.
    """
    first = record.best_rival(of_arm)
    names = dict.fromkeys(name for name in (first, "label") if name is not None and table.shots(name))
    rows = {name: evidence.compare_pair(table, arm, name, drawn) for name in names}
    return [evidence.find(of, arm, name, evidence.POOLED) for name, of in rows.items()]


def finish(
    runner: Runner, audit: dict[str, Any], shown: Shown, done: Mapping[str, list[dict[str, Any]]],
    arms: Mapping[str, Arm],
) -> dict[str, Any]:  # fmt: skip
    """The verdict from everything that was run; writes experiments/plan/."""
    settings, lang = runner.settings, runner.settings.record_lang
    samples = _samples(shown)
    table = plan.merged(samples)
    rows = evidence.compare_pair(table, GRPO, RCE, runner.drawn)
    word, text = plan.verdict(rows, settings.delta, lang)
    validation = {name: [chosen_metric(run) for run in runs] for name, (_, runs) in shown.items()}
    start = [value for _, runs in shown.values() for run in runs if (value := start_metric(run)) is not None]
    best = {**plan.best_recipe(validation, start), "metric": metric_name(shown)}
    first_record = shown[RCE][0]
    rivals, price = first_record["fair_rivals"], dict(first_record["price"])
    price["evaluation"] = prices.total(*(made["price"]["evaluation"] for made, _ in shown.values()))
    best_v3 = max(validation, key=lambda name: np.mean(validation[name]))
    rival, of_rival = _rival(runner, table, samples, best_v3, rivals)
    compared = [row for of in done.values() for row in of]
    warnings = [f.name for f in findings(audit, lang) if f.warning]
    field = against_rivals(table, best_v3, shown[best_v3][0], runner.drawn)
    records = {name: of for name, (of, _) in shown.items()}
    made = {
        "experiment": "plan", "dataset": first_record["dataset"], "lvlm": first_record["lvlm"],
        "n_queries": first_record["n_queries"], "n_images": first_record["n_images"], "delta": settings.delta,
        "seeds": runner.seeds, "arms": list(shown), "accuracy": accuracies(shown, rival),
        "decisions": [d.as_dict() for d in plan.decisions(done, settings.delta, lang)],
        "verdict": {"word": word, "text": text, "comparisons": rows},
        "against_v2": compared, "against_rivals": field, "best": best, "rival": rival,
        "price": price, "fair_rivals": rivals,
        "against_prompts": frontier.rows(settings, records, table, rival, of_rival),
        "audit_warnings": warnings,
        "overridden": {name: arms[name].overridden for name in shown if arms[name].overridden},
        "conclusion": [*other_settings([arms[name] for name in shown], lang),
                       *conclusion(compared, field, best, rival, warnings, settings.delta, lang),
                       longer_training({name: runs for name, (_, runs) in shown.items()}, table, settings)],
        "next": plan.advice(word, best, rival and rival["comparison"], warnings, lang, rates(shown[GRPO]), field),
        "provenance": provenance.provenance(),
    }  # fmt: skip
    out = paths.experiment_dir(settings, "plan")
    io.write_json(out / "record.json", made, indent=1)
    io.write_text(out / "record.md", render(made, lang))
    export.write(out, shown)
    report.write(out / "report.html", shown, lang, audit, made)
    log.info(
        "\n".join(
            ["", text, *made["conclusion"], "", *made["next"], "", str(out / "record.md"), str(out / "report.html")]
        )
    )
    return made


def other_settings(arms: Sequence[Arm], lang: str) -> list[str]:
    """Says, where the user's environment replaced settings of the plan, that these are not the plan's experiments."""
    changed: dict[str, list[str]] = {}
    for arm in arms:
        for name, value in arm.overridden.items():
            told = words.say("other_setting", lang, name=name, value=value, plan=arm.settings[name])
            changed.setdefault(told, []).append(words.method(arm.name, lang))
    every = words.say("all_experiments", lang)
    told = [f"{what}: {every if len(of) == len(arms) else ', '.join(of)}" for what, of in changed.items()]
    if not told:
        return []
    return [words.say("other_settings", lang) + words.say("semicolon", lang).join(told)]


def conclusion(
    compared: Sequence[dict[str, Any]], field: Sequence[dict[str, Any]], best: dict[str, Any],
    rival: dict[str, Any] | None, warnings: Sequence[str], delta: float, lang: str,
) -> list[str]:  # fmt: skip
    """The plan's sentences beside the verdict."""
    arm, metric = words.method(best["arm"], lang), f"{best['validation'][best['arm']]:.4f}"
    by = words.validation(best["metric"], lang)
    lines = [words.say("best_recipe", lang, by=by, arm=arm, metric=metric)]
    others = [row for row in field if row["b"] != "v2"]  # that stands among ``compared``
    lines += [words.verdict(row, delta, lang) for row in (*others, *compared)]
    if rival:
        lines.append(words.verdict(rival["comparison"], delta, lang))
    if warnings:
        lines.append(words.say("audit_warnings", lang, told=words.say("and", lang).join(warnings)))
    return lines


def longer_training(
    arms: Mapping[str, Sequence[record.Run]], table: evidence.Table, settings: ExperimentSettings
) -> str:
    """Says that RCE + GRPO trains longer than RCE alone; compares it with RCE of as many epochs where that was run."""
    lang, seed = settings.record_lang, seeds_of(settings.seeds)[0]
    epochs = {name: _epochs(runs[0]) for name, runs in arms.items()}
    text = words.say("longer", lang, n=epochs[GRPO] - epochs[RCE])
    same = [name for name in arms if name.startswith("exp2") and epochs[name] == epochs[GRPO]]
    if same:
        drawn = stats.Resampling(settings.bootstrap, settings.data_seed)
        rows = evidence.compare_pair(table, GRPO, same[0], drawn)
        told = words.verdict(evidence.find(rows, GRPO, same[0], evidence.POOLED), settings.delta, lang)
        return text + words.say("as_long", lang) + told
    command = f"RCE_EPOCHS={epochs[GRPO]} bash scripts/run_experiment.sh 2"
    then = f"bash scripts/compare.sh {GRPO}_seed{seed} exp2_seed{seed}"
    return text + words.say("as_long_to_run", lang, command=command, then=then)


def _epochs(run: record.Run) -> int:
    settings = run.training.settings()
    return int(settings["RCE_EPOCHS"]) + int(settings["GRPO_EPOCHS"])


def render(made: dict[str, Any], lang: str) -> str:
    """record.md of the plan."""
    seeded = any(row["recipe_ci95"] for row in made["verdict"]["comparisons"])
    shots = record.shots_of(made)
    return markdown.render(f"plan.{lang}.md", p=made, w=words, lang=lang, seeded=seeded, shots=shots)


def chosen_metric(run: record.Run) -> float:
    """Validation metric of the checkpoint that was evaluated.

    Raises:
        MissingInputError: the training left no best.json beside it.
    """
    best, checkpoint = run.training.best, run.metrics.get("checkpoint") or {}
    if not best:
        raise MissingInputError(
            f"no best.json beside {checkpoint.get('path')}, which {run.folder} evaluated (remove {run.folder} and run "
            "the same command again)"
        )
    entry = best.get("per_phase", {}).get(checkpoint.get("phase"), best)
    if entry["value"] is None:
        raise UsageError(
            f"{run.folder}: no train query was held out (VAL_FRACTION, or too little RL data), so the plan cannot "
            "choose a best recipe without the test queries; its experiments have their own records"
        )
    return float(entry["value"])


def metric_name(shown: Shown) -> str:
    """The validation metric by which checkpoints and recipes were chosen.

    Raises:
        UsageError: the arms were validated by different metrics.
    """
    names = sorted({run.training.best["metric"] for _, runs in shown.values() for run in runs})
    if len(names) > 1:
        raise UsageError(f"the arms were validated by different metrics ({', '.join(names)}); train them again")
    return names[0]


def rates(arm: tuple[dict[str, Any], list[record.Run]]) -> dict[str, float]:
    """Learning rates of an arm's first run, by setting."""
    settings = arm[1][0].training.settings()
    return {name: float(settings[name]) for name in ("RCE_LR", "GRPO_LR")}


def accuracies(shown: Shown, rival: dict[str, Any] | None) -> dict[str, Any]:
    """Accuracy per shot of the baselines, v2, the rival and every arm: cells of the records' ``accuracy``."""
    first = next(iter(shown.values()))[0]["accuracy"]
    found = {name: first[name] for name in BASELINES if name in first}
    if rival:
        found[RIVAL] = rival["accuracy"]
    return found | {name: made["accuracy"]["v3"] for name, (made, _) in shown.items()}


def start_metric(run: record.Run) -> float | None:
    """The same metric of the selector before training (v2): epoch 0 of the first phase."""
    zero = [line for line in run.training.lines if line["kind"] == "epoch" and line["epoch"] == 0 and "metric" in line]
    return float(zero[0]["metric"]) if zero else None


def _samples(shown: Shown) -> dict[str, list[Samples]]:
    return {name: [run.samples for run in runs] for name, (_, runs) in shown.items()}


def _rival(
    runner: Runner, table: evidence.Table, samples: Mapping[str, list[Samples]], best_v3: str, rivals: dict[str, Any]
) -> tuple[dict[str, Any] | None, evidence.Table | None]:
    """Run v2 at v3's price and compare the best v3 arm with it: the comparison and its scores; None where RIVAL=none or
    the price is unknown.
    """
    settings = runner.settings
    kind = settings.rival
    if kind == "none" or kind not in rivals:
        return None, None
    anchors = rivals[kind]["anchors"]
    folder = runner.evaluate_v2(f"rival_{kind}_{anchors}", anchors)
    run = evidence.same_queries([samples[best_v3][0], read_samples(folder / "samples.jsonl")])[1]
    scores = {(RIVAL, shot): run.scores("v2", shot)[None] for shot in run.shots("v2")}
    both = evidence.Table(table.images, {**table.scores, **scores}, table.averaged)
    rows = evidence.compare_pair(both, best_v3, RIVAL, runner.drawn)
    main = evidence.find(rows, best_v3, RIVAL, evidence.POOLED)
    alone = evidence.Table(table.images, scores, frozenset())
    accuracy = evidence.accuracies([run], alone, runner.drawn)[RIVAL]
    found = {"kind": kind, **rivals[kind], "run": str(folder), "accuracy": accuracy, "comparison": main}
    return {**found, "comparisons": rows}, alone
