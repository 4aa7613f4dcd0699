"""REPORT_TO: what is installed is used, what is not is one line before the first step."""

import importlib.util
import sys
import types

import pytest

from lever_plus.rl.runlog import RunLog
from lever_plus.settings.loading import load
from lever_plus.settings.selector import TrainV2Settings, TrainV3Settings
from lever_plus.settings.word_lists import trackers
from open_mmicl.errors import UsageError

CONFIG = {"BATCH_SIZE": 4, "RCE_LR": 1e-4, "TIED": True, "REWARD_MODE": "plan", "RESULT_DIR": "/a/b", "EXP_NAME": "try"}


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_has_the_curves_and_the_settings(tmp_path) -> None:
    log = RunLog(tmp_path, "tensorboard", CONFIG)
    for epoch in (0, 1, 2):
        log.epoch({"phase": "rce", "epoch": epoch, "step": epoch, "loss": 1.0 / (epoch + 1), "metric": 0.1 * epoch})
    log.close()
    found = events(tmp_path / "tensorboard")
    assert [round(e.value, 3) for e in found.Scalars("rce/loss")] == [1.0, 0.5, 0.333]
    assert [e.step for e in found.Scalars("rce/metric")] == [0, 1, 2]
    said = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for name in ("BATCH_SIZE", "RCE_LR", "TIED", "REWARD_MODE"):
        assert name.encode() in said
    assert b"/a/b" not in said


def test_none_writes_no_curves(tmp_path) -> None:
    log = RunLog(tmp_path, "none", CONFIG)
    log.epoch({"phase": "rce", "epoch": 1, "step": 1, "loss": 1.0})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["train_log.jsonl"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_settings_and_numbers(tmp_path, monkeypatch, name: str) -> None:
    calls = []
    module = types.ModuleType(name)
    module.init = lambda **given: calls.append(("init", given))
    module.log = lambda given: calls.append(("log", given))
    module.finish = lambda: calls.append(("finish",))
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    log = RunLog(tmp_path, f"{name},tensorboard", CONFIG)
    log.epoch({"phase": "grpo", "epoch": 1, "step": 8, "loss": 0.5})
    log.close()
    assert [call[0] for call in calls] == ["init", "log", "finish"]
    assert calls[0][1]["name"] == "try" and calls[0][1]["config"]["BATCH_SIZE"] == 4
    assert calls[1][1] == {"grpo/loss": 0.5, "epoch": 1}
    assert (tmp_path / "tensorboard").is_dir()


@pytest.mark.parametrize("cls", [TrainV2Settings, TrainV3Settings])
def test_what_is_unknown_or_not_installed_is_one_line_before_anything_runs(monkeypatch, cls: type) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    for value, said in (("wandb", "pip install wandb"), ("mlflow", "not allowed"), ("tensorboard,wandb", "wandb")):
        with pytest.raises(UsageError, match=said):
            load(cls, {"DATASET": "mini_okvqa", "REPORT_TO": value})
    assert trackers("tensorboard") == ["tensorboard"] and trackers("none") == []
