"""The only place that builds result paths. Names follow the original Lever-Plus, so its folder can be used as it is.

A name from the user or from a YAML file becomes part of a path here only, through ``config.check_name``.
"""

import re
from pathlib import Path

from lever_plus.config import check_name, config_file
from lever_plus.data import catalog
from lever_plus.provenance import is_brought
from lever_plus.registries import SAMPLER_CLASSES
from lever_plus.settings.data import RlDataSettings
from lever_plus.settings.selector import TrainV3Settings
from lever_plus.settings.shared import BeamNames, LvlmSettings, SharedSettings
from open_mmicl.errors import UsageError
from open_mmicl.interface.config import InferModelConfig


def sampler_class(name: str) -> str:
    """``rand_sampler`` or ``RandSampler`` -> ``RandSampler``."""
    return SAMPLER_CLASSES.get(name, name)


def model_slug(name: str) -> str:
    """The LVLM's name as file names have it: ``Qwen2.5-VL-3B-Instruct`` -> ``Qwen2_5-VL-3B-Instruct``."""
    return name.replace(".", "_").replace("/", "_")


def folders(settings: SharedSettings) -> dict[str, str]:
    """What the settings say of folders, by variable: RESULT_DIR, COCO_PATH, DATASET_PATH, OKVQA_PATH, …"""
    named = {name.upper(): value for name, value in vars(settings).items()}
    return {name: value for name, value in named.items() if name.endswith(("_PATH", "_DIR"))}


def dataset(settings: SharedSettings) -> catalog.DatasetConfig:
    """The settings' data set. Raises: as :func:`lever_plus.data.catalog.load`."""
    return catalog.load(settings.dataset, folders(settings))


def dataset_name(settings: SharedSettings) -> str:
    """The results folder of a data set: ``okvqa_local`` -> ``okvqa`` (the ``name`` of its YAML)."""
    return dataset(settings).name


def lvlm_name(settings: SharedSettings) -> str:
    """Name of the LVLM that answers: the data set's stand-in for ``beam_model`` where it has one."""
    path = infer_model_yaml(settings)
    name = InferModelConfig.load(path).name
    check_name(model_slug(name), f"{path}: name")
    return name


def infer_model_yaml(settings: SharedSettings) -> Path:
    """configs/infer_model/<model>.yaml of the LVLM that answers (the data set's stand-in where it has one)."""
    stand_in = dataset(settings).stand_in
    for named in stand_in:
        if not config_file("infer_model", check_name(named, f"{settings.dataset}.yaml: stand_in")).is_file():
            raise UsageError(f"{settings.dataset}.yaml: stand_in: {named!r} is no LVLM of configs/infer_model")
    model = stand_in.get(settings.beam_model, settings.beam_model)
    return config_file("infer_model", check_name(model, "BEAM_MODEL"))


def dataset_dir(settings: SharedSettings) -> Path:
    """``results/<data set>``."""
    return Path(settings.result_dir) / dataset_name(settings)


def log_path(settings: SharedSettings, stage: str) -> Path:
    """The log file of a stage."""
    return dataset_dir(settings) / "logs" / f"{stage}.log"


def answer_cache(settings: LvlmSettings) -> Path:
    """The SQLite file of answers and scores."""
    return Path(settings.answer_cache) if settings.answer_cache else dataset_dir(settings) / "cache" / "answers.sqlite"


def query_embeddings(settings: SharedSettings, own: str = "") -> Path:
    """Embeddings of every validation item, [N_val, d] float32 (the queries of inference); ``own`` as above."""
    return dataset_dir(settings) / "cache" / f"query_embeddings{_emb_suffix(settings, own)}.pt"


def candidate_embeddings(settings: SharedSettings, own: str = "") -> Path:
    """Embeddings of every train item, [N_train, d] float32 (candidates, and the queries of training).

    ``own``: the selector whose own CLIP made them (``v2_lora``).
    """
    return dataset_dir(settings) / "cache" / f"candidate_embeddings{_emb_suffix(settings, own)}.pt"


def modality_embeddings(settings: SharedSettings, split: str) -> Path:
    """Image and question embeddings apart, {"image": [N, d], "text": [N, d]} (the similarity samplers read them)."""
    own = settings.own_clip
    return dataset_dir(settings) / "cache" / f"clip_{split}{'_' if own else ''}{own}.pt"


def lvlm_states(settings: SharedSettings, split: str) -> Path:
    """The LVLM's hidden states of every item's zero-shot prompt, float32 [N, layers x d], by LVLM_LAYERS, LVLM_POOL."""
    layers = "_".join(settings.lvlm_layers.split())
    form = "" if (layers, settings.lvlm_pool) == ("-1", "last") else f"_{layers}_{settings.lvlm_pool}"
    return dataset_dir(settings) / "cache" / f"lvlm_{model_slug(lvlm_name(settings))}{form}_{split}.npy"


def answer_embeddings(settings: SharedSettings, channel: str) -> Path:
    """Every train item's answer, float32 [N, d]: ``answer`` as the LVLM has it, ``answer_clip`` as CLIP has it."""
    model = f"_{model_slug(lvlm_name(settings))}" if channel == "answer" else ""
    return dataset_dir(settings) / "cache" / f"{channel}{model}_train.npy"


def beam_data(settings: BeamNames) -> Path:
    """InfoScore beam data of a sampler and model, or the file of an older name where only that is there: with ":"
    (which not every file system takes) for "=", as this project wrote it, or the existing one (``few_shot`` too).
    """
    s = settings
    parts = [
        "vqa", dataset_name(s), model_slug(lvlm_name(s)), sampler_class(s.sampler), "scorer=infoscore",
        f"construct_order={s.construct_order}", f"beam_size={s.beam_size}", f"max_shot={s.max_shot}",
        f"candidate_num={s.candidate_num}", f"sample_num={s.sample_num}",
    ]  # fmt: skip
    path = dataset_dir(settings) / "generated_data" / ("-".join(parts) + ".json")
    former = path.name.replace("=", ":")
    names = (path.name, former, former.replace("-max_shot:", "-few_shot:"))
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), path)


def rl_data(settings: RlDataSettings | TrainV3Settings) -> Path:
    """RL data of a sampler and model; the original Lever-Plus's name, without the model, where only that is there."""
    if settings.rl_data_path:
        return Path(settings.rl_data_path)
    folder, start = dataset_dir(settings) / "generated_data", f"rl_data_{sampler_class(settings.sampler)}"
    path, old = folder / f"{start}_{model_slug(lvlm_name(settings))}.json", folder / f"{start}.json"
    return old if old.is_file() and not path.is_file() else path


def v2_checkpoint(settings: BeamNames, version: str = "v2") -> Path:
    """The supervised selector: ``v2`` (trained on beams, or with V2_MODE=labels on the annotations), ``v1`` (without
    cross-attention) or ``v2_lora`` (CLIP trained, too).
    """
    if version == "v2" and settings.v2_mode == "labels":
        return label_checkpoint(settings)
    return _beam_selector(settings, version)


def brings_own_embeddings(settings: SharedSettings) -> bool:
    """Whether the user brought embeddings of whole items, or a supervised selector, which was trained on such."""
    selectors = (dataset_dir(settings) / "model_cpk" / "v2").glob("*_best.ckpt")
    return any(is_brought(path) for path in (candidate_embeddings(settings), *selectors))


def label_checkpoint(settings: SharedSettings) -> Path:
    """The label retriever: the supervised selector that was trained on annotations alone."""
    s = settings
    name = f"{model_slug(lvlm_name(s))}_{sampler_class(s.sampler)}_labels_cand{s.candidate_num}_best.ckpt"
    return dataset_dir(s) / "model_cpk" / "v2" / name


def _beam_selector(settings: BeamNames, version: str = "v2") -> Path:
    s, lora = settings, "_lora" if version == "v2_lora" else ""
    name = (
        f"{model_slug(lvlm_name(s))}_{sampler_class(s.sampler)}_infoscore_{s.construct_order}_beam{s.beam_size}"
        f"_shot{s.max_shot}_cand{s.candidate_num}_sample{s.sample_num}_best{lora}.ckpt"
    )
    return dataset_dir(s) / "model_cpk" / ("v1" if version == "v1" else "v2") / name


def lora_clip(settings: BeamNames) -> Path:
    """Folder of the CLIP that the ``v2_lora`` selector was trained with."""
    selector = v2_checkpoint(settings, "v2_lora")
    return selector.with_name(selector.stem + "_clip")


def brought_sample_nums(output: Path) -> dict[int, Path]:
    """Files that the user brought and whose names differ from beam data's or a v2 checkpoint's in the number of
    anchors only, by that number.
    """
    named = re.sub(r"(sample(_num[=:])?)\d+", r"\g<1>(?P<number>\\d+)", re.escape(output.name))
    pattern = re.compile(re.sub("[=:]", "[=:]", re.sub("(max|few)_shot(?=[=:])", "(max|few)_shot", named)))
    there = sorted(output.parent.iterdir()) if output.parent.is_dir() else []
    matches = [(pattern.fullmatch(path.name), path) for path in there if is_brought(path)]
    return {int(match["number"]): path for match, path in matches if match and "number" in match.groupdict()}


def found_sample_num(settings: BeamNames) -> int | None:
    """The number of anchors of the beam data and v2 checkpoint that the user brought.

    None where a file of the settings' own number is there, or where nothing or more than one number is found.
    """
    outputs = (beam_data(settings), _beam_selector(settings))
    numbers = {number for output in outputs for number in brought_sample_nums(output)}
    return numbers.pop() if len(numbers) == 1 and not any(output.exists() for output in outputs) else None


def v3_dir(settings: SharedSettings) -> Path:
    """Folder of the v3 checkpoints; ``EXP_NAME`` gives each experiment its own."""
    name = f"v3_{sampler_class(settings.sampler)}_{model_slug(lvlm_name(settings))}"
    return (
        dataset_dir(settings)
        / "model_cpk"
        / (f"{name}_{check_name(settings.exp_name, 'EXP_NAME')}" if settings.exp_name else name)
    )


def inference_dir(settings: SharedSettings, run: str) -> Path:
    """Folder of one inference run."""
    return dataset_dir(settings) / "icl_inference" / check_name(run, "RUN_NAME")


def experiment_dir(settings: SharedSettings, experiment: str) -> Path:
    """Folder of an experiment's record and report."""
    return dataset_dir(settings) / "experiments" / check_name(experiment, "experiment")


def _emb_suffix(settings: SharedSettings, own: str) -> str:
    """Embeddings other than the standard ones (mean of image and text, by the data set's CLIP) get own names."""
    parts = ["concat"] if settings.embedding == "concat" else []
    if settings.lever_lm != "query_img_text_icd_img_text":
        parts.append(settings.lever_lm)
    if own := own or settings.own_clip:
        parts.append(own)
    return "".join(f"_{part}" for part in parts)
