"""Comparison of finished runs: pairing on shared queries, refusals, numbers by hand."""

import dataclasses
import json

import numpy as np
import pytest

from lever_plus.experiments import compare, stats
from lever_plus.experiments.record import load_run
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from open_mmicl.errors import UsageError
from tests.reference.fake_run import make_samples, write_run


def side(tmp_path, name, lines, method="v3", **kwargs):
    return compare.Side(name, load_run(write_run(tmp_path / name, lines, **kwargs)), method)


def mean(lines, method, shot, keep):
    return 100 * np.mean([r["score"] for r in lines if (r["method"], r["shot"]) == (method, shot) and keep(r)])


def test_pairs_on_shared_queries(tmp_path):
    a = make_samples(1, n=60)
    b = [r for r in make_samples(2, n=80) if r["question_id"] >= 1020]
    sides = [side(tmp_path, "a", a), side(tmp_path, "b", b), side(tmp_path, "c", a, "v2")]
    found = compare.compare(sides, stats.Resampling(1000))

    def shared(r):
        return 1020 <= r["question_id"] < 1060

    assert found["n_shared"] == 40 and found["n_each"] == {"a": 60, "b": 60, "c": 60}
    assert found["accuracy"]["b"]["2"]["mean"] == pytest.approx(mean(b, "v3", 2, shared))
    assert len(found["comparisons"]) == 3 * 5
    row = next(c for c in found["comparisons"] if (c["a"], c["b"], c["shot"]) == ("a", "b", 3))
    assert row["diff"] == pytest.approx(mean(a, "v3", 3, shared) - mean(b, "v3", 3, shared)) and row["n"] == 40
    text = compare.text(found, 1.0, "en")
    assert "shared queries, n = 40" in text and "no difference shown" in text


def test_a_comparison_of_many_long_names_has_a_folder_of_its_own(tmp_path):
    made = side(tmp_path, "a", make_samples(1, n=30))
    settings = load(InferenceSettings, {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"})
    folders = set()
    for tail in ("x", "y"):
        names = [f"v3_RandSampler_模型_experiment_{number}_{tail}" for number in range(9)]
        folder = compare.output_dir(settings, names, [dataclasses.replace(made, label=tail)])
        assert len(folder.name.encode()) <= 96
        folder.mkdir(parents=True)
        (folder / "compare.json").write_text("{}")
        again = compare.output_dir(settings, names, [dataclasses.replace(made, label=tail)])
        assert again.name == f"{folder.name}_2"  # the first is another comparison's
        folders.add(folder.name)
    assert len(folders) == 2


def test_a_comparison_is_named_by_exp_name_and_another_of_the_name_is_kept(tmp_path):
    made = side(tmp_path, "a", make_samples(1, n=30))
    settings = load(InferenceSettings, {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "EXP_NAME": "mine"})
    folders = []
    for method in ("v3", "v2"):
        found = compare.output_dir(settings, ["a", "b"], [dataclasses.replace(made, method=method)])
        found.mkdir(parents=True)
        (found / "compare.json").write_text(json.dumps({"runs": {made.label: compare._identity_of(made)}}))
        folders.append(found.name)
    assert folders == ["compare_mine", "compare_mine_2"]


def test_seeds_of_one_recipe_are_one_side(tmp_path, monkeypatch, capsys):
    lines = [make_samples(number, n=60) for number in (1, 2, 3)]
    a = side(tmp_path, "a", lines[0])
    more = tuple(side(tmp_path, name, some).run for name, some in zip("bc", lines[1:], strict=True))
    rival = side(tmp_path, "d", lines[0], "v2")
    found = compare.compare([dataclasses.replace(a, more=more), rival], stats.Resampling(1000))
    row = next(c for c in found["comparisons"] if c["shot"] == 2)
    each = [mean(some, "v3", 2, bool) - mean(lines[0], "v2", 2, bool) for some in lines]
    assert row["each"] == pytest.approx(each) and row["diff"] == pytest.approx(np.mean(each))
    low, high = row["recipe_ci95"]
    assert low < row["ci95"][0] and high > row["ci95"][1]  # the seeds' own variation is in it
    assert found["accuracy"]["a"]["2"]["mean"] == pytest.approx(np.mean([mean(s, "v3", 2, bool) for s in lines]))

    for name, value in {"RESULT_DIR": tmp_path, "DATASET": "mini_okvqa", "BOOTSTRAP": "1000"}.items():
        monkeypatch.setenv(name, str(value))
    for name, some in zip(("s1", "s2", "s3"), lines, strict=True):
        write_run(tmp_path / "mini_okvqa" / "icl_inference" / name, some)
    assert compare.main(["s1,s2,s3", "s1:v2"]) == 0
    (out,) = (tmp_path / "mini_okvqa" / "experiments").glob("compare_*")
    written = json.loads((out / "compare.json").read_text())
    assert [c["each"] for c in written["comparisons"] if c["shot"] == 2] == [pytest.approx(each)]
    assert compare.main(["s1,s1", "s2"]) == 2 and compare.main(["s1:v2,s2", "s3"]) == 2
    assert compare.main(["s1,s9", "s2"]) == 3


@pytest.mark.parametrize(
    ("change", "what"),
    [({"dataset": "okvqa"}, "data set"), ({"model": "other"}, "LVLM"),
     ({"settings": {"PROMPT_ORDER": "best_first"}}, "PROMPT_ORDER")],
)  # fmt: skip
def test_runs_that_cannot_be_compared_are_refused(tmp_path, change, what):
    lines = make_samples(1, n=20)
    sides = [side(tmp_path, "a", lines, settings={"PROMPT_ORDER": "best_last"})]
    sides.append(side(tmp_path, "b", lines, **{"settings": {"PROMPT_ORDER": "best_last"}, **change}))
    with pytest.raises(UsageError, match=f"a and b cannot be compared.*{what}"):
        compare.compare(sides)


def test_other_prompt_words_annotations_or_no_common_query_are_refused(tmp_path):
    lines = make_samples(1, n=20)
    a, b = side(tmp_path, "a", lines), side(tmp_path, "b", lines)
    b.run.metrics["run"]["recipe"] = {"values": {"prompt_format": "x"}}
    with pytest.raises(UsageError, match="prompt format"):
        compare.compare([a, b])
    with pytest.raises(UsageError, match="20 shared queries"):
        compare.compare([a, side(tmp_path, "c", make_samples(1, n=20, world=5))])
    with pytest.raises(UsageError, match="share no query"):
        compare.compare([a, side(tmp_path, "d", [{**r, "question_id": r["question_id"] + 500} for r in lines])])


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESULT_DIR", str(tmp_path))
    monkeypatch.setenv("DATASET", "mini_okvqa")
    monkeypatch.setenv("BOOTSTRAP", "1000")
    monkeypatch.setenv("RECORD_LANG", "en")
    runs = tmp_path / "mini_okvqa" / "icl_inference"
    write_run(runs / "one", make_samples(1, n=30))
    write_run(runs / "two", make_samples(2, n=30))
    assert compare.main(["one", "two", "one:v2"]) == 0
    out = tmp_path / "mini_okvqa" / "experiments" / "compare_one_vs_two_vs_one-v2"
    assert json.loads((out / "compare.json").read_text())["n_shared"] == 30
    rows = (out / "comparisons.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 5 and rows[0].startswith("a,b,shot,diff") and "recipe_ci95_high" in rows[0]
    assert "shared queries, n = 30" in capsys.readouterr().out
    assert compare.main(["one"]) == 2
    assert compare.main(["one", "one"]) == 2
    assert compare.main(["one", "two:nothing"]) == 2
    assert compare.main(["one", "three"]) == 3
    assert "error: " in capsys.readouterr().err


def test_runs_are_found_by_exp_name_and_other_comparisons_are_kept(tmp_path, monkeypatch, capsys):
    for name, value in {"RESULT_DIR": tmp_path, "DATASET": "mini_okvqa", "BOOTSTRAP": "1000", "LANG": "en_US"}.items():
        monkeypatch.setenv(name, str(value))
    runs = tmp_path / "mini_okvqa" / "icl_inference"
    long = "v3_RandSampler_Qwen2_5-VL-3B-Instruct_best_200"
    write_run(runs / long, make_samples(1, n=30), settings={"EXP_NAME": "best"})
    write_run(runs / "small", make_samples(1, n=20), settings={"EXP_NAME": "best"})
    write_run(runs / "other", make_samples(2, n=30))
    assert compare.main([]) == 2 and compare.main(["best", "nowhere"]) == 3
    said = capsys.readouterr().err
    assert said.count(f"{long} (EXP_NAME=best, n = 30)") == 2 and "other (n = 30)" in said
    assert compare.main(["best", "other:v2", f"{long}:random"]) == 0
    out = tmp_path / "mini_okvqa" / "experiments"
    (made,) = out.glob("compare_*")
    found = json.loads((made / "compare.json").read_text())
    assert list(found["accuracy"]) == ["best", "other:v2", "best:random"]  # a short label for the long name
    assert found["runs"]["best"] == {"folder": str(runs / long), "method": "v3"}
    for file in ("compare.md", "compare.html"):
        text = (made / file).read_text()
        assert "best − other:v2" in text and "shared queries, n = 30" in text
    assert max(map(len, capsys.readouterr().out.split("shared queries")[1].splitlines()[:5])) <= 100
    (tmp_path / "elsewhere").mkdir()
    moved = write_run(tmp_path / "elsewhere" / "other", make_samples(3, n=30))
    assert compare.main(["best", "other"]) == 0 and compare.main(["best", str(moved)]) == 0
    assert compare.main(["best", "other"]) == 0  # the same comparison again: the same folder
    assert sorted(p.name for p in out.glob("compare_best_vs_other*")) == [
        "compare_best_vs_other", "compare_best_vs_other-v2_vs_" + long + "-random", "compare_best_vs_other_2"
    ]  # fmt: skip
