"""How many demonstrations: every number recomputed by plain loops over the lines, and what is shown of it."""

import csv
import json

import numpy as np
import pytest

from lever_plus.experiments import adaptive, compare, export, record, report, stats
from lever_plus.experiments.samples import Samples, read_samples
from open_mmicl.errors import DamagedInputError, MissingInputError
from tests.reference.fake_run import make_samples, write_run, write_training

PRICE, RIVALS = {"beam_data": 1, "rl_data": 2, "training": 0, "evaluation": 3}, {}
SHOTS = 2  # the policy may take 0 to 2; the fixed shots go to 4


def lines_of(seed, n=40):
    """A run whose policy chooses a number per query; its answers are those of the fixed shots."""
    lines = make_samples(seed, n=n)
    rng = np.random.default_rng(seed)
    answered = {(r["query_idx"], r["method"], r["shot"]): r for r in lines}
    for row in lines:
        row["prompt_tokens"] = 100 + 50 * row["shot"]
    for i in range(n):
        number = int(rng.integers(SHOTS + 1))
        source = answered[(i, "v3", number) if number else (i, "zero_shot", 0)]
        probabilities = [float(rng.uniform(0, 0.5)) for _ in range(SHOTS)]
        if number < SHOTS:
            probabilities[number] = float(rng.uniform(0.5, 1))
        lines.append({**source, "method": "v3_adaptive", "shot": SHOTS, "stop_probs": probabilities})
    return lines


def choice_of(seed):
    return [{**r, "prompt_tokens": 1} for r in make_samples(seed, n=30, only=("v3", "zero_shot"), world=9)]


@pytest.fixture
def runs(tmp_path):
    made = []
    for seed in (1, 2):
        folder = write_run(tmp_path / f"run{seed}", lines_of(seed))
        text = "".join(json.dumps(r) + "\n" for r in choice_of(seed))
        (folder / "choice_samples.jsonl").write_text(text)
        made.append(record.load_run(folder, write_training(tmp_path / f"v3_{seed}", seed)))
    return made


def test_the_summary_is_recomputed_by_plain_loops():
    lines, choice = lines_of(1), choice_of(1)
    found = adaptive.summarize(Samples(lines), Samples(choice), 200.0)
    of_fixed = {k: np.mean([r["score"] for r in choice if (r["method"], r["shot"]) == ("v3", k)]) for k in (1, 2, 3, 4)}
    best = max(of_fixed, key=of_fixed.get)
    assert found["best_fixed"]["shot"] == best and found["best_fixed"]["n_queries"] == 30
    score = {(r["query_idx"], r["method"], r["shot"]): r["score"] for r in lines if r["method"] != "random"}
    mine = [r for r in lines if r["method"] == "v3_adaptive"]
    numbers = [len(r["icd_ids"]) for r in mine]
    assert found["mean_demonstrations"] == np.mean(numbers)
    assert found["abstentions"] == 100 * numbers.count(0) / 40
    assert found["chosen"] == [numbers.count(k) for k in range(3)]
    assert found["accuracy"] == pytest.approx(100 * np.mean([r["score"] for r in mine]))
    of_query = [[score[i, "zero_shot", 0], score[i, "v3", 1], score[i, "v3", 2]] for i in range(40)]
    assert found["perfect_choice"] == pytest.approx(100 * np.mean([max(s) for s in of_query]))
    assert found["prompt_tokens"]["v3_adaptive"]["2"] == pytest.approx(100 + 50 * np.mean(numbers))
    assert found["seconds_per_query"]["v3"]["3"] == pytest.approx(250 / 200)
    for g in found["gained"]:
        gains = [100 * (of_query[i][k] - score[i, "v3", best]) for i, k in enumerate(numbers) if k == g["number"]]
        assert (g["n"], g["over_best_fixed"]) == (len(gains), pytest.approx(np.mean(gains)))
        assert g["over_best_fixed_se"] == pytest.approx(np.std(gains, ddof=1) / len(gains) ** 0.5)
    right, told = {"stop": [], "go": []}, []
    for r, own in zip(mine, of_query, strict=True):
        n = len(r["icd_ids"])
        for step in range(min(n + 1, SHOTS)):
            is_right = own[step] >= max(own[step + 1 :])
            told.append((r["stop_probs"][step], is_right))
            (right["stop"] if step == n else right["go"]).append(is_right)
    s = found["stopping"]
    assert (s["stopped"], s["stopped_right"]) == (len(right["stop"]), sum(right["stop"]))
    assert (s["went_on"], s["went_on_right"]) == (len(right["go"]), len(right["go"]) - sum(right["go"]))
    assert s["brier"] == pytest.approx(np.mean([(p - float(y)) ** 2 for p, y in told]))
    for b in s["bins"]:
        inside = [(p, y) for p, y in told if int(p * 10) == int(b["mean"] * 10)]
        assert b["n"] == len(inside) and b["right"] == pytest.approx(np.mean([y for _, y in inside]))


def test_a_policy_that_always_stops_at_once():
    lines = [r for r in lines_of(1) if r["method"] != "v3_adaptive"]
    zero = [r for r in lines if r["method"] == "zero_shot"]
    lines += [{**r, "method": "v3_adaptive", "shot": SHOTS, "stop_probs": [1.0, 1.0]} for r in zero]
    found = adaptive.summarize(Samples(lines), Samples(choice_of(1)), None)
    assert found["abstentions"] == 100 and found["mean_demonstrations"] == 0
    assert found["accuracy"] == found["zero_shot"] and found["seconds_per_query"] is None
    assert found["stopping"]["stopped"] == 40 and found["stopping"]["went_on"] == 0
    assert found["gained"][1]["over_best_fixed"] is None


def test_the_record_compares_with_the_best_fixed_number_and_zero_shot(runs):
    made = record.build(runs, "exp1", PRICE, RIVALS)
    part = made["adaptive"]
    own = [[r["score"] for r in run.samples.rows if r["method"] == "v3_adaptive"] for run in runs]
    for row in part["comparisons"]:
        rival = [
            run.samples.scores("zero_shot", 0) if row["b"] == "zero_shot"
            else run.samples.scores("v3", adaptive.best_fixed_shot(run.choice)["shot"])
            for run in runs
        ]  # fmt: skip
        assert row["a"] == "v3_adaptive" and row["diff"] == pytest.approx(100 * (np.array(own) - rival).mean())
        assert row["each"] == pytest.approx((100 * (np.array(own) - rival).mean(axis=1)).tolist())
        assert row in made["comparisons"]
    assert part["stopping"]["stopped"] == sum(adaptive.stopping(run.samples)["stopped"] for run in runs)
    assert sum(part["chosen"]) == 40 and sum(g["n"] for g in part["gained"]) == 40
    before = Samples([r for r in runs[0].samples.rows if r["method"] != "v3_adaptive"])
    assert np.array_equal(runs[0].samples.oracle(2), before.oracle(2))  # it is no further try at two demonstrations


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_what_is_shown(runs, tmp_path, lang):
    made = record.build(runs, "exp1", PRICE, RIVALS)
    text = record.render(made, lang)
    assert {"zh": "用几个示例", "en": "How many demonstrations"}[lang] in text
    assert f"{made['adaptive']['mean_demonstrations']:.2f}" in text
    assert "undefined" not in text.lower()
    page = report.render({"exp1": (made, runs)}, lang)
    assert 'id="gains-exp1' in page or "gains-exp1-" in page
    assert "reliability-exp1-" in page
    export.write_tables(tmp_path, {"exp1": (made, runs)})
    (row,) = csv.DictReader((tmp_path / "adaptive.csv").open())
    assert float(row["accuracy"]) == made["adaptive"]["accuracy"]
    assert int(row["stopped_right"]) == made["adaptive"]["stopping"]["stopped_right"]


def test_without_it_nothing_is_shown_of_it(tmp_path):
    run = record.load_run(write_run(tmp_path / "run", make_samples(1)), write_training(tmp_path / "v3", 1))
    made = record.build([run], "exp1", PRICE, RIVALS)
    assert "adaptive" not in made and "How many" not in record.render(made, "en")
    export.write_tables(tmp_path, {"exp1": (made, [run])})
    assert not (tmp_path / "adaptive.csv").exists()


def test_compare_sets_it_against_every_shot_of_the_other(runs):
    sides = [compare.Side("a", runs[0], "v3_adaptive"), compare.Side("b", runs[1], "v3")]
    found = compare.compare(sides, stats.Resampling(1000))
    assert [c["shot"] for c in found["comparisons"]] == [1, 2, 3, 4, "pooled"]
    own = runs[0].samples.scores("v3_adaptive", SHOTS)
    for k in (1, 2, 3, 4):
        expected = 100 * (own - runs[1].samples.scores("v3", k)).mean()
        assert found["comparisons"][k - 1]["diff"] == pytest.approx(expected)
    both = [compare.Side("a", runs[0], "v3_adaptive"), compare.Side("b", runs[1], "v3_adaptive")]
    assert [c["shot"] for c in compare.compare(both, stats.Resampling(1000))["comparisons"]] == [SHOTS]


@pytest.mark.parametrize("damage", [{"stop_probs": [0.5]}, {"stop_probs": [0.5, 1.2]}, {"prompt_tokens": "9"}])
def test_damaged_lines_are_named(tmp_path, damage):
    lines = lines_of(1)
    lines[-1] = {**lines[-1], **damage}
    with pytest.raises(DamagedInputError, match=next(iter(damage))):
        adaptive.summarize(Samples(lines), Samples(choice_of(1)), None)
    with pytest.raises(DamagedInputError, match="without zero_shot"):
        adaptive.by_length(Samples([r for r in lines if r["method"] != "zero_shot"]))


def test_the_held_out_answers_are_needed(tmp_path):
    folder = write_run(tmp_path / "run", lines_of(1))
    with pytest.raises(MissingInputError, match="choice_samples"):
        record.load_run(folder)
    assert read_samples(folder / "samples.jsonl").shots("v3_adaptive") == [SHOTS]
