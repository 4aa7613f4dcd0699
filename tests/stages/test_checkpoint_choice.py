"""Fault 10: the best checkpoint is the one with the best validation metric, not the newest file."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lever_plus import paths
from lever_plus.best import UNCOMPARED
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.stages.checkpoint_choice import choose_v3
from open_mmicl.errors import DamagedInputError, MissingInputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = paths.v3_dir(load(InferenceSettings, {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}, {}))
    folder.mkdir(parents=True)
    for name in ("rce_epoch1.pt", "rce_epoch2.pt", "grpo_epoch1.pt"):
        torch.save({"metrics": {}}, folder / name)
    os.utime(folder / "rce_epoch2.pt", (1, 1))
    rce = {"file": "rce_epoch2.pt", "phase": "rce", "epoch": 2, "value": 0.9}
    grpo = {"file": "grpo_epoch1.pt", "phase": "grpo", "epoch": 1, "value": 0.8}
    best = {**rce, "metric": "expected_reward", "per_phase": {"rce": rce, "grpo": grpo}}
    (folder / "best.json").write_text(json.dumps(best))
    return folder


def choose(tmp_path: Path, **values: str) -> dict:
    return choose_v3(load(InferenceSettings, {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", **values}, {}))


def test_fault_10_the_best_by_the_metric_not_the_newest(folder: Path, tmp_path: Path) -> None:
    chosen = choose(tmp_path)
    assert chosen["path"] == str(folder / "rce_epoch2.pt") and (chosen["phase"], chosen["epoch"]) == ("rce", 2)
    assert "expected_reward" in chosen["why"] and "0.9" in chosen["why"]


def test_a_phase_or_a_file_can_be_asked_for(folder: Path, tmp_path: Path) -> None:
    assert choose(tmp_path, CHECKPOINT_PHASE="grpo")["path"] == str(folder / "grpo_epoch1.pt")
    named = choose(tmp_path, LEVER_LM_CHECKPOINT_PATH=str(folder / "rce_epoch1.pt"))
    assert (named["phase"], named["epoch"]) == ("rce", 1)


def test_with_nothing_held_out_the_last_epoch_is_taken_and_said(folder: Path, tmp_path: Path) -> None:
    best = json.loads((folder / "best.json").read_text())
    best["per_phase"] = {name: {**entry, "value": None} for name, entry in best["per_phase"].items()}
    best |= {**best["per_phase"]["grpo"], "metric": UNCOMPARED}
    (folder / "best.json").write_text(json.dumps(best))
    chosen = choose(tmp_path)
    assert chosen["path"] == str(folder / "grpo_epoch1.pt") and "last epoch" in chosen["why"]
    assert "best" not in chosen["why"] and "no train query was held out" in chosen["why"]


def test_what_is_missing_or_damaged_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nowhere"):
        choose(tmp_path, LEVER_LM_CHECKPOINT_PATH=str(tmp_path / "nowhere.pt"))
    best = json.loads((folder / "best.json").read_text())
    del best["per_phase"]["grpo"]
    (folder / "best.json").write_text(json.dumps(best))
    with pytest.raises(MissingInputError, match="only checkpoints of rce"):
        choose(tmp_path, CHECKPOINT_PHASE="grpo")
    (folder / "rce_epoch2.pt").unlink()
    with pytest.raises(MissingInputError, match=r"rce_epoch2\.pt"):
        choose(tmp_path)
    torch.save({"metrics": {}}, tmp_path / "outside.pt")
    contents = ["[1]", '{"file": 3}', '{"per_phase": []}', "", "[" * 100_000, "9" * 10_000]
    for name, values in {
        "file": ("../outside.pt", str(tmp_path / "outside.pt"), "..", ".", "", "a\0b", "\ud800"),
        "value": (None, "0.9", True, 10**400),
        "epoch": (1.5, True, None),
        "phase": (3,),
    }.items():
        for value in values:  # in the entry that is read or in another
            contents.append(json.dumps({**best, "per_phase": {"rce": {**best["per_phase"]["rce"], name: value}}}))
            contents.append(json.dumps({**best, name: value}))
    contents.append(json.dumps({**best, "per_phase": {"rce": "rce_epoch2.pt"}}))
    for content in contents:
        (folder / "best.json").write_text(content)
        for phase in ("auto", "rce"):
            with pytest.raises(DamagedInputError, match=r"best\.json"):
                choose(tmp_path, CHECKPOINT_PHASE=phase)
    (folder / "best.json").unlink()
    with pytest.raises(MissingInputError, match="LEVER_LM_CHECKPOINT_PATH"):
        choose(tmp_path)


def test_an_old_folder_without_best_json_goes_by_the_recorded_val_loss(tmp_path: Path) -> None:
    folder = paths.v3_dir(load(InferenceSettings, {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}, {}))
    folder.mkdir(parents=True)
    for name, loss in (("rce_epoch1", 3.0), ("rce_epoch2", np.float32(2.5)), ("grpo_epoch1", 2.8)):
        torch.save({"metrics": {"val_loss": loss}}, folder / f"{name}.pt")
    assert choose(tmp_path, CHECKPOINT_PHASE="rce")["path"] == str(folder / "rce_epoch2.pt")
    both = choose(tmp_path)  # RCE's lower loss says nothing against GRPO's
    assert both["path"] == str(folder / "grpo_epoch1.pt") and "last phase" in both["why"]
    chosen = choose(tmp_path, CHECKPOINT_PHASE="grpo")
    assert chosen["epoch"] == 1 and "the only checkpoint" in chosen["why"]
    torch.save({"metrics": {}}, folder / "rce_epoch3.pt")  # one that does not say, and no RL data: no guess
    with pytest.raises(MissingInputError, match="LEVER_LM_CHECKPOINT_PATH"):
        choose(tmp_path)
