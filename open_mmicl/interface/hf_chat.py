"""Any transformers image-text-to-text model with a chat template that takes several images: the batched path.

This is also the *naive* path that the fast engine is measured against: chat template, processor, padded batches,
images encoded every time, one forward per (prompt, answer), one ``generate`` per batch.
"""

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from open_mmicl.errors import NumericError, UsageError
from open_mmicl.interface.base import AnswerScore, GenerationSettings
from open_mmicl.interface.config import DTYPES, InferModelConfig
from open_mmicl.interface.images import ImageFiles, load_rgb
from open_mmicl.interface.layout import PromptLayout
from open_mmicl.interface.loading import end_ids
from open_mmicl.interface.prompts import Prompt


class HfChat:
    """A loaded model asked through its processor. ``full_logits`` keeps the naive path's full-vocabulary logits."""

    fast = False

    def __init__(
        self, config: InferModelConfig, model: Any, processor: Any, folder: Path, fingerprint: str, dtype_name: str
    ):
        self.config, self.model, self.processor, self.folder = config, model, processor, folder
        self.name, self.fingerprint, self.dtype_name = config.name, fingerprint, dtype_name
        self.tokenizer = processor.tokenizer
        self.images = ImageFiles()
        self.end_ids = end_ids(model, self.tokenizer)
        self.full_logits = True
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.layout = PromptLayout(self.tokenizer, self.render, config.prompt_format, self.image_token_id())
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.end_ids[0])

    @property
    def processor_fingerprint(self) -> str:
        """The processor settings that the configuration adds to the model's own files."""
        return repr(sorted(self.config.processor.items()))

    def image_token_id(self) -> int:
        """The id that stands for an image in the rendered chat template."""
        token = self.processor.image_token
        return self.tokenizer.convert_tokens_to_ids(token)

    def render(self, messages: list[dict], generation: bool) -> str:
        """The chat template as text."""
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)

    def answer_ids(self, answer: str) -> list[int]:
        """The answer's tokens in the assistant turn."""
        return list(self.layout.answer_ids(answer))

    def inputs(self, texts: Sequence[str], images: Sequence[Sequence[str]], side: str) -> dict[str, torch.Tensor]:
        """Model inputs of rendered texts, padded on ``side``."""
        loaded = [[load_rgb(path) for path in paths] for paths in images]
        batch = self.processor(text=list(texts), images=loaded, padding=True, padding_side=side, return_tensors="pt")
        return dict(batch.to(self.model.device, dtype=self.model.dtype))

    def prompt_lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt, image tokens included."""
        return [int(self._prompt_inputs([p], "right")["attention_mask"].sum()) for p in prompts]

    @torch.inference_mode()
    def score_batch(self, prompts: Sequence[Prompt], answers: Sequence[str], end: bool) -> list[AnswerScore]:
        """Log-probabilities of (prompt, answer) pairs from one padded forward pass.

        Raises:
            UsageError: an answer that cannot be placed. NumericError: a non-finite score.
        """
        closed = [self.render(self._with_answer(p, a), False) for p, a in zip(prompts, answers, strict=True)]
        batch = self.inputs(closed, [prompt.images for prompt in prompts], "right")
        lengths = batch["attention_mask"].sum(1).tolist()
        spans = []
        for row, answer in enumerate(answers):
            ids, closing = self.layout.answer_ids(answer), self.layout.closing_ids(answer)
            start = lengths[row] - len(closing) - len(ids)
            wanted = [*ids, *closing[: int(end)]]
            if batch["input_ids"][row, start : start + len(wanted)].tolist() != wanted:
                raise UsageError(f"the answer {answer!r} is not found at the end of its prompt")
            spans.append((start, wanted))
        positions = sorted({p for start, wanted in spans for p in range(start - 1, start + len(wanted) - 1)})
        logits, column = self._logits(batch, positions)
        scores = []
        for row, (start, wanted) in enumerate(spans):
            columns = [column[p] for p in range(start - 1, start + len(wanted) - 1)]
            log_probs = logits[row, columns].float().log_softmax(-1)  # (T, V)
            value = float(log_probs[torch.arange(len(wanted)), wanted].double().sum())
            if not math.isfinite(value):
                raise NumericError(f"{self.name}: the log-probability of {answers[row]!r} is {value}")
            scores.append(AnswerScore(value, len(wanted)))
        return scores

    @torch.inference_mode()
    def generate_batch(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[str]:
        """Texts generated for a left-padded batch by transformers' own ``generate``."""
        batch = self._prompt_inputs(prompts, "left")
        out = self.model.generate(**batch, **generate_arguments(settings, self.end_ids, self.tokenizer.pad_token_id))
        new = out[:, batch["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _prompt_inputs(self, prompts: Sequence[Prompt], side: str) -> dict[str, torch.Tensor]:
        return self.inputs([self.layout.text(p) for p in prompts], [p.images for p in prompts], side)

    def _with_answer(self, prompt: Prompt, answer: str) -> list[dict]:
        return self.config.prompt_format.messages(prompt, answer.strip())

    def _logits(self, batch: dict[str, torch.Tensor], positions: list[int]) -> tuple[torch.Tensor, dict[int, int]]:
        """Logits (B, n, V) and the column of each position in them."""
        if self.full_logits or not self._keeps_logits:
            return self.model(**batch).logits, {p: p for p in positions}
        keep = torch.tensor(positions, device=self.model.device)
        return self.model(**batch, logits_to_keep=keep).logits, {p: i for i, p in enumerate(positions)}


def generate_arguments(settings: GenerationSettings, end: list[int], pad: int) -> dict[str, Any]:
    """Keyword arguments of transformers' ``generate``: nothing of the model's own sampling settings applies."""
    arguments: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens, "num_beams": settings.num_beams, "do_sample": False,
        "eos_token_id": end, "pad_token_id": pad, "temperature": None, "top_p": None, "top_k": None,
        "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    }  # fmt: skip
    if settings.num_beams > 1:
        arguments |= {"length_penalty": settings.length_penalty, "early_stopping": False}
    return arguments


def torch_dtype(name: str) -> torch.dtype:
    """``bf16`` -> ``torch.bfloat16``."""
    return getattr(torch, DTYPES[name])


def load_chat(
    config: InferModelConfig, folder: Path, model: Any, tokenizer: Any, fingerprint: str, dtype_name: str
) -> HfChat:
    """Wrap a loaded model with its own processor.

    Raises:
        DamagedInputError: the processor's files are missing or it cannot be built here.
    """
    from open_mmicl.interface.processors import load_processor

    processor = load_processor(folder, model, tokenizer, config.processor)
    if config.chat_template:
        processor.chat_template = config.chat_template
    return HfChat(config, model, processor, folder, fingerprint, dtype_name)
