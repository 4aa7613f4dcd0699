"""The order of the steps, and what an evaluation takes as it is."""

import importlib
from pathlib import Path

import pytest

from lever_plus import paths, pipeline
from lever_plus.run import sidecar
from lever_plus.settings import load
from lever_plus.settings.inference import InferenceSettings
from open_mmicl.errors import UsageError


def test_each_step_comes_after_what_it_needs_and_once() -> None:
    for target in pipeline.STEPS:
        steps = pipeline.plan(target)
        assert steps[-1] == target and len(set(steps)) == len(steps)
        for i, step in enumerate(steps):
            assert set(pipeline.STEPS[step][1]) <= set(steps[:i])


def test_an_unknown_target_names_the_known() -> None:
    with pytest.raises(UsageError, match="beam_data, v2"):
        pipeline.plan("all")


def test_an_evaluation_does_not_train_again_what_is_there(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}
    steps = pipeline.plan("record")
    assert pipeline.needed("record", env) == steps
    settings = load(InferenceSettings, {}, env)
    paths.v3_dir(settings).mkdir(parents=True)
    (paths.v3_dir(settings) / "rce_epoch1.pt").write_bytes(b"x")
    assert pipeline.needed("record", env) == [*pipeline.plan("v2"), "label", "inference", "record"]
    for made in (paths.v2_checkpoint(settings), paths.label_checkpoint(settings)):
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(b"x")
        sidecar(made).write_text("{}")
    assert pipeline.needed("record", env) == ["dataset", "embeddings", "channels", "inference", "record"]


def test_labels_take_no_beams_and_one_supervised_training(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "V2_MODE": "labels"}
    steps = pipeline.needed("record", env)
    assert steps == ["dataset", "embeddings", "channels", "v2", "rl_data", "v3", "inference", "record"]
    settings = load(InferenceSettings, {}, env)
    assert paths.v2_checkpoint(settings) == paths.label_checkpoint(settings)


def test_channels_are_made_only_where_they_are_read(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}
    assert "channels" in pipeline.needed("v2", env)
    assert "channels" not in pipeline.needed("v2", {**env, "EMBEDDING": "mean"})
    assert "channels" not in pipeline.needed("v2", {**env, "EMBEDDING": "clip_image clip_text"})
    assert "channels" not in pipeline.needed("v2", {**env, "V2_MODE": "lora"})
    old = paths.candidate_embeddings(load(InferenceSettings, {}, env))
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x")  # brought: what it was made for reads it
    assert "channels" not in pipeline.needed("v2", env)
    assert "channels" in pipeline.needed("v2", {**env, "EMBEDDING": "clip_text answer"})


def test_several_processes_only_ask_a_stage_that_can_say_whether_it_is_done(tmp_path: Path, monkeypatch) -> None:
    for step, (module, _, sharing) in pipeline.STEPS.items():
        if sharing == "prompts":
            assert callable(importlib.import_module(module).is_done), step
    called = []
    monkeypatch.setattr(pipeline, "_call", lambda command, env: called.append(command[-1]) or 0)
    jobs = [pipeline.Job("v2"), pipeline.Job("v3")]
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "CUDA_VISIBLE_DEVICES": ""}
    assert pipeline.run_jobs(jobs, env, {"training": 2}, False) == 0
    assert called == [pipeline.STEPS["v2"][0], pipeline.STEPS["v3"][0]]


def test_what_the_user_brought_needs_no_inputs(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}
    v2, rl = paths.v2_checkpoint(load(InferenceSettings, {}, env)), paths.rl_data(load(InferenceSettings, {}, env))
    for path in (v2, rl):
        path.parent.mkdir(parents=True)
    assert pipeline.needed("v3", env) == pipeline.plan("v3")
    rl.write_bytes(b"x")
    assert pipeline.needed("v3", env) == pipeline.plan("v3")  # v2 is where v3 starts
    assert pipeline.needed("v3", {**env, "SFT_CKPT": "scratch"}) == [
        "dataset", "embeddings", "channels", "rl_data", "v3"
    ]  # fmt: skip
    v2.write_bytes(b"x")
    assert pipeline.needed("v3", env) == ["dataset", "embeddings", "v2", "rl_data", "v3"]
    sidecar(v2).write_text("{}")  # made by us: it may be stale
    assert pipeline.needed("v3", env) == pipeline.plan("v3")


def test_the_number_of_anchors_is_that_of_the_files_found(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}
    default = load(InferenceSettings, {}, env)
    beams = paths.beam_data(default)
    beams.parent.mkdir(parents=True)
    beams.with_name(beams.name.replace("max_shot", "few_shot").replace("num:400", "num:5000")).write_bytes(b"x")
    assert load(InferenceSettings, {}, env).sample_num == 5000
    assert load(InferenceSettings, {"SAMPLE_NUM": "800"}, env).sample_num == 800
    beams.with_name(beams.name.replace("num:400", "num:7")).write_bytes(b"x")  # two of them: no guess
    assert load(InferenceSettings, {}, env).sample_num == default.sample_num == 400


@pytest.mark.parametrize(
    ("argv", "code", "word"),
    [
        (["v3", "--RCE_LR", "abc"], 2, "RCE_LR=abc"),
        (["v3", "--rce-epochs=-1"], 2, "RCE_EPOCHS=-1"),
        (["v3", "--SAMPLER", "best_sampler"], 2, "text_sim_sampler"),
        (["v3", "--RCE_EPOCH", "3"], 2, "RCE_EPOCHS"),
        (["v3", "--BEAM_MODEL", "gpt"], 2, "qwen2.5_vl_3B"),
        (["nothing"], 2, "beam_data"),
    ],
)
def test_bad_settings_stop_before_the_first_step(argv, code, word, capsys, monkeypatch) -> None:
    from lever_plus import cli

    monkeypatch.setattr(pipeline, "run_jobs", lambda *a: pytest.fail("a step was run"))
    assert cli.guard(lambda: pipeline.main([*argv, "--DATASET", "mini_okvqa"])) == code
    captured = capsys.readouterr()
    assert word in captured.err and len(captured.err.strip().splitlines()) == 1


def test_rounds_alternate_rl_data_and_training_each_from_the_best_of_the_last(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "RL_ROUNDS": "3", "EXP_NAME": "e"}
    jobs = pipeline.jobs_of(pipeline.plan("v3"), env)
    assert [job.step for job in jobs][-5:] == ["v3", "rl_data", "v3", "rl_data", "v3"]
    first, fresh2, second, fresh3, last = jobs[-5:]
    assert first.extra["OUTPUT_DIR"].endswith("round1") and second.extra["OUTPUT_DIR"].endswith("round2")
    assert "OUTPUT_DIR" not in last.extra and last.extra["RL_DATA_PATH"] == fresh3.extra["RL_DATA_PATH"]
    assert fresh2.extra["RL_DATA_PATH"] != fresh3.extra["RL_DATA_PATH"]
    assert fresh2.after == second.after and str(second.after) == first.extra["OUTPUT_DIR"]
    second.after.mkdir(parents=True)
    (second.after / "best.json").write_text('{"file": "grpo_epoch4.pt"}')
    assert second.environment({"A": "1"})["SFT_CKPT"] == str(second.after / "grpo_epoch4.pt")
    assert fresh2.environment({})["LEVER_LM_CHECKPOINT_PATH"] == str(second.after / "grpo_epoch4.pt")
