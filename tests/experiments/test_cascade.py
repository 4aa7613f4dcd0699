"""Cascades: rule, lines and what is told of them, recomputed query by query with plain loops."""

import csv
import json

import numpy as np
import pytest

from lever_plus.data import methods
from lever_plus.experiments import cascade, export, record, report
from lever_plus.experiments.samples import Samples
from lever_plus.settings.inference import InferenceSettings
from open_mmicl.errors import DamagedInputError
from tests.reference.fake_run import make_samples, write_run, write_training

PRICE, RIVALS = {"beam_data": 1, "rl_data": 2, "training": 0, "evaluation": 3}, {}
METHODS = ("v3_cascade", "similarity_cascade")


def lines_of(seed, n=40, **more):
    """Answers with a probability each; the right ones are given with more certainty than the others."""
    lines, rng = make_samples(seed, n=n, **more), np.random.default_rng(seed)
    for row in lines:
        row["prompt_tokens"] = 100 + 50 * row["shot"]
        if row["method"] in ("v3", "similarity", "zero_shot"):
            row["answer_prob"] = round(float(np.clip(rng.normal(0.3 + 0.4 * row["score"], 0.15), 0, 1)), 6)
    return lines


def choice_of(seed):
    return lines_of(seed + 50, n=30, world=9)


def followed(rule, probabilities):
    """What the rule does with one query's probabilities: (number of demonstrations that stands, lengths asked)."""
    asked = []
    for k in range(rule.start, len(probabilities)):
        asked.append(k)
        if probabilities[k] >= rule.threshold:
            return k, asked
    return max(asked, key=lambda k: (probabilities[k], -k)), asked


def table(lines, method):
    """Per query the score and the probability with 0 to 4 demonstrations."""
    fixed, of = method.rsplit("_", 1)[0], {}
    for row in lines:
        if row["method"] in (fixed, "zero_shot"):
            of.setdefault(row["question_id"], {})[row["shot"]] = (row["score"], row["answer_prob"])
    return {q: [by[k] for k in range(5)] for q, by in of.items()}


@pytest.fixture
def runs(tmp_path):
    made = []
    for seed in (1, 2):
        lines, choice = lines_of(seed), choice_of(seed)
        more = [row for m in METHODS for row in cascade.rows(Samples(lines), Samples(choice), m)]
        folder = write_run(tmp_path / f"run{seed}", lines + more)
        (folder / "choice_samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in choice))
        made.append(record.load_run(folder, write_training(tmp_path / f"v3_{seed}", seed)))
    return made


@pytest.mark.parametrize("method", METHODS)
def test_lines_are_those_of_the_answers_that_stand(method):
    lines, choice = lines_of(1), choice_of(1)
    rule, fixed = cascade.rule_of(Samples(choice), method), method.rsplit("_", 1)[0]
    known = {(r["question_id"], r["method"], r["shot"]): r for r in lines if r["method"] != "random"}
    made = cascade.rows(Samples(lines), Samples(choice), method)
    assert len(made) == 40
    for row in made:
        q = row["question_id"]
        number, asked = followed(rule, [p for _, p in table(lines, method)[q]])
        of = [known[q, fixed, k] if k else known[q, "zero_shot", 0] for k in range(5)]
        assert row["asked"] == asked and row["prompt_tokens"] == sum(of[k]["prompt_tokens"] for k in asked)
        own = {"method": method, "shot": 4, "asked": asked, "prompt_tokens": row["prompt_tokens"]}
        assert row == {**of[number], **own}


def test_the_rule_asks_as_little_as_loses_nothing():
    rng, kinds = np.random.default_rng(3), set()
    for _ in range(30):
        scores, certain = rng.integers(0, 2, (12, 4)).astype(float), rng.uniform(0, 1, (12, 4)).round(2)

        def of(rule, scores=scores, certain=certain):
            return [s[followed(rule, p)[0]] for s, p in zip(scores, certain.tolist(), strict=True)]

        found, asked_all = cascade.fit(scores, certain), [of(cascade.Rule(s, 1.0)) for s in (0, 1)]
        start = 0 if np.mean(asked_all[0]) > np.mean(asked_all[1]) else 1
        gains = scores[:, scores.mean(axis=0).argmax()] - asked_all[start]
        if gains.mean() > 0.5 * gains.std(ddof=1) / 12**0.5:
            kinds.add("fixed")
            assert found == cascade.Rule(int(scores.mean(axis=0).argmax()), 0.0)
            continue
        kinds.add("cascade")
        assert found.start == start
        assert all(mine >= other for mine, other in zip(of(found), asked_all[start], strict=True))
        below = [t for t in (0.0, *np.unique(certain[:, start:])) if t < found.threshold]
        if below:  # the next lower threshold loses somewhere
            assert any(a < b for a, b in zip(of(cascade.Rule(start, max(below))), asked_all[start], strict=True))
    assert kinds == {"fixed", "cascade"}


def test_what_the_model_knows_is_asked_without_demonstrations():
    rng = np.random.default_rng(1)
    known = np.arange(60) < 45
    scores = np.stack([known, np.zeros(60), np.zeros(60)], axis=1).astype(float)
    certain = np.where(scores == 1, 0.9, 0.3) + rng.uniform(0, 0.05, (60, 3))
    rule = cascade.fit(scores, certain)
    assert rule.start == 0 and (rule.follow(certain)[0][known] == 0).all()
    misled = np.where(scores == 1, 0.3, 0.9)  # certain where it is wrong: none at all is best
    assert cascade.fit(scores, misled) == cascade.Rule(0, 0.0)


def test_certainty_that_says_nothing_asks_once():
    scores = np.tile([0.2, 0.9, 0.5], (30, 1))
    assert cascade.fit(scores, np.full((30, 3), 0.7)) == cascade.Rule(1, 0.0)


def test_the_record_holds_each_cascade_against_its_fixed_number_zero_shot_and_each_other(runs):
    made = record.build(runs, "exp1", PRICE, RIVALS)
    assert list(made["cascades"]) == list(METHODS) and "adaptive" not in made
    part = made["cascades"]["v3_cascade"]
    own = [np.array([r["score"] for r in run.samples.rows if r["method"] == "v3_cascade"]) for run in runs]
    assert part["accuracy"] == pytest.approx(100 * np.mean(own))
    numbers = [[len(r["icd_ids"]) for r in run.samples.rows if r["method"] == "v3_cascade"] for run in runs]
    asked = [[len(r["asked"]) for r in run.samples.rows if r["method"] == "v3_cascade"] for run in runs]
    assert part["mean_demonstrations"] == pytest.approx(np.mean(numbers))
    assert part["prompts"] == pytest.approx(np.mean(asked))
    rivals = {}
    for run in runs:
        of = {k: run.choice.scores("v3", k).mean() for k in (1, 2, 3, 4)}
        best = max(of, key=lambda k: (of[k], -k))
        rivals.setdefault("v3_best_fixed", []).append(run.samples.scores("v3", best))
        rivals.setdefault("zero_shot", []).append(run.samples.scores("zero_shot", 0))
        rivals.setdefault("similarity_cascade", []).append(run.samples.scores("similarity_cascade", 4))
    assert [row["b"] for row in part["comparisons"]] == list(rivals)
    for row in part["comparisons"]:
        assert row["diff"] == pytest.approx(100 * (np.array(own) - np.array(rivals[row["b"]])).mean())
        assert row in made["comparisons"]
    told = [
        (p, s) for run in runs
        for r, lengths in zip([r for r in run.samples.rows if r["method"] == "v3_cascade"],
                              table(run.samples.rows, "v3_cascade").values(), strict=True)
        for s, p in (lengths[k] for k in r["asked"])
    ]  # fmt: skip
    assert sum(b["n"] for b in part["certainty"]["bins"]) == len(told)
    assert part["certainty"]["brier"] == pytest.approx(np.mean([(p - s) ** 2 for p, s in told]), abs=0.02)


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_what_is_shown(runs, tmp_path, lang):
    made = record.build(runs, "exp1", PRICE, RIVALS)
    text = record.render(made, lang)
    assert {"zh": "没把握时再加", "en": "while the LVLM is unsure"}[lang] in text and "undefined" not in text.lower()
    assert f"{made['cascades']['v3_cascade']['prompts']:.2f}" in text
    page = report.render({"exp1": (made, runs)}, lang)
    assert "gains-v3_cascade-exp1" in page and "certainty-v3_cascade-exp1" in page
    export.write_tables(tmp_path, {"exp1": (made, runs)})
    rows = list(csv.DictReader((tmp_path / "cascades.csv").open()))
    assert [row["method"] for row in rows] == list(METHODS)
    assert [float(t) for t in rows[0]["threshold"].split()] == [
        rule["threshold"] for rule in made["cascades"]["v3_cascade"]["rules"]
    ]


def test_lines_without_a_probability_are_named():
    lines = lines_of(1)
    for damage in (None, 1.5, "0.5", True):
        bad = [{**r, "answer_prob": damage} if (r["method"], r["shot"]) == ("v3", 2) else r for r in lines]
        with pytest.raises(DamagedInputError, match="answer_prob"):
            cascade.rows(Samples(bad), Samples(choice_of(1)), "v3_cascade")


def test_naming_one_adds_what_it_needs():
    named, usual = (InferenceSettings(dataset="mini_okvqa", methods=words) for words in ("label_cascade", "auto"))
    assert methods.chosen(named) == ["label_cascade", "label", "zero_shot"]
    assert not set(methods.CASCADES) & set(methods.chosen(usual))
    more = methods.chosen(InferenceSettings(dataset="mini_okvqa", methods="auto", cascade=True))
    assert set(more) - set(methods.chosen(usual)) == set(methods.CASCADES)
    of_seeds = methods.chosen(InferenceSettings(dataset="mini_okvqa", methods="v3 v2", cascade=True))
    assert of_seeds == ["v3", "v2", "v3_cascade", "v2_cascade", "zero_shot"]
