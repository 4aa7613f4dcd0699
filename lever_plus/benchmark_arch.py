"""Random models of a known architecture for speed measurements where no weights may be downloaded."""

from typing import Any

from open_mmicl.errors import UsageError
from open_mmicl.interface.config import REPO_ROOT, InferModelConfig
from open_mmicl.lazy import lazy

hf_chat = lazy("open_mmicl.interface.hf_chat")
image_processing_pil_qwen2_vl = lazy("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
loading = lazy("open_mmicl.interface.loading")
qwen_vl = lazy("open_mmicl.interface.qwen_vl")
templates = lazy("open_mmicl.interface.templates")
torch = lazy("torch")
transformers = lazy("transformers")

# Qwen2.5-VL-3B-Instruct, from its published config.json.
TEXT_3B = {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 128_000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
}  # fmt: skip
_VISION_3B = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip


def need_gpu() -> None:
    """Say what a measurement on a GPU needs.

    Raises:
        UsageError: torch can use no GPU here.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            "--device cuda needs an NVIDIA GPU and a CUDA build of torch, and this machine shows none "
            f"(torch {torch.__version__}); the 3B architecture in bf16 takes about 8 GB for its weights and up to 8 GB "
            "for its caches; without a GPU: --device cpu, with the default --arch mini"
        )


def random_pair(config: InferModelConfig, device: str, precision: str) -> list[Any]:
    """Two wrappers (naive, fast) of one random 3B model, with the embedded model's tokenizer and its chat template.

    Raises:
        UsageError: the device is not usable.
    """
    chosen = loading.resolve_device(device)
    dtype_name = loading.precision_name(config, precision)
    dtype = hf_chat.torch_dtype(dtype_name)
    folder = REPO_ROOT / "lever_plus/mini/weights/lvlm"
    tokenizer = loading.load_tokenizer(folder)
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    if any(token not in tokenizer.get_vocab() for token in tokens):
        raise UsageError(f"the tokenizer in {folder} lacks Qwen's image tokens")
    image, video, start, end = tokenizer.convert_tokens_to_ids(list(tokens))
    arch = transformers.AutoConfig.for_model(
        "qwen2_5_vl", text_config=TEXT_3B, vision_config=_VISION_3B, tie_word_embeddings=True, image_token_id=image,
        video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    with torch.device(chosen):
        model = transformers.AutoModelForImageTextToText.from_config(
            arch, dtype=dtype, attn_implementation=loading.attention(config, chosen, dtype)
        )
    model.to(chosen).eval().requires_grad_(False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    template = templates.find(config, folder, tokenizer.chat_template)
    pixels = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
        **{"min_pixels": 56 * 56, "max_pixels": 12_845_056, **config.processor}
    )
    processor = qwen_vl.QwenProcessor(tokenizer, pixels, template, tokens[0])
    return [qwen_vl.QwenVL(config, model, processor, folder, "random weights", dtype_name) for _ in range(2)]
