"""What the stages that ask the LVLM share: the engine, the pools, the recipe of a prompt. No torch until they work."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import config, paths
from lever_plus.cli import log
from lever_plus.data import channel_names, samplers
from lever_plus.data.dataset import VqaSplit, load_split
from lever_plus.devices import torch_device
from lever_plus.infoscore import prompt_order
from lever_plus.settings.shared import LvlmSettings, SharedSettings
from open_mmicl.errors import DamagedInputError, UsageError
from open_mmicl.interface.base import GenerationSettings
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.fingerprint import folder_fingerprint
from open_mmicl.interface.prompts import Prompt
from open_mmicl.lazy import lazy
from open_mmicl.metrics.vqa import gt_weights

channels = lazy("lever_plus.data.channels")
embeddings = lazy("lever_plus.data.embeddings")
open_mmicl_engine = lazy("open_mmicl.engine")


def model_config(settings: LvlmSettings) -> InferModelConfig:
    """The LVLM's configuration (the data set's stand-in where it has one), with DEVICE_MAP where that is set."""
    cfg = InferModelConfig.load(paths.infer_model_yaml(settings))
    return dataclasses.replace(cfg, device_map=settings.device_map) if settings.device_map else cfg


def inner_config(settings: LvlmSettings) -> InferModelConfig:
    """Configuration of the model whose hidden states and embeddings are read: the LVLM, or of one on a server the same
    model for our own engine.

    Raises:
        UsageError: a server without ``reference``.
    """
    cfg = model_config(settings).own_engine()
    return dataclasses.replace(cfg, device_map=settings.device_map) if settings.device_map else cfg


def model_fingerprint(settings: LvlmSettings, model: InferModelConfig | None = None) -> dict[str, Any]:
    """What decides an LVLM's answers besides the prompt: its files, data type and image processing, or the server that
    has it; of ``model`` instead of :func:`model_config` where it is given. No torch.
    """
    cfg = model or model_config(settings)
    if cfg.interface == "openai":
        said = {"name": cfg.model_name_or_path, "dtype": cfg.dtype, "processor": cfg.processor}
        return {**said, "engine": "openai", **cfg.server_config.identity()}
    folder = cfg.local_dir()
    files = folder_fingerprint(folder, [cfg.chat_template] if cfg.chat_template else []) if folder else ""
    name = "" if folder else f"{cfg.model_name_or_path}@{cfg.revision}"
    dtype = cfg.dtype if settings.precision == "auto" else settings.precision
    return {"files": files, "name": name, "dtype": dtype, "processor": cfg.processor, "engine": settings.engine}


def load_engine(settings: LvlmSettings, model: InferModelConfig | None = None) -> Any:
    """The engine with the answer cache of this results folder, on this process's device; ``model`` as above.

    On the CPU with one thread, unless OMP_NUM_THREADS says otherwise: processes share the work (see the pipeline), and
    the number of threads decides the last decimals of a log-probability.
    """
    if not (paths.dataset_dir(settings) / "doctor.json").is_file():
        log.info("bash scripts/doctor.sh was not run here yet: it checks model, data and memory, and tells the price")
    return open_mmicl_engine.Engine.load(
        model or model_config(settings),
        device=torch_device(settings.device, threads=1),
        mode=settings.engine,
        precision=settings.precision,
        cache_path=paths.answer_cache(settings),
        token_budget=settings.token_budget,
        image_cache_mb=settings.image_cache_mb,
    )


def parts_key(recipe: Any, engine: Any) -> str:
    """What the unfinished parts of an output belong to: its recipe, and with a server what it says of itself."""
    known = recipe.fingerprint()
    if engine.on_server:
        return hashlib.sha256(f"{known} {engine.key}".encode()).hexdigest()
    return known


def check_texts(engine: Any, split: VqaSplit, rows: Sequence[int]) -> None:
    """Before anything is asked: the true answer of each of these rows can be said by the model.

    Raises:
        DamagedInputError: it cannot; names the question. (An annotator's other answer that cannot be said has
        probability 0 and is counted in the log.)
    """
    count, first = 0, None
    for row in map(int, rows):
        question_id = split.question_id(row)
        if not engine.scorable(split.answer(row)):
            raise DamagedInputError(
                f"question_id {question_id}: {engine.name} cannot say its most frequent answer {split.answer(row)!r} "
                "(a control token, or characters that its tokenizer has not); correct it in the annotations file"
            )
        for answer, _ in gt_weights(split.answers(row)):
            if not engine.scorable(answer.strip()):
                count, first = count + 1, question_id if first is None else first
    if count:
        log.info(f"{count} answers cannot be said by {engine.name} and count nothing, the first at question_id {first}")


def generation(settings: LvlmSettings) -> Any:
    """Generation settings of the answers."""
    return GenerationSettings(settings.max_new_tokens, settings.num_beams, settings.length_penalty)


def build_prompt(train: VqaSplit, queries: VqaSplit, row: int, pool: np.ndarray, pointer: Any, order: str) -> Prompt:
    """The prompt of a pointer (pool positions in pick order) for the query in ``row`` of ``queries``.

    Args:
        pool: [K] train rows.
        order: PROMPT_ORDER, ``best_last`` or ``best_first``.

    Raises:
        ValueError: a position outside the pool; padding (-1) is no position.
    """
    if any(not 0 <= position < len(pool) for position in pointer):
        raise ValueError(f"pointer {list(pointer)} names a position outside the pool of {len(pool)}")
    demos = tuple(train.demo(int(pool[position])) for position in prompt_order(pointer, order))
    return Prompt(demos, queries.image_path(row), queries.question(row))


def train_query_order(train: VqaSplit, settings: SharedSettings) -> np.ndarray:
    """Train rows in the order in which anchors and RL queries are drawn: [Q] int64, a shuffle by DATA_SEED of those
    that may be queries (``train.query_rows``).

    The first SAMPLE_NUM are the beam search's anchors, the first RL_QUERY_NUM the RL queries, so the
    anchors are among them.
    """
    order = np.random.default_rng([settings.data_seed, 0]).permutation(len(train)).astype(np.int64)
    return order[np.isin(order, train.query_rows)]


def first_queries(train: VqaSplit, settings: SharedSettings, name: str, times: int = 1) -> np.ndarray:
    """As many of :func:`train_query_order` as the setting ``name`` (SAMPLE_NUM, RL_QUERY_NUM) says, or ``times`` that.

    Raises:
        UsageError: the setting is more than there are.
    """
    wanted, there = getattr(settings, name.lower()), len(train.query_rows)
    if wanted > there:
        raise UsageError(f"{name}={wanted} is more than the {there} train queries there are")
    return train_query_order(train, settings)[: wanted * times]


def modality_features(settings: SharedSettings, split: str) -> Mapping[str, Any]:
    """{"image": [N, d], "text": [N, d]} of a split, as export_embeddings wrote them, read when asked for."""
    rows = len(load_split(paths.dataset(settings), split))
    return embeddings.ModalityFile(paths.modality_embeddings(settings, split), f"CLIP embeddings of {split}", rows)


def query_pools(
    settings: SharedSettings, queries: VqaSplit, rows: np.ndarray, train: VqaSplit, split: str
) -> np.ndarray:
    """[Q, K] int64 train rows: the pools of the given query rows by the sampler of the settings."""
    reads = samplers.read_by(settings.sampler)
    train_features: Mapping[str, Any] | None = None
    query_features: Mapping[str, Any] | None = None
    if samplers.CHANNELS in reads:
        asking = channels.load_tables(channel_names.table_files(settings, split), len(train), len(queries)).queries
        items = asking
        if split != "train":
            items = channels.load_tables(channel_names.table_files(settings), len(train)).queries
        query_features, train_features = {"channels": asking}, {"channels": items}
    elif reads:
        train_features = modality_features(settings, "train")
        query_features = train_features if split == "train" else modality_features(settings, split)
    return samplers.sample_pools(
        settings.sampler,
        query_rows=rows,
        query_image_ids=queries.image_ids,
        train_image_ids=train.image_ids,
        k=settings.candidate_num,
        seed=settings.data_seed,
        same_split=split == "train",
        query_features=query_features,
        train_features=train_features,
    )


def prompt_inputs(settings: LvlmSettings, splits: tuple[str, ...] = ("train",)) -> dict[str, Any]:
    """What is behind every prompt and no setting of its own: data, sampler, model, words; part of each recipe."""
    return {
        "dataset": {split: load_split(paths.dataset(settings), split).fingerprint for split in splits},
        "sampler": paths.sampler_class(settings.sampler),
        "model": model_fingerprint(settings),
        "prompt_format": model_config(settings).prompt_format.fingerprint(),
    }


def feature_files(settings: SharedSettings, *splits: str) -> dict[str, Path]:
    """The embedding files that the sampler reads; {} for one that compares nothing."""
    reads = samplers.read_by(settings.sampler)
    if not reads:
        return {}
    if samplers.CHANNELS in reads:
        if channel_names.names(settings):
            found = [channel_names.files(settings, split, candidates=False) for split in splits]
            return {role: path for files in found for role, path in files.items()}
        own = {"val": channel_names.query_embeddings_file} if "val" in splits else {}
        return {**channel_names.train_files(settings), **{f"queries_{s}": of(settings) for s, of in own.items()}}
    return {f"clip_{split}": paths.modality_embeddings(settings, split) for split in splits}


def repo_path(text: str) -> str:
    """A path of the configuration, relative to the repository, as an absolute one where it exists there."""
    there = config.REPO_ROOT / text
    return str(there) if text and there.exists() else text
