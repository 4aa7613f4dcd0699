"""Floating-point operations of an LVLM's forward passes from its configuration, and hours on cards that are named.

Counted: every matrix product of the decoder and the vision tower (2 operations per weight and token), attention, and
the head where a token is read. Loads no weights and no torch.
"""

from dataclasses import dataclass
from typing import Any

from lever_plus import io
from open_mmicl.errors import MissingInputError

SHARE = 0.4  # of a card's peak that long prompts in large passes reach; stated wherever hours are
_PATCH, _WINDOW = 3 * 2 * 14 * 14, 64  # numbers in a patch; patches that a patch attends to in most blocks
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Card:
    """Dense bf16 peak [operations/s] and memory [GiB] from the manufacturer's data sheet."""

    name: str
    peak: float
    memory: int


CARDS = (
    Card("H100", 989e12, 80), Card("H200", 989e12, 141), Card("A100", 312e12, 80), Card("RTX 4090", 165e12, 24),
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Qwen-VL model: the decoder's, then the vision tower's (``v_``)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    v_hidden: int
    v_depth: int
    v_inner: int
    tied: bool = True

    @property
    def decoder_weights(self) -> int:
        """Weights of the decoder's layers."""
        narrow = self.hidden // self.heads * self.kv_heads
        return self.layers * (2 * self.hidden * (self.hidden + narrow) + 3 * self.hidden * self.inner)

    @property
    def vision_weights(self) -> int:
        """Weights of the vision tower's blocks."""
        return self.v_depth * (4 * self.v_hidden**2 + 3 * self.v_hidden * self.v_inner)

    @property
    def weights(self) -> int:
        """All of them, the merger and the embeddings included."""
        merger = (4 * self.v_hidden) ** 2 + 4 * self.v_hidden * self.hidden
        return self.decoder_weights + self.vision_weights + merger + (2 - self.tied) * self.vocabulary * self.hidden

    def decoder(self, tokens: float, length: float, read: float) -> float:
        """Operations for ``tokens`` in prompts of ``length`` tokens, of which ``read`` go through the head."""
        attention = 2 * self.layers * self.hidden * length  # causal: half of 4 · d · length
        return tokens * (2 * self.decoder_weights + attention) + 2 * read * self.vocabulary * self.hidden

    def vision(self, tokens: float) -> float:
        """Operations to encode images of ``tokens`` visual tokens (4 patches each) in all."""
        d, wide = self.v_hidden, 4 * self.v_hidden
        patch = 2 * (self.vision_weights + _PATCH * d) + 4 * self.v_depth * d * _WINDOW
        return tokens * (4 * patch + 2 * wide * (wide + self.hidden))

    def feature_bytes(self, tokens: float, dtype: str) -> float:
        """Bytes of the features of images of ``tokens`` visual tokens in all."""
        return tokens * self.hidden * BYTES[dtype]

    def kv_bytes(self, tokens: float, dtype: str) -> float:
        """Bytes of keys and values of so many tokens."""
        return 2.0 * tokens * self.layers * self.hidden // self.heads * self.kv_heads * BYTES[dtype]


def architecture(cfg: Any) -> Architecture | None:
    """The sizes in the model's config.json where its folder is here, else those in its YAML; None where neither says.

    Raises:
        DamagedInputError: config.json cannot be read.
    """
    raw = read_of_model(cfg, "config.json", "model configuration", optional=False)
    raw = dict(cfg.architecture) if raw is None else raw
    text, vision = {**raw, **raw.get("text_config", {})}, raw.get("vision_config", {})
    try:
        return Architecture(
            hidden=text["hidden_size"], layers=text["num_hidden_layers"], heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"], inner=text["intermediate_size"], vocabulary=text["vocab_size"],
            v_hidden=vision["hidden_size"], v_depth=vision["depth"], v_inner=vision["intermediate_size"],
            tied=bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )  # fmt: skip
    except (KeyError, TypeError):
        return None


def read_of_model(cfg: Any, name: str, what: str, optional: bool = True) -> dict[str, Any] | None:
    """A JSON file of the model's folder; None where the folder is not here: a price can be told without the weights.

    Raises:
        DamagedInputError: it cannot be read. MissingInputError: the folder lacks it, and it is not ``optional``.
    """
    try:
        folder = cfg.local_dir()
    except MissingInputError:
        return None
    if folder is None or (optional and not (folder / name).is_file()):
        return None
    return io.read_object(folder / name, what)


def hours(operations: float, card: Card, count: int = 1) -> float:
    """Hours on ``count`` cards at :data:`SHARE` of their peak."""
    return operations / (SHARE * card.peak) / count / 3600
