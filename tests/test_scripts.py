"""The entry points: help, dry run, bad arguments, .env, and that each is thin."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lever_plus import config
from lever_plus.settings.selector import TrainV3Settings

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(p.name for p in (ROOT / "scripts").glob("*.sh") if p.name != "common.sh")


def run(*words: str, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", *words], cwd=root, env={**os.environ, "PATH": path, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_thin_valid_bash_and_strict(script: str) -> None:
    path = ROOT / "scripts" / script
    text = path.read_text()
    assert len(text.splitlines()) < 60 and os.access(path, os.X_OK)
    assert "common.sh" in text and subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


@pytest.mark.parametrize("script", ["train_v3_rce_only.sh", "inference_v3_best.sh", "quickstart.sh"])
def test_help_shows_arguments_and_live_settings(script: str) -> None:
    result = run(f"scripts/{script}", "--help")
    assert result.returncode == 0, result.stderr
    assert f"bash scripts/{script}" in result.stdout
    if script == "train_v3_rce_only.sh":
        for name in ("RCE_EPOCHS", "GRPO_EPOCHS", "KL_BETA", "ZERO_STAGE", "RL_QUERY_NUM", "V2_EPOCHS", "CLIP_BATCH"):
            rows = [line for line in result.stdout.splitlines() if line.startswith(f"  {name} ")]
            assert len(rows) == 1, name  # every step's settings, each once
        assert "--name value" not in result.stdout  # the scripts take no such options


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "test.sh"])
def test_help_fits_into_100_columns(script: str) -> None:
    result = run(f"scripts/{script}", "-h")
    assert result.returncode == 0, result.stderr
    own = result.stdout.partition("usage: ")[0]  # argparse fits its own part to the terminal
    assert max(map(len, own.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("scripts/train_v3_rce_only.sh", "7", "rand_sampler", "10", "extra"), "too many"),
        (("scripts/train_v3_rce_only.sh", "--fast"), "--fast"),
        (("scripts/train_v3.sh", "caption"), "caption"),
        (
            (
                "scripts/train_lever_lm.sh",
                "vqa",
                "auto",
                "0",
                "query_img_text_icd_img_text",
                "rand_sampler",
                "qwen2.5_vl_3B",
                "v9",
            ),
            "v9",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(words: tuple[str, ...], named: str) -> None:
    result = run(*words)
    assert result.returncode == 2 and named in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("env", "argument", "named"),
    [
        ({"RCE_LR": "abc"}, "10", "RCE_LR=abc"),
        ({}, "-1", "RCE_EPOCHS=-1"),
        ({"REWARD_MODE": "x"}, "10", "hard_plus_soft"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(env: dict, argument: str, named: str) -> None:
    result = run("scripts/train_v3_rce_only.sh", "7", "rand_sampler", argument, DATASET="mini_okvqa", **env)
    assert result.returncode == 2 and named in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_an_unknown_sampler_lists_the_known() -> None:
    result = run("scripts/train_v3_rce_only.sh", "7", "nice_sampler", DATASET="mini_okvqa")
    assert result.returncode == 2 and "text_sim_sampler" in result.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the entry points whose Python only prints the settings that reach it."""
    (tmp_path / "scripts").mkdir()
    for name in ("common.sh", "train_v3_rce_only.sh", "inference_v3_best.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "rce_only.env", tmp_path / "configs")
    (tmp_path / "lever_plus").mkdir()
    (tmp_path / "lever_plus" / "__init__.py").touch()
    shutil.copy(ROOT / "lever_plus" / "dotenv.py", tmp_path / "lever_plus")
    (tmp_path / "lever_plus" / "pipeline.py").write_text(
        "import os, sys\nfor n in 'RCE_EPOCHS GRPO_EPOCHS BATCH_SIZE RCE_LR GRPO_LR KL_BETA REWARD_ALPHA '"
        "'REWARD_BETA GPU_ID SAMPLER'.split():\n    print(n, os.environ.get(n))\nprint('ARGS', *sys.argv[1:])\n"
    )
    return tmp_path


def test_rce_only_exports_the_plans_settings_where_not_already_set(checkout: Path) -> None:
    bare = run("scripts/train_v3_rce_only.sh", root=checkout).stdout
    assert bare.split("\n")[:11] == [
        "RCE_EPOCHS 10", "GRPO_EPOCHS 0", "BATCH_SIZE 4", "RCE_LR 1e-5", "GRPO_LR 1e-5", "KL_BETA 0.1",
        "REWARD_ALPHA 0.5", "REWARD_BETA 0.8", "GPU_ID 7", "SAMPLER rand_sampler", "ARGS v3",
    ]  # fmt: skip
    assert run("scripts/train_v3_rce_only.sh", root=checkout, BATCH_SIZE="", KL_BETA="").stdout == bare
    given = run(
        "scripts/train_v3_rce_only.sh", "3", "mix_sampler", "12", "-n", root=checkout, RCE_EPOCHS="4", KL_BETA="0.2"
    )
    assert "RCE_EPOCHS 12" in given.stdout and "KL_BETA 0.2" in given.stdout and "ARGS v3 --dry-run" in given.stdout
    assert "GPU_ID 3" in given.stdout and "SAMPLER mix_sampler" in given.stdout


def test_dotenv_stands_below_the_environment_and_above_the_scripts_defaults(checkout: Path) -> None:
    (checkout / ".env").write_text("REWARD_ALPHA=0.9\nKL_BETA='0.3'\n# note\nBATCH_SIZE=16 # groups\n")
    out = run("scripts/train_v3_rce_only.sh", root=checkout, KL_BETA="0.7").stdout
    assert "REWARD_ALPHA 0.9" in out and "KL_BETA 0.7" in out and "BATCH_SIZE 16" in out


def test_dotenv_means_the_same_to_scripts_and_python(checkout: Path) -> None:
    (checkout / ".env").write_text("BATCH_SIZE = 8\n")
    assert "BATCH_SIZE 8" in run("scripts/train_v3_rce_only.sh", root=checkout).stdout
    values = config.read_dotenv(checkout / ".env")
    assert config.resolve(TrainV3Settings, {}, {}, {}, values).batch_size == 8


@pytest.mark.parametrize(
    ("words", "env", "told"),
    [((), {}, "400 TEST_DATA_NUM"), (("400",), {}, "400 -"), ((), {"TEST_DATA_NUM": "400"}, "400 -")],
)
def test_a_scripts_own_number_of_queries_is_told_from_the_users(checkout: Path, words: tuple, env: dict, told: str):
    (checkout / "lever_plus" / "pipeline.py").write_text(
        "import os\nprint(os.environ['TEST_DATA_NUM'], os.environ.get('LEVER_USUAL', '-'))\n"
    )
    done = run("scripts/inference_v3_best.sh", *words, root=checkout, LEVER_USUAL="SAMPLE_NUM TEST_DATA_NUM", **env)
    assert done.stdout.split("\n")[0] == told, done.stderr
