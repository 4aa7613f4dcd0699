"""The order of the steps, and what an evaluation takes as it is."""

import importlib
import json
from pathlib import Path

import pytest

from lever_plus import cli, paths, pipeline, sharing
from lever_plus.provenance import sidecar
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from open_mmicl.errors import MissingInputError, UsageError


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
    settings = load(InferenceSettings, {}, env)
    assert pipeline.needed("record", env) == [*pipeline.plan("v2"), "label", "inference", "record"]
    for made in (paths.v2_checkpoint(settings), paths.label_checkpoint(settings)):
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(b"x")
        sidecar(made).write_text("{}")
    assert pipeline.needed("record", env) == ["dataset", "embeddings", "channels", "inference", "record"]


def test_pools_of_the_channels_come_after_the_channels(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}
    assert pipeline.needed("beam_data", env) == ["dataset", "embeddings", "beam_data"]
    env["SAMPLER"] = "channel_sim_sampler"
    for target in ("beam_data", "v2", "v3"):
        steps = pipeline.needed(target, env)
        assert steps.index("channels") < steps.index("beam_data") and len(set(steps)) == len(steps)
        assert steps[-1] == target
    assert "channels" not in pipeline.needed("beam_data", {**env, "EMBEDDING": "mean"})


def test_a_server_without_log_probabilities_is_refused_before_the_first_step(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "configs" / "infer_model").mkdir(parents=True)
    yaml = "name: C\nmodel_name_or_path: c\ninterface: openai\nserver: {urls: [http://h/v1], scores: none}\n"
    (tmp_path / "configs" / "infer_model" / "closed.yaml").write_text(yaml)
    monkeypatch.chdir(tmp_path)
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "BEAM_MODEL": "closed"}
    with pytest.raises(UsageError, match="V2_MODE=labels starts from the label retriever"):
        pipeline.check(pipeline.needed("v3", env), env)
    without = {**env, "V2_MODE": "labels"}
    pipeline.check(pipeline.needed("v3", without), without)


def test_labels_take_no_beams_and_one_supervised_training(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "V2_MODE": "labels"}
    assert pipeline.needed("v3", env) == ["dataset", "embeddings", "channels", "v2", "rl_data", "v3"]
    assert pipeline.needed("record", env) == ["dataset", "embeddings", "channels", "v2", "inference", "record"]
    settings = load(InferenceSettings, {}, env)
    assert paths.v2_checkpoint(settings) == paths.label_checkpoint(settings)
    assert paths.v2_checkpoint(settings, "v1") != paths.label_checkpoint(settings)


def test_the_other_supervised_selectors_are_trained_for_an_evaluation_that_names_them(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "METHODS": "v1 v2_lora zero_shot"}
    wanted = ["dataset", "embeddings", "beam_data", "channels", "inference"]
    assert pipeline.needed("inference", env) == wanted  # v2 and the label retriever are not asked for
    assert pipeline.needed("inference", {**env, "V2_MODE": "labels"}) == wanted
    jobs = [(job.step, job.extra.get("V2_MODE")) for job in pipeline.jobs_of(wanted, env)]
    assert jobs[4:6] == [("v2", "v1"), ("v2", "lora")]
    assert [step for step, _ in jobs] == [*wanted[:-1], "v2", "v2", "embeddings", "inference"]
    settings = load(InferenceSettings, {}, env)
    for version in ("v1", "v2_lora"):
        made = paths.v2_checkpoint(settings, version)
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(b"x")
    assert pipeline.needed("inference", env) == ["dataset", "embeddings", "channels", "inference"]
    assert not paths.brings_own_embeddings(settings)


@pytest.mark.parametrize(("mode", "version"), [("lora", "v2_lora"), ("v1", "v1")])
def test_v3_is_not_begun_from_a_selector_that_it_cannot_start_from(tmp_path: Path, mode: str, version: str) -> None:
    """Everything was paid, and then the start was not found."""
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "V2_MODE": mode}
    for target in ("rl_data", "v3", "inference", "record"):
        with pytest.raises(UsageError, match=f"V2_MODE={mode} .*frozen or labels.* {version} as the version"):
            pipeline.needed(target, env)
    assert pipeline.needed("v2", env)[-1] == "v2"
    assert "inference" in pipeline.needed("inference", {**env, "METHODS": f"{version} random zero_shot"})
    assert "baseline" in pipeline.needed("baseline", env)


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


def test_an_evaluation_never_trains_a_v3_that_nobody_asked_for(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "EXP_NAME": "ecp1"}
    assert "v3" not in pipeline.needed("record", env) + pipeline.needed("inference", env)
    for name in ("exp1", "best"):
        folder = paths.v3_dir(load(InferenceSettings, {}, {**env, "EXP_NAME": name}))
        folder.mkdir(parents=True)
        (folder / "rce_epoch1.pt").write_bytes(b"x")
    with pytest.raises(MissingInputError, match=r"EXP_NAME=best, EXP_NAME=exp1; .* EXP_NAME=ecp1 bash scripts"):
        pipeline.require_v3(env)
    with pytest.raises(MissingInputError, match="EXP_NAME=best, EXP_NAME=exp1"):
        pipeline.require_v3({**env, "EXP_NAME": ""})
    pipeline.require_v3({**env, "EXP_NAME": "exp1"})
    pipeline.require_v3({**env, "METHODS": "v2 random"})


def test_several_processes_only_ask_a_stage_that_can_say_whether_it_is_done(tmp_path: Path, monkeypatch) -> None:
    for step, (module, _, kind) in pipeline.STEPS.items():
        if kind == "prompts":
            assert callable(importlib.import_module(module).is_done), step
    called = []
    monkeypatch.setattr(pipeline.cli, "call", lambda command, env: called.append(command[-1]) or 0)
    jobs = [pipeline.Job("v2"), pipeline.Job("v3")]
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "CUDA_VISIBLE_DEVICES": ""}
    assert pipeline.run_jobs(jobs, env, {"training": 2}, False) == 0
    assert called == [pipeline.STEPS["v2"][0], pipeline.STEPS["v3"][0]]


def test_on_the_cpu_the_cores_share_the_prompts_with_one_thread_each(monkeypatch) -> None:
    settings, env = load(InferenceSettings, {"DATASET": "mini_okvqa"}, {}), {"CUDA_VISIBLE_DEVICES": ""}
    monkeypatch.setattr(sharing, "cores", lambda: 12)
    monkeypatch.setattr(sharing.memory, "host_free", lambda: 64 << 30)
    shares = sharing.processes(settings, env)
    assert shares == {"prompts": 12, "training": 1, "": 1} and sharing.threads_of(shares, env) == {}
    monkeypatch.setattr(sharing.memory, "host_free", lambda: 4 << 30)  # three processes fit
    shares = sharing.processes(settings, env)
    assert shares["prompts"] == 3 and sharing.threads_of(shares, env) == {"OMP_NUM_THREADS": "4"}
    one = sharing.processes(load(InferenceSettings, {"DATASET": "mini_okvqa", "NPROC": "1"}, {}), {"NPROC": "1"})
    assert one["prompts"] == 1 and sharing.threads_of(one, {**env, "NPROC": "1"}) == {}
    assert sharing.threads_of({"prompts": 1}, {"CUDA_VISIBLE_DEVICES": "0"}) == {}
    assert sharing.processes(settings, {"CUDA_VISIBLE_DEVICES": "0,1"})["prompts"] == 2
    monkeypatch.setattr(sharing.memory, "host_free", lambda: 0)
    assert sharing.processes(settings, env)["prompts"] == 1


def test_with_nproc_a_selector_trains_in_one_process_on_the_cpu_unless_there_is_something_to_share() -> None:
    def trained_by(**more: str) -> int:
        env = {"DATASET": "mini_okvqa", "NPROC": "4", "CUDA_VISIBLE_DEVICES": "", **more}
        shares = sharing.processes(load(InferenceSettings, {}, env), env)
        assert shares["prompts"] == 4
        return shares["training"]

    assert trained_by() == 1
    shared = ({"ZERO_STAGE": "2"}, {"V2_MODE": "lora"}, {"GRPO_MODE": "online"}, {"CHECKPOINT_METRIC": "answers"})
    assert [trained_by(**more) for more in (*shared, {"CUDA_VISIBLE_DEVICES": "0,1"})] == [4] * 5


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
    former = beams.name.replace("=", ":").replace("max_shot", "few_shot").replace("num:400", "num:5000")
    beams.with_name(former).write_bytes(b"x")
    assert load(InferenceSettings, {}, env).sample_num == 5000
    assert load(InferenceSettings, {"SAMPLE_NUM": "800"}, env).sample_num == 800
    beams.with_name(beams.name.replace("num=400", "num=7")).write_bytes(b"x")  # two of them: no guess
    assert load(InferenceSettings, {}, env).sample_num == default.sample_num == 400


def test_names_that_any_file_system_takes_and_the_older_ones_are_found(tmp_path: Path) -> None:
    settings = load(InferenceSettings, {}, {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"})
    own = paths.beam_data(settings)
    assert not set(own.name) & set('<>:"|?*') and "construct_order=left" in own.name
    own.parent.mkdir(parents=True)
    older = own.with_name(own.name.replace("=", ":"))
    for name in (older.name.replace("max_shot", "few_shot"), older.name, own.name):  # the newer name wins
        own.with_name(name).write_bytes(b"x")
        assert paths.beam_data(settings).name == name


@pytest.mark.parametrize(
    ("argv", "code", "word"),
    [
        (["v3", "--RCE_LR", "abc"], 2, "RCE_LR=abc"),
        (["v3", "--rce-epochs=-1"], 2, "RCE_EPOCHS=-1"),
        (["v3", "--SAMPLER", "best_sampler"], 2, "text_sim_sampler"),
        (["v3", "--RCE_EPOCH", "3"], 2, "RCE_EPOCHS"),
        (["v3", "--BEAM_MODEL", "gpt"], 2, "qwen2.5_vl_3B"),
        (["v3", "--RCE_EPOCHS", "0", "--GRPO_EPOCHS", "0", "-n"], 2, "nothing to train"),
        (["baseline", "--METHODS", "v9", "-n"], 2, "v9"),
        (["nothing"], 2, "beam_data"),
    ],
)
def test_bad_settings_stop_before_the_first_step(argv, code, word, capsys, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "run_jobs", lambda *a: pytest.fail("a step was run"))
    assert cli.guard(lambda: pipeline.main([*argv, "--DATASET", "mini_okvqa"])) == code
    captured = capsys.readouterr()
    assert word in captured.err and len(captured.err.strip().splitlines()) == 1


def test_a_data_set_that_nobody_named_is_said_and_where_the_other_was_looked_for(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("DATASET", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    where = ["--OKVQA_PATH", str(tmp_path / "none"), "--RESULT_DIR", str(tmp_path)]
    assert cli.guard(lambda: pipeline.main(["dataset", "--dry-run", *where])) == 0
    assert f"DATASET=auto: no OK-VQA files found in {tmp_path / 'none'}, using the embedded" in capsys.readouterr().out


def test_more_questions_than_there_are_are_refused_before_the_first_step(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}
    pipeline.check(pipeline.plan("inference"), {**env, "TEST_DATA_NUM": "999999"})  # nobody knows yet
    folder = tmp_path / "mini_okvqa" / "dataset"
    folder.mkdir(parents=True)
    for split, count in (("train", 500), ("val", 90)):
        for kind in ("OpenEnded_mscoco_{}2014_questions.json", "mscoco_{}2014_annotations.json"):
            (folder / kind.format(split)).write_text(json.dumps([{"question_id": i} for i in range(count)]))
    small = {**env, "SAMPLE_NUM": "50", "RL_QUERY_NUM": "200", "TEST_DATA_NUM": "90"}
    pipeline.check(pipeline.plan("inference"), small)
    pipeline.check(pipeline.plan("inference"), {**small, "TEST_DATA_NUM": "-1"})
    for name, value in (("TEST_DATA_NUM", "91"), ("SAMPLE_NUM", "501"), ("RL_QUERY_NUM", "501")):
        with pytest.raises(UsageError, match=f"{name}={value}"):
            pipeline.check(pipeline.plan("inference"), {**small, name: value})


@pytest.mark.parametrize(
    ("target", "name"),
    [("v3", "SFT_CKPT"), ("v3", "QUERY_EMB_PATH"), ("v3", "LEVER_LM_CHECKPOINT_PATH"), ("v3", "BEAM_DATA_PATH"),
     ("v2", "IMAGE_IDS_PATH"), ("inference", "V2_CHECKPOINT_PATH"), ("record", "LEVER_LM_CHECKPOINT_PATH")],
)  # fmt: skip
def test_a_named_file_that_is_not_there_stops_before_the_first_step(target: str, name: str, tmp_path: Path) -> None:
    env, file = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}, tmp_path / "named.pt"
    steps = pipeline.plan(target)
    with pytest.raises(MissingInputError, match=f"{name}=.*named.pt: there is no such file"):
        pipeline.check(steps, {**env, name: str(file)})
    file.touch()
    pipeline.check(steps, {**env, name: str(file)})


def test_a_start_that_the_pipeline_makes_itself_need_not_be_there(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}
    own = paths.v2_checkpoint(load(InferenceSettings, {}, env))
    for start in ("scratch", "", str(own)):
        pipeline.check(pipeline.plan("v3"), {**env, "SFT_CKPT": start})


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
    best = {"file": "grpo_epoch4.pt", "phase": "grpo", "epoch": 4, "value": 0.5}
    (second.after / "best.json").write_text(json.dumps({**best, "metric": "val_expected", "per_phase": {"grpo": best}}))
    assert second.environment({"A": "1"})["SFT_CKPT"] == str(second.after / "grpo_epoch4.pt")
    assert fresh2.environment({})["LEVER_LM_CHECKPOINT_PATH"] == str(second.after / "grpo_epoch4.pt")
