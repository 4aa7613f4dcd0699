"""Data sets that take what another one has: worlds of other seeds are three lines of YAML."""

import json
from pathlib import Path

import pytest

from lever_plus import cli, config, paths
from lever_plus.data import catalog
from lever_plus.data.check import main
from lever_plus.data.dataset import load_split
from lever_plus.mini.world import World, sample_questions
from lever_plus.settings.data import BeamSettings, RlDataSettings
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.settings.shared import SharedSettings
from lever_plus.stages import generate_data, lvlm, prepare_dataset, retrieval
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError

SMALL = "base: mini_okvqa\ngenerator_args: {table_seed: %d, seed: 5, n_train: 20, n_val: 10}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configs folder with mini_okvqa and room for more."""
    source = (config.CONFIG_DIR / "dataset" / "mini_okvqa.yaml").read_text()
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mini_okvqa.yaml").write_text(source)
    (tmp_path / "infer_model").symlink_to(config.CONFIG_DIR / "infer_model")
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path)
    return tmp_path / "dataset"


def test_a_world_of_other_seeds_is_its_base_in_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    (folder / "mine.yaml").write_text(SMALL % 9)
    settings = SharedSettings(dataset="mine", result_dir=str(tmp_path / "r"), mini_okvqa_path="/elsewhere")
    mine, base = paths.dataset(settings), catalog.load("mini_okvqa", paths.folders(settings))
    assert mine.name == "mine" and mine.root == tmp_path / "r" / "mine" / "dataset"
    assert base.root == Path("/elsewhere")  # the base's folder variable is the base's alone
    assert mine.questions["val"].parent == mine.image_dirs["val"][0].parent.parent == mine.root
    assert (mine.stand_in, mine.clip, mine.settings) == (base.stand_in, base.clip, base.settings)
    assert paths.dataset_dir(settings) == tmp_path / "r" / "mine"


def test_mappings_are_joined_and_bases_may_have_bases(folder: Path) -> None:
    (folder / "a.yaml").write_text(SMALL % 9 + "settings: {SAMPLE_NUM: 7}\n")
    (folder / "b.yaml").write_text("base: a\ngenerator_args: {table_seed: 11}\n")
    found = paths.dataset(SharedSettings(dataset="b"))
    assert found.generator_args == {"table_seed": 11, "seed": 5, "n_train": 20, "n_val": 10}
    assert found.settings["SAMPLE_NUM"] == 7 and found.settings["RL_QUERY_NUM"] == 2000 and found.name == "b"


def test_bases_that_are_no_bases(folder: Path) -> None:
    (folder / "a.yaml").write_text("base: b\n")
    (folder / "b.yaml").write_text("base: a\n")
    with pytest.raises(DamagedInputError, match="base"):
        paths.dataset(SharedSettings(dataset="a"))
    (folder / "c.yaml").write_text("base: nowhere\n")
    with pytest.raises(UsageError, match="nowhere"):
        paths.dataset(SharedSettings(dataset="c"))


def test_a_changed_seed_does_not_meet_the_old_files(folder: Path, tmp_path: Path) -> None:
    settings = SharedSettings(dataset="mine", result_dir=str(tmp_path / "r"))
    (folder / "mine.yaml").write_text(SMALL % 9)
    assert prepare_dataset.run(settings, False) == 0 == prepare_dataset.run(settings, False)
    (folder / "mine.yaml").write_text(SMALL % 10)
    with pytest.raises(UsageError, match="table_seed 9 instead of 10"):
        prepare_dataset.run(settings, False)
    (folder / "mine.yaml").write_text("base: mini_okvqa\ngenerator_args: {table: 3}\n")
    with pytest.raises(UsageError, match="no setting 'table'"):
        prepare_dataset.run(settings, False)


@pytest.mark.parametrize("key", ["mini_okvqa_b", "mini_okvqa_c", "mini_unseen"])
def test_the_worlds_that_come_with_the_project(key: str) -> None:
    found = paths.dataset(SharedSettings(dataset=key))
    assert found.name == key and found.generator_args["table_seed"] > 1


def test_the_world_that_misleads_has_more_training_queries_than_its_yaml_asks_for() -> None:
    found = paths.dataset(SharedSettings(dataset="mini_known"))
    assert found.candidates_only == ("misleading",) and found.groups.name == "groups.json"
    train = sample_questions(World(**{"n_val": 10, **found.generator_args}))["train"]
    wanted = load(BeamSettings, {"DATASET": "mini_known"}, {}).sample_num
    wanted = max(wanted, load(RlDataSettings, {"DATASET": "mini_known"}, {}).rl_query_num)
    assert 0 < wanted <= sum(row.group != "misleading" for row in train)


@pytest.fixture
def unseen(folder: Path, tmp_path: Path) -> SharedSettings:
    """A small world with unseen concepts, made."""
    (folder / "mine.yaml").write_text(
        "base: mini_okvqa\ngenerator_args: {table_seed: 9, seed: 5, n_train: 200, n_val: 60, unseen: 2}\n"
        'groups: "{root}/groups.json"\ncandidates_only: [unseen]\n'
    )
    settings = SharedSettings(dataset="mine", result_dir=str(tmp_path / "r"))
    assert prepare_dataset.run(settings, False) == 0
    return settings


def test_items_of_candidate_groups_are_never_training_queries(unseen: SharedSettings) -> None:
    train, val = load_split(paths.dataset(unseen), "train"), load_split(paths.dataset(unseen), "val")
    of = json.loads(paths.dataset(unseen).groups.read_text())
    assert train.groups.tolist() == [of[str(question_id)] for question_id in train.question_ids]
    asked = [row for row in range(len(train)) if train.groups[row] == "seen"]
    assert train.query_rows.tolist() == asked and 0 < len(asked) < len(train)
    assert set(val.groups) == {"seen", "unseen"}
    order = lvlm.train_query_order(train, unseen)
    assert sorted(order.tolist()) == asked and order.tolist() != asked
    tuned = load(InferenceSettings, {"EVAL_SPLIT": "train_val", "TEST_DATA_NUM": "-1", "VAL_FRACTION": "0.4",
                                     "DATASET": "mine", "RESULT_DIR": unseen.result_dir}, {})  # fmt: skip
    rows = retrieval.query_rows(tuned, train, train)
    assert len(rows) and set(rows.tolist()) <= set(asked)
    pools = lvlm.query_pools(unseen, train, order[:20], train, "train")
    assert {train.groups[row] for row in pools.ravel()} == {"seen", "unseen"}  # candidates of both


def test_more_anchors_than_training_queries_are_refused(unseen: SharedSettings) -> None:
    train = load_split(paths.dataset(unseen), "train")
    settings = load(BeamSettings, {"SAMPLE_NUM": str(len(train)), "DATASET": "mine", "RESULT_DIR": unseen.result_dir,
                                   "DEVICE": "cpu"}, {})  # fmt: skip
    with pytest.raises(UsageError, match=f"more than the {len(train.query_rows)} train queries"):
        generate_data.search(settings, settings.result_dir, generate_data.recipe(settings))


def test_groups_files_that_do_not_fit(unseen: SharedSettings, folder: Path) -> None:
    path, before = paths.dataset(unseen).groups, load_split(paths.dataset(unseen), "train").fingerprint
    groups = json.loads(path.read_text())
    path.write_text(json.dumps({**groups, "1": "more"}))
    assert load_split(paths.dataset(unseen), "train").fingerprint != before
    first = str(load_split(paths.dataset(unseen), "train").question_ids[0])
    for bad in (None, 3, "", ["seen"]):
        path.write_text(json.dumps({**groups, first: bad}))
        with pytest.raises(DamagedInputError, match=f"question {first} has no group"):
            load_split(paths.dataset(unseen), "train")
    path.unlink()
    with pytest.raises(MissingInputError, match=r"groups\.json"):
        load_split(paths.dataset(unseen), "train")
    assert cli.guard(lambda: main(["check", "mine", f"RESULT_DIR={unseen.result_dir}"])) == 3


def test_a_candidate_group_may_be_of_one_split_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "mine.yaml").write_text(
        "base: mini_known\ngenerator_args: {seed: 5, n_train: 200, n_val: 60, facts: 1, misleading: 50}\n"
    )
    settings = SharedSettings(dataset="mine", result_dir=str(tmp_path / "r"))
    assert prepare_dataset.run(settings, False) == 0
    train, val = (load_split(paths.dataset(settings), split) for split in ("train", "val"))
    assert "misleading" in set(train.groups) and "misleading" not in set(val.groups)
    assert 0 < len(train.query_rows) < len(train) and len(val.query_rows) == 60


def test_a_misspelt_group_is_not_passed_over(unseen: SharedSettings, folder: Path) -> None:
    file = folder / "mine.yaml"
    file.write_text(file.read_text().replace("[unseen]", "[unsen]"))
    with pytest.raises(UsageError, match="candidates_only: no group 'unsen'; there are: seen, unseen"):
        load_split(paths.dataset(unseen), "train")


@pytest.mark.parametrize("key", ["questions", "annotations", "images", "image_name"])
def test_a_misspelt_split_is_not_passed_over(key: str, folder: Path) -> None:
    (folder / "mine.yaml").write_text(f"base: mini_okvqa\n{key}: {{trian: x}}\n")
    with pytest.raises(UsageError, match=f"{key}: 'trian' is not allowed: train and val"):
        paths.dataset(SharedSettings(dataset="mine"))


def test_a_stand_in_for_no_lvlm_is_not_passed_over(folder: Path) -> None:
    (folder / "mine.yaml").write_text("base: mini_okvqa\nstand_in: {qwen2.5_vl_3b: mini_qwen2.5_vl}\n")
    with pytest.raises(UsageError, match="stand_in: 'qwen2.5_vl_3b' is no LVLM of configs/infer_model"):
        paths.infer_model_yaml(SharedSettings(dataset="mine"))
