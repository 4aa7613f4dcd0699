"""Which channels are in use, and which files they lie in. No torch until a file of original Lever-Plus is opened."""

from dataclasses import dataclass
from pathlib import Path

from lever_plus import paths, provenance
from lever_plus.data.dataset import load_split
from lever_plus.settings.shared import SharedSettings
from lever_plus.settings.word_lists import CHANNELS, DEFAULT, ITEM_WORDS, WITHOUT_WEIGHTS
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.lazy import lazy

embeddings = lazy("lever_plus.data.embeddings")


def names(settings: SharedSettings) -> tuple[str, ...]:
    """The channels in the order of a candidate's row, those of queries first; () where one table of item embeddings is
    read (``mean``, ``concat``, QUERY_EMB_PATH, EMBEDDINGS_OF).

    ``auto``: item embeddings where the user brought them or a v2 checkpoint, or asked for one modality (LEVER_LM) or
    CLIP with LoRA; else :data:`DEFAULT`, or without what an LVLM on a server does not show and no reference does.

    Raises:
        UsageError: EMBEDDING asks for that.
    """
    if settings.item_embeddings or settings.own_clip:
        return ()
    word = settings.embedding
    if word == "auto":
        word = DEFAULT if InferModelConfig.load(paths.infer_model_yaml(settings)).has_own_engine else WITHOUT_WEIGHTS
        one_modality = settings.lever_lm != "query_img_text_icd_img_text"
        if one_modality or settings.v2_mode == "lora" or paths.brings_own_embeddings(settings):
            word = "mean"
    if word in ITEM_WORDS:
        return ()
    chosen = word.split()
    if {"lvlm", "answer"} & set(chosen):
        InferModelConfig.load(paths.infer_model_yaml(settings)).own_engine()  # raises where nothing shows them
    return tuple(name for name in CHANNELS if name in chosen)


def item_word(embedding: str) -> str:
    """``mean`` or ``concat``: how item embeddings are made, where they are; ``embedding`` is EMBEDDING."""
    return embedding if embedding in ITEM_WORDS else "mean"


@dataclass(frozen=True)
class TableFiles:
    """The files behind the tables of a split's queries and of the train items as candidates, by role.

    ``channels``: in the order of a candidate's row, those of queries first; () for one table of item embeddings, whose
    role is ``embeddings``.
    """

    split: str
    channels: tuple[str, ...]
    queries: dict[str, Path]
    candidates: dict[str, Path]


def table_files(settings: SharedSettings, split: str = "train") -> TableFiles:
    """The files of the settings' channels, or of their item embeddings, with queries of ``split``."""
    candidates, channels = train_files(settings), names(settings)
    if channels:
        queries = files(settings, split, candidates=False)
    else:
        queries = candidates if split == "train" else {"embeddings": query_embeddings_file(settings)}
    return TableFiles(split, channels, queries, candidates)


def files(settings: SharedSettings, split: str, candidates: bool) -> dict[str, Path]:
    """The files behind a table of ``split``, by role; of candidates, or of queries."""
    found: dict[str, Path] = {}
    for name in names(settings):
        if name in ("clip_image", "clip_text"):
            found[f"clip_{split}"] = paths.modality_embeddings(settings, split)
        elif name == "lvlm":
            found[f"lvlm_{split}"] = paths.lvlm_states(settings, split)
            found["lvlm_train"] = paths.lvlm_states(settings, "train")  # whose mean and spread are taken off
        elif candidates:
            found[name] = paths.answer_embeddings(settings, name)
    return found


def train_files(settings: SharedSettings) -> dict[str, Path]:
    """The files behind the train items' tables, by role: the channels', or the item embeddings'."""
    if names(settings):
        return files(settings, "train", candidates=True)
    own = settings.item_embeddings
    return {"embeddings": Path(own) if own else paths.candidate_embeddings(settings)}


def outputs_needed(settings: SharedSettings) -> bool:
    """Whether a channel is in use that is the LVLM's or an answer's: more than CLIP's image and question."""
    return bool(set(names(settings)) - {"clip_image", "clip_text"})


def query_embeddings_file(settings: SharedSettings) -> Path:
    """The validation split's embeddings.

    The original Lever-Plus's query_embeddings.pt holds the train split; where such a file is found, ours lies
    beside it as val_embeddings.pt.
    """
    usual = paths.query_embeddings(settings)
    if not usual.is_file() or provenance.sidecar(usual).is_file():
        return usual

    train, val = (len(load_split(paths.dataset(settings), split)) for split in ("train", "val"))
    rows = len(embeddings.load_embeddings(usual, "query embeddings"))
    return usual.with_name(usual.name.replace("query_", "val_")) if rows == train != val else usual
