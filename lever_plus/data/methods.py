"""The methods of an evaluation, by name. No torch."""

from collections.abc import Sequence

from lever_plus.data import channel_names
from lever_plus.registries import RIVALS
from lever_plus.settings.inference import InferenceSettings
from open_mmicl.errors import UsageError

SELECTORS = ("v3", "v2", "label")
CHANNEL_SIMILARITY = {"sim_clip_image": "clip_image", "sim_clip_text": "clip_text", "sim_lvlm": "lvlm"}
ADAPTIVE = "v3_adaptive"
CASCADE = "_cascade"
CASCADES = tuple(f"{method}{CASCADE}" for method in (*SELECTORS, "similarity"))
"""Methods asked with more demonstrations only while the LVLM is not sure of its answer; evaluated where named."""
VERSIONS = ("v1", "v2_lora")
"""Other supervised selectors: evaluated where they are named, for they cost a training each."""


def known() -> list[str]:
    """Every method, in the order of tables."""
    deciding = (ADAPTIVE, *CASCADES)
    return [*SELECTORS, *VERSIONS, "similarity", *CHANNEL_SIMILARITY, *RIVALS, "random", "zero_shot", *deciding]


def chosen(settings: InferenceSettings) -> list[str]:
    """The methods of METHODS; ``auto``: all of them, but for VERSIONS, the channels that EMBEDDING does not have, and
    the label retriever where it is v2 (V2_MODE=labels). v3_adaptive is among them where STOP=1, and then what it is
    judged by.

    Raises:
        UsageError: an unknown method, one whose channel is not read, or none.
    """
    channels = channel_names.names(settings)
    if settings.methods == "auto":
        lacking = {name for name, channel in CHANNEL_SIMILARITY.items() if channel not in channels}
        same = {"label"} if settings.v2_mode == "labels" else set()
        named = [name for name in known() if name not in {*VERSIONS, *lacking, *same, ADAPTIVE, *CASCADES}]
        return with_rivals(named, settings.stop, settings.cascade)
    methods = settings.methods.split()
    unknown = [name for name in methods if name not in known()]
    if unknown or not methods or len(set(methods)) < len(methods):
        there = " ".join(known())
        raise UsageError(f"METHODS={settings.methods!r} is not allowed: auto, or some of {there}, each once")
    for name in methods:
        if name in CHANNEL_SIMILARITY and CHANNEL_SIMILARITY[name] not in channels:
            raise UsageError(f"METHODS: {name} needs the channel {CHANNEL_SIMILARITY[name]}: add it to EMBEDDING")
    return with_rivals(methods, settings.stop, settings.cascade)


def with_rivals(methods: list[str], stop: bool, cascade: bool) -> list[str]:
    """The methods, and beside those that decide how many the fixed numbers and zero_shot; STOP=1 adds v3_adaptive where
    v3 is, CASCADE=1 the cascades of the selectors and of similarity where they are.
    """
    wanted = methods + ([ADAPTIVE] if stop and "v3" in methods else [])
    wanted += [f"{name}{CASCADE}" for name in (*SELECTORS, "similarity") if cascade and name in methods]
    for name in [name for name in wanted if decides(name)]:
        wanted = [*wanted, fixed_of(name), "zero_shot"]
    return list(dict.fromkeys(wanted))


def decides(name: str) -> bool:
    """Whether a method decides for each query how many demonstrations it gets."""
    return name == ADAPTIVE or name in CASCADES


def fixed_of(name: str) -> str:
    """The method with a fixed number of demonstrations whose picks a method that :func:`decides` takes some of."""
    return name.rsplit("_", 1)[0]


def answered(names: Sequence[str]) -> list[str]:
    """The methods that ask the LVLM for answers of their own: a cascade takes those of its fixed numbers."""
    return [name for name in names if name not in CASCADES]
