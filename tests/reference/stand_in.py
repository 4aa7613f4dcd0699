"""Stand-ins of the published folders, with their real vocabularies and random narrow weights.

Qwen2.5-VL-3B-Instruct: 151,643 ranks of Qwen's BPE (the wheel of dashscope carries them), 22 added tokens, real depth,
files as published: flat config, sampling generation_config, the image template in chat_template.json and a text-only
one in the tokenizer's. CLIP: the 48,894 merges that open_clip_torch carries. Neither package is imported.
"""

import base64
import gzip
import importlib.util
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.reference.tiny_lvlm import draw_weights

ROOT = Path(__file__).resolve().parents[2]
ADDED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip
FIRST_ADDED, VOCABULARY, LAYERS, WIDTH = 151_643, 151_936, 36, 64
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools' }}{%- endif %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def data_file(package: str, inner: str) -> Path:
    """A data file of a package that is installed, or unpacked by scripts/test.sh; the test is skipped without it."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations) if spec else []
    for folder in (*map(Path, folders), ROOT / ".test-data" / package):
        if (folder / inner).is_file():
            return folder / inner
    return pytest.skip(f"{package}/{inner} is not here: bash scripts/test.sh installs it (tests/requirements.txt)")


@lru_cache(1)
def qwen_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of Qwen's byte-level BPE: a pair merges before another if what it makes has a lower rank."""
    alphabet = bytes_to_unicode()
    ranks = {}
    for line in data_file("dashscope", "resources/qwen.tiktoken").read_bytes().splitlines():
        token, rank = line.split()
        ranks["".join(alphabet[byte] for byte in base64.b64decode(token))] = int(rank)
    assert len(ranks) == FIRST_ADDED
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return ranks, merges


def qwen_folder(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with the files of Qwen/Qwen2.5-VL-3B-Instruct."""
    folder.mkdir(parents=True)
    ids = {token: FIRST_ADDED + i for i, token in enumerate(ADDED)}
    _qwen_words(folder, ids)
    same = {"hidden_size": WIDTH, "intermediate_size": 96, "num_attention_heads": 8, "num_hidden_layers": LAYERS,
            "num_key_value_heads": 2, "vocab_size": VOCABULARY}  # fmt: skip
    vision = {"depth": 32, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": WIDTH,
              "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
              "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu", "tokens_per_second": 2}  # fmt: skip
    flat = same | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "hidden_act": "silu",
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "initializer_range": 0.02, "max_position_embeddings": 128000,
        "max_window_layers": 70, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True,
        "use_sliding_window": False, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "vision_config": vision | {"in_chans": 3, "spatial_patch_size": 14},
    }  # fmt: skip
    _write(folder, "config.json", flat)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder)).to(dtype)
    draw_weights(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0, 0.3)
    published = {}
    for name, weight in model.state_dict().items():  # names as published, before transformers 4.52 moved them
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if name != "lm_head.weight":
            published[name] = weight.contiguous()
    names, index = sorted(published), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: published[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    _write(folder, "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": index})
    sampling = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6, "transformers_version": "4.49.0"}
    ends = {"bos_token_id": FIRST_ADDED, "pad_token_id": FIRST_ADDED, "eos_token_id": [ids["<|im_end|>"], FIRST_ADDED]}
    _write(folder, "generation_config.json", sampling | ends)
    means = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056}
    names = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    _write(folder, "preprocessor_config.json", patches | means | names)
    return folder


def _qwen_words(folder: Path, ids: dict[str, int]) -> None:
    vocabulary, merges = qwen_bpe()
    words = Tokenizer(models.BPE(vocabulary, merges))
    words.normalizer = normalizers.NFC()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    words.decoder = decoders.ByteLevel()
    special = {token for token in ADDED if token.startswith("<|") and "fim" not in token and "repo" not in token}
    words.add_tokens([AddedToken(token, special=token in special, normalized=False) for token in ADDED])
    words.save(str(folder / "tokenizer.json"))
    _write(folder, "vocab.json", vocabulary)
    text = "\n".join(map(" ".join, merges))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{text}\n", encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": token, **plain, "special": token in special} for token, i in ids.items()}
    settings = {
        "add_prefix_space": False, "added_tokens_decoder": added, "additional_special_tokens": ADDED[1:14],
        "bos_token": None, "chat_template": TOOL_TEMPLATE, "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 131072, "pad_token": "<|endoftext|>",
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None, "add_bos_token": False,
    }  # fmt: skip
    _write(folder, "tokenizer_config.json", settings)
    _write(folder, "chat_template.json", {"chat_template": TEMPLATE})


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """A folder with the files of openai/clip-vit-base-patch32: real vocabulary, narrow random weights."""
    folder.mkdir(parents=True)
    packed = data_file("open_clip", "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    assert len(vocabulary) == 49_408
    _write(folder, "vocab.json", vocabulary)
    text = "\n".join(map(" ".join, merges))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{text}\n", encoding="utf-8")
    _write(folder, "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 77, "do_lower_case": True,
    })  # fmt: skip
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config=narrow | {"vocab_size": 49_408, "max_position_embeddings": 77, "eos_token_id": 49_407},
        vision_config=narrow | {"image_size": 224, "patch_size": 32}, projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(folder)
    means = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    sizes = {"size": 224, "crop_size": 224, "do_resize": True, "do_center_crop": True, "resample": 3}
    _write(folder, "preprocessor_config.json", sizes | means | {"do_normalize": True, "feature_extractor_type": "CLIPFeatureExtractor"})  # fmt: skip  # noqa: E501
    return folder


def _write(folder: Path, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
