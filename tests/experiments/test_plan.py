"""The decision tree on planted results, the verdict's coverage, and the whole walk over fake steps."""

import json

import numpy as np
import pytest

from lever_plus import config, paths
from lever_plus.experiments import evidence, frontier, plan, record, run, runner, sweep, walk, words
from lever_plus.experiments.arms import Arm, all_arms, arms_of, check, known, seeds_of
from lever_plus.settings import loading
from lever_plus.settings.experiment import ExperimentSettings
from open_mmicl.errors import MissingInputError, UsageError
from tests.experiments.test_audit import random_data
from tests.reference import naive_evidence
from tests.reference.fake_run import make_samples, write_run, write_training
from tests.reference.fake_steps import FakeSteps

CONFIGS = runner.repository_path("configs/experiments")


def row(diff, word="none", label="x", **more):
    return {"diff": diff, "word": word, "label": label, "ci95": [diff - 2, diff + 2], "withheld": None, **more}


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ({}, ["1"]),
        ({"1": [row(0.5)]}, ["3"]),
        ({"1": [row(-0.9)]}, ["3"]),
        ({"1": [row(-1.0)]}, ["2"]),
        ({"1": [row(-3, "worse")]}, ["2"]),
        ({"1": [row(-3, "worse")], "2": [row(-4, "worse"), row(-0.5)]}, ["3"]),
        ({"1": [row(-3, "worse")], "2": [row(-4, "worse"), row(-2)]}, ["3"]),
        ({"1": [row(-3)], "2": [row(-4, "worse"), row(-4, "worse")]}, ["3"]),
        ({"1": [row(-3, "worse")], "2": [row(-4, "worse"), row(-2, "worse")]}, ["4a", "4b", "3"]),
        ({"1": [row(-3, "worse")], "2": [row(-4, "worse")], "4a": [row(-3)]}, ["4b", "3"]),
        ({"1": [row(-3, "worse")], "2": [row(-4, "worse")], "4a": [row(-3)], "4b": [row(0)]}, ["3"]),
        ({"1": [row(0)], "3": [row(0)]}, []),
    ],
)
def test_tree_follows_the_plan(done, expected):
    assert plan.next_experiments(done, 1.0) == expected


def test_decisions_name_rule_number_and_branch():
    done = {"1": [row(-3, "worse", "exp1")], "2": [row(-4, "worse", "exp2")], "4a": [row(0, label="exp4a")]}
    steps = plan.decisions(done, 1.0, "en")
    assert [s.after for s in steps] == ["experiment 1", "experiment 2", "experiment 4"]
    assert "−3.0" in steps[0].number and steps[0].branch == "no → experiment 2"
    assert "clearly below" in steps[1].rule and "4A" in steps[1].branch
    assert steps[2].branch == "yes → experiment 3"
    assert len(plan.decisions({"1": [row(1)]}, 1.0, "zh")) == 1


def test_best_recipe_is_chosen_by_validation():
    best = plan.best_recipe({"exp1": [0.5, 0.6], "exp3": [0.7, 0.7]}, [0.4])
    assert best["arm"] == "exp3" and best["validation"]["exp1"] == pytest.approx(0.55)
    assert plan.best_recipe({"exp1": [0.5]}, [0.5])["arm"] == "v2"
    with pytest.raises(UsageError, match="validation"):
        plan.best_recipe({}, [])


@pytest.mark.parametrize("word", ["better", "none", "worse"])
@pytest.mark.parametrize("lang", ["zh", "en"])
def test_advice_covers_every_case(word, lang):
    small, large = {"RCE_LR": 1e-5, "GRPO_LR": 1e-5}, {"RCE_LR": 1e-4, "GRPO_LR": 1e-4}
    lines = plan.advice(word, {"arm": "v2"}, {"word": word}, ["ties"], lang, small)
    assert len(lines) == 4 and len(set(lines)) == 4 and "ties" in lines[0]
    (both,) = plan.advice("none", {"arm": "exp3"}, None, [], lang, small)
    (one,) = plan.advice("none", {"arm": "exp3"}, None, [], lang, small | {"RCE_LR": 0.05})
    (other,) = plan.advice("none", {"arm": "exp3"}, None, [], lang, large)
    (pools, label, *_) = plan.advice(
        word, {"arm": "exp3"}, None, [], lang, large, [{"b": b, "word": "worse"} for b in ("mmices", "label")]
    )
    assert "SAMPLER=channel_sim_sampler" in pools and "V2_MODE=labels" in label
    level = plan.advice(word, {"arm": "exp3"}, None, [], lang, large, [{"b": "label", "word": "none"}])
    assert level == plan.advice(word, {"arm": "exp3"}, None, [], lang, large)
    assert "RCE_LR=1e-4" in both and "RCE_LR" not in one and "GRPO_LR=1e-4" in one and "_LR=" not in other


def test_configs_are_the_plans_settings():
    arms = all_arms(CONFIGS, {})
    assert [a.name for a in arms["2"]] == ["exp2_rce_epochs15", "exp2_rce_epochs20"]
    expected = {
        "exp1": ("10", "0", 0.5, 0.8), "exp2_rce_epochs15": ("15", "0", 0.5, 0.8), "exp3": ("10", "5", 0.5, 0.8),
        "exp2_rce_epochs20": ("20", "0", 0.5, 0.8), "exp4a": ("10", "0", 0.0, 1.0), "exp4b": ("10", "0", 0.8, 0.5),
    }  # fmt: skip
    for arm in (a for group in arms.values() for a in group):
        s = arm.settings
        got = (s["RCE_EPOCHS"], s["GRPO_EPOCHS"], float(s["REWARD_ALPHA"]), float(s["REWARD_BETA"]))
        assert got == expected[arm.name] and s["BATCH_SIZE"] == "4" and float(s["RCE_LR"]) == 1e-5
    grpo = arms["3"][0].settings
    assert float(grpo["KL_BETA"]) == 0.05 and float(grpo["GRPO_LR"]) == 1e-5 and grpo["CHECKPOINT_PHASE"] == "grpo"


def test_fault_06_a_users_setting_is_used_or_refused():
    arm = arms_of("1", CONFIGS, {"RCE_LR": "1e-4", "BATCH_SIZE": "4"})[0]
    assert arm.overridden == {"RCE_LR": "1e-4"} and arm.environment(3)["RCE_LR"] == "1e-4"
    assert arm.environment(3)["SEED"] == "3" and arm.environment(3)["EXP_NAME"] == "exp1_seed3"
    assert [a.name for a in arms_of("2", CONFIGS, {"RCE_EPOCHS": "30"})] == ["exp2"]
    with pytest.raises(UsageError, match="RCE_EPOCHS"):
        all_arms(CONFIGS, {"RCE_EPOCHS": "3"})
    assert all_arms(CONFIGS, {"RCE_LR": "1e-4"})["4a"][0].overridden == {"RCE_LR": "1e-4"}


def test_any_settings_file_of_the_folder_is_an_experiment(tmp_path):
    (tmp_path / "explistwise.env").write_text("RCE_OBJECTIVE=listwise\nRCE_LR='1e-5 1e-4'\n")
    assert known(tmp_path)[-1] == "listwise" and "listwise" not in known(CONFIGS)
    names = [(a.name, a.settings["RCE_OBJECTIVE"]) for a in arms_of("listwise", tmp_path, {})]
    assert names == [("explistwise_rce_lr1e-5", "listwise"), ("explistwise_rce_lr1e-4", "listwise")]
    with pytest.raises(UsageError, match="listwise"):
        arms_of("listwis", tmp_path, {})


def test_a_file_with_one_setting_is_an_experiment_and_two_swept_settings_are_every_combination(tmp_path):
    (tmp_path / "expone.env").write_text("RCE_EPOCHS=3\n")
    (tmp_path / "expgrid.env").write_text("RCE_LR='1e-5 1e-4'\nKL_BETA='0 0.05 0.1'\nRL_DATA_PATH='/a b/c.json'\n")
    (one,) = arms_of("one", tmp_path, {})
    assert one.settings == {"RCE_EPOCHS": "3"}
    grid = arms_of("grid", tmp_path, {})
    assert len({arm.name for arm in grid}) == len({tuple(arm.settings.items()) for arm in grid}) == 6
    assert grid[0].name == "expgrid_rce_lr1e-5_kl_beta0" and grid[0].settings["RL_DATA_PATH"] == "/a b/c.json"
    assert len(arms_of("grid", tmp_path, {"KL_BETA": "0.2"})) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("BATCH_SIZ=4", "did you mean BATCH_SIZE"),
        ("SEED=3", "SEEDS"),
        ("SAMPLE_NUM=200", "belongs to all arms"),
        ("METHODS=v3", "same methods"),
        ("FROBNICATE=1", "not a setting"),
        ("RCE_LR=abc", "RCE_LR=abc"),
        ("RCE_LR='1e-4 x'", "RCE_LR=x"),
        ("CHECKPOINT_PHASE=best", "CHECKPOINT_PHASE=best"),
        ("RCE_EPOCHS=0\nGRPO_EPOCHS=0", "nothing to train"),
        ("REQUIRE_POSITIVE_QUERY=true", "original Lever-Plus"),
        ("RCE_LR='1e-4 1e-4'", "same value twice"),
    ],
)
def test_a_wrong_line_of_an_experiments_file_stops_it_before_the_first_step(tmp_path, monkeypatch, capsys, line, says):
    (tmp_path / "expmine.env").write_text(f"{line}\n")
    monkeypatch.setenv("RESULT_DIR", str(tmp_path / "results"))
    monkeypatch.setattr(runner.cli, "call", lambda *a: pytest.fail("a step was run"))
    for more in (["-n"], []):
        assert run.main(["mine", f"--EXPERIMENT_DIR={tmp_path}", "--DATASET=mini_okvqa", *more]) == 2
        captured = capsys.readouterr()
        assert says in captured.err and len(captured.err.strip().splitlines()) == 1, captured


def test_names_of_the_original_project_work_in_an_experiments_file(tmp_path):
    (tmp_path / "expold.env").write_text("RCE_TEMP_START='0.5 2'\nRCE_USE_NORMALIZED_REWARD=true\n")
    arms = arms_of("old", tmp_path, {})
    assert [arm.settings for arm in arms] == [{"RCE_TAU_START": t, "RCE_REWARDS": "zscore"} for t in ("0.5", "2")]


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_a_sweep_names_the_best_by_validation_only(lang):
    arms = [Arm(f"expx_kl_beta{v}", "x", {"RCE_EPOCHS": "3", "KL_BETA": v}) for v in ("0", "0.1")]

    def one(value, accuracy):
        cells = {"v3": {"1": {"mean": accuracy}, "2": {"mean": accuracy}}}
        return {"training": [{"metric": "val_expected_accuracy", "value": value}], "accuracy": cells, "comparisons": []}

    made = {arms[0].name: one(0.4, 30.0), arms[1].name: one(0.3, 50.0)}
    found = sweep.rows(arms, made)
    assert found[0]["settings"] == {"KL_BETA": "0"} and sweep.best(found) == arms[0].name
    assert "**KL_BETA=0**" in sweep.markdown("x", found, lang)
    made[arms[1].name] = one(None, 50.0)
    assert sweep.best(sweep.rows(arms, made)) is None and "**" not in sweep.markdown("x", sweep.rows(arms, made), lang)


@pytest.mark.parametrize("text", ["", "1 1", "-1", "a", "1.5"])
def test_wrong_seeds_are_refused(text):
    with pytest.raises(UsageError, match="SEEDS"):
        seeds_of(text)
    assert seeds_of("1, 2 3") == [1, 2, 3]


def verdicts_of_worlds(difference, images):
    """Verdict words for many worlds at once, pooled over shots and seeds; difference: (seeds, n, worlds) in points."""
    from lever_plus.experiments import stats

    mean = difference.mean(axis=0)
    low, high = stats.bootstrap_interval(mean, images, 10_000)
    p = stats.sign_flip_p(mean, images, 10_000)
    words = []
    for w in range(mean.shape[1]):
        word = stats.direction([low[w], high[w]], p[w], len(np.unique(images)))
        recipe = stats.recipe_interval(difference[:, :, w], images)
        words.append("none" if recipe[0] <= 0 <= recipe[1] else word)
    return words


def planted(rng, effect, n=400, seeds=3, worlds=500, seed_sd=0.0):
    """(seeds, n, worlds): differences of accuracies pooled over four shots, two queries to an image, in points."""
    steps = np.array([0, 0.3, 0.6, 0.9, 1.0])
    image = np.repeat(rng.normal(0, 8, (1, n // 2, worlds)), 2, axis=1)  # what the queries of an image share
    noise = np.zeros((seeds, n, worlds))
    for _ in range(4):
        changed = rng.random((seeds, n, worlds)) < 0.3
        noise += changed * (rng.choice(steps, (seeds, n, worlds)) - rng.choice(steps, (seeds, n, worlds))) * 25
    return effect + image + noise + rng.normal(0, seed_sd, (seeds, 1, worlds)), np.arange(n) // 2


def test_verdict_of_two_copies_is_no_effect():
    for seed_sd in (0.0, 1.5):
        difference, images = planted(np.random.default_rng(21), 0.0, seed_sd=seed_sd)
        assert np.mean([w == "none" for w in verdicts_of_worlds(difference, images)]) >= 0.94


def test_verdict_finds_ten_points_at_400():
    difference, images = planted(np.random.default_rng(22), 10.0, worlds=200, seed_sd=1.0)
    assert np.mean([w == "better" for w in verdicts_of_worlds(difference, images)]) >= 0.95


def walked(tmp_path, right, seeds="1 2 3", fail_at=0, **options):
    env = {"DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path), "SEEDS": seeds, "BOOTSTRAP": "1000", **options}
    s = loading.load(ExperimentSettings, {}, env)
    steps = FakeSteps(
        tmp_path, {"rival": 0.5, **right}, random_data(np.random.default_rng(0), queries=40), fail_at=fail_at
    )
    made_by = runner.Runner(s, env, steps)
    made_by._answers = lambda: None
    return s, steps, lambda: walk.walk(made_by, all_arms(CONFIGS, env))


def test_walk_with_a_working_grpo(tmp_path):
    s, steps, go = walked(tmp_path, {"1": 0.65, "3": 0.95}, RECORD_LANG="en")
    made = go()
    assert [d["branch"] for d in made["decisions"]] == ["yes → experiment 3"]
    assert made["verdict"]["word"] == "better" and made["verdict"]["text"].startswith("GRPO helps")
    assert made["arms"] == ["exp1", "exp3"] and made["rival"]["comparison"]["word"] == "better"
    assert ("inference", "rival_prompts_505") in steps.calls  # 400 + 40000 / 380 anchors
    folder = paths.experiment_dir(s, "plan")
    text = (folder / "record.md").read_text()
    assert "GRPO helps" in text and "505 anchors" in text and "(was run)" in text
    page = (folder / "report.html").read_text()
    for part in ('id="verdict"', 'id="exp1"', 'id="exp3"', 'id="audit"', "yes → experiment 3"):
        assert part in page
    for name in ("exp1", "exp3", "exp5", "plan"):
        assert (paths.experiment_dir(s, name) / "report.html").is_file()
    assert json.loads((folder / "record.json").read_text()) == json.loads(json.dumps(made))
    # every number from the samples, by plain loops
    arms = {arm: [_lines(s, f"{arm}_seed{k}") for k in (1, 2, 3)] for arm in ("exp1", "exp3")}
    world = naive_evidence.recompute_arms(arms, arms["exp1"], 1000, 0, _lines(s, "rival_prompts_505"))
    accuracy = naive_evidence.accuracies(world)
    assert naive_evidence.difference(made["accuracy"], {name: accuracy[name] for name in made["accuracy"]}) is None
    shown = {"verdict": made["verdict"]["comparisons"], "rival": made["rival"]["comparisons"]}
    again = {"verdict": naive_evidence.compared(world, "exp3", "exp1"),
             "rival": naive_evidence.compared(world, made["best"]["arm"], "v2_rival")}  # fmt: skip
    assert naive_evidence.difference(shown, again) is None
    against_v2 = [{**naive_evidence.compared(world, arm, "v2")[-1], "label": arm} for arm in arms]
    assert naive_evidence.difference(made["against_v2"], against_v2) is None
    assert made["verdict"]["text"] == plan.verdict(again["verdict"], 1.0, "en")[1]
    # the best v3 arm against the best rival, with the verdict on the first screen
    others = {name: sum(c["mean"] for c in of.values()) / len(of) for name, of in accuracy.items()}
    first = made["against_rivals"][0]
    rivals = [n for n in others if not n.startswith(("oracle", "majority", "exp")) and n != "v2_rival"]
    assert others[first["b"]] == max(others[n] for n in rivals)
    assert naive_evidence.difference(first, naive_evidence.compared(world, first["a"], first["b"])[-1]) is None
    told = words.verdict(first, 1.0, "en")
    assert told in text and told[1:] in page
    assert len(set(made["conclusion"])) == len(made["conclusion"])
    # accuracy against prompts, by plain loops
    spent = {row["name"]: row for row in made["against_prompts"]}
    beams, data, states = 152000, 40000, 3200  # FakeSteps
    assert spent["exp1"]["prompts"] == spent["exp3"]["prompts"] == beams + data + states
    assert spent["v2"]["prompts"] == beams + states
    assert spent["v2_rival"]["prompts"] == made["rival"]["prompts"] + states
    assert all(row["prompts"] == 0 for name, row in spent.items() if name in ("random", "zero_shot"))
    assert set(spent) == {name for name, _ in world.scores if not name.startswith(("oracle", "majority"))}
    for name, row in spent.items():
        mean = [cell["mean"] for cell in accuracy[name].values()]
        assert row["mean"] == pytest.approx(sum(mean) / len(mean)) and row["ci95"][0] <= row["mean"] <= row["ci95"][1]
    prices = [row["prompts"] for row in made["against_prompts"]]
    best = frontier.reached(made["against_prompts"])
    for name, row in spent.items():
        beaten = [o for o in spent.values() if o["prompts"] <= row["prompts"] and o["mean"] > row["mean"]]
        assert (name in best) == (not beaten)
    assert prices == sorted(prices) and "Accuracy against prompts" in text and 'id="against-prompts' in page


def _lines(s, run_name):
    path = paths.inference_dir(s, run_name) / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def no_figures(monkeypatch):
    """Reports and exports are checked by the first walk; drawing takes most of the time."""
    for module in (walk, runner):
        monkeypatch.setattr(module.report, "write", lambda *args, **kwargs: None)
        monkeypatch.setattr(module.export, "write", lambda *args: None)


def test_walk_down_the_other_branch(tmp_path, no_figures):
    _, steps, go = walked(
        tmp_path, {"1": 0.2, "2": 0.2, "4a": 0.2, "4b": 0.2, "3": 0.2, "copy": True}, RIVAL="none", RECORD_LANG="en",
        RCE_LR="0.05",
    )  # fmt: skip
    made = go()
    assert made["conclusion"][0] == "Settings that are not the plan's: RCE_LR=0.05 (the plan's: 1e-5): all experiments"
    assert made["overridden"]["exp4b"] == {"RCE_LR": "0.05"}
    assert made["arms"] == ["exp1", "exp2_rce_epochs15", "exp2_rce_epochs20", "exp4a", "exp4b", "exp3"]
    assert [d["after"] for d in made["decisions"]] == ["experiment 1", "experiment 2", "experiment 4"]
    assert made["verdict"]["word"] == "none" and made["rival"] is None
    pooled = next(c for c in made["verdict"]["comparisons"] if c["shot"] == "pooled")
    assert pooled["diff"] == 0 and "no effect shown" in made["verdict"]["text"]


def test_longer_training_is_named_and_compared_where_it_can_be(tmp_path):
    lines = {arm: make_samples(seed, n=30, world=0) for seed, arm in enumerate(("exp1", "exp2_rce_epochs15", "exp3"))}
    epochs = {"exp1": (10, 0), "exp2_rce_epochs15": (15, 0), "exp3": (10, 5)}
    arms = {}
    for arm, (rce, grpo) in epochs.items():
        training = write_training(tmp_path / f"v3_{arm}", settings={"RCE_EPOCHS": rce, "GRPO_EPOCHS": grpo})
        arms[arm] = [record.load_run(write_run(tmp_path / arm, lines[arm]), training)]
    s = loading.load(ExperimentSettings, {}, {"DATASET": "mini_okvqa", "SEEDS": "4 5", "RECORD_LANG": "en"})
    table = plan.merged({arm: [run.samples for run in runs] for arm, runs in arms.items()})
    told = walk.longer_training(arms, table, s)
    row = evidence.find(
        evidence.compare_pair(table, "exp3", "exp2_rce_epochs15"), "exp3", "exp2_rce_epochs15", "pooled"
    )
    assert "5 epochs longer" in told and told.endswith(words.verdict(row, 1.0, "en"))
    del arms["exp2_rce_epochs15"]
    told = walk.longer_training(arms, table, s)
    assert "RCE_EPOCHS=15 bash scripts/run_experiment.sh 2, then" in told and "exp3_seed4 exp2_seed4" in told


def test_interrupted_walk_goes_on_and_ends_alike(tmp_path, no_figures):
    right = {"1": 0.75, "3": 0.75}
    _, steps, go = walked(tmp_path / "a", right, "1 2")
    whole = go()
    _, steps, go = walked(tmp_path / "b", right, "1 2", fail_at=4)
    with pytest.raises(runner.StepFailed, match="exit code 5") as failed:
        go()
    assert failed.value.exit_code == 5
    again = go()
    for made in (whole, again):
        made.pop("rival", None)
    assert again["verdict"] == whole["verdict"] and again["against_v2"] == whole["against_v2"]


def test_single_experiment_writes_its_own_folder(tmp_path):
    env = {"DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path), "SEEDS": "4 5", "BOOTSTRAP": "1000"}
    s = loading.load(ExperimentSettings, {}, env)
    made_by = runner.Runner(s, env, FakeSteps(tmp_path, {"1": 0.5}, random_data(np.random.default_rng(0), queries=40)))
    made_by.rl_data()
    made = made_by.experiment(arms_of("1", CONFIGS, env)[0])
    folder = paths.experiment_dir(s, "exp1")
    assert made["configuration"]["SEED"] == [4, 5] and made["price"]["rl_data"] == 40000
    assert {p.name for p in folder.iterdir()} >= {"record.md", "record.json", "report.html", "accuracy.csv", "comparisons.csv", "training.csv", "tensorboard"}  # fmt: skip  # noqa: E501
    rows = (folder / "accuracy.csv").read_text().splitlines()
    assert rows[0].startswith("experiment,method,shot,accuracy") and len(rows) == 1 + sum(
        map(len, made["accuracy"].values())
    )


@pytest.mark.parametrize("words", [[], ["6"], ["plan", "--seeds", "1 1"], ["1", "--no-such-thing"]])
def test_wrong_words_end_with_exit_code_2(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESULT_DIR", str(tmp_path))
    monkeypatch.setenv("DATASET", "mini_okvqa")
    assert run.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_dry_run_shows_tree_and_costs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESULT_DIR", str(tmp_path))
    monkeypatch.setenv("DATASET", "mini_okvqa")
    assert run.main(["plan", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for part in (
        "152,000 LVLM prompts",
        "v3 - v2 > -1 points: 3",
        "exp2_rce_epochs20",
        "7,500 optimiser steps",
        "458 anchors",
        "shortest way (1, 3): at most 196,040 LVLM prompts for data and 89,000 for evaluation, 37,500 optimiser steps",
        "longest way (1, 2, 4a, 4b, 3)",
    ):
        assert part in text
    assert not (tmp_path / "mini_okvqa" / "experiments").exists()


def test_dry_run_prices_what_training_asks_and_no_beams_where_none_are_searched(tmp_path, monkeypatch, capsys):
    given = {
        "RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "V2_MODE": "labels", "RL_SHOT": "4",
        "RL_QUERY_NUM": "100", "EXPERIMENT_DIR": str(config.CONFIG_DIR / "studies" / "nearest"), "VAL_FRACTION": "0.2",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run.main(["nearest", "-n"]) == 0
    text = capsys.readouterr().out
    assert "beam data" not in text
    assert "and at most 1,200 LVLM prompts" in text  # 20 queries x 4 numbers x (13 epochs + 2 starts)


def test_verdict_uses_the_pooled_row():
    rows = [row(5, "better", shot=1, n=9, recipe_ci95=None), row(1, "none", shot="pooled", n=9, recipe_ci95=None, n_images=9, se=1.0)]  # fmt: skip  # noqa: E501
    assert plan.verdict(rows, 1.0, "en")[0] == "none"
    assert evidence.find([{**r, "a": "x", "b": "y"} for r in rows], "x", "y", "pooled")["diff"] == 1


@pytest.mark.parametrize("name", ["SFT_CKPT", "QUERY_EMB_PATH", "IMAGE_IDS_PATH"])
def test_a_file_that_an_arm_names_is_looked_for_before_the_first_is_trained(name, tmp_path):
    (tmp_path / "expmine.env").write_text(f"{name}={tmp_path}/named.pt\n")
    env = {"DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path)}
    with pytest.raises(MissingInputError, match=f"expmine: {name}=.*there is no such file"):
        check(arms_of("mine", tmp_path, env), env)
    (tmp_path / "named.pt").touch()
    check(arms_of("mine", tmp_path, env), env)
