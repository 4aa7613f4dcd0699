"""The few-shot task for lmms-eval: its utils.py asks what Lever-Plus asks; lmms-eval's own class where it is there."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from lever_plus.release.lmms_eval import UTILS, export, task_yaml
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from open_mmicl.errors import UsageError
from open_mmicl.interface.prompts import Demo, Prompt, PromptFormat
from open_mmicl.metrics.vqa import cut_answer, vqa_accuracy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    demos = [{"question_id": i, "image": f"train/{i}.png", "question": f"what {i}?", "answer": f"a{i}"} for i in (1, 2)]
    (tmp_path / "fewshot.jsonl").write_text(json.dumps({"question_id": 7, "demonstrations": demos}) + "\n")
    (tmp_path / "prompt.json").write_text(
        json.dumps({"system": "S", "user_template": "Q:<Q> A:", "order": "best_last"})
    )
    (tmp_path / "images.json").write_text(json.dumps({"train": [str(tmp_path)], "val": [str(tmp_path)]}))
    doc = {"question_id": "7", "image": "val/9.png", "question": "and?", "answers": ["b"] * 10}
    (tmp_path / "questions.jsonl").write_text(json.dumps(doc) + "\n")
    for name in (1, 2, 9):
        Image.new("RGB", (8, 8), (name, 0, 0)).save(tmp_path / f"{name}.png")
    shutil.copyfile(UTILS, tmp_path / "utils.py")
    return tmp_path


def loaded(folder: Path):
    spec = importlib.util.spec_from_file_location("exported_utils", folder / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def question(folder: Path) -> dict:
    return json.loads((folder / "questions.jsonl").read_text())


def test_picks_of_another_method_are_not_mixed_into_a_folder(tmp_path: Path) -> None:
    run = SimpleNamespace(samples=SimpleNamespace(shots=lambda method: [1]))
    (tmp_path / "lever_plus_mini_okvqa_v3_1shot.yaml").touch()
    with pytest.raises(UsageError, match="holds the task lever_plus_mini_okvqa_v3_1shot of another export"):
        export(run, "v2", tmp_path, load(InferenceSettings, {"DATASET": "mini_okvqa"}))


def test_messages_are_those_of_the_prompt(folder: Path) -> None:
    utils, doc = loaded(folder), question(folder)
    for shots, order in ((0, ()), (1, (1,)), (2, (2, 1))):
        demos = tuple(Demo(f"{i}.png", f"what {i}?", f"a{i}") for i in order)
        wanted = PromptFormat("S", "Q:<Q> A:").messages(Prompt(demos, "9.png", "and?"))
        found = utils.doc_to_messages(doc, {"shots": shots})
        assert [t["role"] for t in found] == [t["role"] for t in wanted]
        assert [t["content"][-1]["text"] for t in found] == [t["content"][-1]["text"] for t in wanted]
        images = [
            part["url"].getpixel((0, 0))[0] for turn in found for part in turn["content"] if part["type"] == "image"
        ]
        assert images == [*order, 9]
        assert [image.getpixel((0, 0))[0] for image in utils.doc_to_visual(doc, {"shots": shots})] == [*order, 9]
    assert utils.doc_to_text(doc, {"shots": 2}) == "Q:what 2? A: a2\nQ:what 1? A: a1\nQ:and? A:"


def test_a_moved_folder_is_written_into_its_tasks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "t.yaml").write_text(task_yaml("t", 2, folder, 5, 3))
    new = tmp_path_factory.mktemp("moved") / "here"
    shutil.move(folder, new)
    loaded(new).move()
    text = "\n".join(line for line in (new / "t.yaml").read_text().splitlines() if "!function" not in line)
    read = yaml.safe_load(text)
    assert read["dataset_kwargs"]["data_files"]["test"] == str((new / "questions.jsonl").resolve())
    assert (
        read["lmms_eval_specific_kwargs"] == {"default": {"shots": 2}} and read["generation_kwargs"]["num_beams"] == 3
    )


def test_a_missing_image_says_what_to_set(folder: Path) -> None:
    (folder / "9.png").unlink()
    with pytest.raises(FileNotFoundError, match="LEVER_IMAGES"):
        loaded(folder).doc_to_visual(question(folder), {"shots": 1})


def test_lmms_evals_own_class_takes_the_task_and_scores_as_we_do(folder: Path) -> None:
    task_api = pytest.importorskip("lmms_eval.api.task", reason="lmms-eval is not installed here")
    from lmms_eval.utils import load_yaml_config

    (folder / "t.yaml").write_text(task_yaml("t", 2, folder, 5, 3))
    task = task_api.ConfigurableMessagesTask(config=load_yaml_config(str(folder / "t.yaml")), model_name="default")
    doc = next(iter(task.test_docs()))
    assert len(task.doc_to_messages(doc)) == 6
    for answer in ("b", "the b.", "c", "b, c", "B Answer: x"):
        assert task.process_results(doc, [answer])["exact_match"] == vqa_accuracy(cut_answer(answer), doc["answers"])
