"""Tiny random Qwen-VL folders, images and prompts for tests: no download, a second to make."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.prompts import Demo, Prompt

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
WORDS = (
    "red blue green fish boat house table wooden metal small large two three what is the colour of it made where who"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "Be brief.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE_TEMPLATE = QWEN_TEMPLATE.replace(
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}", ""
)


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Random weights of a size that keeps activations alive through every layer, biases that matter."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, 1.2 / weight[0].numel() ** 0.5)
        elif name.endswith("bias"):
            weight.normal_(0, 0.1)


def make_tokenizer(kind: str = "bytes", template: str = QWEN_TEMPLATE, named: dict[str, str] | None = None):
    """``bytes``: byte-level BPE split as Qwen's; ``metaspace``: a word is the same token wherever it stands.

    ``named``: further special tokens, under the attribute names that a processor looks for.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    if kind == "bytes":
        pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = sorted({c for c in map(chr, range(32, 127))} | set("▁\né…"))
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([WORDS, "Question: Short answer:", "user assistant system"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named or SPECIAL[3:],
    )
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in (named or {}).values()])
    fast.chat_template = template
    return fast


def make_folder(
    folder: Path,
    family: str = "qwen2_5_vl",
    tokenizer: str = "bytes",
    template: str = QWEN_TEMPLATE,
    seed: int = 0,
    **text: object,
) -> Path:
    """A random model of the family, its tokenizer and its image processor, saved to ``folder``.

    ``text``: other values of the decoder's configuration.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = make_tokenizer(tokenizer, template)
    ids = dict(zip(SPECIAL, words.convert_tokens_to_ids(SPECIAL), strict=True))
    vision = {"depth": 3, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_5_vl":
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 48,
            "window_size": 56,
            "fullatt_block_indexes": [2],
        }
    else:
        vision |= {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    config = AutoConfig.for_model(
        family,
        text_config={
            "vocab_size": len(words), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
            "tie_word_embeddings": False, **text,
        },
        vision_config=vision, tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    draw_weights(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0, 1)
        head = model.lm_head.weight
        head *= 2
        head[len(words) :] *= 0.4  # ids that the tokenizer cannot decode, where the vocabulary is larger
        head[ids["<|im_end|>"]] *= 1.3  # so that answers end early now and then
        head[ids["<|endoftext|>"]] *= 1.3
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16).save_pretrained(folder)
    return folder


def make_config(folder: Path, **changes: object) -> InferModelConfig:
    """A configuration for a folder of :func:`make_folder`, with small budgets."""
    settings = {
        "name": "tiny",
        "model_name_or_path": str(folder),
        "dtype": "fp32",
        "token_budget": 1500,
        "image_cache_mb": 4,
        "kv_cache_mb": 4,
    }
    return InferModelConfig(**{**settings, **changes})


def make_images(folder: Path, count: int, seed: int = 0) -> list[str]:
    """JPEG files of mixed sizes: one to sixteen merged patches, several attention windows."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        height, width = rng.integers(20, 130, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((int(width), int(height))).save(folder / f"{i}.jpg", quality=90)
        paths.append(str(folder / f"{i}.jpg"))
    return paths


def make_prompts(images: list[str], count: int, seed: int = 0, shots: int = 4) -> list[Prompt]:
    """Prompts with 0 … ``shots`` demonstrations, many with common beginnings, of mixed lengths."""
    rng = random.Random(seed)
    words = WORDS.split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    demos = [Demo(rng.choice(images), text(1, 9) + "?", text(1, 2)) for _ in range(8)]
    queries = [(rng.choice(images), text(1, 12) + "?") for _ in range(6)]
    return [Prompt(tuple(rng.sample(demos, rng.randint(0, shots))), *rng.choice(queries)) for _ in range(count)]
