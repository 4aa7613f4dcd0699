"""The record: every number recomputed from samples.jsonl by plain loops, the words held to the rules."""

import csv
import gzip
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from lever_plus.experiments import evidence, export, record, report, stats, words
from lever_plus.experiments.samples import read_samples
from lever_plus.experiments.training import read_log, read_training
from lever_plus.stages import inference_metrics
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError
from tests.reference import naive_evidence, official_vqa
from tests.reference.fake_run import make_samples, write_run, write_training

PRICE = {"beam_data": 152000, "rl_data": None, "training": 0, "evaluation": 900}
RIVALS = {"queries": {"anchors": 2000, "prompts": 760000}}


def built(tmp_path, seeds=(1,), name="exp1", dataset="mini_okvqa", **sample_args):
    runs = []
    for seed in seeds:
        inference = write_run(tmp_path / f"run{seed}", make_samples(seed, **sample_args), dataset=dataset)
        runs.append(record.load_run(inference, write_training(tmp_path / f"v3_{seed}", seed)))
    return record.build(runs, name, PRICE, RIVALS)


def lines_of(tmp_path, seed):
    return [json.loads(line) for line in (tmp_path / f"run{seed}" / "samples.jsonl").read_text().splitlines()]


NOT_FROM_SAMPLES = {
    "experiment", "dataset", "split", "lvlm", "delta", "bootstrap", "configuration", "training", "price", "fair_rivals",
    "reported_earlier", "runs", "provenance", "metric",
}  # fmt: skip


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_every_number_is_recomputed_from_the_samples(tmp_path, seeds):
    """Every key and every number of record.json that is not a setting, a loss or a price; then the texts from those."""
    made = built(tmp_path, seeds=seeds, n=44)
    per_seed = [lines_of(tmp_path, seed) for seed in seeds]
    baselines = [x for x in per_seed[0] if x["method"] != "v3"]  # one v2 and one set of baselines for all seeds
    for seed, lines in zip(seeds, per_seed, strict=True):
        mine = [x for x in lines if x["method"] == "v3"] + baselines
        write_run(tmp_path / f"run{seed}", mine)
    made = record.build(
        [record.load_run(tmp_path / f"run{s}", tmp_path / f"v3_{s}") for s in seeds], "e", PRICE, RIVALS
    )
    again = naive_evidence.recompute([lines_of(tmp_path, seed) for seed in seeds], 1000, 0)
    assert naive_evidence.difference({k: v for k, v in made.items() if k not in NOT_FROM_SAMPLES}, again) is None
    assert {c["word"] for c in made["comparisons"]} == {"none", "better"}
    assert all(len(cell["each"]) == 1 for cell in made["accuracy"]["v2"].values())
    again["accuracy"] = {method: again["accuracy"][method] for method in made["accuracy"]}  # in the order shown
    for lang in words.LANGUAGES:
        assert record.render({**made, **again}, lang) == record.render(made, lang)


def test_oracle_and_majority_vote_by_hand(tmp_path):
    made, lines = built(tmp_path), make_samples(1)
    best, votes = {}, []
    for r in lines:
        if r["shot"] == 2:
            best[r["question_id"]] = max(best.get(r["question_id"], 0), r["score"])
            if r["method"] == "v2":
                first, second = (official_vqa.normalize(a) for a in r["icd_answers"])
                votes.append(official_vqa.accuracy(second if second == first else first, r["answers"]))
    assert made["accuracy"]["oracle"]["2"]["mean"] == pytest.approx(100 * np.mean(list(best.values())))
    assert made["accuracy"]["majority_vote_v2"]["2"]["mean"] == pytest.approx(100 * np.mean(votes))


def test_single_run_comparison_is_that_of_stats(tmp_path):
    made, samples = built(tmp_path), read_samples(tmp_path / "run1" / "samples.jsonl")
    row = evidence.find(made["comparisons"], "v3", "v2", 3)
    pair = (samples.scores(method, 3)[:, None] for method in ("v3", "v2"))
    (alone,) = stats.compare_columns(*pair, samples.images, resamples=1000, seed=0)
    assert row["ci95"] == pytest.approx(alone.ci95) and row["p_value"] == alone.p_value
    shots = [evidence.find(made["comparisons"], "v3", "v2", k) for k in (1, 2, 3, 4)]
    assert [c["p_value_holm"] for c in shots] == pytest.approx(stats.holm([c["p_value"] for c in shots]))
    pooled = evidence.find(made["comparisons"], "v3", "v2", "pooled")
    assert pooled["diff"] == pytest.approx(np.mean([c["diff"] for c in shots])) and pooled["p_value"] is None


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_template_is_complete(tmp_path, lang):
    made = built(tmp_path, seeds=(1, 2, 3), dataset="okvqa")
    text = record.write(made, tmp_path / "out", lang)
    markdown = (tmp_path / "out" / "record.md").read_text(encoding="utf-8")
    headings = {
        "zh": ["# 实验1", "## 配置", "## 训练结果", "## 推理结果（60 条数据）", "## 对比 v2", "此前报告",
               "## 结论", "未记录"],
        "en": ["# Experiment 1", "## Configuration", "## Training result", "## Inference result (60", "## Against v2",
               "reported earlier", "## Conclusion", "not recorded"],
    }  # fmt: skip
    for part in (*headings[lang], "RCE_EPOCHS: 3", "SEED: [1, 2, 3]", "56.7%", "152,000", "760,000"):
        assert part in markdown, part
    assert re.search(r"RCE loss: (从 8\.0000 降到 2\.6667|from 8\.0000 to 2\.6667)", markdown)
    for k in (1, 2, 3, 4):
        assert f"{made['accuracy']['v3'][str(k)]['mean']:.1f}%" in markdown
        assert words.points(evidence.find(made["comparisons"], "v3", "v2", k)["diff"]) in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables) and "\n\n\n\n" not in markdown
    assert json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8")) == json.loads(json.dumps(made))
    assert "v3" in text and "shot 4" in text


@pytest.mark.parametrize(
    ("lang", "said"), [("zh", "- RCE loss: 8.0000（1 个 epoch）"), ("en", "- RCE loss: 8.0000 (1 epoch)")]
)
def test_one_epoch_has_one_loss_and_only_rce_is_said_not_to_fall(tmp_path, lang, said):
    made = built(tmp_path)
    phase = {"epochs": 1, "loss": [8.0, 8.0], "validation": {}}
    made["training"][0]["phases"] = {"rce": phase, "grpo": {**phase, "epochs": 5, "loss": [-0.3, -0.1]}}
    record.write(made, tmp_path / "out", lang)
    markdown = (tmp_path / "out" / "record.md").read_text(encoding="utf-8")
    assert f"{said}\n" in markdown and "GRPO loss: " in markdown
    assert "did not fall" not in markdown and "没有下降" not in markdown
    made["training"][0]["phases"]["rce"]["epochs"] = 2
    record.write(made, tmp_path / "out", lang)
    markdown = (tmp_path / "out" / "record.md").read_text(encoding="utf-8")
    assert ("did not fall" in markdown) == (lang == "en") and ("没有下降" in markdown) == (lang == "zh")


def test_reported_earlier_only_for_okvqa(tmp_path):
    made = built(tmp_path)
    assert made["reported_earlier"] == {}
    assert "此前报告" not in record.render(made, "zh")


def test_fault_12_noise_is_not_called_a_win(tmp_path):
    made = built(tmp_path, n=200, right={"v3": 0.5, "v2": 0.5})
    main = evidence.find(made["comparisons"], "v3", "v2", "pooled")
    assert main["word"] == "none"
    english, chinese = record.conclusion(made, "en")[0], record.conclusion(made, "zh")[0]
    assert "no difference shown at n = 200" in english and "better" not in english and "would be needed" in english
    assert "未显示差异" in chinese and "好于" not in chinese


def test_a_large_effect_is_named(tmp_path):
    made = built(tmp_path, n=300, right={"v3": 0.8, "v2": 0.4})
    assert "v3 (RL selector) is better than v2" in record.conclusion(made, "en")[0]
    assert "好于" in record.conclusion(made, "zh")[0]
    swapped = built(tmp_path / "b", n=300, right={"v3": 0.2, "v2": 0.5, "zero_shot": 0.5})
    text = " ".join(record.conclusion(swapped, "en"))
    assert "is worse than v2" in text and "worse than none (v3)" in text


def test_seeds_that_disagree_are_no_result(tmp_path):
    runs = []
    for seed, p in ((1, 0.2), (2, 0.55), (3, 0.95)):
        folder = write_run(tmp_path / f"run{seed}", make_samples(seed, n=300, right={"v3": p, "v2": 0.45}))
        runs.append(record.load_run(folder, write_training(tmp_path / f"v3_{seed}", seed)))
    made = record.build(runs, "exp3", PRICE, RIVALS)
    main = evidence.find(made["comparisons"], "v3", "v2", "pooled")
    assert main["ci95"][0] > 0 and main["recipe_ci95"][0] < 0 and main["word"] == "none"
    assert "between training seeds" in record.conclusion(made, "en")[0]


def judged(*p_values, main=None, **more):
    """Words of comparisons of one pair: one per shot, then, with ``main``, the pooled one of that p."""
    same = {"n_images": 200, "recipe_ci95": None, "p_value": None, "ci95": [0.2, 4.0], **more}
    ps = [*p_values, *([] if main is None else [main])]
    rows = [{**same, "p_permutation": p, "shot": k} for k, p in enumerate(ps, 1)]
    evidence.judge(rows)
    return rows


def test_one_lucky_shot_is_no_result_and_the_record_says_why():
    lucky, *_ = rows = judged(0.03, 0.4, 0.6, 0.8, main=0.2)
    assert lucky["p_permutation_holm"] == pytest.approx(0.12) and {r["word"] for r in rows} == {"none"}
    assert [r["withheld"] for r in rows] == ["signs"] * 5  # 0.03 alone is not below the shots' 0.01 either
    shots = judged(0.004, 0.4, 0.6, 0.8, main=0.2)
    assert shots[0]["word"] == "none" and shots[0]["withheld"] == "shots"
    assert "p = 0.004 becomes 0.016 by Holm's correction, not below 0.01" in words.why_none(shots[0], "en")
    assert "Holm 校正为 0.016" in words.result(shots[0], "zh")
    assert judged(0.002, 0.4, 0.6, 0.8, main=0.2)[0]["word"] == "better"
    assert judged(0.012, 0.4, 0.6, 0.8, main=0.03)[0]["word"] == "better"  # the main statement holds: 0.05
    alone = judged(0.039)[0]
    assert alone["word"] == "better" and alone["withheld"] is None
    assert judged(0.041)[0]["withheld"] == "signs" and judged(0.001, n_images=19)[0]["withheld"] == "images"
    beside = judged(0.001, 0.4, main=0.2, recipe_ci95=[0.5, 5.0])[0]
    assert beside["withheld"] == "main" and "no single one is named" in words.why_none(beside, "en")
    assert judged(0.001, 0.4, main=0.001, recipe_ci95=[0.5, 5.0])[0]["word"] == "better"
    seeds = judged(0.001, recipe_ci95=[-0.5, 5.0])[0]
    assert seeds["withheld"] == "seeds" and "[−0.5, +5.0]" in words.why_none(seeds, "en")


def test_runs_of_different_questions_or_models_are_refused(tmp_path):
    a = record.load_run(write_run(tmp_path / "a", make_samples(1)))
    fewer = record.load_run(write_run(tmp_path / "b", make_samples(1, n=50)))
    other = record.load_run(write_run(tmp_path / "c", make_samples(1), model="other"))
    with pytest.raises(UsageError, match="different queries"):
        record.build([a, fewer], "exp1", PRICE, RIVALS)
    with pytest.raises(UsageError, match="lvlm"):
        record.build([a, other], "exp1", PRICE, RIVALS)


def test_order_of_queries_does_not_matter(tmp_path):
    lines = make_samples(1)
    straight = record.load_run(write_run(tmp_path / "a", lines))
    back = record.load_run(write_run(tmp_path / "b", lines[::-1]))
    one, two = (
        record.build([straight, straight], "e", PRICE, RIVALS),
        record.build([straight, back], "e", PRICE, RIVALS),
    )
    for x, y in zip(one["comparisons"], two["comparisons"], strict=True):
        assert x["diff"] == pytest.approx(y["diff"]) and x["ci95"] == pytest.approx(y["ci95"])


def damage(lines, **change):
    return [json.dumps({**lines[0], **change}), *map(json.dumps, lines[1:])]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: [json.dumps(x[0]), '{"question_id": 1'], "line 2 is not JSON"),
        (lambda x: damage(x, score=1.2), "outside"),
        (lambda x: damage(x, score="1"), "'score'"),
        (lambda x: damage(x, score=True), "'score'"),
        (lambda x: damage(x, question_id=True), "'question_id'"),
        (lambda x: damage(x, answers=[1] * 10), "'answers'"),
        (lambda x: damage(x, answer="\ud800"), "'answer'"),
        (lambda x: damage(x, answers=["yes"] * 9), "(9 answers here and 10 in|10 answers here and 9 in) line"),
        (lambda x: damage(x, answers=["yes"] * 11), "and 11 in line|11 answers here"),
        (lambda x: damage(x, answers=[]), "0 answers"),
        (lambda x: damage(x, image_id=2**70), "'image_id'"),
        (lambda x: damage(x, icd_ids=["1"]), "'icd_ids'"),
        (lambda x: damage(x, icd_images=["a.jpg"] * 9), "differ in length"),
        (lambda x: damage(x, image=3), "'image'"),
        (lambda x: [line.replace('"seed"', '"shot": 7, "seed"') for line in damage(x)], "'shot' occurs twice"),
        (lambda x: ["[" * 100_000], "line 1 is not JSON"),
        (lambda x: ["9" * 10_000], "line 1 is not JSON"),
        (lambda x: [json.dumps(r) for r in [x[0], *x]], "twice"),
        (lambda x: [json.dumps(r) for r in x[1:]], "59 of the run's 60"),
        (lambda x: [], "empty"),
    ],
)
def test_damaged_samples_say_where(tmp_path, spoil, message):
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(spoil(make_samples(1))))
    with pytest.raises(DamagedInputError, match=message):
        read_samples(path)


def test_missing_and_contradicting_files(tmp_path):
    with pytest.raises(MissingInputError, match="inference_v3_best"):
        read_samples(tmp_path / "samples.jsonl")
    folder = write_run(tmp_path / "run", make_samples(1))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["accuracy"]["v3"]["1"] += 1
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(DamagedInputError, match="disagree on v3, shot 1"):
        record.load_run(folder)
    for other in ([], {}, {**metrics, "accuracy": {"v3": 3}}, {**metrics, "lvlm": None}, {**metrics, "accuracy": {}}):
        (folder / "metrics.json").write_text(json.dumps(other))
        with pytest.raises(DamagedInputError, match="metrics.json: (expected an object|not what an inference writes)"):
            record.load_run(folder)


def test_log_of_a_resumed_run_counts_the_last_line(tmp_path):
    path = tmp_path / "train_log.jsonl"
    line = {"phase": "rce", "kind": "step", "epoch": 1, "step": 3, "loss": 2.0}
    path.write_text("\n".join([json.dumps(line), json.dumps({**line, "loss": 1.0}), '{"phase": "r']))
    assert [x["loss"] for x in read_log(path)] == [1.0]
    for bad in ("not json", "[1]", '{"phase": "rce"}', json.dumps({**line, "epoch": [1]}), "[" * 100_000,
                json.dumps({"phase": "rce", "kind": "epoch", "loss": 1.0})):  # fmt: skip
        path.write_text(bad + "\n" + json.dumps(line) + "\n")
        with pytest.raises(DamagedInputError, match="line 1"):
            read_log(path)
    path.write_bytes(json.dumps(line).encode("utf-16"))
    with pytest.raises(DamagedInputError, match="UTF-16"):
        read_log(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("best.json", {"file": "a.pt"}), ("best.json", {"file": "../a.pt", "metric": "m", "per_phase": {}}),
     ("run.json", {"settings": [1]}), ("run.json", [1])],
)  # fmt: skip
def test_damaged_files_of_the_training_are_one_error(tmp_path, name, content):
    folder = write_training(tmp_path / "v3")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(DamagedInputError, match=name):
        read_training(folder)


def test_a_checkpoint_named_elsewhere_brings_its_own_training(tmp_path):
    ours, theirs = write_training(tmp_path / "v3", 1), write_training(tmp_path / "other", 9)
    named = write_run(tmp_path / "run", make_samples(1, n=20), checkpoint=str(theirs / "grpo_epoch2.pt"))
    assert record.load_run(named, ours).training.settings()["SEED"] == 9
    bare = write_run(tmp_path / "run2", make_samples(1, n=20), checkpoint=str(tmp_path / "nowhere" / "x.pt"))
    assert record.load_run(bare, ours).training.lines == []
    moved = write_run(tmp_path / "run3", make_samples(1, n=20), checkpoint=str(tmp_path / "gone" / "v3" / "x.pt"))
    assert record.load_run(moved, ours).training.settings()["SEED"] == 1


def test_write_record_from_folders(tmp_path, monkeypatch):
    inference = write_run(tmp_path / "run", make_samples(1))
    v3 = write_training(tmp_path / "v3")
    monkeypatch.setattr(record.prices, "read_price", lambda *_: PRICE)
    monkeypatch.setattr(record.prices, "fair_rivals", lambda *_: RIVALS)
    text = report.write_record(SimpleNamespace(record_lang="en"), inference, v3, tmp_path / "exp1")
    assert "Experiment 1: RCE only" in text
    files = {path.name for path in (tmp_path / "exp1").iterdir()}
    assert files == {"record.md", "record.json", "report.html", "accuracy.csv", "comparisons.csv", "training.csv"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.pop("accuracy"),
        lambda m: m.update(accuracy=[]),
        lambda m: m["accuracy"].update(v3=None),
        lambda m: m["accuracy"]["v3"].update({"x": 1.0}),
        lambda m: m["accuracy"]["v3"].update({"1": "high"}),
        lambda m: m["accuracy"]["v3"].update({"9": 50.0}),
        lambda m: m.pop("dataset"),
        lambda m: m.update(lvlm="qwen"),
        lambda m: m.update(checkpoint=["x"]),
        lambda m: m.update(run={"recipe": [1]}),
    ],
)
def test_damaged_metrics_are_one_error(spoil, tmp_path):
    folder = write_run(tmp_path / "run", make_samples(1))
    metrics = json.loads((folder / "metrics.json").read_text())
    spoil(metrics)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(DamagedInputError, match="metrics"):
        record.load_run(folder)


def test_samples_that_are_no_text_are_one_error(tmp_path):
    path = tmp_path / "samples.jsonl"
    for data in (gzip.compress(b"{}"), "{}".encode("utf-16"), b"{}\n\xff\xfe\n"):
        path.write_bytes(data)
        with pytest.raises(DamagedInputError, match="samples"):
            read_samples(path)


def test_groups_of_queries_are_reported_apart(tmp_path):
    """Each group's numbers are those of a run that holds that group's lines alone."""
    lines = make_samples(1, n=60)
    for line in lines:
        line["group"] = "unseen" if line["query_idx"] % 4 == 0 else "seen"
    run = record.load_run(write_run(tmp_path / "run", lines), write_training(tmp_path / "v3"))
    made = record.build([run], "exp1", PRICE, RIVALS)
    assert {name: part["n_queries"] for name, part in made["groups"].items()} == {"seen": 45, "unseen": 15}
    for name, part in made["groups"].items():
        alone = read_samples(write_run(tmp_path / name, [x for x in lines if x["group"] == name]) / "samples.jsonl")
        again = evidence.summarize([alone], stats.Resampling(1000))
        assert again["groups"].keys() == {name}
        assert part == {key: again[key] for key in ("n_queries", "n_images", "accuracy", "comparisons")}
        metrics = inference_metrics.summarize(run.samples, stats.Resampling(1000))["groups"][name]
        assert metrics["n_queries"] == part["n_queries"]
        of_v3 = [100 * x["score"] for x in lines if (x["group"], x["method"], x["shot"]) == (name, "v3", 1)]
        assert metrics["accuracy"]["v3"]["1"] == pytest.approx(np.mean(of_v3)) == part["accuracy"]["v3"]["1"]["mean"]
        pair = [c for c in metrics["comparisons"] if (c["a"], c["b"], c["shot"]) == ("v3", "v2", 1)][0]
        assert pair["diff"] == evidence.find(part["comparisons"], "v3", "v2", 1)["diff"] and pair["n"] == len(of_v3)
        for lang in words.LANGUAGES:
            text = record.render(made, lang)
            assert words.group(name, lang) in text and f"{part['accuracy']['v3']['1']['mean']:.1f}%" in text
            assert words.group(name, lang) in record.table(made, lang)
    export.write_tables(tmp_path / "csv", {"e": (made, [run])})
    with (tmp_path / "csv" / "groups_accuracy.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == sum(len(by) for part in made["groups"].values() for by in part["accuracy"].values())
    plain = record.load_run(write_run(tmp_path / "plain", make_samples(1)), None)
    assert "groups" not in record.build([plain], "e", PRICE, RIVALS)


def test_a_query_is_in_one_group(tmp_path):
    lines = make_samples(1, n=6)
    for line in lines:
        line["group"] = "seen"
    for value in ("unseen", None):
        lines[0]["group"] = value
        if value is None:
            del lines[0]["group"]
        with pytest.raises(DamagedInputError, match="not in one group"):
            read_samples(write_run(tmp_path / "run", lines) / "samples.jsonl")
    lines[0]["group"] = 3
    with pytest.raises(DamagedInputError, match="group"):
        read_samples(write_run(tmp_path / "run", lines) / "samples.jsonl")


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_the_table_on_the_screen_fits_and_holds_the_records_numbers(tmp_path, lang):
    run = record.load_run(write_run(tmp_path / "a", make_samples(1, n=60)))
    made = record.build([run], "exp1", {"beam_data": None, "rl_data": None, "training": 0, "evaluation": None}, {})
    text = record.table(made, lang)
    assert max(map(words.columns, text.splitlines())) <= 100 and "oracle" not in text and "majority" not in text
    for name in ("v3", "v2", "random", "similarity", "zero_shot"):
        for cell in made["accuracy"][name].values():
            assert f"{cell['mean']:.1f} [{cell['ci95'][0]:.1f}, {cell['ci95'][1]:.1f}]" in text
    assert "".join(words.wrap(text, 40)).split() != [] and max(map(words.columns, words.wrap("字" * 90, 40))) <= 40
