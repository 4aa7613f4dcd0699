"""Model folders as they lie on the hub, older than the transformers that reads them.

Qwen2.5-VL-3B-Instruct: flat configuration, two shards without the tied head, pixel bounds as numbers, the chat template
in its own JSON file, a generation configuration that samples with a repetition penalty. CLIP ViT-B/32: pickled weights
with position ids in them, sizes as plain numbers, CLIPFeatureExtractor.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lever_plus.data.clip_features import load_pretrained
from lever_plus.mini.gates import WEIGHTS
from open_mmicl.engine import Engine, GenerationSettings
from tests.reference.tiny_lvlm import QWEN_TEMPLATE, SPECIAL, make_config, make_folder, make_images, make_prompts

CLIP_DIR = WEIGHTS / "clip"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write(folder: Path, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def published_qwen(source: Path, folder: Path) -> Path:
    """The model of ``source`` with tied embeddings, in the files of Qwen/Qwen2.5-VL-3B-Instruct."""
    folder.mkdir()
    weights = load_file(source / "model.safetensors")
    del weights["lm_head.weight"]
    names, index = sorted(weights), {}
    for i, part in enumerate((names[:40], names[40:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    write(folder, "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": index})
    ids = {token: i for i, token in enumerate(SPECIAL)}
    now = json.loads((source / "config.json").read_text(encoding="utf-8"))
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    vision = {k: v for k, v in now["vision_config"].items() if k not in ("in_channels", "rope_parameters", "dtype")}
    flat = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4,
        "vision_token_id": 6, "image_token_id": 5, "video_token_id": 6, "hidden_act": "silu",
        "max_position_embeddings": 128000, "max_window_layers": 70, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2", "use_cache": True, "vocab_size": now["text_config"]["vocab_size"],
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
        "vision_config": vision | {"in_chans": 3, "spatial_patch_size": 14, "tokens_per_second": 2},
    }  # fmt: skip
    write(folder, "config.json", flat | {name: now["text_config"][name] for name in same})
    sampling = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6}
    write(folder, "generation_config.json", sampling | {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": [2, 0]})
    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": MEAN, "image_std": STD}
    names = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    write(folder, "preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 12845056} | patches | names)
    words = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    write(folder, "tokenizer.json", words)
    write(folder, "vocab.json", words["model"]["vocab"])
    merges = "\n".join(" ".join(pair) for pair in words["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(i): {"content": token, **plain} for token, i in ids.items()}
    settings = {
        "add_prefix_space": False, "added_tokens_decoder": added, "additional_special_tokens": SPECIAL[1:],
        "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "errors": "replace", "model_max_length": 131072, "tokenizer_class": "Qwen2Tokenizer",
    }  # fmt: skip
    write(folder, "tokenizer_config.json", settings)
    write(folder, "chat_template.json", {"chat_template": QWEN_TEMPLATE})
    return folder


def test_qwen_as_on_the_hub_runs_on_both_paths(tmp_path) -> None:
    source = make_folder(tmp_path / "source")
    folder = published_qwen(source, tmp_path / "Qwen2.5-VL-3B-Instruct")
    prompts = make_prompts(make_images(tmp_path / "images", 8), 12)
    replies = []
    for mode in ("fast", "naive"):
        engine = Engine.load(make_config(folder), mode=mode)
        model = engine.lvlm.model
        assert engine.lvlm.fast and engine.lvlm.layout.in_pieces
        assert torch.equal(model.lm_head.weight, load_file(source / "model.safetensors")["model.embed_tokens.weight"])
        assert (model.config.text_config.rms_norm_eps, engine.lvlm.end_ids) == (1e-6, [2, 0])
        replies.append(engine.ask(prompts, GenerationSettings(), [[("red", True), ("two fish", False)]] * len(prompts)))
    for fast, naive in zip(*replies, strict=True):
        assert fast.text == naive.text
        for ours, theirs in zip(fast.scores, naive.scores, strict=True):
            assert ours.log_prob == pytest.approx(theirs.log_prob, abs=1e-4)


def test_clip_as_on_the_hub(tmp_path) -> None:
    config = json.loads((CLIP_DIR / "config.json").read_text(encoding="utf-8"))
    weights = load_file(CLIP_DIR / "model.safetensors")
    size = config["vision_config"]["image_size"]
    patches = (size // config["vision_config"]["patch_size"]) ** 2
    weights["text_model.embeddings.position_ids"] = torch.arange(config["text_config"]["max_position_embeddings"])[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(patches + 1)[None]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    older = {"text_config_dict": None, "vision_config_dict": None, "torch_dtype": "float32"}
    write(tmp_path, "config.json", {k: v for k, v in config.items() if k != "dtype"} | older)
    sizes = {"size": size, "crop_size": size, "do_resize": True, "do_center_crop": True, "resample": 3}
    means = {"do_normalize": True, "image_mean": MEAN, "image_std": STD}
    write(tmp_path, "preprocessor_config.json", sizes | means | {"feature_extractor_type": "CLIPFeatureExtractor"})
    ours, theirs = load_pretrained(CLIPModel, str(tmp_path)), load_pretrained(CLIPModel, str(CLIP_DIR))
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    read = load_pretrained(CLIPImageProcessorPil, str(tmp_path))
    assert read.to_dict() == load_pretrained(CLIPImageProcessorPil, str(CLIP_DIR)).to_dict()
