import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lever_plus import config, paths
from lever_plus.data import clip_features
from lever_plus.data.clip_features import combine_modalities, embed_split
from lever_plus.data.dataset import load_split
from lever_plus.settings.shared import SharedSettings
from open_mmicl.errors import DamagedInputError, MissingInputError
from open_mmicl.interface.images import load_rgb
from tests.data import make

IMAGES = [7, 5, 7, 9, 5]
CLIP = config.REPO_ROOT / "lever_plus" / "mini" / "weights" / "clip"  # a real CLIPModel of two thin layers


@pytest.fixture(scope="module")
def clip_folder():
    return CLIP


@pytest.fixture
def split(tmp_path):
    questions, annotations = make.vqa_json(IMAGES)
    questions["questions"][4]["question"] = questions["questions"][0]["question"]
    make.write(tmp_path / "OpenEnded_mscoco_train2014_questions.json", questions)
    make.write(tmp_path / "mscoco_train2014_annotations.json", annotations)
    rng = np.random.default_rng(0)
    for image in set(IMAGES):
        path = tmp_path / "train2014" / f"COCO_train2014_{image:012d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
    settings = SharedSettings(dataset="okvqa_local", okvqa_path=str(tmp_path), coco_path=str(tmp_path))
    return load_split(paths.dataset(settings), "train")


def one_by_one(split, folder):
    """The plain way: every row on its own."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    images, texts = [], []
    for row in range(len(split)):
        with torch.no_grad():
            pixels = processor(images=Image.open(split.image_path(row)).convert("RGB"), return_tensors="pt")
            image = model.get_image_features(**pixels).pooler_output[0]
            text = model.get_text_features(**tokenizer(split.question(row), return_tensors="pt")).pooler_output[0]
        images.append(image / image.norm())
        texts.append(text / text.norm())
    return {"image": torch.stack(images), "text": torch.stack(texts)}


def test_equals_one_by_one(split, clip_folder):
    expected = one_by_one(split, clip_folder)
    for batch in (1, 3, 64):
        features = embed_split(split, str(clip_folder), "cpu", batch)
        for name, value in expected.items():
            assert features[name].dtype == torch.float32
            assert torch.allclose(features[name], value, atol=1e-5), name
    assert torch.equal(features["text"][0], features["text"][4]) and torch.equal(
        features["image"][0], features["image"][2]
    )


def test_each_image_is_decoded_once(split, clip_folder, monkeypatch):
    opened = []
    real = clip_features.open_image
    monkeypatch.setattr(clip_features, "open_image", lambda path: opened.append(path) or real(path))
    embed_split(split, str(clip_folder), "cpu", 2)
    assert sorted(opened) == sorted({split.image_path(row) for row in range(len(split))})


def test_a_damaged_image_and_a_missing_model_are_named(split, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingInputError, match="CLIP_PATH"):
        embed_split(split, str(tmp_path / "no-such-model"), "cpu", 2)
    path = split.image_path(1)
    with open(path, "r+b") as handle:  # noqa: PTH123 - truncates in place
        handle.truncate(100)
    with pytest.raises(DamagedInputError, match="COCO_train2014_000000000005.jpg"):
        embed_split(split, str(clip_folder), "cpu", 2)


def test_combinations():
    features = {"image": torch.tensor([[1.0, 0.0]]), "text": torch.tensor([[0.0, 1.0]])}
    both = "query_img_text_icd_img_text"
    assert torch.allclose(combine_modalities(features, "mean", both), torch.tensor([[0.5**0.5, 0.5**0.5]]))
    assert torch.equal(combine_modalities(features, "concat", both), torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    assert torch.equal(combine_modalities(features, "mean", "query_img_icd_img"), features["image"])
    assert torch.equal(combine_modalities(features, "concat", "query_text_icd_text"), features["text"])


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def spoil(folder, how):
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "a weight missing":
        state = load_file(weights)
        del state["visual_projection.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    elif how == "a pickle that runs code":
        weights.unlink()
        torch.save({"logit_scale": Bomb()}, folder / "pytorch_model.bin")
    else:
        (folder / how).write_text("{")


@pytest.mark.parametrize(
    "how", ["truncated", "a weight missing", "a pickle that runs code", "config.json", "preprocessor_config.json"]
)
def test_a_damaged_model_folder_is_one_error(how, split, clip_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    spoil(folder, how)
    with pytest.raises(DamagedInputError, match="CLIP model") as caught:
        embed_split(split, str(folder), "cpu", 2)
    assert "\n" not in str(caught.value) and not (tmp_path / "exploded").exists()


def test_pickled_weights_are_read_as_tensors(split, clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found, expected = (embed_split(split, str(f), "cpu", 4) for f in (folder, clip_folder))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(MissingInputError, match="no weights"):
        embed_split(split, str(folder), "cpu", 4)


def test_an_image_is_never_given_to_another_program(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for opener in (clip_features.open_image, load_rgb):
        with pytest.raises(DamagedInputError, match="x.jpg cannot be read: not an image"):
            opener(str(tmp_path / "x.jpg"))
