"""The truth the engine is held against: transformers alone, one prompt at a time, nothing cached, nothing padded.

Whole prompts are rendered by the chat template and tokenised as one text; images go through the image processor and
the vision tower every time; positions are the model's own (``get_rope_index``); generation is ``model.generate``.
"""

from pathlib import Path

import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from open_mmicl.interface.prompts import Prompt, PromptFormat


class NaiveLvlm:
    """A Qwen-VL folder in fp32 on the CPU. ``template``: the chat template as text, where it is not the tokenizer's.

    ``pictures``: upright RGB arrays or images by path, where a file is not to be opened the plain way.
    """

    def __init__(
        self, folder: Path, prompt_format: PromptFormat, template: str | None = None, pictures: dict | None = None
    ):
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.format, self.template, self.pictures = prompt_format, template, pictures or {}

    def inputs(self, prompt: Prompt, text: str) -> dict[str, torch.Tensor]:
        """Inputs of one rendered text."""
        images = [self.pictures.get(path) or self.picture(path) for path in prompt.images]
        vision = self.processor(images=images, return_tensors="pt")
        for grid in vision["image_grid_thw"]:
            count = int(grid.prod()) // self.processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
        text = text.replace("<|placeholder|>", "<|image_pad|>")
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
            **vision,
        }

    @staticmethod
    def picture(path: str) -> Image.Image:
        """An ordinary photograph."""
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")

    def text(self, prompt: Prompt, answer: str | None = None) -> str:
        """The rendered conversation, up to the answer or with it."""
        return self.tokenizer.apply_chat_template(
            self.format.messages(prompt, answer), tokenize=False, add_generation_prompt=answer is None,
            chat_template=self.template,
        )  # fmt: skip

    @torch.no_grad()
    def score(self, prompt: Prompt, answer: str, end: bool = False) -> tuple[float, list[int]]:
        """(log P(answer | prompt), the answer's token ids)."""
        before = self.inputs(prompt, self.text(prompt))["input_ids"].shape[1]
        inputs = self.inputs(prompt, self.text(prompt, answer))
        self.model.model.rope_deltas = None
        log_probs = self.model(**inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0]
        stop = before + ids[before:].tolist().index(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        wanted = ids[before : stop + int(end)]
        rows = torch.arange(before - 1, before - 1 + len(wanted))
        return float(log_probs[rows, wanted].double().sum()), wanted.tolist()

    @torch.no_grad()
    def generate(self, prompt: Prompt, num_beams: int = 3, max_new_tokens: int = 5, length_penalty: float = 0.0) -> str:
        """The text that ``model.generate`` gives."""
        inputs = self.inputs(prompt, self.text(prompt))
        self.model.model.rope_deltas = None
        out = self.model.generate(
            **inputs, num_beams=num_beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty,
            do_sample=False, repetition_penalty=1.0,
        )  # fmt: skip
        return self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
