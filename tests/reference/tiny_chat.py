"""Tiny random chat models of several families with their own processors, saved as folders; and the truth about them."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.processing_idefics2 import Idefics2Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from open_mmicl.interface.processors import image_only
from open_mmicl.interface.prompts import Prompt, PromptFormat
from tests.reference import tiny_lvlm

FAMILIES = ("idefics3", "gemma3", "llava_onevision", "qwen3_vl", "internvl", "smolvlm", "idefics2")
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "head_dim": 8,
}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def _tokenizer(special: dict[str, str], image: str) -> Any:
    """The tiny tokenizer with a family's special tokens under the names its processor looks for."""
    template = tiny_lvlm.BARE_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", image)
    return tiny_lvlm.make_tokenizer("bytes", template, special)


def _idefics2() -> tuple[Any, Any]:
    words = _tokenizer(
        {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>", "end": "<end_of_utterance>"},
        "<image>",
    )
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=False)
    processor = Idefics2Processor(images, words, image_seq_len=4, chat_template=words.chat_template)
    config = AutoConfig.for_model(
        "idefics2", text_config={"model_type": "mistral", **_TEXT, "vocab_size": len(words)},
        vision_config={**_VISION, "image_size": 56, "patch_size": 7}, image_token_id=words.image_token_id,
        perceiver_config={"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                          "resampler_head_dim": 8, "num_key_value_heads": 2},
        tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


def _idefics3(name: str = "idefics3") -> tuple[Any, Any]:
    """Idefics3 cuts images into parts, SmolVLM (the same architecture) is left to take them whole."""
    words = _tokenizer(
        {"image_token": "<image>", "fake_token": "<fake_token_around_image>", "tag_token": "<global-img>"}, "<image>"
    )
    whole = name == "smolvlm"
    image_class = SmolVLMImageProcessorPil if whole else Idefics3ImageProcessorPil
    processor_class = partial(image_only(SmolVLMProcessor), video_processor=None) if whole else Idefics3Processor
    images = image_class(
        size={"longest_edge": 28 if whole else 56}, max_image_size={"longest_edge": 28}, do_image_splitting=not whole
    )
    processor = processor_class(images, words, image_seq_len=4, chat_template=words.chat_template)
    config = AutoConfig.for_model(
        name, text_config={"model_type": "llama", **_TEXT, "vocab_size": len(words)}, scale_factor=2,
        vision_config={**_VISION, "image_size": 28, "patch_size": 7}, image_token_id=words.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    return config, processor


def _smolvlm() -> tuple[Any, Any]:
    return _idefics3("smolvlm")


def _gemma3() -> tuple[Any, Any]:
    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = _tokenizer(special, "<start_of_image>")
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = Gemma3Processor(images, words, image_seq_length=4, chat_template=words.chat_template)
    text = {**_TEXT, "vocab_size": len(words), "query_pre_attn_scalar": 8, "sliding_window": 512}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**_VISION, "image_size": 28, "patch_size": 7}, mm_tokens_per_image=4,
        image_token_index=words.image_token_id, boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id,
    )  # fmt: skip
    return config, processor


def _llava_onevision() -> tuple[Any, Any]:
    words = _tokenizer({"image_token": "<image>", "video_token": "<video>"}, "<image>\n")
    grids = [[28, 28], [28, 56], [56, 28], [56, 56]]
    images = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=grids)
    processor = image_only(LlavaOnevisionProcessor)(
        images, words, num_image_tokens=16, vision_feature_select_strategy="full", chat_template=words.chat_template
    )
    vision = {
        "model_type": "siglip_vision_model",
        **_VISION,
        "image_size": 28,
        "patch_size": 7,
        "vision_use_head": False,
    }
    config = AutoConfig.for_model(
        "llava_onevision", text_config={"model_type": "qwen2", **_TEXT, "vocab_size": len(words)}, vision_config=vision,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=grids,
        image_token_id=words.image_token_id, video_token_id=words.video_token_id,
    )  # fmt: skip
    return config, processor


def _qwen3_vl() -> tuple[Any, Any]:
    words = _tokenizer({}, "<|vision_start|><|image_pad|><|vision_end|>")
    start, end, image, video = words.convert_tokens_to_ids(tiny_lvlm.SPECIAL[3:])
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    processor = image_only(Qwen3VLProcessor)(images, words, chat_template=words.chat_template)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14, "out_hidden_size": 32,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = AutoConfig.for_model(
        "qwen3_vl", text_config={**_TEXT, "vocab_size": len(words), "rope_parameters": rope}, vision_config=vision,
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    return config, processor


def _internvl() -> tuple[Any, Any]:
    special = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    words = _tokenizer({**special, "video_token": "<video>"}, "<IMG_CONTEXT>\n")
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=False)
    processor = image_only(InternVLProcessor)(images, words, image_seq_length=4, chat_template=words.chat_template)
    config = AutoConfig.for_model(
        "internvl", text_config={"model_type": "qwen2", **_TEXT, "vocab_size": len(words)}, image_seq_length=4,
        vision_config={**_VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=words.context_image_token_id,
    )  # fmt: skip
    return config, processor


def make_chat(family: str, folder: Path) -> tuple[Any, Any]:
    """(random model, processor) of a family; both saved to ``folder``."""
    makers = {
        "idefics3": _idefics3, "gemma3": _gemma3, "llava_onevision": _llava_onevision, "qwen3_vl": _qwen3_vl,
        "internvl": _internvl, "smolvlm": _smolvlm, "idefics2": _idefics2,
    }  # fmt: skip
    config, processor = makers[family]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.2 / weight[0].numel() ** 0.5)
        model.get_input_embeddings().weight.normal_(0, 0.7)
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


class ChatTruth:
    """One prompt at a time through processor, forward and ``generate``."""

    def __init__(self, model: Any, processor: Any, prompt_format: PromptFormat):
        self.model, self.processor, self.format = model, processor, prompt_format

    def inputs(self, prompt: Prompt, answer: str | None) -> dict[str, torch.Tensor]:
        """Model inputs of the conversation up to the answer, or with it."""
        text = self.processor.apply_chat_template(
            self.format.messages(prompt, answer), tokenize=False, add_generation_prompt=answer is None
        )
        images = [[Image.open(path).convert("RGB") for path in prompt.images]]
        return dict(self.processor(text=[text], images=images, return_tensors="pt"))

    @torch.no_grad()
    def score(self, prompt: Prompt, answer: str) -> float:
        """log P(answer | prompt)."""
        before = self.inputs(prompt, None)["input_ids"].shape[1]
        inputs = self.inputs(prompt, answer)
        ids = inputs["input_ids"][0].tolist()
        stop = ids.index(self.processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), before)
        log_probs = self.model(**inputs).logits[0].log_softmax(-1)
        return float(sum(log_probs[i - 1, ids[i]] for i in range(before, stop)))

    @torch.no_grad()
    def generate(self, prompt: Prompt) -> str:
        """What ``generate`` gives: 5 tokens, 3 beams, length penalty 0."""
        inputs = self.inputs(prompt, None)
        out = self.model.generate(**inputs, max_new_tokens=5, num_beams=3, length_penalty=0.0, do_sample=False)
        return self.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
