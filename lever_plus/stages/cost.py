"""What a step would cost: prompts, images, tokens, operations, hours on named cards and as measured. No weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lever_plus import paths
from lever_plus.cli import log
from lever_plus.data.dataset import load_split
from lever_plus.devices import gpus_here
from lever_plus.settings.shared import LvlmSettings
from lever_plus.stages.flops import CARDS, SHARE, Architecture, architecture, hours, read_of_model
from lever_plus.stages.lvlm import model_config
from lever_plus.stages.work import Work
from open_mmicl.answer_cache import AnswerCache, Rate
from open_mmicl.lazy import lazy

interface_images = lazy("open_mmicl.interface.images")

TURN_TOKENS = (
    26  # chat marks, "Question:… Short answer:", a question of about 9 words and an answer, with Qwen's tokenizer
)
ANSWER_TOKENS = 3  # of a scored answer
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
    """Totals of a step as the naive path would pay them, the distinct images, and operations.

    ``operations``: every distinct image encoded once, every prompt computed whole; None without an architecture. The
    engine stays below: it computes shared beginnings once, and what the cache holds not at all.
    """

    queries: int
    prompts: int
    images: int
    distinct_images: int
    image_tokens: int
    text_tokens: int
    operations: float | None = None

    @property
    def tokens(self) -> int:
        """Image and text tokens."""
        return self.image_tokens + self.text_tokens


@dataclass(frozen=True)
class Sizes:
    """What a price is made of: the splits, visual tokens an image, where these are from, the model's sizes."""

    splits: dict[str, Split]
    per_image: float
    basis: str
    model: Architecture | None
    dtype: str

    def images_there(self, step: Work) -> int:
        """Distinct images that a step's prompts can hold."""
        return sum(self.splits[name].images for name in {step.split, "train"})


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


def sizes(settings: LvlmSettings) -> Sizes:
    """What a price is made of with these settings; reads headers of some images, no weights.

    Raises:
        MissingInputError, DamagedInputError: of the data set or the model's files.
    """
    cfg = model_config(settings)
    dtype = cfg.dtype if settings.precision == "auto" else settings.precision
    cfg = cfg.own_engine() if cfg.has_own_engine else cfg
    return Sizes(*_splits(settings, _pixel_bounds(cfg)), architecture(cfg), dtype)


def price(settings: LvlmSettings, step: Work, there: Sizes) -> Cost:
    """What a step costs at most (equal prompts and shared beginnings are paid once)."""
    queries = step.capped(there.splits[step.split].questions)
    prompts, images = queries * step.per_query, queries * step.images
    shown = max(step.by_shots, default=0) * step.per_query
    distinct = min(queries * (1 + min(settings.candidate_num, shown)), there.images_there(step))
    image_tokens, text_tokens = round(images * there.per_image), images * TURN_TOKENS
    operations = None
    if there.model is not None and prompts:
        length = (image_tokens + text_tokens) / prompts
        new = settings.num_beams * (settings.max_new_tokens - 1) if step.generates else ANSWER_TOKENS
        operations = there.model.decoder(image_tokens + text_tokens + prompts * new, length, prompts * (1 + new))
        operations += there.model.vision(distinct * there.per_image)
    return Cost(queries, prompts, images, distinct, image_tokens, text_tokens, operations)


def print_plan(settings: LvlmSettings, step: Work, output: Path) -> int:
    """Print a step's price. Returns 0."""
    there = sizes(settings)
    cost = price(settings, step, there)
    capped = "" if cost.queries == step.queries or step.queries < 0 else (
        f" ({step.setting}={step.queries:,} is more than the {cost.queries:,} there are, and would be refused)"
    )  # fmt: skip
    lines = [
        f"dry run: {step.what} -> {output}",
        f"  {cost.queries:,} queries x {step.per_query} prompts = {cost.prompts:,} prompts{capped}",
        f"  {cost.images:,} images in them, at most {cost.distinct_images:,} distinct (each is encoded once)",
        f"  about {cost.image_tokens:,} image tokens and {cost.text_tokens:,} text tokens without sharing "
        f"({there.per_image:.0f} an image, {there.basis})",
        f"  {operations_line(cost.operations, cards(settings))}",
        f"  {image_memory_line(settings, cost, there)}",
        f"  {_hours(settings, cost, 'generate' if step.generates else 'score')}",
    ]
    log.info("\n".join(lines))
    return 0


def cards(settings: LvlmSettings) -> int:
    """Cards that share the prompts: one for each process, or for each GPU that is named."""
    return max(settings.nproc, len([gpu for gpu in settings.gpu_id.split(",") if gpu.strip()]))


def operations_line(operations: float | None, count: int) -> str:
    """Operations, and hours on the cards of :mod:`lever_plus.stages.flops`."""
    if operations is None:
        return "operations: unknown, the model's config.json is not here and its YAML has no architecture"
    told = ", ".join(f"{card.name} {hours(operations, card, count):.2g} h" for card in CARDS)
    return f"at most {operations:.2g} floating-point operations: {told} ({count} card(s) at {SHARE:.0%} of bf16 peak)"


def image_memory_line(settings: LvlmSettings, cost: Cost, there: Sizes) -> str:
    """What the features of the distinct images take, beside the memory that is allowed for them."""
    if there.model is None:
        return "memory for the distinct images: unknown"
    needed = there.model.feature_bytes(cost.distinct_images * there.per_image, there.dtype)
    told = f"features of the distinct images: {needed / 2**30:.2g} GiB"
    allowed = settings.image_cache_mb or model_config(settings).image_cache_mb
    if not allowed:
        return f"{told}; kept within free memory (IMAGE_CACHE_MB=0)"
    if allowed << 20 >= needed:
        return f"{told}, all of them fit into IMAGE_CACHE_MB={allowed}"
    held = int((allowed << 20) / needed * cost.distinct_images)
    return (
        f"{told}; IMAGE_CACHE_MB={allowed} holds {held:,} of "
        f"{cost.distinct_images:,}, the others are encoded again: IMAGE_CACHE_MB=0 takes what memory is free"
    )


def _pixel_bounds(cfg: Any) -> dict[str, Any]:
    """``min_pixels`` and ``max_pixels`` of the model's image processor: the configuration's, else its files'."""
    raw = read_of_model(cfg, "preprocessor_config.json", "image processor configuration") or {}
    size = raw.get("size", {})
    bounds = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    bounds.update({key: raw[key] for key in bounds if raw.get(key)})
    bounds.update({key: cfg.processor[key] for key in bounds if key in cfg.processor})
    return {key: value for key, value in bounds.items() if value}


def _splits(settings: LvlmSettings, processor: dict[str, Any]) -> tuple[dict[str, Split], float, str]:
    """The splits, visual tokens an image, and where these come from."""
    there = paths.dataset(settings)
    if settings.assume or not there.found():
        name = settings.assume or (there.name if there.name in ASSUMED else "okvqa")
        missing = "" if settings.assume else f"{settings.dataset} is not there, "
        return ASSUMED[name], image_tokens(*COCO_IMAGE, processor), f"{missing}assumed: {name}, 640 x 480"

    train, val = load_split(there, "train"), load_split(there, "val")
    step = max(1, len(train) // SAMPLED_IMAGES)
    files = interface_images.ImageFiles()
    shapes = [files.size(train.image_path(row)) for row in range(0, len(train), step)]
    found = [image_tokens(width, height, processor) for height, width in shapes]
    asked = {"train": len(train.query_rows), "val": len(val)}
    splits = {n: Split(asked[n], len(set(s.image_ids.tolist()))) for n, s in (("train", train), ("val", val))}
    return splits, sum(found) / len(found), f"mean of {len(found)} images"


def rates_of(settings: LvlmSettings, model: str, kind: str) -> list[tuple[str, Rate]]:
    """(device, rate) of what was measured with a model and the settings' engine; [] where nothing was."""
    path = paths.answer_cache(settings)
    if not path.is_file():
        return []
    cache = AnswerCache(path)
    found = [
        (device, rate)
        for name, description, asked, device, rate in cache.rates()
        if (name, description.get("mode"), asked) == (model, settings.engine, kind) and rate.seconds > 0
    ]
    cache.close()
    return found


def _hours(settings: LvlmSettings, cost: Cost, kind: str) -> str:
    """Hours from the rate that was measured with this model, engine and kind of work (``score`` or ``generate``)."""
    path, model = paths.answer_cache(settings), paths.lvlm_name(settings)
    rates = rates_of(settings, model, kind)
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
