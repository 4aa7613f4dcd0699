"""The doctor is content with what is right, and names each fault before any prompt is paid."""

import json
import shutil
from pathlib import Path

import pytest

from lever_plus import doctor
from lever_plus.config import REPO_ROOT
from open_mmicl.engine import Engine
from tests.data import make
from tests.open_mmicl.test_templates import TEXT_ONLY
from tests.reference import tiny_lvlm
from tests.reference.openai_server import Served, Server

pytestmark = pytest.mark.slow
WEIGHTS = REPO_ROOT / "lever_plus" / "mini" / "weights" / "lvlm"
IMAGES = list(range(20, 32))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An OK-VQA folder and a copy of the embedded model as the user's; the doctor's environment points to them."""
    for split in ("train", "val"):
        questions, annotations = make.vqa_json(IMAGES)
        make.write(tmp_path / f"OpenEnded_mscoco_{split}2014_questions.json", questions)
        for item in (answer for annotation in annotations["annotations"] for answer in annotation["answers"]):
            item["answer"] = item["answer"].replace("café", "fish")  # the embedded tokenizer has no é
        make.write(tmp_path / f"mscoco_{split}2014_annotations.json", annotations)
        folder = tmp_path / f"{split}2014"
        for i, path in enumerate(tiny_lvlm.make_images(folder, len(IMAGES))):
            Path(path).rename(folder / f"COCO_{split}2014_{IMAGES[i]:012d}.jpg")
    shutil.copytree(WEIGHTS, tmp_path / "model")
    for name, value in {
        "DATASET": "okvqa_local", "OKVQA_PATH": tmp_path, "COCO_PATH": tmp_path, "RESULT_DIR": tmp_path / "results",
        "QWEN2_5_VL_3B_PATH": tmp_path / "model", "PRECISION": "fp32", "SAMPLE_NUM": 2, "RL_QUERY_NUM": 4,
        "CANDIDATE_NUM": 6, "TEST_DATA_NUM": 5, "DOCTOR_PROMPTS": 6, "CUDA_VISIBLE_DEVICES": "", "TOKEN_BUDGET": 2048,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return tmp_path


def examined(place: Path) -> tuple[int, dict]:
    """(exit code, the checks of doctor.json)."""
    code = doctor.main([])
    found = json.loads((place / "results" / "okvqa" / "doctor.json").read_text(encoding="utf-8"))
    return code, found["checks"]


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_all_is_well(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = examined(place)
    out = capsys.readouterr().out
    assert code == 0 and all(check["well"] for check in checks.values()), out
    exact = checks["fp32 against transformers alone"]
    assert exact["answers_differ"] == 0 and exact["largest"] <= 1e-4 and exact["prompts"] == 6
    assert "<|vision_start|>" in out and "scored as its answer" in out and "all is well" in out
    assert checks["speed"]["tokens_per_second"] > 0 and 0 < checks["speed"]["share"] < 2
    plan = checks["price"]["the plan, longest way"]
    assert plan["prompts"] > checks["price"]["experiment 1"]["prompts"] and plan["device_hours"] > 0
    assert len(out.splitlines()) < 70


def text_only(place: Path) -> None:
    (place / "model" / "chat_template.jinja").write_text(TEXT_ONLY, encoding="utf-8")


def wrong_image_token(place: Path) -> None:
    edit(place / "model" / "config.json", image_token_id=7)


def other_weights(place: Path) -> None:
    raw = json.loads((place / "model" / "config.json").read_text(encoding="utf-8"))
    raw["text_config"]["intermediate_size"] *= 2
    (place / "model" / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def cut_weights(place: Path) -> None:
    file = place / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200_000])


def no_image(place: Path) -> None:
    next((place / "val2014").iterdir()).unlink()


def broken_image(place: Path) -> None:
    next((place / "train2014").iterdir()).write_bytes(b"<html>404</html>")


def no_tokenizer(place: Path) -> None:
    (place / "model" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1", encoding="utf-8")


@pytest.mark.parametrize(
    ("fault", "check", "code", "said"),
    [
        (text_only, "model folder", 4, "chat_template.jinja"),
        (wrong_image_token, "model folder", 4, "image tokens of two images"),
        (other_weights, "fp32 against transformers alone", 4, "do not fit|cannot be loaded"),
        (cut_weights, "model folder", 4, "truncated"),
        (no_image, "data set", 3, "images missing: COCO_val2014"),
        (broken_image, "images", 4, "COCO_train2014"),
        (no_tokenizer, "model folder", 4, "tokenizer"),
    ],
)
def test_a_fault_is_named_before_anything_is_asked(fault, check, code, said, place: Path, monkeypatch) -> None:
    fault(place)
    monkeypatch.setattr(Engine, "ask", lambda *_: pytest.fail("a prompt was paid"))
    result, checks = examined(place)
    assert result == code and not checks[check]["well"]
    assert any(word in checks[check]["error"] for word in said.split("|")) and "\n" not in checks[check]["error"]


def test_too_little_memory_is_named_before_anything_is_asked(place: Path, monkeypatch) -> None:
    monkeypatch.setenv("TOKEN_BUDGET", str(10**9))
    monkeypatch.setattr(Engine, "ask", lambda *_: pytest.fail("a prompt was paid"))
    code, checks = examined(place)
    assert code == 2 and "TOKEN_BUDGET=1000000000" in checks["memory"]["error"]


def test_a_server_is_asked_who_it_is_and_compared_with_its_reference(place: Path, monkeypatch, capsys) -> None:
    server = Server(Served(WEIGHTS), place / "paid.log", name="mini-qwen2.5-vl").start()
    monkeypatch.setenv("BEAM_MODEL", "mini_qwen2.5_vl_server")
    monkeypatch.setenv("LVLM_SERVER_URLS", server.url)
    monkeypatch.delenv("PRECISION")
    code, checks = examined(place)
    out = capsys.readouterr().out
    assert code == 0 and "all is well" in out, out
    assert list(checks)[3:] == ["server", "reference", "answers", "speed", "price"]
    assert checks["server"]["can"]["scores"] == "token_ids" and 0 < checks["answers"]["largest"] <= 1e-3
    assert checks["price"]["experiment 1"]["hours"] > 0 and checks["price"]["experiment 1"]["operations"] > 0
    server.extensions = False
    code, checks = examined(place)
    assert code == 2 and "does not search with beams (NUM_BEAMS=3)" in checks["answers"]["error"]
    server.stop()
    code, checks = examined(place)
    assert code == 3 and "no server answers at" in checks["server"]["error"] and checks["price"]["well"]
