"""The words of EMBEDDING: which channels there are, which are in use, which files they lie in. No torch."""

from pathlib import Path
from typing import Any

from lever_plus import paths
from open_mmicl.errors import UsageError

SEEN_OF_QUERIES = ("clip_image", "clip_text", "lvlm")
OF_CANDIDATES = ("answer", "answer_clip")
CHANNELS = (*SEEN_OF_QUERIES, *OF_CANDIDATES)
ITEM_WORDS = ("mean", "concat")
DEFAULT = "clip_image clip_text lvlm answer"


def check_words(embedding: str) -> None:
    """See that EMBEDDING says something that is known.

    Raises:
        UsageError: an unknown or repeated word, or no channel that a query has.
    """
    words = embedding.split()
    if len(words) == 1 and words[0] in ("auto", *ITEM_WORDS):
        return
    unknown = [word for word in words if word not in CHANNELS]
    if unknown or not words or len(set(words)) < len(words) or not set(words) & set(SEEN_OF_QUERIES):
        raise UsageError(
            f"EMBEDDING={embedding} is not allowed: auto, mean, concat, or channels of {' '.join(CHANNELS)}, each once "
            f"and at least one that a query has ({' '.join(SEEN_OF_QUERIES)})"
        )


def layers(text: str) -> tuple[int, ...]:
    """``"-1 -2"`` -> (-1, -2).

    Raises:
        UsageError: LVLM_LAYERS holds anything but distinct whole numbers.
    """
    words = text.split()
    numbers = tuple(int(word) for word in words if word.removeprefix("-").isdecimal() and word.isascii())
    if not words or len(set(numbers)) < len(words):
        raise UsageError(f"LVLM_LAYERS={text} is not allowed: distinct whole numbers with spaces between, e.g. -1 -2")
    return numbers


def names(settings: Any) -> tuple[str, ...]:
    """The channels in the order of a candidate's row, those of queries first; () where one table of item embeddings is
    read (``mean``, ``concat``, QUERY_EMB_PATH, EMBEDDINGS_OF).

    ``auto``: item embeddings where the user brought them or a v2 checkpoint, or asked for one modality (LEVER_LM) or
    CLIP with LoRA; else :data:`DEFAULT`.
    """
    if getattr(settings, "query_emb_path", "") or getattr(settings, "embeddings_of", ""):
        return ()
    word = settings.embedding
    if word == "auto":
        word = DEFAULT
        one_modality = settings.lever_lm != "query_img_text_icd_img_text"
        lora = getattr(settings, "v2_mode", "") == "lora"
        if one_modality or lora or paths.brings_own_embeddings(settings):
            word = "mean"
    if word in ITEM_WORDS:
        return ()
    chosen = word.split()
    return tuple(name for name in CHANNELS if name in chosen)


def item_word(settings: Any) -> str:
    """``mean`` or ``concat``: how item embeddings are made, where they are."""
    return settings.embedding if settings.embedding in ITEM_WORDS else "mean"


def files(settings: Any, split: str, candidates: bool) -> dict[str, Path]:
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


def train_files(settings: Any) -> dict[str, Path]:
    """The files behind the train items' tables, by role: the channels', or the item embeddings'."""
    if names(settings):
        return files(settings, "train", candidates=True)
    own = getattr(settings, "query_emb_path", "")
    return {"embeddings": Path(own) if own else paths.candidate_embeddings(settings)}


def outputs_needed(settings: Any) -> bool:
    """Whether a channel is in use that is the LVLM's or an answer's: more than CLIP's image and question."""
    return bool(set(names(settings)) - {"clip_image", "clip_text"})
