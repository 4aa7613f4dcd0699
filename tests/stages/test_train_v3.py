import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lever_plus import cli, config
from lever_plus.rl.planted import Planted, PlantedWorld, policy_value
from lever_plus.selectors import PointerSelector
from lever_plus.settings.selector import TrainV3Settings
from lever_plus.stages import launch, train_v3, v3_phases

WORLD = PlantedWorld(
    queries=150, heldout=100, items=400, pool=16, pointers=6, dim=16, topic_dim=4, nuisance=1.5, seed=5
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    Planted(WORLD).write(folder)
    return folder


def environment(files, out, **values):
    return {
        "RL_DATA_PATH": files / "rl_data.json", "QUERY_EMB_PATH": files / "embeddings.pt", "SFT_CKPT": "scratch",
        "OUTPUT_DIR": out, "RESULT_DIR": out / "results", "DEVICE": "cpu", "RCE_EPOCHS": 1, "GRPO_EPOCHS": 1,
        "HIDDEN_DIM": 32, **values,
    }  # fmt: skip


def stage(monkeypatch, files, out, *arguments, **values):
    for name, value in environment(files, out, **values).items():
        monkeypatch.setenv(name, str(value))
    return cli.stage_main(TrainV3Settings, train_v3.run, train_v3.__doc__, list(arguments))


def test_trains_on_files_alone_and_recognises_what_is_done(monkeypatch, files, tmp_path, capsys):
    assert stage(monkeypatch, files, tmp_path) == 0
    best = json.loads((tmp_path / "best.json").read_text())
    checkpoint = torch.load(tmp_path / best["file"], weights_only=True)
    assert checkpoint["settings"]["KL_BETA"] == 0.05 and checkpoint["settings"]["OUTPUT_DIR"] == str(tmp_path)
    assert checkpoint["provenance"]["prompt_order"] == "best_last"
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"
    assert not (tmp_path / "state").exists()
    assert "each query counts as an image of its own" in capsys.readouterr().out
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.pt")}
    assert stage(monkeypatch, files, tmp_path) == 0
    assert "done before with the same inputs and settings" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.pt")} == written
    assert stage(monkeypatch, files, tmp_path, RCE_LR=3e-4) == 0  # other settings: retrained, nothing deleted
    assert (tmp_path / "previous_1" / "grpo_epoch1.pt").is_file() and (tmp_path / "grpo_epoch1.pt").is_file()


def test_grpo_raises_the_true_value_on_queries_it_never_saw(monkeypatch, files, tmp_path):
    assert stage(monkeypatch, files, tmp_path, RCE_EPOCHS=3, GRPO_EPOCHS=12, GRPO_LR=1e-3, RCE_LR=1e-3, KL_BETA=0) == 0
    values = [policy_value(files, PointerSelector.load(tmp_path / f)) for f in ("rce_epoch3.pt", "grpo_epoch12.pt")]
    assert values[0]["policy"] > values[0]["random"] + 0.2
    assert values[1]["policy"] > max(values[0]["policy"], values[0]["cosine"]) + 0.05


@pytest.mark.parametrize("given, grpo_falls", [({}, True), ({"LR_SCHEDULE": "constant"}, False)])
def test_the_learning_rate_falls_in_grpo_unless_a_constant_one_is_asked_for(
    monkeypatch, files, tmp_path, given, grpo_falls
):
    assert stage(monkeypatch, files, tmp_path, **given) == 0
    lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    steps = [r for r in lines if r["kind"] == "step"]
    rates = {phase: [r["lr"] for r in steps if r["phase"] == phase] for phase in ("rce", "grpo")}
    assert len(set(rates["rce"])) == 1 and rates["grpo"][0] == rates["rce"][0]
    assert rates["grpo"] == sorted(rates["grpo"], reverse=True) and (rates["grpo"][-1] < rates["grpo"][0]) is grpo_falls


def test_from_scratch_the_selector_is_tied_and_a_file_keeps_its_own_shape(monkeypatch, files, tmp_path, capsys):
    def shape(folder):
        return torch.load(tmp_path / folder / "rce_epoch1.pt", weights_only=True)["config"]["tied"]

    assert stage(monkeypatch, files, tmp_path / "tied", GRPO_EPOCHS=0) == 0 and shape("tied")
    assert stage(monkeypatch, files, tmp_path / "two", GRPO_EPOCHS=0, TIED=0) == 0 and not shape("two")
    sft = tmp_path / "two" / "rce_epoch1.pt"
    monkeypatch.delenv("TIED")
    assert stage(monkeypatch, files, tmp_path / "on", GRPO_EPOCHS=0, SFT_CKPT=sft) == 0 and not shape("on")
    sft = tmp_path / "tied" / "rce_epoch1.pt"
    assert stage(monkeypatch, files, tmp_path / "refused", GRPO_EPOCHS=0, SFT_CKPT=sft, TIED=0) == 2
    assert "TIED=False, but" in capsys.readouterr().err


def test_a_high_learning_rate_does_not_learn_the_labels_noise_by_heart(monkeypatch, tmp_path):
    world = PlantedWorld(queries=150, heldout=200, items=500, pool=32, pointers=6, dim=64, seed=5)
    Planted(world).write(tmp_path)
    values = {"RCE_LR": 3e-3, "GRPO_LR": 3e-3, "KL_BETA": 0, "RCE_EPOCHS": 2, "GRPO_EPOCHS": 10, "BATCH_SIZE": 16}
    found = {}
    for name, decay in (("held", {}), ("free", {"START_DECAY": 0})):
        assert stage(monkeypatch, tmp_path, tmp_path / name, HIDDEN_DIM=64, **values, **decay) == 0
        found[name] = policy_value(tmp_path, PointerSelector.load(tmp_path / name / "grpo_epoch10.pt"))["policy"]
    assert found["held"] > found["free"] + 0.01


def test_a_selector_from_a_file_is_not_pulled_back_unless_asked():
    decay = {}
    for name, given in {"scratch": {"sft_ckpt": "scratch"}, "file": {"sft_ckpt": "v2.ckpt"}, "standard": {}}.items():
        decay[name] = v3_phases.start_decay(TrainV3Settings(**given))
        assert v3_phases.start_decay(TrainV3Settings(start_decay=3.0, **given)) == 3.0
    assert decay == {"scratch": 50.0, "file": 0.0, "standard": 0.0}
    assert v3_phases.start_decay(TrainV3Settings(sft_ckpt="scratch", batch_size=8)) == 25.0


def test_fault_13_a_missing_sft_checkpoint_is_an_error(monkeypatch, files, tmp_path, capsys):
    assert stage(monkeypatch, files, tmp_path, SFT_CKPT=tmp_path / "none.ckpt") == 3
    error = capsys.readouterr().err
    assert "none.ckpt" in error and "train_lever_lm.sh" in error and "scratch" in error
    assert not list(tmp_path.glob("*.pt"))


def test_fault_06_settings_are_used_or_refused(monkeypatch, files, tmp_path, capsys):
    assert stage(monkeypatch, files, tmp_path, "--dry-run", EPS_LOW=0.1, GRPO_MODE="exact") == 0
    assert "EPS_LOW is set, but" in capsys.readouterr().out
    assert stage(monkeypatch, files, tmp_path, RCE_LR="abc") == 2
    assert "RCE_LR=abc is not allowed" in capsys.readouterr().err
    assert stage(monkeypatch, files, tmp_path, RCE_LR=1e-4, RCE_EPOCHS=0, GRPO_EPOCHS=0) == 2
    assert stage(monkeypatch, files, tmp_path, RCE_EPOCHS=1, GRPO_MODE="online", EPS_LOW=0.2, GRPO_EPOCHS=1) == 2
    assert "needs the LVLM" in capsys.readouterr().err


def test_an_sft_checkpoint_must_fit_the_embeddings_and_the_shape_asked_for(monkeypatch, files, tmp_path, capsys):
    assert stage(monkeypatch, files, tmp_path / "a", GRPO_EPOCHS=0) == 0
    sft = tmp_path / "a" / "rce_epoch1.pt"
    assert stage(monkeypatch, files, tmp_path / "b", SFT_CKPT=sft, NUM_LAYERS=3) == 2
    assert "NUM_LAYERS=3, but" in capsys.readouterr().err
    torch.save(torch.randn(WORLD.items, 48), tmp_path / "wide.pt")
    monkeypatch.setenv("NUM_LAYERS", "1")
    assert stage(monkeypatch, files, tmp_path / "c", SFT_CKPT=sft, QUERY_EMB_PATH=tmp_path / "wide.pt") == 4
    assert "widths (16, 16)" in capsys.readouterr().err


def test_fault_11_queries_of_one_image_are_never_on_both_sides(monkeypatch, files, tmp_path):
    from lever_plus.stages.v3_phases import read_groups

    torch.save(torch.arange(WORLD.items) // 5, tmp_path / "images.pt")
    values = environment(files, tmp_path, IMAGE_IDS_PATH=tmp_path / "images.pt", VAL_FRACTION=0.3)
    settings = config.resolve(TrainV3Settings, env={k: str(v) for k, v in values.items()}, dotenv={})
    _, (train, val), _, _ = read_groups(settings)
    assert len(train) + len(val) == WORLD.queries and len(val) > 5
    assert not set((train.query_idx // 5).tolist()) & set((val.query_idx // 5).tolist())


@pytest.mark.slow
def test_killed_at_any_moment_or_started_twice_it_ends_with_the_same_bytes(files, tmp_path):
    def command(out):
        values = environment(files, out, RCE_EPOCHS=4, GRPO_EPOCHS=4, BATCH_SIZE=4)
        env = {**os.environ, **{k: str(v) for k, v in values.items()}, "PYTHONPATH": str(config.REPO_ROOT)}
        return subprocess.Popen(
            [sys.executable, "-m", "lever_plus.stages.train_v3"], env=env, stdout=subprocess.DEVNULL
        )

    assert command(tmp_path / "whole").wait() == 0
    out, deadline = tmp_path / "cut", time.monotonic() + 100
    for wanted in ("rce_epoch2.pt", "grpo_epoch1.pt"):
        child = command(out)
        while not (out / wanted).is_file() and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert command(out).wait() == 0
    pair = [command(tmp_path / "twice") for _ in range(2)]
    assert [child.wait() for child in pair] == [0, 0]
    whole = torch.load(tmp_path / "whole" / "grpo_epoch4.pt", weights_only=True)["model_state_dict"]
    for folder in (out, tmp_path / "twice"):
        found = torch.load(folder / "grpo_epoch4.pt", weights_only=True)["model_state_dict"]
        assert all(torch.equal(found[name], value) for name, value in whole.items())
        assert not [path for path in folder.iterdir() if path.name.startswith(".") or path.name == "state"]
        records = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        epochs = [(record["phase"], record["epoch"]) for record in records if record["kind"] == "epoch"]
        assert epochs == [(phase, epoch) for phase in ("rce", "grpo") for epoch in range(5)]


def test_a_folder_whose_run_was_moved_away_never_goes_on_from_that_runs_state(tmp_path):
    """A kill may fall between the moving of an old run's files and the end of that."""
    from lever_plus.provenance import Recipe
    from lever_plus.rl.deepspeed_engine import Processes

    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "latest.json").write_text("{}")
    launch.prepare_folder(tmp_path, Recipe({}), "new", TrainV3Settings(), Processes(0, 1, torch.device("cpu")))
    assert [path.name for path in tmp_path.iterdir()] == [launch.RUN_FILE]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_two_processes_equal_one_process(files, tmp_path, monkeypatch, zero_stage):
    values = {"BATCH_SIZE": 23, "RCE_EPOCHS": 1, "GRPO_EPOCHS": 2, "ADVANTAGE_SCALE": "batch"}
    assert stage(monkeypatch, files, tmp_path / "one", **values) == 0
    env = environment(files, tmp_path / "two", **values, NPROC=2, ZERO_STAGE=zero_stage)
    env = {**os.environ, **{k: str(v) for k, v in env.items()}, "PYTHONPATH": str(config.REPO_ROOT)}
    subprocess.run([sys.executable, "-m", "lever_plus.stages.train_v3"], env=env, check=True, capture_output=True)
    one, two = (
        torch.load(tmp_path / name / "grpo_epoch2.pt", weights_only=True)["model_state_dict"] for name in ("one", "two")
    )
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize(("kl", "said"), [(None, False), (0.4, False), (100.0, False), (101.0, True), (1.4e12, True)])
def test_a_policy_that_left_the_scored_pointers_is_told_of(kl, said):
    best = {"phase": "grpo", "epoch": 3} | ({} if kl is None else {"kl": kl})
    told = train_v3.drift(best, "val_expected_accuracy")
    assert bool(told) == said and (not said or f"{kl:.3g}" in told and "val_expected_accuracy" in told)
