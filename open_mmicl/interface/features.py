"""Images for the generic interface as features: each goes through the vision tower once, whatever the model class.

transformers' models take encoded images (``mm_encoder_outputs``) where they would take pixels and merge both by the
same code; what an image's token becomes in the text, the processor tells (``text_replacement_offsets``). So nothing
here knows a model. Whether this gives what pixels give is tried when a model is loaded, see :func:`feature_inputs`.
"""

import contextlib
import dataclasses
import inspect
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from open_mmicl.errors import DamagedInputError, foreign
from open_mmicl.interface.base import Work
from open_mmicl.interface.images import ImageFiles, load_rgb
from open_mmicl.interface.prompts import Demo, Prompt
from open_mmicl.memory import Budget

EXACT = 1e-4  # between log-probabilities from pixels and from features, fp32
ROUNDED = 0.05  # the same in 16 bit, of the logits' spread
_CACHED_SIZES = 4096


class FeatureCache:
    """Values made from images, least recently used first out of the device's memory and then out of the host's.

    Args:
        encode: sources -> as many tensors or :class:`EncodedImage`; called for what is not held.
        budget: bytes on the device, or those and further ones on the host.
        work: its ``images`` counts what was encoded.
    """

    def __init__(self, encode: Callable[[list[Any]], Sequence[Any]], budget: int | Budget, work: Work):
        self.encode, self.work = encode, work
        self.budget = budget if isinstance(budget, Budget) else Budget(budget)
        self.held: OrderedDict[Any, Any] = OrderedDict()
        self.spilled: OrderedDict[Any, Any] = OrderedDict()
        self.bytes = self.spilled_bytes = 0

    def get(self, wanted: Mapping[Any, Any]) -> dict[Any, Any]:
        """Values of ``{key: source}``; what is not held is encoded, all of it in one call."""
        found = {key: self.held[key] for key in wanted if key in self.held}
        for key in found:
            self.held.move_to_end(key)
        for key in [key for key in wanted if key in self.spilled]:
            value, home = self.spilled.pop(key)
            self.spilled_bytes -= value.nbytes
            self._hold(found, key, _moved(value, home))
        lacking = [key for key in wanted if key not in found]
        fresh = self.encode([wanted[key] for key in lacking]) if lacking else []
        self.work.images += len(lacking)
        for key, value in zip(lacking, fresh, strict=True):
            self._hold(found, key, value)
        while self.bytes > self.budget.device and len(self.held) > 1:
            key, value = self.held.popitem(last=False)
            self.bytes -= value.nbytes
            if value.nbytes <= self.budget.host:
                self.spilled[key] = (_moved(value, torch.device("cpu")), value.device)
                self.spilled_bytes += value.nbytes
        while self.spilled_bytes > self.budget.host:
            self.spilled_bytes -= self.spilled.popitem(last=False)[1][0].nbytes
        return found

    def _hold(self, found: dict[Any, Any], key: Any, value: Any) -> None:
        found[key] = self.held[key] = value
        self.bytes += value.nbytes


def _moved(value: Any, device: torch.device) -> Any:
    return [part.to(device) for part in value] if isinstance(value, list) else value.to(device)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image as the model takes it.

    ``replacement``: the text that stands for it; ``pooled``: features (n, tokens, d) or a list of (tokens, d) as the
    model's ``get_image_features`` gives them; ``deep``: the same for inner layers of the decoder; ``facts``: (1, …)
    tensors that the decoder reads besides (grids).
    """

    replacement: str
    pooled: Any
    deep: list[list[torch.Tensor]] = field(default_factory=list)
    facts: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return sum(t.nbytes for some in (self.pooled, *self.deep) for t in some)

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.pooled[0].device

    def to(self, device: torch.device) -> "EncodedImage":
        """The same with its features on another device."""
        pooled = _moved(self.pooled, device)
        return dataclasses.replace(self, pooled=pooled, deep=[_moved(layer, device) for layer in self.deep])


class FeatureInputs:
    """Model inputs that hold features instead of pixels.

    ``types``: names under which the model reads which tokens are images; ``by_count``: whether an image that is alone
    in its prompt looks different from one that is not (LLaVA-OneVision cuts it into more parts); ``tells``: whether the
    processor tells what an image's token becomes in the text (where not, Idefics2's, it is given blank images of the
    same sizes each time).
    """

    def __init__(self, model: Any, processor: Any, files: ImageFiles, budget: int | Budget):
        self.model, self.processor, self.files, self.budget = model, processor, files, budget
        self.base = model.base_model
        self.types: list[str] = []
        self.by_count = self.tells = True
        self._takes = set(inspect.signature(self.base.get_image_features).parameters)
        self._output_class: Any = None
        self.start(Work())
        self._text_of_size = lru_cache(_CACHED_SIZES)(self._replacement_of_size)

    def start(self, work: Work) -> None:
        """Begin with an empty cache; ``work`` counts the images encoded from here on."""
        self._cache = FeatureCache(self._encode, self.budget, work)

    def inputs(self, texts: Sequence[str], images: Sequence[Sequence[str]], **words: Any) -> dict[str, Any]:
        """Inputs of rendered texts; ``words`` go to the tokenizer (padding, special tokens)."""
        rows = [[(self.files.digest(path), self._several(paths)) for path in paths] for paths in images]
        keys, paths = [key for row in rows for key in row], [path for row in images for path in row]
        found = self._cache.get({key: (path, key[1]) for key, path in zip(keys, paths, strict=True)})
        encoded = [found[key] for key in keys]
        words["return_tensors"] = "pt"
        if self.tells:
            replacements = [[found[key].replacement for key in row] for row in rows]
            batch = dict(self.processor.tokenizer(self._expanded(texts, replacements), **words))
            for name in self.types:
                batch[name] = torch.tensor(self.processor.create_mm_token_type_ids(batch["input_ids"].tolist()))
        else:
            batch = self._with_blanks(texts, images, **words)
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        for name in encoded[0].facts:
            batch[name] = torch.cat([image.facts[name] for image in encoded])
        return {**batch, "mm_encoder_outputs": {"image": self._joined(encoded)}}

    def lengths(self, texts: Sequence[str], images: Sequence[Sequence[str]], **words: Any) -> list[int]:
        """Tokens of each text; of the images only the sizes are read."""
        if not self.tells:
            return [
                len(self._with_blanks([t], [i], **words)["input_ids"][0]) for t, i in zip(texts, images, strict=True)
            ]
        replacements = [
            [self._text_of_size(self.files.size(path), self._several(paths)) for path in paths] for paths in images
        ]
        return [len(ids) for ids in self.processor.tokenizer(self._expanded(texts, replacements), **words)["input_ids"]]

    def see_whether_counts_matter(self, example: str) -> None:
        """Sets ``by_count``: compares texts of images of several sizes and the features of one, alone and not."""
        sizes = ((61, 97), (150, 200), (900, 1200))
        if any(self._text_of_size(size, False) != self._text_of_size(size, True) for size in sizes):
            return
        alone, beside = self._encode([(example, False), (example, True)])
        self.by_count = any(
            a.shape != b.shape or float((a - b).float().norm()) > ROUNDED * float(a.float().norm())
            for a, b in zip(alone.pooled, beside.pooled, strict=True)
        )

    def _several(self, paths: Sequence[str]) -> bool:
        return self.by_count and len(paths) > 1

    def _encode(self, sources: Sequence[tuple[str, bool]]) -> list[EncodedImage]:
        """Each image alone, so that its features do not depend on those beside it.

        An image that shares its prompt with others is encoded beside a copy of itself: some processors cut an image
        into more parts where it is the only one.
        """
        return [self._encode_one(path, several) for path, several in sources]

    @torch.inference_mode()
    def _encode_one(self, path: str, several: bool) -> EncodedImage:
        data, replacement = self._processed(load_rgb(path), several, path)
        data = data.to(self.model.device, dtype=self.model.dtype)
        out = self.base.get_image_features(**{k: v for k, v in data.items() if k in self._takes}, return_dict=True)
        self._output_class = type(out)
        deep = getattr(out, "deepstack_features", None) or []
        facts = {name: value[:1] for name, value in data.items() if name.startswith("image_")}
        return EncodedImage(
            replacement, _first(out.pooler_output, several), [list(_first(layer, several)) for layer in deep], facts
        )

    def _processed(self, image: Image.Image, several: bool, name: str) -> tuple[Any, str]:
        """(what the processor makes of an image, what its token becomes in the text)."""
        count = 1 + several
        with foreign("image", name, "is refused by the processor"):
            data = self.processor(
                text=[self.processor.image_token * count],
                images=[[image] * count],
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
        told = data.pop("text_replacement_offsets", None)
        self.tells = told is not None
        return data, told[0][0]["replacement"] if told else ""

    def _replacement_of_size(self, size: tuple[int, int], several: bool) -> str:
        height, width = size
        return self._processed(Image.new("RGB", (width, height)), several, f"of {width} x {height} pixels")[1]

    def _expanded(self, texts: Sequence[str], replacements: Sequence[Sequence[str]]) -> list[str]:
        """The texts with what stands for each image in the place of its token."""
        expanded = []
        for text, news in zip(texts, replacements, strict=True):
            first, *others = text.split(self.processor.image_token)
            expanded.append(first + "".join(new + part for new, part in zip(news, others, strict=True)))
        return expanded

    def _with_blanks(
        self, texts: Sequence[str], images: Sequence[Sequence[str]], **words: Any
    ) -> dict[str, torch.Tensor]:
        """The text part of what the processor makes of the texts with blank images of the same sizes."""
        blanks = [[Image.new("RGB", self.files.size(path)[::-1]) for path in paths] for paths in images]
        data = self.processor(text=list(texts), images=blanks, **words)
        return {name: data[name] for name in ("input_ids", "attention_mask", *self.types)}

    def _joined(self, encoded: Sequence[EncodedImage]) -> Any:
        """The images' features as if they had been encoded together. A new object: ``generate`` changes it."""
        if isinstance(encoded[0].pooled, torch.Tensor):
            out = self._output_class(pooler_output=torch.cat([image.pooled for image in encoded]))
        else:
            out = self._output_class(pooler_output=[part for image in encoded for part in image.pooled])
        if encoded[0].deep:
            layers = range(len(encoded[0].deep))
            out.deepstack_features = [[part for image in encoded for part in image.deep[i]] for i in layers]
        return out


@contextlib.contextmanager
def trial_prompts() -> Iterator[list[Prompt]]:
    """Two prompts of different lengths, with one image and with two, of random pixels, to try a loaded model with."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="lever_trial_") as folder:
        paths = [str(Path(folder) / f"{width}.png") for width in (97, 200)]
        for path, (height, width) in zip(paths, ((61, 97), (150, 200)), strict=True):
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        demo = Demo(paths[1], "who?", "fish")
        yield [Prompt((), paths[0], "what is it?"), Prompt((demo,), paths[0], "a longer one?")]


def feature_inputs(lvlm: Any, budget: int | Budget) -> tuple[FeatureInputs | None, str]:
    """(feature inputs of an :class:`~open_mmicl.interface.hf_chat.HfChat`, "") where they give what pixels give, else
    (None, the reason). ``budget``: bytes of features that are kept.

    Two prompts, with one image and with two, go through the model both ways: the token ids and all that stands beside
    them must be equal, the log-probabilities of the next token equal to 1e-4 (in 16 bit: to its rounding).
    """
    if "mm_encoder_outputs" not in inspect.signature(lvlm.model.forward).parameters:
        return None, "the model takes no encoded images"
    if not isinstance(lvlm.processor, ProcessorMixin) or not hasattr(lvlm.model.base_model, "get_image_features"):
        return None, "the processor or the model does not show what it makes of an image"
    features = FeatureInputs(lvlm.model, lvlm.processor, lvlm.images, budget)
    try:
        with foreign("model", lvlm.name, "does not take features"):
            reason = _difference(lvlm, features)
    except DamagedInputError as error:
        reason = str(error)[:200]
    if reason:
        return None, reason
    features.start(lvlm.work)
    return features, ""


@torch.inference_mode()
def _difference(lvlm: Any, features: FeatureInputs) -> str:
    """In what inputs of features differ from those of pixels; "" where they do not. Sets ``features.types``."""
    with trial_prompts() as prompts:
        asked = ([lvlm.layout.text(prompt) for prompt in prompts], [prompt.images for prompt in prompts])
        words = {**lvlm.words(asked[0]), "padding": True, "padding_side": "left"}
        plain = lvlm.pixel_inputs(*asked, **words)
        beside = [name for name, value in plain.items() if value.shape == plain["input_ids"].shape]
        features.types = [name for name in beside if name not in ("input_ids", "attention_mask")]
        features.see_whether_counts_matter(prompts[1].images[0])
        ours = features.inputs(*asked, **words)
    for name in (*beside, *(name for name in plain if name in ours)):
        if not torch.equal(plain[name], ours[name]):
            return f"{name} differs between pixels and features"
    two = [lvlm.model(**batch).logits[:, -1].float().log_softmax(-1) for batch in (plain, ours)]
    if lvlm.model.dtype == torch.float32:
        apart, allowed = float((two[0] - two[1]).abs().max()), EXACT
    else:
        apart, allowed = float((two[0] - two[1]).std() / two[0].std()), ROUNDED
    return "" if apart <= allowed else f"log-probabilities differ by {apart:.1e} between pixels and features"


def _first(parts: Any, several: bool) -> Any:
    """Of the features of an image and its copy, the image's. They come one beside the other or as one prompt's."""
    if not several:
        return parts
    if isinstance(parts, torch.Tensor):
        return parts[: len(parts) // 2].clone()
    if len(parts) == 1:
        return [_first(parts[0], True)]
    return [part.clone() for part in parts[: len(parts) // 2]]
