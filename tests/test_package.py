"""The package as it is installed: built, imported outside the repository, and its one command beside the scripts."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import pytest

from lever_plus import __version__, main
from open_mmicl.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"lever_plus": "lever_plus", "open_mmicl": "open_mmicl", "configs": "lever_plus/configs"}
"""Where each is in the installed package."""
PARTS = (*FOLDERS, "pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "LICENSE", "README.md")


def run(*words: str, cwd: Path, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP"))}
    done = subprocess.run(words, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel of this tree and, beneath it, the packages that the tests run on."""
    folder = tmp_path_factory.mktemp("package")
    source, venv = folder / "source", folder / "venv"
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", str(folder), str(source), cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(venv), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"lever_plus-{__version__}-py3-none-any.whl"
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", *offline, str(wheel), cwd=folder)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "beneath.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return venv


@pytest.mark.slow
def test_the_wheel_has_all_that_the_tree_has_and_runs_outside_it(installed: Path, tmp_path: Path) -> None:
    (site,) = installed.glob("lib/python*/site-packages")
    for folder, inside in FOLDERS.items():
        tracked = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        missing = [p for p in tracked if not (site / inside / p.relative_to(ROOT / folder)).is_file()]
        assert not missing
    code = "import open_mmicl, lever_plus, lever_plus.config as c; print(open_mmicl.__file__, c.CONFIG_DIR, c.HOME)"
    where = run(str(installed / "bin" / "python"), "-c", code, cwd=tmp_path).split()
    assert where[0].startswith(str(site)) and where[1] == str(site / "lever_plus/configs") and where[2] == str(tmp_path)
    command = str(installed / "bin" / "lever-plus")
    assert run(command, "--version", cwd=tmp_path).strip() == __version__
    before = sorted(p for p in site.rglob("*") if "__pycache__" not in p.parts)
    rows = [{"image": f"{i}.png", "question": "what?", "answer": "red"} for i in range(4)]
    (tmp_path / "configs" / "dataset").mkdir(parents=True)
    (tmp_path / "configs" / "dataset" / "mine.yaml").write_text('reader: jsonl\nfiles: "{root}/q.jsonl"\n')
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(4):
        (tmp_path / "data" / "mine" / f"{i}.png").write_bytes(b"png")
    (tmp_path / ".env").write_text("BEAM_MODEL=mini_qwen2.5_vl\n")
    said = run(command, "dataset", "check", "mine", cwd=tmp_path)
    assert "train: 3 questions" in said and "tokenizer of Mini-Qwen2.5-VL" in said
    said = run(command, "quickstart", "-n", cwd=tmp_path, DEVICE="cpu")
    assert "would make mini_okvqa at results/mini_okvqa" in said and "[7/7] v3" in said
    assert before == sorted(p for p in site.rglob("*") if "__pycache__" not in p.parts)


def test_quickstarts_second_command_sees_only_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(main.pipeline, "main", lambda words: seen.append(dict(os.environ)) or 0)
    with mock.patch.dict(os.environ, {"SEED": "3"}):
        os.environ.pop("RCE_LR", None)
        assert main.main(["quickstart", "-n"]) == 0
    train, infer = seen
    assert train["RCE_LR"] == "1e-5" and "RCE_LR" not in infer and "RCE_EPOCHS" not in infer
    assert train["SEED"] == infer["SEED"] == "3" and train["EXP_NAME"] == infer["EXP_NAME"]


def test_commands_take_what_the_scripts_take() -> None:
    """Names, order and defaults of the arguments, and the pipeline's target, as each script has them."""
    for name, command in main.COMMANDS.items():
        script = ROOT / "scripts" / f"{name}.sh"
        if not command.arguments:
            continue
        text = script.read_text()
        numbers = {}
        for number, default in re.findall(r'"?\$\(arg (\d) (?:"\$\{\w+:-([^}]*)\}"|"?\w*"?)\)', text):
            numbers[int(number)] = numbers.get(int(number)) or default
        assert max(numbers) == len(command.arguments), name
        for number, (word, default) in enumerate(command.arguments, 1):
            if word.isupper():
                assert f'{word}="$(arg {number} "${{{word}:-{default}}}")"' in text, (name, word)
        if command.targets and command.then is None:
            assert f"\npipeline {command.targets[0]}\n" in text, name
        plan = "\nload_dotenv configs/rce_only.env or-empty\n" in text
        assert (command.defaults is main.PLAN) == plan, name
        for setting, default in () if plan else (command.defaults or {}).items():
            assert f'{setting}="${{{setting}:-{default}}}"' in text, (name, setting)


def test_arguments_become_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from lever_plus import pipeline

    asked: list[list[str]] = []
    monkeypatch.setattr(pipeline, "main", lambda argv: asked.append(list(argv)) or 0)
    touched = ("DATASET", "GPU_ID", "SAMPLER", "BEAM_MODEL", "LEVER_LM", "METHODS", "TEST_DATA_NUM", "V2_MODE")
    for name in (*touched, "LEVER_USUAL", "RCE_EPOCHS", *main.PLAN):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("KL_BETA", "0.3")
    assert main.main(["train-v3-rce-only", "1", "mix_sampler", "-n"]) == 0
    assert asked == [["v3", "--dry-run"]]
    assert [os.environ[n] for n in ("GPU_ID", "SAMPLER", "RCE_EPOCHS", "KL_BETA", "BATCH_SIZE")] == [
        "1", "mix_sampler", "10", "0.3", "4",
    ]  # fmt: skip
    assert main.main(["train_lever_lm", "vqa", "okvqa_local", "0", "", "", "", "v2_lora"]) == 0
    assert asked[-1] == ["v2"] and os.environ["V2_MODE"] == "lora" and os.environ["DATASET"] == "okvqa_local"
    assert main.main(["inference", "vqa", "auto", "0", "", "", "", "v1", "50"]) == 0
    assert os.environ["METHODS"].startswith("v1 label") and os.environ["TEST_DATA_NUM"] == "50"
    assert main.main(["inference_v3_best", "-n"]) == 0 and "LEVER_USUAL" not in os.environ  # 50 is the user's by now
    monkeypatch.setenv("TEST_DATA_NUM", "")
    assert main.main(["inference_v3_best", "-n"]) == 0
    assert (os.environ["TEST_DATA_NUM"], os.environ["LEVER_USUAL"]) == ("400", "TEST_DATA_NUM")
    assert main.main(["inference_v3_best", "400", "-n"]) == 0 and "LEVER_USUAL" not in os.environ
    for words in (["nothing"], ["baseline", "caption"], ["doctor", "a", "b", "c", "d"], ["train_v3", "--what"], []):
        assert main.main(words) == UsageError.exit_code
    assert main.main(["inference_v3_best", "-h"]) == 0
    assert "TEST_DATA_NUM" in capsys.readouterr().out
