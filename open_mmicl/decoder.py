"""The decoder stack of a Qwen-VL model with less around its matrix products.

The same arithmetic as transformers' ``Qwen2VLTextModel``/``Qwen2_5_VLTextModel`` (held against them in the tests), with
four differences: query, key and value weights lie side by side, as do the two halves of the gated MLP (one product
instead of five; the model's own parameters become views of them); rotations and gates work in place; norms in fp32 are
torch's own; and the last layer is computed only in the columns that are read: a scored prompt is read at its last token
and its answer's, a shared prefix not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache

_WIDE_BYTES = 2 << 30  # of fp32 copies of 16-bit weights


def columns(hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """(B, S, d), (B, R) column numbers -> (B, R, d)."""
    return torch.take_along_dim(hidden, read[..., None], dim=1)


def widens(weight: torch.Tensor) -> bool:
    """Whether products with a 16-bit weight are better computed in fp32: on a CPU without 16-bit instructions.

    There torch multiplies 16-bit matrices an element at a time, five to eight times slower than in fp32.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    kind = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()


class Matrix:
    """A linear layer's weight (n, k) and bias. In 16 bit on a CPU without such instructions its fp32 copy multiplies,
    and the product is rounded once, to 16 bit: what an accumulator of 32 bits gives where there are such instructions.
    The copy is kept (``hold``) or made for each product, which takes a few percent of a long one's time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, hold: bool = False):
        self.weight, self.bias, self._widens = weight, bias, widens(weight)
        self._wide = weight.float() if hold and self._widens else None

    def rows(self, start: int, stop: int | None) -> "Matrix":
        """Part of the outputs; nothing is copied."""
        part = object.__new__(Matrix)
        for name, value in vars(self).items():
            setattr(part, name, value[start:stop] if isinstance(value, torch.Tensor) else value)
        return part

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, k) -> (…, n)."""
        if not self._widens:
            return functional.linear(hidden, self.weight, self.bias)
        wide = self.weight.float() if self._wide is None else self._wide
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(hidden.float(), wide, bias).to(hidden.dtype)


class WideLinear(nn.Module):
    """An ``nn.Linear`` computed as :class:`Matrix`; reads the layer's own weights."""

    def __init__(self, linear: Any, hold: bool):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._matrix = Matrix(linear.weight.data, None if linear.bias is None else linear.bias.data, hold)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, k) -> (…, n)."""
        return self._matrix(hidden)


def widen(module: nn.Module) -> None:
    """Replace a module's linear layers where :func:`widens` says that fp32 is faster."""
    hold = _held(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and widens(child.weight):
                setattr(parent, name, WideLinear(child, hold))


@dataclass(frozen=True)
class _Layer:
    source: Any  # transformers' decoder layer
    qkv: Matrix  # ((heads + 2 H) * D, d)
    queries: Matrix  # its first heads * D rows
    keys_values: Matrix  # the others
    out: Matrix  # (d, heads * D)
    gate_up: Matrix  # (2 * ffn, d)
    down: Matrix  # (d, ffn)


class DecoderStack:
    """Callable form of a transformers decoder stack on one device. Inference only."""

    def __init__(self, text: Any):
        self.text = text
        hold = _held(text.layers)
        self.layers = [_joined(layer, hold) for layer in text.layers]
        self.head_dim = text.layers[0].self_attn.head_dim

    def __call__(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        read: torch.Tensor | None = None,
        ends: bool = False,
    ) -> torch.Tensor:
        """Final hidden states (B, S, d), or (B, R, d) of the columns ``read`` (B, R).

        Args:
            hidden: (B, S, d) embeddings. positions: (3, B, S).
            mask: additive (B or 1, 1, S, T), or None for plain causal attention (then nothing is cached before).
            cache: keys and values are appended to it (and read from it).
        """
        cos, sin = self.text.rotary_emb(hidden, positions)
        rope = (cos[:, :, None], sin[:, :, None])  # (B, S, 1, D) each
        for i, layer in enumerate(self.layers):
            if ends and 0 < i < len(self.layers) - 1:
                continue
            last = read if i == len(self.layers) - 1 else None
            hidden = self._layer(layer, i, hidden, rope, mask, cache, last)
        return _normed(self.text.norm, hidden)

    def _layer(
        self,
        layer: _Layer,
        index: int,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Cache | None,
        read: torch.Tensor | None,
    ) -> torch.Tensor:
        source, attention = layer.source, layer.source.self_attn
        heads = attention.num_heads
        normed = _normed(source.input_layernorm, hidden)
        if read is None:
            joined = _heads(layer.qkv(normed), self.head_dim)  # (B, S, heads + 2 H, D)
            n_rotated = (heads + joined.shape[2]) // 2  # queries and keys; the values are as many as the keys
            rotated = _rotate(joined[:, :, :n_rotated], rope)
            queries, keys, values = rotated[:, :, :heads], rotated[:, :, heads:], joined[:, :, n_rotated:]
        else:
            keys, values = _heads(layer.keys_values(normed), self.head_dim).chunk(2, dim=2)
            keys = _rotate(keys, rope)
            own = _heads(layer.queries(columns(normed, read)), self.head_dim)
            queries = _rotate(own, tuple(torch.take_along_dim(table, read[..., None, None], dim=1) for table in rope))
            hidden = columns(hidden, read)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, index)  # (B, H, T, D)
        if read is not None:
            if not read.shape[1]:
                return hidden
            mask = _rows_of_mask(mask, read, keys.shape[2], hidden.dtype)
        out = _attend(queries.transpose(1, 2), keys, values, mask, attention.scaling)
        hidden = layer.out(out.transpose(1, 2).flatten(2)).add_(hidden)
        gate, up = layer.gate_up(_normed(source.post_attention_layernorm, hidden)).chunk(2, dim=-1)
        gated = source.mlp.act_fn(gate).mul_(up)
        return hidden.add_(layer.down(gated))


class PatchProjection(nn.Module):
    """The vision tower's patch convolution as the matrix product that it is: one patch in, its kernel's size.

    Several times faster than the convolution, on a CPU as on a GPU; equal but for rounding. Reads the convolution's own
    weights.
    """

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self._matrix = Matrix(self.weight.data.flatten(1), None if self.bias is None else self.bias.data)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, channels, frames, height, width) -> (N, d)."""
        return self._matrix(patches.flatten(1))


def _held(module: nn.Module) -> bool:
    """Whether there is to be an fp32 copy of a module's weights: not of a large model's."""
    return 4 * sum(weight.numel() for weight in module.parameters()) <= _WIDE_BYTES


def _joined(layer: Any, hold: bool) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = Matrix(*_side_by_side([attention.q_proj, attention.k_proj, attention.v_proj]), hold)
    gate_up = Matrix(*_side_by_side([mlp.gate_proj, mlp.up_proj]), hold)
    n_query = attention.q_proj.out_features
    return _Layer(
        layer, qkv, qkv.rows(0, n_query), qkv.rows(n_query, None), Matrix(attention.o_proj.weight, None, hold),
        gate_up, Matrix(mlp.down_proj.weight, None, hold),
    )  # fmt: skip


def _side_by_side(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (and biases) of linear layers in one tensor each; the layers' own become views, so nothing is doubled."""
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears]) if linears[0].bias is not None else None
    for linear, part in zip(linears, weight.split(sizes), strict=True):
        linear.weight.data = part
    for linear, part in zip(linears, [] if bias is None else bias.split(sizes), strict=bias is not None):
        linear.bias.data = part
    return weight, bias


def _normed(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """RMS norm; torch's own is several times faster on a CPU. In 16 bit transformers' is kept: it rounds once more."""
    if hidden.dtype != torch.float32:
        return norm(hidden)
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _heads(projected: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, S, heads · D) -> (B, S, heads, D)."""
    return projected.unflatten(-1, (-1, head_dim))


def _rotate(states: torch.Tensor, rope: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Rotary embedding of (B, S, heads, D): x cos + rotate_half(x) sin."""
    cos, sin = rope
    half = states.shape[-1] // 2
    rotated = states * cos
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated


def _rows_of_mask(mask: torch.Tensor | None, read: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask's rows of the columns read, (B, 1, R, T)."""
    if mask is not None:
        return torch.take_along_dim(mask, read[:, None, :, None], dim=2)
    seen = torch.arange(length, device=read.device) <= read[..., None]  # (B, R, T)
    return torch.zeros(seen.shape, dtype=dtype, device=read.device).masked_fill_(~seen, -torch.inf)[:, None]


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention (B, heads, S, D) x (B, H, T, D); heads that share keys stand side by side as further queries, so that
    keys and values are never repeated. Without a mask: causal.
    """
    groups, length = queries.shape[1] // keys.shape[1], queries.shape[2]
    attend = functional.scaled_dot_product_attention
    if mask is None:
        return attend(queries, keys, values, is_causal=length > 1, scale=scale, enable_gqa=groups > 1)
    if groups == 1:
        return attend(queries, keys, values, attn_mask=mask, scale=scale)
    queries = queries.unflatten(1, (keys.shape[1], groups)).flatten(2, 3)  # (B, H, groups * S, D)
    out = attend(queries, keys, values, attn_mask=mask.repeat(1, 1, groups, 1), scale=scale)
    return out.unflatten(2, (groups, length)).flatten(1, 2)
