"""The tiny Qwen2.5-VL: its configuration, its image processor, and how it is saved."""

import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lever_plus.mini.render import SIZE

IMAGE_TOKENS = 4  #: merged visual tokens of one picture


def image_processor() -> Qwen2VLImageProcessorPil:
    """The processor that leaves a 56 x 56 picture at its size: 16 patches, 4 merged tokens."""
    return Qwen2VLImageProcessorPil(
        min_pixels=SIZE * SIZE, max_pixels=SIZE * SIZE, patch_size=14, merge_size=2, temporal_patch_size=2
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised model (call ``torch.manual_seed`` first), about 1.4 M parameters, float32."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "out_hidden_size": 128,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    _init_language(model)
    model.generation_config = GenerationConfig(
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        max_new_tokens=5,
    )
    return model


def _init_language(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Start from weights fit for a width of 128. The class's own 0.02 is made for thousands: with it the model
    first copies from a demonstration after some 1,300 steps, with these after 200.
    """
    layers = model.config.text_config.num_hidden_layers
    for name, weight in model.model.language_model.named_parameters():
        if weight.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.3 if "embed_tokens" in name else 0.08 / (2 * layers) ** 0.5 if residual else 0.08
            nn.init.normal_(weight, std=std)


def positions(input_ids: torch.Tensor, image_token: int) -> torch.Tensor:
    """Three-dimensional rotary positions [3, B, L] of right-padded ids [B, L], every picture being 2 x 2 tokens.

    Equal to the model's own ``get_rope_index``, without its loop over sequences.
    """
    is_image = input_ids == image_token
    within = (is_image.cumsum(1) - 1) % IMAGE_TOKENS  # place inside the picture, 0..3
    # Each token moves the clock by one, except that four image tokens move it by two, after the last of them.
    advance = torch.where(is_image, torch.where(within == IMAGE_TOKENS - 1, 2, 0), 1)
    start = advance.cumsum(1) - advance  # the clock before this token
    row = start + torch.where(is_image, within // 2, 0)
    column = start + torch.where(is_image, within % 2, 0)
    return torch.stack([start, row, column])


def save_folder(model: nn.Module, parts: list, folder: Path) -> None:
    """``save_pretrained`` of a model and its parts into ``folder``, file by file, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".save.", dir=folder))
    try:
        for part in (model, *parts):
            part.save_pretrained(work)
        for path in sorted(work.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(work)
