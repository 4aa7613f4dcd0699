"""Settings that hold several words: EMBEDDING, LVLM_LAYERS, REPORT_TO. No torch."""

import importlib.util

from open_mmicl.errors import UsageError

SEEN_OF_QUERIES = ("clip_image", "clip_text", "lvlm")
OF_CANDIDATES = ("answer", "answer_clip")
CHANNELS = (*SEEN_OF_QUERIES, *OF_CANDIDATES)
ITEM_WORDS = ("mean", "concat")
DEFAULT = "clip_image clip_text lvlm answer"
WITHOUT_WEIGHTS = "clip_image clip_text answer_clip"  # of an LVLM on a server that is nowhere else
TRACKERS = ("tensorboard", "wandb", "trackio")


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
        raise UsageError(f"LVLM_LAYERS={text} is not allowed: distinct whole numbers separated by spaces, e.g. -1 -2")
    return numbers


def trackers(report_to: str) -> list[str]:
    """The trackers that are named, in order; ``none``: [].

    Raises:
        UsageError: an unknown word, or one whose package is not installed.
    """
    words = report_to.replace(",", " ").split()
    if words == ["none"]:
        return []
    unknown = [word for word in words if word not in TRACKERS]
    if unknown or not words:
        raise UsageError(f"REPORT_TO={report_to} is not allowed: none, or {', '.join(TRACKERS)} (several with commas)")
    for word in words:
        if importlib.util.find_spec(word) is None:
            raise UsageError(f"REPORT_TO={report_to}: {word} is not installed (pip install {word}), or take it out")
    return list(dict.fromkeys(words))
