"""Data sets of one's own by one YAML: every reader, the real layouts of six data sets, ids, splits, metrics, errors."""

import csv
import io as text_io
import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lever_plus import cli, config, paths, pipeline
from lever_plus.data import catalog, sizes
from lever_plus.data.check import main
from lever_plus.data.dataset import load_split, split_by_image
from lever_plus.data.pictures import Pictures
from lever_plus.settings import names
from lever_plus.settings.data import BeamSettings
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.settings.shared import SharedSettings
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError
from tests.data.make import split_of, vqa_json

ROOT = config.CONFIG_DIR


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configs folder with the project's data sets and models, and room for more."""
    shutil.copytree(ROOT / "dataset", tmp_path / "configs" / "dataset")
    (tmp_path / "configs" / "infer_model").symlink_to(ROOT / "infer_model")
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs" / "dataset"


def settings(key: str, root: Path, **more: str) -> SharedSettings:
    return load(SharedSettings, {"DATASET": key, "RESULT_DIR": str(root / "r"), "DEVICE": "cpu", **more}, {})


def picture(path: Path, color: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (color % 256, 9, 200)).save(path)
    return path


def put(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def ninety(root: Path) -> list[dict[str, str]]:
    """90 questions about 30 PNG pictures, one answer each."""
    rows = []
    for i in range(90):
        name = f"my pictures/Bild {i % 30:02d}.png"
        if i < 30:
            picture(root / name, i)
        rows.append({"image": name, "question": f"What is number {i}?", "answer": ["red", "blue", "two"][i % 3]})
    return rows


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


MINE = 'reader: jsonl\nfiles: "{root}/questions.jsonl"\nimages: "{root}"\npath_variable: MY_THINGS_PATH\n'


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> SharedSettings:
    """90 questions of one's own, as data set ``mine``."""
    put(tmp_path / "d" / "questions.jsonl", lines(ninety(tmp_path / "d")))
    (folder / "mine.yaml").write_text(MINE)
    return settings("mine", tmp_path, MY_THINGS_PATH=str(tmp_path / "d"))


def test_one_file_is_parted_by_image_reproducibly(mine: SharedSettings, folder: Path) -> None:
    train, val = split_of(mine, "train"), split_of(mine, "val")
    assert (len(train), len(val)) == (72, 18) and not set(train.image_ids.tolist()) & set(val.image_ids.tolist())
    assert sorted([*train.question_ids.tolist(), *val.question_ids.tolist()]) == list(range(1, 91))
    assert Path(train.image_path(0)).is_file() and train.image_id(0).startswith("my pictures/Bild ")
    assert train.answers(0) == [train.answer(0)] and train.fingerprint != val.fingerprint
    for seed in range(3):  # of what is left a part can be held out for model selection, with an equal seed, too
        assert all(len(rows) for rows in split_by_image(train.query_rows, train.image_ids, 0.2, seed))
    first = val.question_ids.tolist()
    file = paths.dataset(mine).items["train"][0]
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*rows, json.dumps({"image": "new.png", "question": "q", "answer": "a"}) + "\n"]))
    assert set(split_of(mine, "val").question_ids.tolist()) - {91} == set(first)  # what was there stays on its side
    (folder / "mine.yaml").write_text(MINE + "val_share: 0.5\nval_seed: 3\n")
    assert len({split_of(mine, "val").image_id(i) for i in range(len(split_of(mine, "val")))}) == 16  # of 31
    (folder / "mine.yaml").write_text(MINE + "val_share: 0.5\nval_seed: 4\n")
    again = split_of(mine, "val")
    (folder / "mine.yaml").write_text(MINE + "val_share: 0.5\nval_seed: 3\n")
    assert again.question_ids.tolist() != split_of(mine, "val").question_ids.tolist()


def test_the_declared_variable_is_a_setting_like_the_others(
    mine: SharedSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    where, rest = str(tmp_path / "d"), {"DATASET": "mine", "RESULT_DIR": str(tmp_path / "r")}
    own = {"MY_THINGS_PATH": where}
    for cli_values, env in ((own, {}), ({}, own), ({}, {"DATASET_PATH": where})):
        assert paths.dataset(load(SharedSettings, {**rest, **cli_values}, env)).found()
    monkeypatch.setattr(config, "read_dotenv", lambda path=None: {"MY_THINGS_PATH": where})
    assert paths.dataset(load(SharedSettings, rest, {})).found()
    over = load(SharedSettings, rest, {"MY_THINGS_PATH": "/elsewhere"})  # the environment wins over .env
    assert paths.dataset(over).root == Path("/elsewhere")
    monkeypatch.setattr(config, "read_dotenv", lambda path=None: {})
    assert cli.parse_options(SharedSettings, [f"--my-things-path={where}"])[0] == {"MY_THINGS_PATH": where}
    assert names.lines({"SEED"}, {"MY_THINGS_PATH": where}, {}) == []
    assert names.lines({"SEED"}, {"MY_THINGS_PTH": where}, {}) == [
        "warning: MY_THINGS_PTH is not a setting; did you mean MY_THINGS_PATH?"
    ]
    with pytest.raises(UsageError, match="MY_THINGS_PATH"):
        load(SharedSettings, rest, {"MY_THINGS_PATH": "a\nb"})
    with pytest.raises(MissingInputError, match="set MY_THINGS_PATH to the folder"):
        split_of(load(SharedSettings, rest, {"MY_THINGS_PATH": "/nowhere"}), "train")
    assert cli.guard(lambda: main(["check", "mine", f"MY_THINGS_PATH={where}", f"RESULT_DIR={tmp_path}"])) == 0
    assert "exact match" in capsys.readouterr().out
    home = load(SharedSettings, rest, {"MY_THINGS_PATH": "~/x"})
    assert paths.dataset(home).root == Path.home() / "x"


def test_numbers_that_nobody_set_fit_a_small_data_set(mine: SharedSettings, tmp_path: Path) -> None:
    given = {"DATASET": "mine", "MY_THINGS_PATH": str(tmp_path / "d"), "RESULT_DIR": str(tmp_path / "r")}
    beams, evaluation = load(BeamSettings, given, {}), load(InferenceSettings, given, {})
    assert sizes.of(paths.dataset(mine)) == sizes.Room(72, 69, 18)
    assert (beams.candidate_num, beams.sample_num, evaluation.test_data_num) == (64, 72, 18)
    assert load(BeamSettings, {**given, "SAMPLE_NUM": "500"}, {}).sample_num == 500  # a wish is never changed
    for name, number in (("SAMPLE_NUM", "73"), ("CANDIDATE_NUM", "70"), ("TEST_DATA_NUM", "19")):
        with pytest.raises(UsageError, match=f"{name}={number} is not allowed: mine has"):
            pipeline.check(["beam_data", "inference"], {**given, "DEVICE": "cpu", name: number})
    pipeline.check(["beam_data", "rl_data", "inference"], {**given, "DEVICE": "cpu"})


@pytest.mark.parametrize("official", [False, True])
def test_a_commands_own_default_is_lowered_and_said_and_a_users_number_is_not(
    official: bool, mine: SharedSettings, tmp_path: Path, folder: Path
) -> None:
    env = {"DATASET": "mine", "MY_THINGS_PATH": str(tmp_path / "d"), "RESULT_DIR": str(tmp_path / "r"), "DEVICE": "cpu"}
    if official:
        kinds = {"questions": "{root}/questions.json", "annotations": "{root}/annotations.json", "images": ["{root}"],
                 "image_name": "{image_id}.png"}  # fmt: skip
        both = {kind: {"train": value, "val": value} for kind, value in kinds.items()}
        put(folder / "mine.yaml", {**both, "path_variable": "MY_THINGS_PATH"})
        put(tmp_path / "d" / "annotations.json", {"annotations": []})
        put(tmp_path / "d" / "questions.json", {"questions": [{"question_id": i} for i in range(18)]})
    asked = {**env, "TEST_DATA_NUM": "400"}
    usual = {**asked, names.USUAL: "TEST_DATA_NUM"}
    lowered = load(InferenceSettings, {}, usual)
    assert lowered.test_data_num == 18 and "TEST_DATA_NUM=18 " in sizes.announcement([lowered], {"test_data_num": 400})
    assert load(InferenceSettings, {}, asked).test_data_num == 400
    assert load(InferenceSettings, {"TEST_DATA_NUM": "30"}, usual).test_data_num == 30
    with pytest.raises(UsageError, match="TEST_DATA_NUM=400 is not allowed: mine has 18"):
        pipeline.check(["inference"], asked)
    pipeline.check(["inference"], usual)


@pytest.mark.parametrize("items", [2, 3])
def test_a_data_set_without_two_candidates_is_refused_before_the_first_step(
    items: int, folder: Path, tmp_path: Path
) -> None:
    put(tmp_path / "questions.jsonl", lines(ninety(tmp_path)[:items]))
    (folder / "mine.yaml").write_text(MINE)
    with pytest.raises(UsageError, match="mine is too small: .*and one has [01]; add train questions"):
        pipeline.check(["v3"], {"DATASET": "mine", "MY_THINGS_PATH": str(tmp_path), "DEVICE": "cpu"})


ITEMS = [
    {"image": "a.png", "question": "What, is \"this\"?", "answers": ["red", "Red", "blue"], "question_id": "q-1",
     "image_id": "A"},
    {"image": "b.PNG", "question": "Zwei\nZeilen?", "answers": ["zwei"], "question_id": "q-0", "image_id": "B"},
    {"image": "sub/c.webp", "question": "Où?", "answers": ["là", "ici"], "question_id": "q-2", "image_id": "C"},
]  # fmt: skip


def as_csv(rows: list[dict], delimiter: str = ",") -> str:
    handle = text_io.StringIO()
    writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows({**row, "answers": json.dumps(row["answers"])} for row in rows)
    return handle.getvalue()


FUNCTION = "import json\ndef read(path, limit=99):\n    yield from json.loads(path.read_text())['things'][:limit]\n"
FORMS = {
    "jsonl": (lines(ITEMS).replace("\n", "\r\n\n"), "reader: jsonl\n"),
    "json": (ITEMS, "reader: json\n"),
    "key": ({"info": {"n": 3}, "rows": ITEMS, "more": []}, "reader: json\nreader_args: {key: rows}\n"),
    "keyed": (
        {x["question_id"]: {k: v for k, v in x.items() if k != "question_id"} for x in ITEMS}, "reader: json\n",
    ),
    "merged": (
        {"annotations": [{**x, "answers": [{"answer": a} for a in x["answers"]]} for x in ITEMS]}, "reader: merged\n",
    ),
    "csv": ("\ufeff" + as_csv(ITEMS), "reader: csv\n"),
    "semicolon": (as_csv(ITEMS, ";"), "reader: csv\nreader_args: {delimiter: ';'}\n"),
    "tsv": (as_csv(ITEMS, "\t"), "reader: tsv\n"),
    "function": ({"things": ITEMS}, "reader: my_reader.py:read\nreader_args: {limit: 3}\n"),
    "renamed": (
        [{"id7": x["question_id"], "pic": x["image"], "text": x["question"], "gold": x["answers"], "img": x["image_id"]}
         for x in ITEMS],
        "reader: json\nfields: {question_id: id7, image: pic, question: text, answers: gold, image_id: img}\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_reader_gives_the_same_questions(form: str, folder: Path, tmp_path: Path) -> None:
    content, yaml = FORMS[form]
    file = tmp_path / "d" / "all.txt"
    file.parent.mkdir()
    file.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    (folder / "my_reader.py").write_text(FUNCTION)
    for item in ITEMS:
        picture(tmp_path / "d" / "pics" / item["image"])
    files = 'files: {train: "{root}/all.txt", val: "{root}/all.txt"}\nimages: "{root}/pics"\n'
    (folder / "form.yaml").write_text(yaml + files)
    found = settings("form", tmp_path, DATASET_PATH=str(tmp_path / "d"))
    split = split_of(found, "train")
    expected = sorted(ITEMS, key=lambda x: x["question_id"])
    assert [split.question_id(i) for i in range(3)] == [x["question_id"] for x in expected] == ["q-0", "q-1", "q-2"]
    assert [split.image_id(i) for i in range(3)] == [x["image_id"] for x in expected]
    assert [split.raw_question(i) for i in range(3)] == [x["question"] for x in expected]
    assert [split.answers(i) for i in range(3)] == [x["answers"] for x in expected]
    assert [Path(split.image_path(i)).relative_to(tmp_path / "d/pics").as_posix() for i in range(3)] == [
        x["image"] for x in expected
    ]
    assert split.image_ids.tolist() == split_of(found, "val").image_ids.tolist() and min(split.image_ids) >= 2**62
    assert cli.guard(lambda: main(["check", "form", f"DATASET_PATH={tmp_path / 'd'}", f"RESULT_DIR={tmp_path}"])) == 0
    picture(tmp_path / "d" / "pics" / "a.png").unlink()
    assert cli.guard(lambda: main(["check", "form", f"DATASET_PATH={tmp_path / 'd'}", f"RESULT_DIR={tmp_path}"])) == 3


def test_parquet_with_pictures_inside(folder: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    shades = [picture(tmp_path / f"{i}.png", 40 * i).read_bytes() for i in range(3)]
    for shard in range(2):
        rows = [
            {"question_id": 10 * shard + i, "question": f"q{i}?", "answers": [{"answer": "x", "answer_id": 1}] * 10,
             "image": {"bytes": shades[(i + shard) % 3], "path": None}}
            for i in range(3)
        ]  # fmt: skip
        (tmp_path / "d").mkdir(exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d" / f"train-0000{shard}-of-00002.parquet")
    (folder / "hub.yaml").write_text('reader: parquet\nfiles: "{root}/train-*.parquet"\nval_share: 0.3\n')
    found = settings("hub", tmp_path, DATASET_PATH=str(tmp_path / "d"))
    train, val = split_of(found, "train"), split_of(found, "val")
    assert (len(train), len(val)) == (4, 2) and train.answers(0) == ["x"] * 10
    written = tmp_path / "r" / "hub" / "images"
    pictures = sorted(written.glob("*.png"))
    assert len(pictures) == 3 and {p.read_bytes() for p in pictures} == set(shades)  # one file a picture
    for row in range(len(train)):
        number = int(train.question_id(row))
        assert Path(train.image_path(row)).read_bytes() == shades[(number % 10 + number // 10) % 3]
    before = {path: path.stat().st_mtime_ns for path in written.iterdir()}
    load_split.__globals__["_SPLITS"].clear()
    split_of(found, "train")
    assert before == {path: path.stat().st_mtime_ns for path in written.iterdir()}  # once
    pictures[0].unlink()
    load_split.__globals__["_SPLITS"].clear()
    split_of(found, "train")
    assert pictures[0].is_file()
    file = tmp_path / "d" / "train-00000-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DamagedInputError, match=r"train-00000-of-00002\.parquet"):
        split_of(found, "train")


def ten(text: str = "cat") -> list[str]:
    return [text] * 6 + ["dog"] * 4


LAYOUTS = {
    "aokvqa": (
        "AOKVQA_PATH", "aokvqa_v1p0_{}.json",
        [{"split": "train", "image_id": 299207, "question_id": "22MexNkBPpdZGX6sxbxVBH", "question": "What is it?",
          "choices": ["a", "b", "c", "d"], "correct_choice_idx": 1, "direct_answers": ten(),
          "difficult_direct_answer": False, "rationales": ["r"]}],
        "coco/{}2017/000000299207.jpg", "22MexNkBPpdZGX6sxbxVBH", 299207,
    ),
    "gqa": (
        "GQA_PATH", "{}_balanced_questions.json",
        {"02930152": {"semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
                      "entailed": ["02930160"], "equivalent": ["02930152"], "question": "Is the sky dark?",
                      "imageId": "2354786", "isBalanced": True, "groups": {"global": None, "local": "06-sky_dark"},
                      "answer": "yes", "semanticStr": "select: sky (2486325)->verify color: dark [0]",
                      "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
                      "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
                      "fullAnswer": "Yes, the sky is dark."}},
        "root/images/2354786.jpg", "02930152", "2354786",
    ),
    "textvqa": (
        "TEXTVQA_PATH", "TextVQA_0.5.1_{}.json",
        {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1",
         "data": [{"question": "what is the brand of this camera?", "image_id": "003a8ae2ef43b901",
                   "image_classes": ["Camera"], "flickr_original_url": "https://x/4.jpg", "image_width": 1024,
                   "image_height": 664, "answers": ten("dakota"), "question_tokens": ["what", "is"],
                   "question_id": 34602, "set_name": "val"}]},
        "root/train_images/003a8ae2ef43b901.jpg", 34602, "003a8ae2ef43b901",
    ),
    "vizwiz": (
        "VIZWIZ_PATH", "Annotations/{}.json",
        [{"image": "VizWiz_{}_00000000.jpg", "question": "What is this?",
          "answers": [{"answer_confidence": "yes", "answer": a} for a in ten("unanswerable")],
          "answer_type": "other", "answerable": 0}],
        "root/{0}/VizWiz_{0}_00000000.jpg", 1, "VizWiz_{}_00000000.jpg",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", LAYOUTS)
def test_ready_configurations_read_the_real_layouts(key: str, folder: Path, tmp_path: Path) -> None:
    variable, file, content, image, question_id, image_id = LAYOUTS[key]
    root = tmp_path / "root"
    for split in catalog.SPLITS:
        put(root / file.format(split), json.dumps(content).replace("VizWiz_{}", f"VizWiz_{split}"))
        picture(tmp_path / image.format(split))
    given = {variable: str(root), "COCO_PATH": str(tmp_path / "coco")}
    found = settings(key, tmp_path, **given)
    for name in catalog.SPLITS:
        split = split_of(found, name)
        assert split.question_id(0) == question_id and isinstance(split.question_id(0), type(question_id))
        assert split.image_id(0) == (image_id.format(name) if isinstance(image_id, str) else image_id)
        assert Path(split.image_path(0)) == tmp_path / image.format(name)
        assert len(split.answers(0)) == (1 if key == "gqa" else 10)
    assert cli.guard(lambda: main(["check", key, *(f"{n}={v}" for n, v in given.items())])) == 0
    for split in catalog.SPLITS:
        path = root / file.format(split)
        path.write_text(path.read_text().replace('"answer": "yes"', '"answer": [""]').replace('"dog"', "[]", 1))
    assert cli.guard(lambda: main(["check", key, *(f"{n}={v}" for n, v in given.items())])) == 4


def test_the_official_layout_with_any_number_of_annotators(folder: Path, tmp_path: Path) -> None:
    questions, annotations = vqa_json([1, 2, 3], answers=1)
    annotations["annotations"][1]["answers"] *= 3
    for split in catalog.SPLITS:
        put(tmp_path / f"q_{split}.json", questions)
        put(tmp_path / f"a_{split}.json", annotations)
    (folder / "three.yaml").write_text(
        'reader: official\nquestions: {train: "{root}/q_train.json", val: "{root}/q_val.json"}\n'
        'annotations: {train: "{root}/a_train.json", val: "{root}/a_val.json"}\n'
        'images: {train: ["{root}"], val: ["{root}"]}\nimage_name: {train: "{image_id}", val: "{image_id}"}\n'
    )
    split = split_of(settings("three", tmp_path, DATASET_PATH=str(tmp_path)), "train")
    assert split.answer_counts() == [1, 3] and [len(split.answers(i)) for i in range(3)] == [1, 3, 1]
    assert split.answers(2) == [annotations["annotations"][2]["answers"][0]["answer"]]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["é1.png", "sub/é.PNG", "ü"])
def test_a_picture_is_found_however_its_accents_are_written(name: str, form: str, tmp_path: Path) -> None:
    there = tmp_path / unicodedata.normalize(form, name if "." in name else name + ".jpg")
    put(there, "x")
    for other in ("NFC", "NFD"):
        asked = unicodedata.normalize(other, name)
        pictures = Pictures([tmp_path], "{image_id}")
        assert pictures.find(asked) == there and pictures.missing([asked]) == ([], [])


def test_a_picture_that_links_to_itself_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    pictures = Pictures([tmp_path], "{image_id}")
    assert pictures.find("a.png") is None and pictures.missing(["a.png"]) == (["a.png"], [])


GOOD = {"image": "a.png", "question": "q?", "answer": "x"}
WRONG = [
    (lines([GOOD, {**GOOD, "answer": None}]), "line 2, field 'answers': is missing .*fields: {answers"),
    (lines([GOOD, {"question": "q?", "answer": "x"}]), "line 2, field 'image': is missing, and so is an image_id"),
    (lines([GOOD, {**GOOD, "question": 7}]), "line 2, field 'question': 7 is no text"),
    (lines([GOOD, {**GOOD, "answer": "  "}]), "line 2, field 'answer': there is no answer"),
    (lines([GOOD, {**GOOD, "answers": [], "answer": "x"}]), "line 2, field 'answers': there is no answer"),
    (lines([GOOD, {**GOOD, "answer": True}]), "line 2, field 'answer': True is no answer"),
    (lines([{**GOOD, "id": "k"}, GOOD, {**GOOD, "id": "k"}]), "line 3, field 'id': 'k' is there twice .first.*1"),
    (lines([{**GOOD, "id": "7"}, GOOD, {**GOOD, "id": 7}]), "line 3, field 'id': '7' is there twice .first.*1"),
    (lines([GOOD, {**GOOD, "id": "1"}]), "line 2, field 'id': '1' is there twice"),
    (lines([{**GOOD, "image_id": 7}, {**GOOD, "image_id": "7"}]), "'image_id': '7' is there as a number and as a text"),
    (lines([GOOD, {**GOOD, "id": -3}]), "line 2, field 'id': -3 is neither"),
    (lines([GOOD, {**GOOD, "image": " "}]), "line 2, field 'image': is blank"),
    (lines([GOOD]) + "{broken\n", "line 2 is not JSON"),
    (lines([GOOD]) + "[1]\n", "line 2: is a list, expected an object"),
    (lines([GOOD]) + '{"a": 1, "a": 2}\n', "line 2: key 'a'"),
    (lines([GOOD]) + '{"a": NaN}\n', "line 2 is not JSON .holds NaN"),
    (lines([GOOD, {**GOOD, "question": "\ud800"}]), "line 2: broken text"),
    ("\n\n", "is empty"),
    (lines([GOOD, GOOD]), "about one image"),
]


@pytest.mark.parametrize(("content", "said"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_told_with_file_line_and_field(
    content: str, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    put(tmp_path / "questions.jsonl", content)
    (folder / "mine.yaml").write_text(MINE)
    with pytest.raises(DamagedInputError, match=said):
        split_of(SharedSettings(dataset="mine", dataset_path=str(tmp_path)), "train")
    assert cli.guard(lambda: main(["check", "mine", f"MY_THINGS_PATH={tmp_path}"])) == 4
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "questions.jsonl" in error


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("reader: jsonl\nfiles: '{rot}/q'\n", r"'{rot}/q': {rot} is none of: {root}, {coco}"),
        ("reader: jsonl\ndefault_path: '{home}/x'\nfiles: q\n", "{home} is none of: {result_dir}, {name}"),
        ("reader: jsonl\nfiles: q\na: b: c\n", "line 3: mapping values are not allowed here"),
        ("reader: jsonl\n\tfiles: q\n", "line 2: .*cannot start any token"),
        ("reader: jsonl\n", "key 'files' is missing"),
        ("reader: xml\nfiles: a\n", "reader: 'xml' is not allowed: official, json"),
        ('reader: nowhere.py:read\nfiles: "{root}/q.jsonl"\n', "nowhere.py not found .reader of"),
        ("reader: jsonl\nfiles: a\npath_variable: SEED\n", "path_variable: 'SEED' is not allowed"),
        ("reader: jsonl\nfiles: a\nval_share: 2\n", "val_share: '2' is not allowed: a number from 0.01 to 0.9"),
        ("reader: jsonl\nfiles: {val: a}\n", "files: 'val' is not allowed"),
        ("reader: jsonl\nfiles: {train: a, val: b}\nval_share: 0.1\n", "val_share: '0.1' is not allowed"),
        ("reader: jsonl\nfiles: a\nfields: {reply: x}\n", "fields: 'reply' is not allowed: question, answers"),
        ("reader: jsonl\nfiles: a\nannotators: many\n", "annotators: 'many' is not allowed"),
        ('reader: jsonl\nfiles: "{root}/q.jsonl"\nreader_args: {size: 3}\n', "size.*reader_args"),
        ('reader: csv\nfiles: "{root}/q.jsonl"\nreader_args: {delimiter: ab}\n', "delimiter='ab' is not allowed"),
        ('reader: bad.py:fails\nfiles: "{root}/q.jsonl"\n', "bad.py:fails: after item 1 of .*: KeyError: 'x'"),
        ('reader: bad.py:number\nfiles: "{root}/q.jsonl"\n', "gave int instead of records"),
        ('reader: bad.py:missing\nfiles: "{root}/q.jsonl"\n', "there is no function missing"),
        ('reader: jsonl\nfiles: "{root}/q.jsonl"\nannotators: 3\n', "line 1, field 'answer': 1 answers, expected 3"),
    ],
)
def test_wrong_configurations_are_told(
    yaml: str, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    put(tmp_path / "q.jsonl", lines([GOOD, {**GOOD, "image": "b"}]))
    put(folder / "bad.py", "def fails(path):\n    yield {'image': 'a', 'question': 'q', 'answer': 'x'}\n    {}['x']\n"
        "def number(path):\n    return 3\n")  # fmt: skip
    (folder / "mine.yaml").write_text(yaml)
    code = cli.guard(lambda: main(["check", "mine", f"DATASET_PATH={tmp_path}", f"RESULT_DIR={tmp_path}"]))
    error = capsys.readouterr().err.strip()
    assert code in (2, 3, 4) and "\n" not in error and re.search(said, error)


def test_a_table_with_a_line_of_another_length(folder: Path, tmp_path: Path) -> None:
    (folder / "mine.yaml").write_text('reader: csv\nfiles: "{root}/q.csv"\n')
    put(tmp_path / "q.csv", "image,question,answer\na.png,Is it, well, red?,yes\n")
    with pytest.raises(DamagedInputError, match="line 2: 5 values for 3 columns; quote"):
        split_of(SharedSettings(dataset="mine", dataset_path=str(tmp_path)), "train")


def test_pools_never_hold_the_querys_picture_and_ids_reach_the_samples(mine: SharedSettings) -> None:
    from lever_plus.stages import lvlm

    train, val = split_of(mine, "train"), split_of(mine, "val")
    s = load(BeamSettings, {"DATASET": "mine", "DATASET_PATH": mine.dataset_path, "RESULT_DIR": mine.result_dir}, {})
    pools = lvlm.query_pools(s, train, np.arange(len(train)), train, "train")
    for row, pool in enumerate(pools):
        assert train.image_id(row) not in {train.image_id(int(item)) for item in pool}
    assert paths.dataset_dir(mine).name == "mine" and val.image_id(0) not in set(train.image_ids)


def test_a_reader_of_a_plugin_file(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "plug.py", "from lever_plus.registries import READERS\n"
        "@READERS.add('pairs', 'question|answer lines')\ndef pairs(path):\n"
        "    for n, line in enumerate(path.read_text().splitlines()):\n"
        "        q, a = line.split('|')\n        yield f'row {n}', {'image': f'{n}.png', 'question': q, 'answer': a}\n")
    put(tmp_path / "q.txt", "who?|me\nwhat?|that\n")
    (folder / "mine.yaml").write_text('reader: pairs\nfiles: "{root}/q.txt"\nval_share: 0.5\n')
    given = {"LEVER_PLUGINS": str(tmp_path / "plug.py"), "DATASET": "mine", "DATASET_PATH": str(tmp_path)}
    try:
        found = load(SharedSettings, given, {})
        assert {split_of(found, s).answer(0) for s in catalog.SPLITS} == {"me", "that"}
        put(tmp_path / "q.txt", "who?|me\nwhat?\n")
        with pytest.raises(UsageError, match="reader pairs: after item 1"):
            split_of(found, "train")
    finally:
        from lever_plus.registries import READERS

        READERS._entries.pop("pairs", None)


def test_the_metric_follows_from_the_number_of_answers() -> None:
    from lever_plus.experiments import words
    from open_mmicl.metrics.vqa import gt_weights, metric_of, vqa_accuracy

    assert [vqa_accuracy("The Cat.", [a]) for a in ("cat", "dog")] == [1, 0] and gt_weights(["Cat"]) == [("Cat", 1)]
    assert [vqa_accuracy("cat", ["cat"] * n + ["dog"] * (2 - n)) for n in range(3)] == [0, 0.5, 1]
    assert [vqa_accuracy("cat", ["cat"] * n + ["dog"] * (5 - n)) for n in range(5)] == [0, 1 / 3, 2 / 3, 1, 1]
    assert vqa_accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx(0.9)
    said = metric_of([1, 2, 4, 5, 10])
    assert words.metric(metric_of([10]), "en") == words.metric(None, "en") == "the official VQA accuracy"
    assert words.metric("min(1, matches / 3) (5 answers)", "zh") == "min(1, 匹配数 / 3)（5 个答案）"
    parts = words.metric(said, "zh").split("；")
    assert parts[2:] == ["min(1, 匹配数 / 2)（2 个答案）", "min(1, 匹配数 / 3)（4 至 5 个答案）"] and len(parts) == 4
