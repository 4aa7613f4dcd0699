"""Qwen2-VL and Qwen2.5-VL: the naive path without torchvision, and the parts of which the fast engine is made.

Positions are always given explicitly (the model's ``rope_deltas`` state is never relied on); image features are
injected as embeddings; attention follows an explicit mask, so that prefixes, beams and several answers of one prompt
can share what they have in common.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from open_mmicl.errors import DamagedInputError, UsageError, foreign, plain
from open_mmicl.interface import templates
from open_mmicl.interface.config import INTERFACES, InferModelConfig
from open_mmicl.interface.hf_chat import HfChat, render
from open_mmicl.interface.images import load_rgb
from open_mmicl.interface.layout import TextPiece
from open_mmicl.interface.loading import load_parts
from open_mmicl.interface.prompts import Prompt
from open_mmicl.interface.templates import ChatTemplate

_UNFIT = "cannot be cut into patches (its size, or processor in the model's YAML and preprocessor_config.json)"
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
_CACHED_PIECES = 8192  # at 391 image tokens about 100 MB
_SMALL_IMAGE = 16  # merged patches, i.e. tokens; a pass of one such image is nearly all overhead
_SMALL_IMAGES_IN_A_PASS = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt. ``ids`` (L,) with image tokens expanded; ``positions`` (3, L) relative to the piece's
    start; ``advance``: how far the position counter moves; ``images``: (content digest, path) in order; ``length``: L.
    """

    key: tuple
    ids: np.ndarray
    positions: np.ndarray
    advance: int
    images: tuple[tuple[bytes, str], ...]
    length: int


class QwenVL(HfChat):
    """A Qwen2-VL or Qwen2.5-VL model. ``processor`` is a :class:`QwenProcessor`."""

    def __init__(
        self, config: InferModelConfig, model: Any, processor: Any, folder: Path, fingerprint: str, dtype_name: str
    ):
        super().__init__(config, model, processor, folder, fingerprint, dtype_name)
        # The tree masks know no sliding window; a model that uses one keeps to plain batches.
        self.fast = set(model.config.get_text_config().layer_types) == {"full_attention"}
        self._placed = functools.lru_cache(_CACHED_PIECES)(self._place)
        self._pass_size: dict[tuple[int, int], int] = {}

    @property
    def language_model(self) -> Any:
        """The decoder stack (embeddings in, hidden states out)."""
        return self.model.model.language_model

    def inputs(self, texts: Sequence[str], images: Sequence[Sequence[str]], side: str) -> dict[str, torch.Tensor]:
        """What Qwen2_5_VLProcessor would return (it cannot be built without torchvision)."""
        paths = [path for row in images for path in row]
        pixels, grids = self.processor.pixels(paths)
        counts = iter((grids.prod(-1) // self.processor.merge**2).tolist())
        expanded = []
        for text in texts:
            parts = text.split(self.processor.image_token)
            expanded.append(parts[0] + "".join(self.processor.image_token * next(counts) + part for part in parts[1:]))
        batch = self.tokenizer(expanded, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt")
        ids, device = batch["input_ids"], self.model.device
        return {
            "input_ids": ids.to(device),
            "attention_mask": batch["attention_mask"].to(device),
            "mm_token_type_ids": (ids == self.layout.image_token_id).int().to(device),
            "pixel_values": pixels.to(device, self.model.dtype),
            "image_grid_thw": grids.to(device),
        }

    def pieces(self, prompts: Sequence[Prompt]) -> list[list[Piece]]:
        """Each prompt as pieces with expanded image tokens and relative 3-D positions; reads image headers only."""
        digests = {path: self.images.digest(path) for prompt in prompts for path in prompt.images}
        return [
            [self._placed(text, tuple((digests[path], path) for path in paths)) for text, paths in some]
            for some in map(self.layout.pieces, prompts)
        ]

    def prompt_lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt, image tokens included; reads image headers only."""
        return [sum(piece.length for piece in some) for some in self.pieces(prompts)]

    @torch.inference_mode()
    def encode_images(self, paths: Sequence[str]) -> list[torch.Tensor]:
        """Merged visual features of each image, (n_tokens, d), the same bits whichever images come together.

        Small images go several to a pass: always as many, of one size (the last is repeated), and only where a pass of
        copies of one image was seen to give the same bits in every place. Others are encoded alone.
        """
        found: dict[int, torch.Tensor] = {}
        by_grid: dict[tuple[int, int], list[int]] = {}
        for i, path in enumerate(paths):
            by_grid.setdefault(self.processor.merged_grid(*self.images.size(path), path), []).append(i)
        for grid, members in by_grid.items():
            size = self._images_in_a_pass(grid, paths[members[0]])
            for start in range(0, len(members), size):
                some = members[start : start + size]
                filled = [paths[i] for i in some] + [paths[some[-1]]] * (size - len(some))
                # Cloned: a slice of the pass's output would keep all of it alive in the feature cache.
                found.update((i, features.clone()) for i, features in zip(some, self._encode(filled), strict=False))
        return [found[i] for i in range(len(paths))]

    def _images_in_a_pass(self, grid: tuple[int, int], example: str) -> int:
        if grid[0] * grid[1] > _SMALL_IMAGE:
            return 1
        if grid not in self._pass_size:
            copies = self._encode([example] * _SMALL_IMAGES_IN_A_PASS)
            same = all(torch.equal(copies[0], other) for other in copies[1:])
            self._pass_size[grid] = _SMALL_IMAGES_IN_A_PASS if same else 1
        return self._pass_size[grid]

    def _encode(self, paths: Sequence[str]) -> Sequence[torch.Tensor]:
        """One vision pass over images of one size; repeated ones are read once."""
        distinct = {path: i for i, path in enumerate(dict.fromkeys(paths))}
        which = [distinct[path] for path in paths]
        pixels, grids = self.processor.pixels(list(distinct))
        pixels = pixels.unflatten(0, (len(distinct), -1))[which].flatten(0, 1)
        grids = grids[which]
        device, home = self.model.model.visual.device, self.model.get_input_embeddings().weight.device
        out = self.model.model.get_image_features(
            pixels.to(device, self.model.dtype), grids.to(device), return_dict=True
        )
        return [features.to(home) for features in out.pooler_output]

    def _place(self, text: TextPiece, images: tuple[tuple[bytes, str], ...]) -> Piece:
        """Expand image tokens and number positions as ``get_rope_index`` does: text counts on by one in all three
        axes; an image of h×w merged patches stands at (start, start + row, start + column) and advances by max(h, w).
        """
        ids, parts, start, left = [], [], 0, list(images)
        run = 0
        for token in text.ids:
            if token != self.layout.image_token_id:
                ids.append(token)
                run += 1
                continue
            parts.append(np.broadcast_to(np.arange(start, start + run), (3, run)))
            start, run = start + run, 0
            path = left.pop(0)[1]
            height, width = self.processor.merged_grid(*self.images.size(path), path)
            ids += [token] * (height * width)
            rows, columns = np.divmod(np.arange(height * width), width)
            parts.append(np.stack([np.zeros_like(rows), rows, columns]) + start)
            start += max(height, width)
        parts.append(np.broadcast_to(np.arange(start, start + run), (3, run)))
        key = (text.key, *(digest for digest, _ in images))
        return Piece(key, np.array(ids, dtype=np.int64), np.concatenate(parts, axis=1), start + run, images, len(ids))


class QwenProcessor:
    """Tokenizer, chat template and PIL image processor of a Qwen-VL folder."""

    def __init__(
        self, tokenizer: Any, image_processor: Qwen2VLImageProcessorPil, template: ChatTemplate, image_token: str
    ):
        self.tokenizer, self.image_processor, self.image_token = tokenizer, image_processor, image_token
        self.template, self.merge = template.text, image_processor.merge_size

    def apply_chat_template(self, messages: list[dict], tokenize: bool, add_generation_prompt: bool) -> str:
        """The rendered conversation."""
        return self.tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt, chat_template=self.template
        )

    def pixels(self, paths: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(patches, 3·t·p·p) pixel values and (n, 3) grids of images, upright and in RGB."""
        with foreign("image", ", ".join(paths)[:200], _UNFIT):
            batch = self.image_processor(images=[load_rgb(path) for path in paths], return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]

    def merged_grid(self, height: int, width: int, path: str) -> tuple[int, int]:
        """Rows and columns of language-model tokens of an image of height × width pixels."""
        patch, size = self.image_processor.patch_size, self.image_processor.size
        with foreign("image", path, _UNFIT):
            high, wide = smart_resize(height, width, patch * self.merge, size["shortest_edge"], size["longest_edge"])
        return high // (patch * self.merge), wide // (patch * self.merge)


@INTERFACES.add("qwen_vl", "Qwen2-VL and Qwen2.5-VL, on the fast path")
def load_qwen(config: InferModelConfig, device: str, precision: str) -> QwenVL:
    """Load a Qwen-VL model.

    Raises:
        UsageError: another model type (names the interface to use). DamagedInputError: processor files are missing, or
        the chat template is wrong.
    """
    folder, model, tokenizer, fingerprint, dtype_name = load_parts(config, device, precision)
    if model.config.model_type not in MODEL_TYPES:
        raise UsageError(f"{config.name} is a {model.config.model_type!r} model: set interface: hf_chat in its YAML")
    with foreign("image processor in", folder, "cannot be loaded"):
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(
            str(folder), local_files_only=True, **config.processor
        )
    check_patches(folder, image_processor, model.config.vision_config)
    token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    if not token:
        raise DamagedInputError(
            f"{folder / 'config.json'}: image_token_id {model.config.image_token_id} is no token of the tokenizer"
        )
    template = templates.find(config, folder, tokenizer.chat_template)
    processor = QwenProcessor(tokenizer, image_processor, template, token)
    templates.check(template, functools.partial(render, processor), config, token)
    return QwenVL(config, model, processor, folder, fingerprint, dtype_name)


def check_patches(folder: Path, image_processor: Any, vision: Any) -> None:
    """See that the image processor cuts pictures as the model's vision tower reads them.

    Raises:
        DamagedInputError: it does not; names the file and both values.
    """
    for ours, theirs in (
        ("patch_size", "patch_size"), ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):  # fmt: skip
        cut, read = getattr(image_processor, ours), getattr(vision, theirs)
        if cut != read:
            raise DamagedInputError(
                f"{folder / 'preprocessor_config.json'}: {ours} is {plain(cut, 40)}, and the model's {theirs} {read} "
                "(config.json); put the model's own file there"
            )
