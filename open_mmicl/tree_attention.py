"""The last decoder layer of a Qwen-VL model, computed only where its result is read.

A scored prompt is read at its last token and its answer's, a shared prefix not at all; the layer's keys and values are
still those of every token. Same arithmetic as transformers' decoder layer; held against it in the tests.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half


def last_layer(
    text: Any,
    hidden: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    cache: Cache | None,
    read: torch.Tensor,
) -> torch.Tensor:
    """Final hidden states of the columns ``read``.

    Args:
        text: the decoder stack (``layers``, ``norm``).
        hidden: (B, S, d), input of the last layer. rope: cosines and sines (B, S, D).
        mask: additive (B or 1, 1, S, T), or None for plain causal attention.
        read: (B, R) column numbers.

    Returns: (B, R, d) after the final norm.
    """
    layer = text.layers[-1]
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    cos, sin = (table[:, None] for table in rope)  # (B, 1, S, D)
    keys = _rotate(_heads(attention.k_proj(normed), attention.head_dim), cos, sin)
    values = _heads(attention.v_proj(normed), attention.head_dim)
    if cache is not None:
        keys, values = cache.update(keys, values, attention.layer_idx)  # (B, H, T, D)
    batch, n_read = read.shape
    if not n_read:
        return hidden[:, :0]
    cos, sin = (torch.take_along_dim(table, read[:, None, :, None], dim=2) for table in (cos, sin))
    queries = _rotate(_heads(attention.q_proj(columns(normed, read)), attention.head_dim), cos, sin)
    if mask is None:
        seen = torch.arange(keys.shape[2], device=read.device) <= read[..., None]  # (B, R, T)
        mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=read.device).masked_fill_(~seen, -torch.inf)[:, None]
    else:
        mask = torch.take_along_dim(mask, read[:, None, :, None], dim=2)  # (B, 1, R, T)
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:  # grouped heads share keys: put them side by side as further queries instead of repeating the keys
        queries = queries.unflatten(1, (keys.shape[1], groups)).flatten(2, 3)  # (B, H, groups * R, D)
        mask = mask.repeat(1, 1, groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=attention.scaling
    )
    if groups > 1:
        out = out.unflatten(2, (groups, n_read)).flatten(1, 2)  # (B, heads, R, D)
    out = attention.o_proj(out.transpose(1, 2).reshape(batch, n_read, -1))
    hidden = columns(hidden, read) + out
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return text.norm(hidden)


def columns(hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """(B, S, d), (B, R) -> (B, R, d)."""
    return torch.take_along_dim(hidden, read[..., None], dim=1)


def _heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, S, heads * D) -> (B, heads, S, D)."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return states * cos + rotate_half(states) * sin
