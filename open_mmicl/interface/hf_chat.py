"""Any transformers image-text-to-text model with a chat template that takes several images: the batched path.

This is also the *naive* path that the fast engine is measured against: chat template, processor, padded batches,
images encoded every time, one forward per (prompt, answer), one ``generate`` per batch (unless :meth:`HfChat.share` was
called).
"""

import functools
import inspect
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from open_mmicl.errors import NumericError, UsageError, foreign
from open_mmicl.interface import templates
from open_mmicl.interface.base import AnswerScore, GenerationSettings, Work
from open_mmicl.interface.config import DTYPES, INTERFACES, InferModelConfig
from open_mmicl.interface.features import feature_inputs
from open_mmicl.interface.images import READ_AS, ImageFiles, load_rgb
from open_mmicl.interface.layout import PromptLayout
from open_mmicl.interface.loading import end_ids, load_parts
from open_mmicl.interface.processors import load_processor
from open_mmicl.interface.prompts import Prompt
from open_mmicl.interface.shared_prefill import shared_prefill
from open_mmicl.memory import Budget

log = logging.getLogger("lever_plus.engine")


class HfChat:
    """A loaded model asked through its processor. ``full_logits`` keeps the naive path's full-vocabulary logits;
    ``work`` counts what its batches computed.
    """

    fast = False

    def __init__(
        self, config: InferModelConfig, model: Any, processor: Any, folder: Path, fingerprint: str, dtype_name: str
    ):
        self.config, self.model, self.processor, self.folder = config, model, processor, folder
        self.name, self.fingerprint, self.dtype_name = config.name, fingerprint, dtype_name
        self.tokenizer = processor.tokenizer
        self.images, self.work = ImageFiles(), Work()
        self.features: Any = None
        self.shared: Any = None
        self.end_ids = end_ids(model, self.tokenizer)
        self.full_logits = True
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.layout = PromptLayout(self.tokenizer, self.render, config.prompt_format, self.image_token_id())
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.end_ids[0])

    @property
    def processor_fingerprint(self) -> str:
        """The processor settings that the configuration adds to the model's own files, and how files are read."""
        return repr([*sorted(self.config.processor.items()), READ_AS])

    def image_token_id(self) -> int:
        """The id that stands for an image in the rendered chat template."""
        token = self.processor.image_token
        return self.tokenizer.convert_tokens_to_ids(token)

    def render(self, messages: list[dict], generation: bool) -> str:
        """The chat template as text.

        Raises:
            DamagedInputError: it fails on these messages.
        """
        with foreign("model", self.name, "the chat template fails on a prompt"):
            return render(self.processor, messages, generation)

    def answer_ids(self, answer: str) -> list[int]:
        """The answer's tokens in the assistant turn."""
        return list(self.layout.answer_ids(answer))

    def share(self, budget: int | Budget) -> None:
        """From now on encode each image once, keeping features within ``budget`` bytes, and compute each prompt once
        for all that is asked of it.

        What the model does not allow, or what does not give the same, is left, and a log line says so.
        """
        self.features, reason = feature_inputs(self, budget)
        if reason:
            log.warning("%s: no feature cache, every pass encodes its images: %s", self.name, reason)
        self.shared, reason = shared_prefill(self)
        if reason:
            log.warning("%s: no shared prefill, a pass for every answer: %s", self.name, reason)

    def inputs(self, texts: Sequence[str], images: Sequence[Sequence[str]], side: str) -> dict[str, Any]:
        """Model inputs of rendered texts, padded on ``side``; features in the place of pixels where they are cached.

        Raises:
            UsageError: a text that holds the model's image token. DamagedInputError: an image that is none.
        """
        self._check(texts, images)
        maker = self.pixel_inputs if self.features is None else self.features.inputs
        return maker(texts, images, **self.words(texts), padding=True, padding_side=side)

    def pixel_inputs(self, texts: Sequence[str], images: Sequence[Sequence[str]], **words: Any) -> dict[str, Any]:
        """What the processor makes of texts and images; ``words`` go to the tokenizer."""
        loaded = [[load_rgb(path) for path in paths] for paths in images]
        named = ", ".join(path for paths in images for path in paths)
        with foreign("image", named[:200], f"is refused by {self.name}"):
            batch = self.processor(text=list(texts), images=loaded, return_tensors="pt", **words)
        return dict(batch.to(self.model.device, dtype=self.model.dtype))

    def prompt_lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt, image tokens included."""
        if self.features is None:
            return [int(self.prompt_inputs([p], "right")["attention_mask"].sum()) for p in prompts]
        texts, images = [self.layout.text(prompt) for prompt in prompts], [prompt.images for prompt in prompts]
        self._check(texts, images)
        return self.features.lengths(texts, images, **self.words(texts))

    def words(self, texts: Sequence[str]) -> dict[str, Any]:
        """How texts are tokenised: the tokenizer's beginning-of-text token is added unless the chat template did so."""
        begin = self.tokenizer.bos_token
        return {"add_special_tokens": not (begin and texts[0].startswith(begin))}

    @torch.inference_mode()
    def score_batch(self, prompts: Sequence[Prompt], answers: Sequence[str], end: bool) -> list[AnswerScore]:
        """Log-probabilities of (prompt, answer) pairs from one padded forward pass.

        Raises:
            UsageError: an answer that cannot be placed. NumericError: a non-finite score.
        """
        closed = [self.layout.text(p, a.strip()) for p, a in zip(prompts, answers, strict=True)]
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
        self.count(batch, prompts)
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
        batch = self.prompt_inputs(prompts, "left")
        out = self.model.generate(**batch, **generate_arguments(settings, self.end_ids, self.tokenizer.pad_token_id))
        new = out[:, batch["input_ids"].shape[1] :]
        self.count(batch, prompts, settings.num_beams, new.shape[1] - 1)
        return self.tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.inference_mode()
    def hidden_batch(self, prompts: Sequence[Prompt], layers: Sequence[int], pool: str) -> torch.Tensor:
        """Hidden states of prompts that end with the generation prompt: what the model knows where it is to answer.

        Args:
            layers: numbers of hidden states as transformers counts them, 0 the embeddings, -1 behind the last layer
                and its norm.
            pool: ``last``: at the last token; ``image``: mean over the image tokens.

        Returns: float32 (B, len(layers), d) on the CPU.

        Raises:
            UsageError: the model has no such layer.
        """
        batch = self.prompt_inputs(prompts, "left")
        self.count(batch, prompts)
        states = self.model(**batch, output_hidden_states=True, **self.one_logit()).hidden_states
        return pooled_states(states, layers, batch["input_ids"] == self.image_token_id(), pool, self.name)

    def answer_embeddings(self, answers: Sequence[str]) -> torch.Tensor:
        """The mean of the output embeddings of each answer's tokens, float32 (N, d) on the CPU; nothing is computed.

        Their products with the last layer's hidden state are the tokens' logits. Control tokens in an answer are plain
        text, as in a demonstration.
        """
        weight, plain = self.model.get_output_embeddings().weight, self.layout.escaped
        rows = [weight[self.answer_ids(plain(answer))].float().mean(0) for answer in answers]
        return torch.stack(rows).detach().cpu()

    def one_logit(self) -> dict[str, int]:
        """Keyword arguments that keep the last position's logits alone, where the model can."""
        return {"logits_to_keep": 1} if self._keeps_logits else {}

    def prompt_inputs(self, prompts: Sequence[Prompt], side: str) -> dict[str, torch.Tensor]:
        """Model inputs of prompts that end with the generation prompt, padded on ``side``."""
        return self.inputs([self.layout.text(p) for p in prompts], [p.images for p in prompts], side)

    def _check(self, texts: Sequence[str], images: Sequence[Sequence[str]]) -> None:
        token = self.processor.image_token
        if any(text.count(token) != len(paths) for text, paths in zip(texts, images, strict=True)):
            raise UsageError(f"a question or an answer holds the model's image token {token} as text")

    def count(self, batch: dict[str, Any], prompts: Sequence[Prompt], beams: int = 1, steps: int = 0) -> None:
        """Add a pass over ``batch``: each row once per beam, then ``steps`` further tokens."""
        mask, work = batch["attention_mask"], self.work
        more = beams * steps * mask.shape[0]
        work.passes += 1 + steps
        work.tokens += beams * int(mask.sum()) + more
        work.padded_tokens += beams * mask.numel() + more
        if self.features is None:
            work.images += sum(len(prompt.images) for prompt in prompts)

    def count_more(self, tokens: int, padded: int) -> None:
        """Add a pass over tokens behind prompts that are in the cache."""
        self.work.passes += 1
        self.work.tokens += tokens
        self.work.padded_tokens += padded

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


def pooled_states(
    states: Sequence[torch.Tensor], layers: Sequence[int], is_image: torch.Tensor, pool: str, name: str
) -> torch.Tensor:
    """Left-padded hidden states, one (B, S, d) per layer, at the last token or as a mean over image tokens.

    ``is_image`` bool (B, S). Returns: float32 (B, len(layers), d) on the CPU.

    Raises:
        UsageError: no such layer.
    """
    count = len(states)
    if not all(-count <= layer < count for layer in layers):
        raise UsageError(f"{name} has {count} hidden states: LVLM_LAYERS takes {-count} to {count - 1}")
    if pool == "last":
        return torch.stack([states[layer][:, -1].float() for layer in layers], 1).cpu()
    weights = is_image.float() / is_image.sum(1, keepdim=True).clamp(min=1)  # (B, S)
    device = states[0].device
    return torch.stack(
        [torch.einsum("bs,bsd->bd", weights.to(device), states[layer].to(device).float()) for layer in layers], 1
    ).cpu()


def torch_dtype(name: str) -> torch.dtype:
    """``bf16`` -> ``torch.bfloat16``."""
    return getattr(torch, DTYPES[name])


def render(processor: Any, messages: list[dict], generation: bool) -> str:
    """Messages as the processor's chat template writes them."""
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


@INTERFACES.add("hf_chat", "any chat model of transformers that takes images, by its own processor")
def load_chat(config: InferModelConfig, device: str, precision: str) -> HfChat:
    """Load a model with its own processor.

    Raises:
        DamagedInputError: the processor's files are missing, it cannot be built here, or the chat template is wrong.
    """
    folder, model, tokenizer, fingerprint, dtype_name = load_parts(config, device, precision)
    processor = load_processor(folder, model, tokenizer, config.processor)
    template = templates.find(config, folder, tokenizer.chat_template)
    processor.chat_template = template.text
    templates.check(template, functools.partial(render, processor), config, processor.image_token)
    return HfChat(config, model, processor, folder, fingerprint, dtype_name)
