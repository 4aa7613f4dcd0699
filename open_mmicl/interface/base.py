"""What the engine needs of a model: batches of prompts in, log-probabilities and texts out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from open_mmicl.errors import UsageError
from open_mmicl.interface.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How an answer is generated (plan's task: 5 new tokens, 3 beams, length penalty 0).

    ``num_beams`` 1 is greedy decoding. Sampling and the model's own ``generation_config`` (repetition penalty,
    temperature) are never applied: an answer is a function of the prompt.
    """

    max_new_tokens: int = 5
    num_beams: int = 3
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.upper()}={getattr(self, name)} is not allowed: whole number >= 1")


@dataclass
class Work:
    """What was computed: forward passes, tokens (without and with padding), images encoded."""

    passes: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    images: int = 0


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """Teacher-forced log P(answer | prompt) in nats, summed over ``n_tokens`` tokens."""

    log_prob: float
    n_tokens: int


class LvlmInterface(Protocol):
    """A loaded model. Batches may mix numbers of images and lengths."""

    name: str
    fingerprint: str
    dtype_name: str
    processor_fingerprint: str

    def answer_ids(self, answer: str) -> list[int]:
        """The answer's tokens as they occur in the assistant turn (without the end of the turn)."""

    def score_batch(self, prompts: Sequence[Prompt], answers: Sequence[str], end: bool) -> list[AnswerScore]:
        """One forward pass over (prompt, answer) pairs."""

    def generate_batch(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[str]:
        """One ``generate`` over the prompts; raw text without special tokens."""

    def hidden_batch(self, prompts: Sequence[Prompt], layers: Sequence[int], pool: str) -> "Tensor":
        """Hidden states (B, len(layers), d) of the prompts, float32 on the CPU, at the last token or over the image."""

    def answer_embeddings(self, answers: Sequence[str]) -> "Tensor":
        """Mean output embedding of each answer's tokens, float32 (N, d)."""

    def prompt_lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt, image tokens included."""
