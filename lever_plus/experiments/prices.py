"""What a result cost in LVLM prompts, and what v3's fair rival (v2 given as many) would cost."""

from pathlib import Path

from lever_plus import paths, provenance
from lever_plus.settings.data import RlDataSettings
from lever_plus.stages import work


def read_price(
    settings: RlDataSettings, inference_dirs: list[Path], training_prompts: int = 0
) -> dict[str, int | None]:
    """LVLM prompts: ``beam_data`` (v2), ``rl_data`` (v3), ``training`` (online GRPO), ``evaluation``.

    From the provenance beside each output; None where it has none (a file brought by the user).
    """
    return {
        "beam_data": prompts_of(paths.beam_data(settings)),
        "rl_data": prompts_of(paths.rl_data(settings)),
        "training": training_prompts,
        "evaluation": total(*(prompts_of(folder / "metrics.json") for folder in inference_dirs)),
    }


def fair_rivals(settings: RlDataSettings, price: dict[str, int | None]) -> dict[str, dict[str, int]]:
    """v2 trained on as many LVLM prompts, or on as many queries, as v3 used: anchors and beam prompts of each.

    Returns: {"prompts": {"anchors", "prompts"}, "queries": {…}}; "prompts" is left out where the price is unknown.
    """
    per_anchor = work.beam_data(settings).per_query
    queries = max(settings.sample_num, settings.rl_query_num)
    rivals = {"queries": {"anchors": queries, "prompts": queries * per_anchor}}
    if price["rl_data"] is not None:
        extra = price["rl_data"] + (price["training"] or 0)
        anchors = settings.sample_num + round(extra / per_anchor)
        rivals["prompts"] = {"anchors": anchors, "prompts": anchors * per_anchor}
    return rivals


def total(*parts: int | None) -> int | None:
    """The sum; None where one is not known."""
    return None if None in parts else sum(parts)


def prompts_of(output: Path) -> int | None:
    """The prompts that an output cost, from the file beside it; None where it does not say."""
    if not provenance.sidecar(output).is_file():
        return None
    prompts = provenance.read_stamp(output).get("prompts")
    return None if prompts is None else sum(prompts.values())
