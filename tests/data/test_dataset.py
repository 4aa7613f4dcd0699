import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lever_plus import paths
from lever_plus.data import dataset as module
from lever_plus.data import vqa_json
from lever_plus.data.check import check, main
from lever_plus.data.dataset import load_split, split_by_image
from lever_plus.settings.shared import SharedSettings
from open_mmicl.errors import DamagedInputError, MissingInputError
from tests.data import make

TRAIN_IMAGES, VAL_IMAGES = [7, 5, 7, 9, 5, 12], [20, 21, 20]
QUESTIONS = "OpenEnded_mscoco_{}2014_questions.json"
ANNOTATIONS = "mscoco_{}2014_annotations.json"


@pytest.fixture
def root(tmp_path):
    """A small OK-VQA folder with its images."""
    for split, images in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        questions, annotations = make.vqa_json(images)
        make.write(tmp_path / QUESTIONS.format(split), questions)
        make.write(tmp_path / ANNOTATIONS.format(split), annotations)
        for image in set(images):
            path = tmp_path / "mscoco2014" / f"{split}2014" / f"COCO_{split}2014_{image:012d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\xff\xd8jpeg")
    return tmp_path


def settings(root):
    return SharedSettings(dataset="okvqa_local", okvqa_path=str(root), coco_path=str(root))


def split_of(root, split):
    return load_split(paths.dataset(settings(root)), split)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_columns_are_those_of_the_files(root):
    split = split_of(root, "train")
    questions, annotations = make.vqa_json(TRAIN_IMAGES)
    assert len(split) == 6
    assert split.question_ids.dtype == split.image_ids.dtype == np.int64
    for row, (q, a) in enumerate(zip(questions["questions"], annotations["annotations"], strict=True)):
        assert split.question_ids[row] == q["question_id"] and split.image_ids[row] == q["image_id"]
        assert split.question(row) == q["question"]
        assert split.answers(row) == [x["answer"] for x in a["answers"]]
        assert split.image_path(row).endswith(f"COCO_train2014_{q['image_id']:012d}.jpg")
    demo = split.demo(2)
    assert (demo.image, demo.question, demo.answer) == (split.image_path(2), split.question(2), split.answer(2))


def test_rows_are_sorted_by_question_id_whatever_the_files_order(root):
    before = split_of(root, "train")

    def shuffle(name, seed):
        def change(content):
            content[name] = [content[name][i] for i in np.random.default_rng(seed).permutation(len(content[name]))]

        return change

    edit(root / QUESTIONS.format("train"), shuffle("questions", 1))
    edit(root / ANNOTATIONS.format("train"), shuffle("annotations", 2))
    after = split_of(root, "train")
    assert after.fingerprint != before.fingerprint
    assert np.array_equal(before.question_ids, after.question_ids) and np.all(np.diff(after.question_ids) > 0)
    assert [after.answers(i) for i in range(6)] == [before.answers(i) for i in range(6)]
    assert [after.question(i) for i in range(6)] == [before.question(i) for i in range(6)]


def test_the_most_frequent_answer_wins_and_ties_go_to_the_first(root):
    def change(content):
        for text, answer in zip(
            ["b", "a", "b", "a", "c", "c", "c", "b", "d", "e"], content["annotations"][0]["answers"], strict=True
        ):
            answer["answer"] = text

    edit(root / ANNOTATIONS.format("train"), change)
    assert split_of(root, "train").answer(0) == "b"


def test_merged_json_of_the_original_lever_plus(root):
    before = {name: split_of(root, name) for name in ("train", "val")}
    for split in ("train", "val"):
        questions = json.loads((root / QUESTIONS.format(split)).read_text())["questions"]
        merged = json.loads((root / ANNOTATIONS.format(split)).read_text())
        for q, a in zip(questions, merged["annotations"], strict=True):
            a["question"] = q["question"]
        make.write(root / "okvqa_hf" / f"vqav2_mscoco_{split}2014.json", merged)
        (root / QUESTIONS.format(split)).unlink()
        (root / ANNOTATIONS.format(split)).unlink()
    for name, split in before.items():
        again = split_of(root, name)
        assert [again.demo(i) for i in range(len(again))] == [split.demo(i) for i in range(len(split))]
        assert np.array_equal(again.question_ids, split.question_ids)


def test_the_window_gives_the_same_columns_at_any_size(root, monkeypatch):
    whole = split_of(root, "train")
    for size in (1, 2, 3, 7, 64, 1000):
        monkeypatch.setattr(vqa_json, "_CHUNK", size)
        module._SPLITS.clear()
        split = split_of(root, "train")
        assert [split.demo(i) for i in range(6)] == [whole.demo(i) for i in range(6)]
        assert [split.answers(i) for i in range(6)] == [whole.answers(i) for i in range(6)]
    module._SPLITS.clear()


def test_any_truncation_is_damage(root):
    path = root / QUESTIONS.format("val")
    text = path.read_text()
    for cut in range(0, len(text) - 1, 7):
        path.write_text(text[:cut])
        with pytest.raises(DamagedInputError, match="OpenEnded_mscoco_val2014_questions.json"):
            split_of(root, "val")


def answers_of_nine(annotations):
    annotations[1]["answers"].pop()


def image_ids_apart(annotations):
    annotations[2]["image_id"] += 1


def no_answers(annotations):
    del annotations[1]["answers"]


def id_twice(annotations):
    annotations[1]["question_id"] = annotations[0]["question_id"]


def unknown_question(annotations):
    annotations[1]["question_id"] = 999


def id_as_text(annotations):
    annotations[1]["question_id"] = "103"


def answer_as_number(annotations):
    annotations[1]["answers"][3]["answer"] = 3


def id_too_long(annotations):
    annotations[1]["image_id"] = 2**70


def broken_text(annotations):
    annotations[1]["answers"][3]["answer"] = "\ud800"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (answers_of_nine, "query 103, answers: 9 entries, expected 10"),
        (image_ids_apart, "query 106, image_id"),
        (no_answers, r"annotations\[1\]: 'answers' is missing"),
        (id_twice, "question_id 100 stands there twice"),
        (unknown_question, "question_id 103 has a question, but no annotation"),
        (id_as_text, r"annotations\[1\]: a field of the wrong type"),
        (answer_as_number, r"annotations\[1\]: a field of the wrong type"),
        (id_too_long, r"annotations\[1\]: a field of the wrong type"),
        (broken_text, r"annotations\[1\]: a field of the wrong type"),
    ],
)
def test_damage_is_named(root, change, says):
    edit(root / ANNOTATIONS.format("val"), lambda content: change(content["annotations"]))
    with pytest.raises(DamagedInputError, match=says):
        split_of(root, "val")


@pytest.mark.parametrize(
    "damage", ["[]", "{}", '{"questions": {}}', '{"questions": []}', '{"questions": [1]}', '{"questions": [NaN]}']
)
def test_other_json_is_damage(root, damage):
    (root / QUESTIONS.format("val")).write_text(damage)
    with pytest.raises(DamagedInputError):
        split_of(root, "val")


def test_a_missing_image_names_file_and_variable(root):
    split = split_of(root, "train")
    name = f"COCO_train2014_{int(split.image_ids[3]):012d}.jpg"
    (root / "mscoco2014" / "train2014" / name).unlink()
    with pytest.raises(MissingInputError, match=f"{name}.*COCO_PATH|{name}.*OKVQA_PATH"):
        split.image_path(3)
    with pytest.raises(MissingInputError):
        split.demo(3)


def test_images_are_found_in_either_folder(root):
    (root / "mscoco2014" / "train2014").rename(root / "train2014")
    assert split_of(root, "train").image_path(0).startswith(str(root / "train2014"))


def test_check_lists_what_is_missing(root):
    assert check(settings(root))[1]
    folder = root / "mscoco2014" / "train2014"
    for name in ("COCO_train2014_000000000005.jpg", "COCO_train2014_000000000009.jpg"):
        (folder / name).unlink()
    (folder / "COCO_train2014_000000000007.jpg").write_bytes(b"")
    (root / ANNOTATIONS.format("val")).unlink()
    lines, complete = check(settings(root))
    text = "\n".join(lines)
    assert not complete
    assert "2 of 4 images missing: COCO_train2014_000000000005.jpg, COCO_train2014_000000000009.jpg" in text
    assert "1 of 4 images empty files" in text
    assert f"val: missing {root / ANNOTATIONS.format('val')}" in text and "OKVQA_PATH" in text


def test_check_command_exit_codes(root, monkeypatch, capsys):
    monkeypatch.setenv("OKVQA_PATH", str(root))
    monkeypatch.setenv("COCO_PATH", str(root))
    assert main(["check", "okvqa_local"]) == 0
    assert "train: 6 questions, 4 images" in capsys.readouterr().out
    (root / QUESTIONS.format("val")).unlink()
    assert main(["check", "okvqa_local"]) == 3
    assert capsys.readouterr().err == "error: okvqa_local: something is missing: see above, and what to do\n"
    assert main(["check", "nonsense"]) == 2
    assert main(["weigh"]) == 2
    edit(root / ANNOTATIONS.format("train"), lambda content: answers_of_nine(content["annotations"]))
    assert main(["check", "okvqa_local"]) == 4
    assert "expected 10" in capsys.readouterr().err


def test_check_of_a_generated_world_says_what_makes_it(tmp_path):
    lines, complete = check(SharedSettings(dataset="mini_okvqa_b", result_dir=str(tmp_path)))
    text = "\n".join(lines)
    assert not complete and "DATASET=mini_okvqa_b python -m lever_plus.pipeline dataset" in text
    assert "set MINI" not in text


def test_check_runs_as_a_module(root):
    env = {**os.environ, "OKVQA_PATH": str(root), "COCO_PATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "lever_plus.data.dataset", "check", "okvqa_local"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout and done.stderr == ""


def test_fault_11_no_image_on_both_sides():
    rng = np.random.default_rng(0)
    image_ids = rng.integers(0, 400, 3000)
    queries = rng.permutation(3000)[:1500]
    train, val = split_by_image(queries, image_ids, 0.1, seed=3)
    assert not set(image_ids[train]) & set(image_ids[val])
    assert sorted([*train, *val]) == sorted(queries)
    assert 0.05 < len(val) / len(queries) < 0.15
    fewer_train, fewer_val = split_by_image(queries[:700], image_ids, 0.1, seed=3)
    assert set(fewer_train) <= set(train) and set(fewer_val) <= set(val)  # the other queries change nothing
    assert set(split_by_image(queries, image_ids, 0.1, seed=4)[1]) != set(val)


def test_split_by_image_keeps_the_order_and_the_edges():
    image_ids = np.arange(50)
    queries = [40, 3, 17, 9]
    train, val = split_by_image(queries, image_ids, 0.0, seed=1)
    assert train.tolist() == queries and val.tolist() == []
    train, val = split_by_image(queries, image_ids, 1.0, seed=1)
    assert train.tolist() == [] and val.tolist() == queries
    train, val = split_by_image([], image_ids, 0.5, seed=1)
    assert train.shape == val.shape == (0,)
