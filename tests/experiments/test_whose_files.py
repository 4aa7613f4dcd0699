"""Copied and moved results: the record of a folder is made from that folder's files; names do not mark texts up."""

import json
import shutil
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lever_plus.experiments import compare_report, gallery, markdown, record, report
from lever_plus.experiments.places import Places
from tests.reference.fake_run import make_samples, write_run, write_training

PRICE = {"beam_data": None, "rl_data": None, "training": 0, "evaluation": None}


def results_of(root, seed=1, colour=(250, 0, 0)):
    """A results folder with a run and its training; its picture is of the data set that was made in it."""
    folder = root / "mini_okvqa"
    picture = folder / "dataset" / "a.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), colour).save(picture)
    training = write_training(folder / "model_cpk" / "v3_x", seed)
    lines = make_samples(1, n=20, image=str(picture))
    named = str(training / "grpo_epoch2.pt")
    return write_run(folder / "icl_inference" / "run", lines, checkpoint=named, settings={"RESULT_DIR": str(root)})


@pytest.fixture
def copied(tmp_path):
    """A copy of a results folder whose original holds other files by now."""
    run = results_of(tmp_path / "made in")
    shutil.copytree(tmp_path / "made in", tmp_path / "copy")
    write_training(run.parents[1] / "model_cpk" / "v3_x", seed=77)
    Image.new("RGB", (8, 8), (0, 0, 250)).save(run.parents[1] / "dataset" / "a.png")
    return tmp_path / "copy" / "mini_okvqa" / "icl_inference" / "run"


def test_a_copy_s_record_is_made_from_the_copy(copied):
    run = record.load_run(copied, copied.parents[1] / "model_cpk" / "v3_x")
    assert run.training.settings()["SEED"] == 1 and record.load_run(copied).training.settings()["SEED"] == 1
    assert run.metrics["checkpoint"]["path"] == str(copied.parents[1] / "model_cpk" / "v3_x" / "grpo_epoch2.pt")
    made = record.build([run], "exp1", PRICE, {})
    assert "made in" not in json.dumps(made) and "made in" not in record.render(made, "en")
    (card, *_) = gallery.cards(run.samples, run.places.here)
    assert card.image == gallery.thumbnail(str(copied.parents[1] / "dataset" / "a.png"))
    assert card.image is not None
    assert card.image != gallery.thumbnail(run.samples.rows[0]["image"])
    assert report._gallery({"exp1": (made, [run])}, None, "en")["thumbnails"] == [card.image]


def test_what_the_copy_lacks_is_not_taken_from_the_original(copied):
    shutil.rmtree(copied.parents[1] / "model_cpk")
    (copied.parents[1] / "dataset" / "a.png").unlink()
    run = record.load_run(copied, copied.parents[1] / "model_cpk" / "v3_x")
    assert run.training.run == {} and run.training.lines == []
    assert gallery.cards(run.samples, run.places.here)[0].image is None


def test_a_checkpoint_of_elsewhere_stays_there(tmp_path):
    elsewhere = write_training(tmp_path / "elsewhere", seed=5) / "grpo_epoch2.pt"
    folder = tmp_path / "r" / "mini_okvqa" / "icl_inference" / "run"
    write_run(folder, make_samples(1, n=20), checkpoint=str(elsewhere), settings={"RESULT_DIR": str(tmp_path / "old")})
    assert record.load_run(folder).training.settings()["SEED"] == 5


PART = st.sampled_from(["a", "b c", "é", "..", "results", "mini_okvqa", "icl_inference"])


@given(st.lists(PART, min_size=1, max_size=5), st.lists(PART, min_size=1, max_size=5), st.booleans())
def test_a_named_file_of_the_old_folder_is_looked_for_in_the_new_one_alone(named, made_in, absolute):
    before = ("/" if absolute else "") + "/".join(part for part in [*made_in, "r"] if part != "..")
    metrics = {"dataset": "mini_okvqa", "run": {"settings": {"RESULT_DIR": before}}}
    places = Places.of_run("/now/mini_okvqa/icl_inference/run", metrics)
    inside = f"{before}/{'/'.join(named)}"
    here = places.here(inside)
    assert here == (inside if ".." in named else f"/now/{'/'.join(named)}")
    assert places.here("/elsewhere/x.pt") == "/elsewhere/x.pt"


class Tags(HTMLParser):
    """The tags of a text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a|b", "[x](javascript:alert(1))", "$x_{$"]
HOSTILE += ["\x1b]0;t\x07", "a\n# b", "<!-- ", "&lt;b&gt;", "{{ 7*7 }}", "]]><svg onload=x>", "'\" onload=x"]
NAME = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))


@given(NAME)
def test_no_text_marks_a_record_up(name):
    told = markdown.tame(name)
    assert told.isprintable() and not Tags(told).found and "](" not in told
    assert told.count("|") == told.count("\\|") and (" | " in name or markdown.row([name, name]).count(" | ") == 1)
    if name.isprintable() and not set(name) & set("<|]"):
        assert told == name


def run_of(folder, names, training):
    """A run whose texts are these names, each somewhere; of two methods, so that few figures are drawn."""
    lines = make_samples(1, n=12, shots=(1, 2), only=("v3", "v2", "similarity"))
    for number, line in enumerate(lines):
        name = names[number % len(names)]
        line |= {"question": f"what {name}?", "icd_answers": [name] * line["shot"]}
        line["method"] = line["method"].replace("similarity", names[0])
    run = write_run(folder, lines, names[1], names[2], checkpoint=f"/x/{names[3].replace('/', '')}/v3.pt")
    loaded = record.load_run(run, training)
    return loaded, record.build([loaded], names[4], PRICE, {})


@pytest.mark.parametrize("turn", [0, 6])
def test_names_of_files_and_data_are_texts_in_record_and_report(tmp_path, turn):
    names = HOSTILE[turn:] + HOSTILE[:turn]
    training = write_training(tmp_path / "v3", 1, {"LR_SCHEDULE": names[5]})
    run, made = run_of(tmp_path / "run", [name for name in names if name.isprintable() or turn == 0], training)
    usual_run, usual = run_of(tmp_path / "plain", ["a", "b", "c", "d", "e"], training)
    for lang in ("zh", "en"):
        text, plain = record.render(made, lang), record.render(usual, lang)
        assert not Tags(text).found and text.count("\n") == plain.count("\n") and "\x1b" not in text
        rows = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
        assert rows == [line.count("|") for line in plain.splitlines() if line.startswith("|")]
    page = Tags(report.render({names[4]: (made, [run])}, "en"))
    other = Tags(report.render({"e": (usual, [usual_run])}, "en"))
    assert {tag for tag, _ in page.found} <= {tag for tag, _ in other.found}
    assert {key for _, attrs in page.found for key in attrs} <= {key for _, attrs in other.found for key in attrs}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_texts_in_a_comparison(name):
    side = {"folder": f"/x/{name}", "method": name}
    found = {"runs": {name: side}, "n_shared": 20, "n_each": {}, "accuracy": {name: {}}, "comparisons": []}
    assert not Tags(compare_report.markdown(found, 1.0, "en")).found
