"""The methods of an evaluation, by name. No torch."""

from typing import Any

from lever_plus.data import channel_names
from open_mmicl.errors import UsageError

SELECTORS = ("v3", "v2", "label")
CHANNEL_SIMILARITY = {"sim_clip_image": "clip_image", "sim_clip_text": "clip_text", "sim_lvlm": "lvlm"}
WHOLE_SPLIT = ("rices", "question_knn", "mmices", "bm25")
METHODS = (*SELECTORS, "similarity", *CHANNEL_SIMILARITY, *WHOLE_SPLIT, "random", "zero_shot")


def chosen(settings: Any) -> list[str]:
    """The methods of METHODS; ``auto``: all of them, but for the channels that EMBEDDING does not have, and the label
    retriever where it is v2 (V2_MODE=labels).

    Raises:
        UsageError: an unknown method, one whose channel is not read, or none.
    """
    channels = channel_names.names(settings)
    if settings.methods == "auto":
        lacking = {name for name, channel in CHANNEL_SIMILARITY.items() if channel not in channels}
        same = {"label"} if settings.v2_mode == "labels" else set()
        return [name for name in METHODS if name not in lacking | same]
    methods = settings.methods.split()
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or len(set(methods)) < len(methods):
        known = " ".join(METHODS)
        raise UsageError(f"METHODS={settings.methods!r} is not allowed: auto, or some of {known}, each once")
    for name in methods:
        if name in CHANNEL_SIMILARITY and CHANNEL_SIMILARITY[name] not in channels:
            raise UsageError(f"METHODS: {name} needs the channel {CHANNEL_SIMILARITY[name]}: add it to EMBEDDING")
    return methods
