"""Commands of the original Lever-Plus: each works, or one line says what to use."""

from pathlib import Path

import pytest

from lever_plus import paths, pipeline
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from tests.test_scripts import ROOT, run

LM = "query_img_text_icd_img_text"
OLD = f"vqa okvqa_local 0 {LM} rand_sampler qwen2.5_vl_3B"
GONE = sorted(p.name for p in (ROOT / "scripts").glob("*.sh") if p.is_symlink())
PRINTING = (
    "import os, sys\nprint(*sys.argv[1:], *(f'{n}={os.environ.get(n)}' for n in "
    "'DATASET GPU_ID SAMPLER BEAM_MODEL METHODS V2_MODE TEST_DATA_NUM'.split()))\n"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts with a pipeline that prints what reaches it."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "configs").symlink_to(ROOT / "configs")
    for name in ("scripts", "lever_plus"):
        (root / name).mkdir()
    for script in (ROOT / "scripts").glob("*.sh"):
        (root / "scripts" / script.name).write_bytes(script.read_bytes())
    (root / "requirements.txt").write_bytes((ROOT / "requirements.txt").read_bytes())
    (root / "lever_plus" / "__init__.py").touch()
    (root / "lever_plus" / "pipeline.py").write_text(PRINTING)
    return root


@pytest.mark.parametrize(
    ("command", "reaches"),
    [
        ("baseline.sh vqa okvqa_local 1 qwen2.5_vl_3B", "baseline GPU_ID=1 BEAM_MODEL=qwen2.5_vl_3B"),
        ("baseline.sh vqa okvqa_local 1 text_sim_sampler", "SAMPLER=text_sim_sampler BEAM_MODEL=qwen2.5_vl_3B"),
        (f"inference.sh {OLD} v1 200", "METHODS=v1 random TEST_DATA_NUM=200"),
        (f"inference.sh {OLD} v2_lora".replace("rand", "mix"), "METHODS=v2_lora SAMPLER=mix_sampler"),
        (f"inference.sh {OLD} v3 -1", "METHODS=auto TEST_DATA_NUM=-1"),
        (f"train_lever_lm.sh vqa okvqa_local 4 {LM} rand_sampler qwen2.5_vl_3B v1", "v2 V2_MODE=v1 GPU_ID=4"),
        (f"train_lever_lm.sh vqa okvqa_local 4 {LM} rand_sampler qwen2.5_vl_3B v2_lora", "v2 V2_MODE=lora"),
        (f"train_lever_lm.sh vqa okvqa_local 7 {LM} rand_sampler qwen2.5_vl_3B v3", "v3 V2_MODE=None"),
        ("generate_data.sh vqa vqav2_local [4] rand_sampler qwen2.5_vl_3B", "beam_data DATASET=vqav2_local GPU_ID=[4]"),
    ],
)  # fmt: skip
def test_positional_forms_that_are_unambiguous_work(checkout: Path, command: str, reaches: str) -> None:
    script, *words = command.split()
    result = run(f"scripts/{script}", *words, root=checkout)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in reaches.split()), result.stdout


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (f"inference.sh {OLD} v4", "docs/migration.md"),
        (f"train_lever_lm.sh vqa okvqa_local 0 {LM} rand_sampler qwen2.5_vl_3B v0", "docs/migration.md"),
        ("generate_rl_data.sh a/v2.ckpt beams.json out.json q.pt c.pt cuda:0 qwen2.5_vl_3B okvqa_local",
         "LEVER_LM_CHECKPOINT_PATH=a/v2.ckpt RL_DATA_PATH=out.json bash scripts/generate_rl_data.sh vqa okvqa_local"),
        ("export_embeddings.sh results/okvqa/model_cpk/v2/x.ckpt okvqa_local results/okvqa/cache cuda:0",
         "bash scripts/export_embeddings.sh vqa okvqa_local cuda:0"),
        ("generate_rl_data_for_sampler.sh mix_sampler qwen2.5_vl_3B okvqa_local cuda:3",
         "bash scripts/generate_rl_data.sh vqa okvqa_local cuda:3 mix_sampler qwen2.5_vl_3B"),
    ],
)  # fmt: skip
def test_other_forms_say_in_one_line_what_to_use(command: str, says: str) -> None:
    script, *words = command.split()
    result = run(f"scripts/{script}", *words)
    assert result.returncode == 2 and says in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("script", GONE)
def test_scripts_that_are_gone_say_what_to_use_and_are_in_the_migration_guide(script: str) -> None:
    result = run(f"scripts/{script}")
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert script in result.stderr and "docs/migration.md" not in result.stderr  # each has an answer of its own
    assert script in (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")


def test_every_former_setting_is_in_the_migration_guide() -> None:
    from lever_plus.settings.former import _INSTEAD, FORMER, VALUES

    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    words = [*FORMER, *(value for of in (*VALUES.values(), *_INSTEAD.values()) for value in of)]
    assert [word for word in words if f"`{word}`" not in text] == []


def test_each_supervised_selector_has_its_own_file_and_is_evaluated_under_its_name(tmp_path: Path) -> None:
    env = {"RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa", "METHODS": "v1 v2_lora random"}
    settings = load(InferenceSettings, {}, env)
    files = {paths.v2_checkpoint(settings, version) for version in ("v1", "v2", "v2_lora")}
    assert len(files) == 3
    steps = pipeline.needed("inference", env)
    assert steps == ["dataset", "embeddings", "beam_data", "channels", "inference"]
    jobs = [(job.step, job.extra) for job in pipeline.jobs_of(steps, env)][4:]
    own = {"CLIP_PATH": str(paths.lora_clip(settings)), "EMBEDDINGS_OF": "v2_lora"}
    assert jobs == [("v2", {"V2_MODE": "v1"}), ("v2", {"V2_MODE": "lora"}), ("embeddings", own), ("inference", {})]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    steps = pipeline.needed("inference", env)
    assert [job.step for job in pipeline.jobs_of(steps, env)] == ["dataset", "embeddings", "embeddings", "inference"]


@pytest.mark.parametrize("script", ["train_v3.sh", "train_v3_rce_only.sh", "inference_v3_best.sh", "run_experiment.sh"])
def test_a_setting_among_the_arguments_is_refused_with_where_it_stands(script: str) -> None:
    result = run(f"scripts/{script}", "RCE_EPOCHS=3", "-n")
    assert result.returncode == 2
    assert f"settings stand before the command: RCE_EPOCHS=3 bash scripts/{script}" in result.stderr


def test_a_run_may_be_named_like_a_setting(checkout: Path) -> None:
    result = run("scripts/bundle.sh", "KL=1", root=checkout)
    assert "settings stand before" not in result.stderr


def test_every_part_of_the_benchmark_has_a_dry_run() -> None:
    for words in (["-n"], ["rl", "-n"], ["lvlm", "--arch", "mini", "--dry-run"]):
        result = run("scripts/benchmark.sh", *words)
        assert (result.returncode, result.stderr) == (0, "") and "would run" in result.stdout
