"""What a picker says of input that it cannot use, and the forms that it reads without channels."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lever_plus.data.clip_features import combine_modalities
from lever_plus.picker import Picker, model_card, read_demos
from lever_plus.selectors import PointerSelector, SelectorConfig
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError
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
