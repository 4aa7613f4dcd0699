"""Files that cannot be read, and names taken by something that is no file: one error each, exit code 3 or 4."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lever_plus import io, paths
from lever_plus.best import read_best
from lever_plus.config import load_yaml, read_dotenv
from lever_plus.data.beam_data import load_pools
from lever_plus.data.dataset import load_split
from lever_plus.data.embeddings import load_embeddings
from lever_plus.data.rl_data import load_rl_data
from lever_plus.experiments.samples import read_samples
from lever_plus.experiments.training import read_log, read_training
from lever_plus.settings.shared import SharedSettings
from lever_plus.stages.recipes import dry_run_done
from open_mmicl.errors import DamagedInputError, LeverError, MissingInputError
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.images import ImageFiles
from tests.data import make
from tests.reference.fake_run import write_training

UNREADABLE = Path("/proc/self/mem")  # a file whose first bytes the system refuses, to every user
READERS = {
    "rl.json": lambda p: load_rl_data(p, make.ROWS),
    "pools.json": load_pools,
    "e.pt": lambda p: load_embeddings(p, "query embeddings"),
    "samples.jsonl": read_samples,
    "train_log.jsonl": read_log,
    "best.json": read_best,
    "image.jpg": lambda p: ImageFiles().digest(str(p)),
}
SETTINGS = {".env": read_dotenv, "data.yaml": load_yaml, "lvlm.yaml": InferModelConfig.load}


@pytest.mark.skipif(not UNREADABLE.exists(), reason="Linux only")
@pytest.mark.parametrize("name", [*READERS, *SETTINGS])
def test_what_the_system_refuses_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(UNREADABLE)
    with pytest.raises(DamagedInputError, match=name) as caught:
        (READERS | SETTINGS)[name](tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not UNREADABLE.exists(), reason="Linux only")
@pytest.mark.parametrize("which", ["OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"])
def test_vqa_files_that_the_system_refuses(which: str, tmp_path: Path) -> None:
    questions, annotations = make.vqa_json([4, 5, 6])
    make.write(tmp_path / "OpenEnded_mscoco_val2014_questions.json", questions)
    make.write(tmp_path / "mscoco_val2014_annotations.json", annotations)
    (tmp_path / which).unlink()
    (tmp_path / which).symlink_to(UNREADABLE)
    with pytest.raises(DamagedInputError, match=f"{which}.*cannot be read"):
        load_split(paths.dataset(SharedSettings(dataset="okvqa_local", okvqa_path=str(tmp_path))), "val")


@pytest.mark.parametrize("taken", ["folder", "loop", "nowhere"])
@pytest.mark.parametrize("name", READERS)
def test_a_name_taken_by_no_file(name: str, taken: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if taken == "folder":
        path.mkdir()
    else:
        path.symlink_to(name if taken == "loop" else "nowhere")
    with pytest.raises(LeverError, match=name) as caught:
        READERS[name](path)
    assert caught.value.exit_code in (3, 4)


@pytest.mark.parametrize("name", ["best.json", "run.json", "train_log.jsonl"])
def test_a_folder_in_place_of_a_trainings_file_does_not_pass_for_absent(name: str, tmp_path: Path) -> None:
    folder = write_training(tmp_path / "v3")
    (folder / name).unlink()
    read_training(folder)  # absent: allowed, a checkpoint from elsewhere has none
    (folder / name).mkdir()
    with pytest.raises(MissingInputError, match=name):
        read_training(folder)


@pytest.mark.parametrize(
    ("value", "plain"),
    [(1, True), (0.5, True), (None, True), (True, True), ("a\nb é", True), ("\ud800", False), (10**400, False),
     (float("inf"), False), ([], False), ({}, False)],
)  # fmt: skip
def test_plain_values(value: Any, plain: bool) -> None:
    assert io.is_plain(value) == plain


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    torch.save(torch.zeros(2, 2), tmp_path / "e.pt")
    (tmp_path / "pools.json").write_text("{}")
    for path in (tmp_path / "e.pt", tmp_path / "pools.json"):
        path.chmod(0)
        with pytest.raises(DamagedInputError, match="cannot be read"):
            READERS[path.name](path)


def test_a_dry_run_says_done_only_of_what_is_there(tmp_path: Path) -> None:
    class Settings:
        assume = ""

    def missing() -> Any:
        raise MissingInputError("v3")

    output = tmp_path / "metrics.json"
    assert not dry_run_done(Settings, output, missing, "inference")  # nothing there: the recipe is not even asked
    output.write_text("{}")
    assert not dry_run_done(Settings, output, missing, "inference")
    assert dry_run_done(Settings, output, lambda: None, "inference")  # brought: no recipe of ours behind it
    Settings.assume = "okvqa"
    assert not dry_run_done(Settings, output, lambda: None, "inference")
