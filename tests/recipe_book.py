"""What each step's output is made from, on a small data set, and how each setting moves it."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lever_plus import config, paths
from lever_plus.data.dataset import load_split
from lever_plus.data.methods import chosen
from lever_plus.provenance import Recipe, sidecar
from lever_plus.settings.data import BeamSettings, ChannelSettings, EmbeddingSettings, RlDataSettings
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.settings.selector import TrainV2Settings, TrainV3Settings
from lever_plus.stages import (
    export_channels,
    export_embeddings,
    generate_data,
    generate_rl_data,
    inference,
    lvlm,
    record,
    train_v2,
    train_v3,
    train_v3_online,
)
from open_mmicl.errors import MissingInputError

# recipe -> (settings class, what is set besides the data set)
CASES: dict[str, tuple[type, dict[str, str]]] = {
    "beam_data": (BeamSettings, {}),
    "beam_data, images": (BeamSettings, {"SAMPLER": "img_sim_sampler"}),
    "beam_data, channels": (BeamSettings, {"SAMPLER": "ChannelSimSampler"}),
    "beam_data, stop": (BeamSettings, {"STOP": "1"}),
    "embeddings train": (EmbeddingSettings, {}),
    "embeddings val": (EmbeddingSettings, {}),
    "items": (EmbeddingSettings, {"EMBEDDING": "mean"}),
    "states": (ChannelSettings, {}),
    "answer": (ChannelSettings, {}),
    "answer_clip": (ChannelSettings, {"EMBEDDING": "clip_image answer_clip"}),
    "v2": (TrainV2Settings, {}),
    "v2, labels": (TrainV2Settings, {"V2_MODE": "labels"}),
    "v2, lora": (TrainV2Settings, {"V2_MODE": "lora"}),
    "v2, v1": (TrainV2Settings, {"V2_MODE": "v1"}),
    "v2, stop": (TrainV2Settings, {"STOP": "1"}),
    "v2, by loss": (TrainV2Settings, {"V2_SELECT": "loss"}),
    "rl_data": (RlDataSettings, {}),
    "rl_data, stop": (RlDataSettings, {"STOP": "1"}),
    "v3 alone": (TrainV3Settings, {}),
    "v3": (train_v3_online.OnlineSettings, {}),
    "v3, shot cost": (train_v3_online.OnlineSettings, {"REWARD_SHOT_COST": "0.1"}),
    "v3, online": (train_v3_online.OnlineSettings, {"GRPO_MODE": "online"}),
    "inference": (InferenceSettings, {"METHODS": "v3 v2 random", "TEST_DATA_NUM": "200"}),
    "inference, train_val": (InferenceSettings, {"METHODS": "v3 v2 random", "EVAL_SPLIT": "train_val"}),
    "inference, adaptive": (
        InferenceSettings, {"METHODS": "v3 v3_adaptive random", "STOP": "1", "TEST_DATA_NUM": "200"},
    ),  # fmt: skip
    "record": (InferenceSettings, {"METHODS": "v3 v2 random"}),
}
OLD_DEFAULTS = {"SUM_STATE": "0", "V2_CREDIT": "first"}
"""Defaults that have changed since the old recipes were written: outputs made with them count where they are set."""
SELECTORS = ("v3", "v2", "v1", "v2_lora", "label")
OTHER_TEXTS = {
    "report_to": "none",
    "dataset": "other", "beam_model": "smolvlm2_2B", "gpu_id": "1", "embedding": "clip_image clip_text",
    "lvlm_layers": "-1 -2", "methods": "v3 random", "seeds": "4 5", "v2_credit": "all",
}  # fmt: skip
YAML = """
path_variable: ""
default_path: "{root}"
questions: {{train: "{{root}}/train_q.json", val: "{{root}}/val_q.json"}}
annotations: {{train: "{{root}}/train_a.json", val: "{{root}}/val_a.json"}}
images: {{train: "{{root}}", val: "{{root}}"}}
image_name: {{train: "{{image_id}}.jpg", val: "{{image_id}}.jpg"}}
"""


def world(root: Path) -> None:
    """Two data sets, ``mine`` and ``other``, below ``root``, which has to be the working directory."""
    (root / "configs" / "dataset").mkdir(parents=True)
    for name in ("mine", "other"):
        (root / name).mkdir()
        for split, number in (("train", 1), ("val", 2)):
            ids = {"image_id": number, "question_id": number}
            question = {**ids, "question": f"{name}?"}
            answers = {**ids, "answers": [{"answer": "red", "answer_id": i} for i in range(10)]}
            (root / name / f"{split}_q.json").write_text(json.dumps({"questions": [question]}))
            (root / name / f"{split}_a.json").write_text(json.dumps({"annotations": [answers]}))
        (root / "configs" / "dataset" / f"{name}.yaml").write_text(YAML.format(root=root / name))


def settings_of(case: str, root: Path, **more: str) -> Any:
    """The settings of a case; ``more`` on top."""
    cls, own = CASES[case]
    values = {"DATASET": "mine", "RESULT_DIR": str(root / "results"), "DEVICE": "cpu", "RECORD_LANG": "en"}
    return load(cls, {**values, **OLD_DEFAULTS, **own, **more}, {})


def recipe_of(case: str, settings: Any) -> Recipe:
    """The recipe of a case."""
    step = case.split(",")[0]
    if step == "beam_data":
        return generate_data.recipe(settings)
    if step.startswith("embeddings"):
        return export_embeddings.recipe(settings, step.split()[1])
    if step == "items":
        return export_embeddings.whole_recipe(settings, paths.modality_embeddings(settings, "train"))
    if step in ("states", "answer", "answer_clip"):
        made = {path.name.split("_mine")[0]: recipe for path, recipe in export_channels.outputs(settings).items()}
        begins = {"states": "lvlm_", "answer": "answer_" + paths.model_slug(paths.lvlm_name(settings))}.get(step, step)
        return next((recipe for name, recipe in made.items() if name.startswith(begins)), Recipe({}, {}))
    if step == "v2":
        return train_v2.recipe(train_v2._output(settings)[1])
    if step == "rl_data":
        return generate_rl_data.recipe(settings)
    if step.startswith("v3"):
        online = case != "v3 alone" and settings.is_online
        return _with_files(lambda: (train_v3_online if online else train_v3).recipe(settings))
    if step == "inference":
        there = {name: Path("selectors") / name for name in chosen(settings) if name in SELECTORS}
        return inference.recipe(settings, there)
    return record.recipe(settings)


def _with_files(make: Any) -> Recipe:
    """What needs its files to be there, with those made (by us, as their provenance says)."""
    for _ in range(9):
        try:
            return make()
        except MissingInputError as error:
            path = Path(re.search(r"not found: (.*?)(?: \(make it|$)", str(error))[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            sidecar(path).write_text("{}")
    return make()


def hashes(settings: Any) -> dict[str, str]:
    """{hash: what it is the hash of} of those in recipes that change with data and code."""
    data, key = paths.dataset(settings), settings.dataset
    names = {load_split(data, split).fingerprint: f"<{key} {split}>" for split in ("train", "val")}
    names[record._writer()] = "<writer>"
    if hasattr(settings, "prompt_order"):
        names[lvlm.model_config(settings).prompt_format.fingerprint()] = "<prompt format>"
    return names


def written(recipe: Recipe, settings: Any) -> dict[str, Any]:
    """A recipe as text: files below the results folder, hashes by what they are the hashes of."""
    names = hashes(settings)

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        return names.get(value, value) if isinstance(value, str) else value

    below = {role: str(path).replace(settings.result_dir, "<results>") for role, path in recipe.files.items()}
    return {"files": below, "values": plain(recipe.values)}


def other_value(field: dataclasses.Field, value: Any) -> str:
    """Another value of a setting that is allowed, as text."""
    meta, name = field.metadata, field.name
    if name in OTHER_TEXTS:
        return OTHER_TEXTS[name]
    if isinstance(value, bool):
        return str(int(not value))
    if meta["choices"]:
        return next(word for word in meta["choices"] if word not in (value, "", paths.sampler_class(str(value))))
    if isinstance(value, int | float):
        low = meta["lo"] if meta["lo"] is not None else -config.LARGEST
        less, more = value - 1 if isinstance(value, int) else value / 2 - 0.01, value + 1
        return str(more if meta["hi"] is None or more <= meta["hi"] else max(low, less))
    return f"elsewhere_{name}"


def moved_by(case: str, root: Path) -> Iterator[str]:
    """The settings of a case's class that change its recipe when they alone change."""
    base = settings_of(case, root)
    before = written(recipe_of(case, base), base)
    for field in dataclasses.fields(base):
        if field.name in ("lever_plugins",):
            continue
        other = config.parse_value(field, other_value(field, getattr(base, field.name)))
        now = dataclasses.replace(base, **{field.name: other})
        if written(recipe_of(case, now), now) != before:
            yield field.name
