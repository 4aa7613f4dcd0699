"""What a stage would cost: prompts, images, tokens, and hours where a rate was measured. Loads no weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lever_plus import io, paths
from lever_plus.cli import log
from lever_plus.data import catalog
from open_mmicl.errors import MissingInputError

TURN_TOKENS = (
    26  # chat marks, "Question:… Short answer:", a question of about 9 words and an answer, with Qwen's tokenizer
)
COCO_IMAGE = (640, 480)  # the commonest size of COCO 2014
SAMPLED_IMAGES = 50


class Split(NamedTuple):
    """Questions of a split, and the images that they are about."""

    questions: int
    images: int


ASSUMED = {
    "okvqa": {"train": Split(9009, 8998), "val": Split(5046, 5033)},
    "vqav2": {"train": Split(443757, 82783), "val": Split(214354, 40504)},
}


@dataclass(frozen=True)
class Cost:
    """Totals of a stage as the naive path would pay them, and the distinct images."""

    queries: int
    prompts: int
    images: int
    distinct_images: int
    tokens: int


def image_tokens(width: int, height: int, processor: dict[str, Any], factor: int = 28) -> int:
    """Visual tokens that Qwen2.5-VL makes of an image: both sides rounded to 28 pixels, then scaled into the
    processor's pixel bounds (transformers' smart_resize).
    """
    low, high = processor.get("min_pixels", 56 * 56), processor.get("max_pixels", 28 * 28 * 1280)
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > high:
        scale = math.sqrt(height * width / high)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif h * w < low:
        scale = math.sqrt(low / (height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return h * w // factor**2


def estimate(
    queries: int, prompts_per_query: int, shots: int, pool: int, per_image: float, images_there: int | None = None
) -> Cost:
    """Cost of ``queries`` x ``prompts_per_query`` prompts with ``shots`` demonstrations each (an upper bound:
    shorter prompts count as full ones). ``images_there``: there are no more distinct images than these.
    """
    prompts = queries * prompts_per_query
    images = prompts * (shots + 1)
    distinct = queries * (1 + min(pool, prompts_per_query * shots))
    distinct = distinct if images_there is None else min(distinct, images_there)
    return Cost(queries, prompts, images, distinct, round(images * (per_image + TURN_TOKENS)))


def print_plan(settings: Any, what: str, queries: int, prompts_per_query: int, shots: int, output: Path) -> int:
    """Print a stage's price. Returns 0."""
    from lever_plus.stages.lvlm import model_config

    splits, per_image, basis = _sizes(settings, _pixel_bounds(model_config(settings)))
    evaluated = "val" if what == "inference" and getattr(settings, "eval_split", "val") == "val" else "train"
    count = splits[evaluated].questions if queries < 0 else queries
    images_there = sum(splits[name].images for name in {evaluated, "train"})
    cost = estimate(count, prompts_per_query, shots, settings.candidate_num, per_image, images_there)
    lines = [
        f"dry run: {what} -> {output}",
        f"  {cost.queries:,} queries x {prompts_per_query} prompts = {cost.prompts:,} prompts",
        f"  {cost.images:,} images in them, at most {cost.distinct_images:,} distinct (each is encoded once)",
        f"  about {cost.tokens:,} tokens without sharing ({per_image:.0f} an image, {basis})",
        f"  {_hours(settings, cost, 'score' if what == 'beam data' else 'generate')}",
    ]
    log.info("\n".join(lines))
    return 0


def _pixel_bounds(cfg: Any) -> dict[str, Any]:
    """``min_pixels`` and ``max_pixels`` of the model's image processor: the configuration's, else its files'."""
    try:
        folder = cfg.local_dir()
    except MissingInputError:  # a plan can be made without the weights
        folder = None
    file = folder / "preprocessor_config.json" if folder else None
    raw = io.read_object(file, "image processor configuration") if file and file.is_file() else {}
    size = raw.get("size", {})
    bounds = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    bounds.update({key: raw[key] for key in bounds if raw.get(key)})
    bounds.update({key: cfg.processor[key] for key in bounds if key in cfg.processor})
    return {key: value for key, value in bounds.items() if value}


def _sizes(settings: Any, processor: dict[str, Any]) -> tuple[dict[str, Split], float, str]:
    """The splits, visual tokens an image, and where these come from."""
    there = catalog.load(settings.dataset, settings)
    if settings.assume or not there.found():
        name = settings.assume or (there.name if there.name in ASSUMED else "okvqa")
        missing = "" if settings.assume else f"{settings.dataset} is not there, "
        return ASSUMED[name], image_tokens(*COCO_IMAGE, processor), f"{missing}assumed: {name}, 640 x 480"
    from PIL import Image

    from lever_plus.data.dataset import load_split

    train, val = load_split(settings, "train"), load_split(settings, "val")
    step = max(1, len(train) // SAMPLED_IMAGES)
    found = []
    for row in range(0, len(train), step):
        with Image.open(train.image_path(row)) as image:
            found.append(image_tokens(*image.size, processor))
    splits = {n: Split(len(split), len(set(split.image_ids.tolist()))) for n, split in (("train", train), ("val", val))}
    return splits, sum(found) / len(found), f"mean of {len(found)} images"


def _hours(settings: Any, cost: Cost, kind: str) -> str:
    """Hours from the rate that was measured with this model, engine and kind of work (``score`` or ``generate``)."""
    from lever_plus.devices import gpus_here
    from open_mmicl.answer_cache import AnswerCache

    path, model = paths.answer_cache(settings), paths.lvlm_name(settings)
    rates: list[tuple[str, Any]] = []
    if path.is_file():
        cache = AnswerCache(path)
        rates = [
            (device, rate)
            for name, description, asked, device, rate in cache.rates()
            if (name, description.get("mode"), asked) == (model, settings.engine, kind) and rate.seconds > 0
        ]
        cache.close()
    devices = {device for device, _ in rates}
    here = "cpu" if settings.device == "cpu" or not gpus_here() else "cuda"
    device = here if here in devices else min(devices, default="")
    per_second = _ratio([rate for on, rate in rates if on == device])
    if not per_second:
        first = "SAMPLE_NUM=5" if kind == "score" else "RL_QUERY_NUM=5 or TEST_DATA_NUM=5"
        return f"hours: not measured yet for {model}; run a few queries first ({first}), the rate is kept in {path}"
    hours = cost.prompts / per_second / settings.nproc / 3600
    return (
        f"about {hours:.2f} hours at {per_second:.1f} prompts/s (measured with {model} on {device}) "
        f"on {settings.nproc} process(es)"
    )


def _ratio(rates: list[Any]) -> float:
    seconds = sum(rate.seconds for rate in rates)
    return sum(rate.prompts for rate in rates) / seconds if seconds else 0.0
