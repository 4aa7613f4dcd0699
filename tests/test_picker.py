"""What a picker says of input that it cannot use, and the forms that it reads without channels."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lever_plus.data.clip_features import combine_modalities
from lever_plus.picker import Picker, model_card, read_demos
from lever_plus.selectors import PointerSelector, SelectorConfig
from open_mmicl.errors import DamagedInputError, MissingInputError, NumericError, UsageError
from open_mmicl.interface.prompts import Demo


class Clip:
    """Embeds a path or text by its characters."""

    def texts(self, texts, title):
        rows = torch.stack([torch.tensor([float(ord(c)) for c in f"{text:<12}"[:12]]) for text in texts])
        return torch.nn.functional.normalize(rows, dim=1)

    images = texts


def picker(**config):
    torch.manual_seed(0)
    selector = PointerSelector(SelectorConfig(input_dim=12, hidden_dim=12, num_layers=0))
    base = {"channels": [], "item_word": "mean", "lever_lm": "query_img_text_icd_img_text", "selector": {},
            "lvlm": "x", "prompt_order": "best_last", "generation": [5, 3, 0.0], "dataset": "mini_okvqa",
            "checkpoint": {}}  # fmt: skip
    made = Picker(selector, {**base, **config}, {}, engine=object())
    made.__dict__["clip"] = Clip()
    return made


def folder_of(tmp_path, lines, image="a.png"):
    Image.new("RGB", (8, 8)).save(tmp_path / image)
    (tmp_path / "demos.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_picks_by_item_embeddings_are_those_of_the_selector(tmp_path):
    demos = [Demo(f"{name}.png", f"what is {name}?", name) for name in ("cat", "dog", "ant", "bee", "elk")]
    made = picker()
    best = made.pick("cow.png", "what is cow?", demos, shots=3)
    clip = Clip()

    def rows(images, questions):
        return combine_modalities(
            {"image": clip.texts(images, ""), "text": clip.texts(questions, "")}, "mean", "query_img_text_icd_img_text"
        )

    items = rows([d.image for d in demos], [d.question for d in demos])
    wanted = made.selector.select(rows(["cow.png"], ["what is cow?"]), items[None], 3)[0].tolist()
    assert best == [demos[i] for i in wanted] and len(set(wanted)) == 3


def test_an_untrained_picker_takes_the_nearest_by_image_and_question(monkeypatch, tmp_path):
    clip = Clip()
    clip.model = SimpleNamespace(config=SimpleNamespace(projection_dim=12))
    monkeypatch.setattr("lever_plus.picker.ClipEncoder", lambda *_: clip)
    torch.manual_seed(3)
    made = Picker.untrained(dataset="mini_okvqa", result_dir=tmp_path)
    demos = [Demo(f"{a}.png", f"what is {b}?", "x") for a in ("cat", "dog", "ant") for b in ("bee", "elk", "cow")]
    best = made.pick("act.png", "what is owl?", demos, shots=5)
    image, text = clip.images(["act.png"], ""), clip.texts(["what is owl?"], "")
    near = [float(clip.images([d.image], "") @ image.T + clip.texts([d.question], "") @ text.T) for d in demos]
    assert [demos.index(d) for d in best] == sorted(range(len(demos)), key=lambda i: -near[i])[:5]
    assert made.config["lvlm"] == "mini_qwen2.5_vl" and "not trained" in model_card(made.config)
    assert "trained on `mini_okvqa`" in model_card(picker().config)


def test_a_folder_is_read_in_order_with_paths_beside_its_list(tmp_path):
    line = {"image": "a.png", "question": "what?", "answer": "it"}
    folder = folder_of(tmp_path, [json.dumps(line), "", json.dumps({**line, "answer": "é"})])
    assert read_demos(folder) == [Demo(str(tmp_path / "a.png"), "what?", answer) for answer in ("it", "é")]


@pytest.mark.parametrize(
    "line, error, said",
    [
        ("{", DamagedInputError, "line 1"),
        ('{"image": "a.png", "question": "q"}', DamagedInputError, "line 1"),
        ('{"image": "a.png", "question": "q", "answer": " "}', DamagedInputError, "none of them empty"),
        ('{"image": "a.png", "question": "q", "answer": 3}', DamagedInputError, "texts"),
        ('{"image": "b.png", "question": "q", "answer": "a"}', MissingInputError, "no such image"),
        ("[1]", DamagedInputError, "line 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, error, said):
    with pytest.raises(error, match=said):
        read_demos(folder_of(tmp_path, [line]))
    with pytest.raises(MissingInputError, match=r"demos\.jsonl not found"):
        read_demos(tmp_path / "none")


def test_what_cannot_be_chosen_is_refused():
    demos = [Demo("a.png", "q", "a"), Demo("b.png", "q", "b")]
    with pytest.raises(UsageError, match="3 shots from a pool of 2"):
        picker().pick("c.png", "q", demos, shots=3)
    with pytest.raises(UsageError, match="not trained to stop"):
        picker().pick("c.png", "q", demos, shots=None)
    with pytest.raises(UsageError, match="no demonstrations"):
        picker().examples([])


def test_a_folder_that_was_not_saved_is_refused(tmp_path):
    made = picker()
    made.config["selector"] = {"input_dim": 12, "hidden_dim": 12, "num_layers": 0}
    made.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        Picker.from_pretrained(tmp_path / "saved").selector.cand_proj.weight, made.selector.cand_proj.weight
    )
    (tmp_path / "saved" / "selector.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DamagedInputError, match="saved"):
        Picker.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text("no json")
    with pytest.raises(DamagedInputError, match=r"config\.json"):
        Picker.from_pretrained(tmp_path / "saved")
    with pytest.raises(MissingInputError, match=r"has no config\.json"):
        (tmp_path / "empty").mkdir()
        Picker.from_pretrained(tmp_path / "empty")


def test_the_card_tells_the_record():
    cells = {"v3": ("1", 71.25, [68.2, 73.9]), "zero_shot": ("0", 22.2, [19.0, 25.0])}
    accuracy = {name: {shot: {"mean": mean, "ci95": ci}} for name, (shot, mean, ci) in cells.items()}
    record = {"dataset": "mini_okvqa", "n_queries": 1000, "accuracy": accuracy}
    card = model_card({**picker().config, "record": record})
    assert "| v3 |  | 71.2 [68.2, 73.9] |" in card and "| zero_shot | 22.2 [19.0, 25.0] |  |" in card
    assert "No record" in model_card(picker().config) and card.startswith("---\n")


DEMOS = [Demo("a.png", "q", "a"), Demo("b.png", "q", "b")]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: p.pick("c.png", "q", DEMOS, shots=1.5), "shots=1.5: a whole number"),
        (lambda p: p.pick("c.png", "q", DEMOS, shots="2"), "shots='2': a whole number"),
        (lambda p: p.pick("c.png", "q", DEMOS, shots=True), "shots=True: a whole number"),
        (lambda p: p.pick(Image.new("RGB", (8, 8)), "q", DEMOS, 1), "path of a file, not Image; save it"),
        (lambda p: p.pick(None, "q", DEMOS, 1), "path of a file, not NoneType"),
        (lambda p: p.pick("c.png", None, DEMOS, 1), "the question is a text that is not empty, not None"),
        (lambda p: p.pick("c.png", " ", DEMOS, 1), "the question is a text that is not empty, not ' '"),
        (lambda p: p.pick("c.png", "\ud800", DEMOS, 1), r"no text in UTF-8: '\\ud800'"),
        (lambda p: p.pick("c.png", "q", None, 1), "demonstrations are what read"),
        (lambda p: p.pick("c.png", "q", ["a.png"], 1), "demonstrations are what read"),
        (lambda p: p.answer("c.png", "q", [{"image": "a.png"}]), "demonstrations are what read"),
        (lambda p: p.prompt("c.png", "q", [Demo("a.png", "q", 3)]), "a demonstration's answer is a text"),
        (lambda p: p.examples(3), "demonstrations are what read"),
        (lambda p: Picker.from_pretrained(None), "a folder or a name on the Hub is expected, not NoneType"),
        (lambda p: Picker.from_pretrained("x", revison="main"), "no option revison; there are: engine, revision"),
        (lambda p: Picker.from_run(datset="mini_okvqa"), "DATSET is not a setting; did you mean DATASET"),
        (lambda p: p.selector.select([1.0], torch.zeros(1, 4, 12), 2), r"tensors, got list and \[1, 4, 12\]"),
        (lambda p: p.selector.log_prob(torch.zeros(1, 12), torch.zeros(1, 4, 12), [[[0]]]), "got list"),
        (lambda p: p.selector.log_prob(torch.zeros(1, 12), torch.zeros(1, 4, 12), torch.zeros(1, 1, 2)), "float32"),
        (lambda p: p.selector.log_prob(torch.zeros(1, 12), torch.zeros(1, 4, 12), torch.zeros(2, 1, 2).long()),
         "pointers of 2 queries for embeddings of 1"),
    ],
)  # fmt: skip
def test_input_of_another_kind_is_told(call, said):
    with pytest.raises(UsageError, match=said):
        call(picker())


def test_embeddings_that_are_not_finite_are_refused_and_none_give_none():
    selector, pool = picker().selector, torch.randn(2, 4, 12)
    for broken in (math.nan, math.inf):
        with pytest.raises(NumericError, match="NaN or infinity"):
            selector.select(torch.full((2, 12), broken), pool, 2)
        with pytest.raises(NumericError, match="NaN or infinity"):
            selector.select(torch.randn(2, 12), pool.index_fill(1, torch.tensor([3]), broken), 2)
    assert selector.select(torch.zeros(0, 12), torch.zeros(0, 4, 12), 2).shape == (0, 2)


@pytest.mark.parametrize("name", ["/nowhere/x", "a/b/c", "no name"])
def test_what_is_neither_a_folder_nor_a_name_on_the_hub_is_missing(name):
    with pytest.raises(MissingInputError, match=f"{name}: no such folder"):
        Picker.from_pretrained(name)


def test_wrong_widths_are_one_line():
    selector = PointerSelector(SelectorConfig(input_dim=12, hidden_dim=8))
    with pytest.raises(UsageError, match="query embeddings of width 5"):
        selector.select(torch.zeros(1, 5), torch.zeros(1, 4, 12), 2)
    with pytest.raises(UsageError, match="candidate embeddings of width 7"):
        selector.select(torch.zeros(1, 12), torch.zeros(1, 4, 7), 2)
    with pytest.raises(UsageError, match="of 2 queries for pools of 3"):
        selector.select(torch.zeros(2, 12), torch.zeros(3, 4, 12), 2)
    with pytest.raises(UsageError, match=r"\[B, K, d\]"):
        selector.select(torch.zeros(1, 12), torch.zeros(4, 12), 2)
