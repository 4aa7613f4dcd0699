"""Data sets that take what another one has: worlds of other seeds are three lines of YAML."""

from pathlib import Path

import pytest

from lever_plus import config, paths
from lever_plus.data import catalog
from lever_plus.settings.shared import SharedSettings
from lever_plus.stages import prepare_dataset
from open_mmicl.errors import DamagedInputError, UsageError

SMALL = "base: mini_okvqa\ngenerator_args: {table_seed: %d, seed: 5, n_train: 20, n_val: 10}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configs folder with mini_okvqa and room for more."""
    source = (config.CONFIG_DIR / "dataset" / "mini_okvqa.yaml").read_text()
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mini_okvqa.yaml").write_text(source)
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path)
    return tmp_path / "dataset"


def test_a_world_of_other_seeds_is_its_base_in_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    (folder / "mine.yaml").write_text(SMALL % 9)
    settings = SharedSettings(dataset="mine", result_dir=str(tmp_path / "r"), mini_okvqa_path="/elsewhere")
    mine, base = catalog.load("mine", settings), catalog.load("mini_okvqa", settings)
    assert mine.name == "mine" and mine.root == tmp_path / "r" / "mine" / "dataset"
    assert base.root == Path("/elsewhere")  # the base's folder variable is the base's alone
    assert mine.questions["val"].parent == mine.image_dirs["val"][0].parent.parent == mine.root
    assert (mine.stand_in, mine.clip, mine.settings) == (base.stand_in, base.clip, base.settings)
    assert paths.dataset_dir(settings) == tmp_path / "r" / "mine"


def test_mappings_are_joined_and_bases_may_have_bases(folder: Path) -> None:
    (folder / "a.yaml").write_text(SMALL % 9 + "settings: {SAMPLE_NUM: 7}\n")
    (folder / "b.yaml").write_text("base: a\ngenerator_args: {table_seed: 11}\n")
    found = catalog.load("b", SharedSettings())
    assert found.generator_args == {"table_seed": 11, "seed": 5, "n_train": 20, "n_val": 10}
    assert found.settings["SAMPLE_NUM"] == 7 and found.settings["RL_QUERY_NUM"] == 2000 and found.name == "b"


def test_bases_that_are_no_bases(folder: Path) -> None:
    (folder / "a.yaml").write_text("base: b\n")
    (folder / "b.yaml").write_text("base: a\n")
    with pytest.raises(DamagedInputError, match="base"):
        catalog.load("a", SharedSettings())
    (folder / "c.yaml").write_text("base: nowhere\n")
    with pytest.raises(UsageError, match="nowhere"):
        catalog.load("c", SharedSettings())


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


@pytest.mark.parametrize("key", ["mini_okvqa_b", "mini_okvqa_c"])
def test_the_worlds_that_come_with_the_project(key: str) -> None:
    found = catalog.load(key, SharedSettings())
    assert found.name == key and found.generator_args["table_seed"] > 1
