"""CLIP with LoRA (peft) under the pointer selector, trained together from images and questions (v2_lora)."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lever_plus.data.clip_features import combine_modalities, load_pretrained, open_image, pooled
from lever_plus.data.dataset import VqaSplit
from lever_plus.selectors.pointer import PointerSelector
from open_mmicl.lazy import lazy

image_processing_pil_clip = lazy("transformers.models.clip.image_processing_pil_clip")
peft = lazy("peft")
transformers = lazy("transformers")

TARGETS = ["q_proj", "v_proj"]  # as in Hu et al. 2022, section 4.2
PIXEL_CACHE = 4096  # preprocessed images kept


class LoraSelector(nn.Module):
    """CLIP whose attention carries LoRA matrices, and the selector on its embeddings. Only these two train."""

    def __init__(
        self, clip: nn.Module, selector: PointerSelector, rank: int, alpha: int, embedding: str, lever_lm: str
    ) -> None:
        super().__init__()

        # A parameter without dimensions is what DeepSpeed's first broadcast cannot send; no embedding needs this one.
        clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1), requires_grad=False)
        self.clip = peft.get_peft_model(clip, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
        self.selector = selector
        self.embedding, self.lever_lm = embedding, lever_lm

    def embed(self, pixels: Tensor, image_of: Tensor, tokens: dict[str, Tensor], text_of: Tensor) -> Tensor:
        """Items (U, d) from distinct images (I, 3, H, W) and questions (T, L); ``…_of`` (U,) say whose is whose."""
        dtype = next(self.selector.parameters()).dtype
        images = functional.normalize(pooled(self.clip.get_image_features(pixel_values=pixels.to(dtype))), dim=-1)
        texts = functional.normalize(pooled(self.clip.get_text_features(**tokens)), dim=-1)
        return combine_modalities({"image": images[image_of], "text": texts[text_of]}, self.embedding, self.lever_lm)

    def forward(
        self, items: tuple[Any, ...], query_rows: Tensor, pool_rows: Tensor, pointers: Tensor, pool_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`PointerSelector.forward`, the embeddings made from ``items`` (what :class:`ItemReader` gives)."""
        embeddings = self.embed(*items)
        return self.selector(embeddings, embeddings[query_rows], pool_rows, pointers, pool_mask)

    def trained(self) -> dict[str, Tensor]:
        """The weights that train, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def merged_clip(self) -> nn.Module:
        """CLIP with the LoRA matrices added into its weights; this module is unusable afterwards."""
        clip = self.clip.merge_and_unload()
        clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(()))
        return clip


class ItemReader:
    """Images and questions of train rows as CLIP's inputs; each distinct one of a batch once."""

    def __init__(self, split: VqaSplit, clip_path: str, longest: int, device: torch.device) -> None:
        """``longest``: tokens that CLIP's text encoder takes."""
        self.split, self.longest, self.device = split, longest, device
        self.tokenizer = load_pretrained(transformers.AutoTokenizer, clip_path)
        self.processor = load_pretrained(image_processing_pil_clip.CLIPImageProcessorPil, clip_path)
        self.pixels_of = lru_cache(PIXEL_CACHE)(self._pixels)

    def _pixels(self, path: str) -> Tensor:
        return self.processor(images=[open_image(path)], return_tensors="pt")["pixel_values"][0]

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        """(pixels (I, 3, H, W), image_of (U,), tokens (T, L), text_of (U,)) of the rows (U,).

        Raises:
            MissingInputError, DamagedInputError: an image is not there or cannot be decoded.
        """
        paths = [self.split.image_path(int(row)) for row in rows]
        questions = [self.split.question(int(row)) for row in rows]
        distinct_paths, image_of = np.unique(paths, return_inverse=True)
        distinct_texts, text_of = np.unique(questions, return_inverse=True)
        pixels = torch.stack([self.pixels_of(str(path)) for path in distinct_paths])
        words = [str(text) for text in distinct_texts]
        tokens = self.tokenizer(words, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        named = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        places = (torch.from_numpy(image_of).to(self.device), torch.from_numpy(text_of).to(self.device))
        return pixels.to(self.device), places[0], named, places[1]

    def save_beside(self, folder: Path) -> None:
        """Write tokenizer and image processor, so that ``folder`` is a whole CLIP."""
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
