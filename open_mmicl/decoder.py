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

from open_mmicl.wide import product


def columns(hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """(B, S, d), (B, R) column numbers -> (B, R, d)."""
    return torch.take_along_dim(hidden, read[..., None], dim=1)


@dataclass(frozen=True)
class Packing:
    """Which tokens of a padded pass (B, S) are real. Only they go through whatever works on each token alone.

    ``real``: (N,) their places in the flattened pass; ``place``: (B·S,) the token at each place, 0 at padding.
    """

    real: torch.Tensor
    place: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, device: torch.device) -> "Packing":
        """From the lengths of right-padded rows."""
        own = torch.arange(width) < torch.tensor(lengths)[:, None]  # (B, S)
        place = (own.flatten().cumsum(0) - 1) * own.flatten()
        return cls(own.flatten().nonzero()[:, 0].to(device), place.to(device), tuple(own.shape))

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, S, …) -> (1, N, …)."""
        return padded.flatten(0, 1).index_select(0, self.real)[None]

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(1, N, …) -> (B, S, …); at padding stands some real token."""
        return packed[0].index_select(0, self.place).unflatten(0, self.shape)

    def take(self, packed: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """(1, N, …), (B, R) columns -> (B, R, …)."""
        rows = torch.arange(len(read), device=read.device)[:, None] * self.shape[1]
        return packed[0][self.place[rows + read]]


@dataclass(frozen=True)
class _Layer:
    source: Any  # transformers' decoder layer
    qkv: torch.Tensor  # ((heads + 2 H) * D, d)
    qkv_bias: torch.Tensor | None
    gate_up: torch.Tensor  # (2 * ffn, d)


class DecoderStack:
    """Callable form of a transformers decoder stack on one device. Inference only."""

    def __init__(self, text: Any):
        self.text = text
        self.layers = [_joined(layer) for layer in text.layers]
        self.head_dim = text.layers[0].self_attn.head_dim

    def __call__(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        read: torch.Tensor | None = None,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """Final hidden states (B, S, d), or (B, R, d) of the columns ``read`` (B, R).

        Args:
            hidden: (B, S, d) embeddings. positions: (3, B, S).
            packing: the real tokens; with it ``read`` must be given.
            mask: additive (B or 1, 1, S, T), or None for plain causal attention (then nothing is cached before).
            cache: keys and values are appended to it (and read from it).
        """
        if packing is not None:
            hidden = packing.pack(hidden)  # (1, N, d)
            positions = positions.flatten(1).index_select(1, packing.real)[:, None]
        cos, sin = self.text.rotary_emb(hidden, positions)
        rope = (cos[:, :, None], sin[:, :, None])  # (B, S, 1, D) each
        for i, layer in enumerate(self.layers):
            last = read if i == len(self.layers) - 1 else None
            hidden = self._layer(layer, i, hidden, rope, mask, cache, last, packing)
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
        packing: Packing | None,
    ) -> torch.Tensor:
        source, attention = layer.source, layer.source.self_attn
        heads = attention.num_heads
        n_query = heads * self.head_dim
        normed = _normed(source.input_layernorm, hidden)
        if read is None:
            joined = _project(normed, layer.qkv, layer.qkv_bias, self.head_dim)  # (B, S, heads + 2 H, D)
            n_rotated = (heads + joined.shape[2]) // 2  # queries and keys; the values are as many as the keys
            rotated = _rotate(joined[:, :, :n_rotated], rope)
            values = joined[:, :, n_rotated:]
            if packing is not None:
                rotated, values = packing.pad(rotated), packing.pad(values)
            queries, keys = rotated[:, :, :heads], rotated[:, :, heads:]
        else:
            take = columns if packing is None else packing.take
            bias = layer.qkv_bias
            rest = _project(normed, layer.qkv[n_query:], None if bias is None else bias[n_query:], self.head_dim)
            keys, values = rest.chunk(2, dim=2)
            keys = _rotate(keys, rope)
            own = _project(
                take(normed, read), layer.qkv[:n_query], None if bias is None else bias[:n_query], self.head_dim
            )
            queries = _rotate(own, tuple(take(table[:, :, 0], read)[:, :, None] for table in rope))
            hidden = take(hidden, read)
            if packing is not None:
                keys, values = packing.pad(keys), packing.pad(values)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, index)  # (B, H, T, D)
        if read is not None:
            if not read.shape[1]:
                return hidden
            mask = _rows_of_mask(mask, read, keys.shape[2], hidden.dtype)
        out = _attend(queries.transpose(1, 2), keys, values, mask, attention.scaling)
        out = out.transpose(1, 2).flatten(2)  # (B, S or R, d)
        if packing is not None and read is None:
            out = packing.pack(out)
        hidden = product(out, attention.o_proj.weight).add_(hidden)
        gate, up = product(_normed(source.post_attention_layernorm, hidden), layer.gate_up).chunk(2, dim=-1)
        gated = source.mlp.act_fn(gate).mul_(up)
        return hidden.add_(product(gated, source.mlp.down_proj.weight))


class PatchProjection(nn.Module):
    """The vision tower's patch convolution as the matrix product that it is: one patch in, its kernel's size.

    Several times faster than the convolution, on a CPU as on a GPU; equal but for rounding. Reads the convolution's own
    weights.
    """

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, channels, frames, height, width) -> (N, d)."""
        return functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def _joined(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, bias = _side_by_side([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, _ = _side_by_side([mlp.gate_proj, mlp.up_proj])
    return _Layer(layer, qkv, bias, gate_up)


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


def _project(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head_dim: int) -> torch.Tensor:
    """(B, S, d) -> (B, S, heads, D)."""
    return product(hidden, weight, bias).unflatten(-1, (-1, head_dim))


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
