"""v2 with LoRA on a data set of coloured squares: a demonstration is good when its colour is the query's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lever_plus import cli, config, paths
from lever_plus.data.beam_data import BeamData, BeamQuery, save_beam_data
from lever_plus.data.clip_features import combine_modalities, embed_split
from lever_plus.data.dataset import load_split
from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.selectors.lora import ItemReader, LoraSelector
from lever_plus.settings.loading import load
from lever_plus.settings.selector import TrainV2Settings
from lever_plus.stages import train_v2, train_v2_lora
from tests.data import make

CLIP = config.REPO_ROOT / "lever_plus" / "mini" / "weights" / "clip"
ITEMS, COLOURS = 40, 4


@pytest.fixture
def settings(tmp_path, monkeypatch):
    images = list(range(1, ITEMS + 1))
    questions, annotations = make.vqa_json(images)
    for split in ("train", "val"):
        make.write(tmp_path / f"OpenEnded_mscoco_{split}2014_questions.json", questions)
        make.write(tmp_path / f"mscoco_{split}2014_annotations.json", annotations)
    rng = np.random.default_rng(0)
    for image in images:
        path = tmp_path / "train2014" / f"COCO_train2014_{image:012d}.jpg"
        path.parent.mkdir(exist_ok=True)
        shade = np.array([(image * 61) % 256, (image % COLOURS) * 80, 255 - (image % COLOURS) * 80])
        pixels = (shade + rng.integers(0, 30, (24, 24, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    queries = []
    for row in range(ITEMS):
        pool = np.array([i for i in rng.permutation(ITEMS) if i != row][:12])
        right = [i for i in range(12) if pool[i] % COLOURS == row % COLOURS][:2]
        wrong = [i for i in range(12) if pool[i] % COLOURS != row % COLOURS][:2]
        if len(right) == 2:
            pointers = [tuple(right), (right[1], right[0]), (right[0], wrong[0])]
            queries.append(BeamQuery(row, pool, pointers, [1.0, 0.9, -1.0]))
    save_beam_data(tmp_path / "beams.json", BeamData(queries, "left"))
    values = {
        "DATASET": "okvqa_local", "OKVQA_PATH": tmp_path, "COCO_PATH": tmp_path, "CLIP_PATH": CLIP, "DEVICE": "cpu",
        "RESULT_DIR": tmp_path / "results", "BEAM_DATA_PATH": tmp_path / "beams.json", "V2_MODE": "lora",
        "V2_EPOCHS": 4, "V2_BATCH_SIZE": 8, "V2_LR": 3e-3, "V2_DROPOUT": 0, "LORA_POOL": 6, "HIDDEN_DIM": 32,
        "VAL_FRACTION": 0.2,
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return load(TrainV2Settings)


def stage(*arguments):
    return cli.stage_main(TrainV2Settings, train_v2.run, train_v2.__doc__, list(arguments))


def test_lora_trains_clip_and_selector_and_what_it_writes_fits_together(settings):
    assert stage() == 0
    checkpoint, clip_folder = train_v2_lora.output_paths(settings)
    records = json.loads(checkpoint.with_name(checkpoint.name + ".meta.json").read_text())["records"]
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
    assert min(r["val_rce_loss"] for r in records[1:]) < records[0]["val_rce_loss"]
    split = load_split(paths.dataset(settings), "train")
    before, after = (embed_split(split, str(folder), "cpu", 64) for folder in (CLIP, clip_folder))
    assert (before["image"] - after["image"]).abs().max() > 1e-3 and (before["text"] - after["text"]).abs().max() > 1e-3
    # The selector on embeddings exported with the merged CLIP has the loss that training saw.
    table = combine_modalities(after, "mean", settings.lever_lm)
    selector = PointerSelector.load(checkpoint)
    best = min(records, key=lambda r: r["val_rce_loss"])
    from lever_plus.data.beam_data import load_beam_data
    from lever_plus.data.dataset import split_by_image
    from lever_plus.rl.groups import build_groups
    from lever_plus.rl.losses import rce_loss

    beams = load_beam_data(train_v2.beam_path(settings))
    groups = build_groups(train_v2.as_rl_data(beams), table, lambda c, where: c.beam_score)
    _, val = split_by_image(np.arange(len(groups)), split.image_ids[groups.query_idx.numpy()], 0.2, settings.data_seed)
    part = groups.take(torch.from_numpy(val))
    log_probs, _ = selector(*part.inputs())
    assert rce_loss(log_probs, part.rewards, part.mask, 0.5).item() == pytest.approx(best["val_rce_loss"], rel=1e-3)
    assert stage() == 0


def test_only_lora_and_the_selector_train():
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(CLIP)
    model = LoraSelector(
        clip, PointerSelector(SelectorConfig(input_dim=8)), 4, 8, "mean", "query_img_text_icd_img_text"
    )
    names = set(model.trained())
    assert all("lora_" in name or name.startswith("selector.") for name in names)
    assert sum("lora_A" in name for name in names) == 4 * 2  # q and v of two layers of two towers


def test_a_cut_run_goes_on_to_the_same_weights(settings, monkeypatch):
    assert stage("V2_EPOCHS=3") == 0
    checkpoint, _ = train_v2_lora.output_paths(settings)
    whole = torch.load(checkpoint, weights_only=True)["model_state_dict"]
    checkpoint.unlink()
    real = train_v2_lora.LoraTraining._epoch

    def cut(self, trained, train, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return real(self, trained, train, epoch)

    monkeypatch.setattr(train_v2_lora.LoraTraining, "_epoch", cut)
    assert stage("V2_EPOCHS=3") == 130
    monkeypatch.setattr(train_v2_lora.LoraTraining, "_epoch", real)
    assert stage("V2_EPOCHS=3") == 0
    found = torch.load(checkpoint, weights_only=True)["model_state_dict"]
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_narrowed_pool_keeps_the_beams_and_their_meaning():
    pool = np.arange(100, 120)
    query = BeamQuery(5, pool, [(3, 17), (17, 9)], [1.0, 0.5])
    ids, pointers = train_v2_lora.narrow(query, 6, torch.Generator().manual_seed(0))
    assert len(ids) == len(set(ids.tolist())) == 6
    assert [ids[p].tolist() for p in pointers] == [[103, 117], [117, 109]]
    whole, same = train_v2_lora.narrow(query, 6, None)
    assert whole is pool and same == [[3, 17], [17, 9]]


def test_items_of_a_batch_are_read_once(settings):
    reader = ItemReader(load_split(paths.dataset(settings), "train"), str(CLIP), 77, torch.device("cpu"))
    pixels, image_of, tokens, text_of = reader.read([3, 0, 3, 5])
    assert pixels.shape[0] == 3 and image_of[0] == image_of[2] != image_of[1]
    assert len(tokens["input_ids"]) == len(set(text_of.tolist()))
