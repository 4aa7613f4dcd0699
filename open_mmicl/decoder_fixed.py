"""The decoder stack for 16 bit: a token's bits depend on the tokens before it in its prompt, and on nothing else.

A 16-bit result is rounded so coarsely that the order of a sum, which follows the shape of a product, decides between
two tokens of nearly equal probability. Here no shape depends on what else is computed:

- Whatever works on each token alone (projections, gates, norms) works on tiles of fixed numbers of tokens, whoseever
  they are; the last one is filled up. Whether a token's place in its tile matters, and tiles of which sizes give it the
  same bits, is tried when the model is loaded.
- Attention is computed for each piece of a prompt (header, demonstration, query), each answer and each step of a beam
  search by itself, over exactly the keys that it sees; where a CPU multiplies in 16 bit, a piece's in blocks of tokens.

Legend: N tokens, R tokens that are read, H key/value heads, D head size, d hidden size.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from open_mmicl.decoder import DecoderStack, _rotate
from open_mmicl.tiles import Tiles, Work, find_tiles
from open_mmicl.wide import Matrix, held

log = logging.getLogger("lever_plus.engine")

# Tokens of a tile: of prompts, and of answers and beams, which come in small numbers.
_TILES = {"cpu": (128, 16), "cuda": (1024, 64)}
# Further sizes, where their products have the same bits: oneDNN's in bf16 have, whatever their rows.
_ALIKE = {"cpu": (4, 8, 16, 32, 64, 128, 256)}
_MASKS = 64  # causal masks kept
BLOCK = 96  # tokens of a piece that attend at once where attention is in 16 bit: over no keys behind the last of them


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that attend together: ``n`` from place ``at`` of a pass, in row ``row`` behind ``before`` others.

    ``sight``: bool (n, before + n) of the keys that each sees, None: all up to its own. ``reads``: how many of the last
    tokens are read.
    """

    row: int
    at: int
    n: int
    before: int
    reads: int = 0
    sight: torch.Tensor | None = None


@dataclass(frozen=True)
class _Layer:
    source: Any  # transformers' decoder layer
    qkv: Matrix  # ((heads + 2 H) * D, d)
    queries: Matrix  # its first heads * D rows
    keys_values: Matrix  # the others
    out: Matrix  # (d, heads * D)
    gate_up: Matrix  # (2 * ffn, d)
    down: Matrix  # (d, ffn)

    @property
    def products(self) -> tuple[Matrix, ...]:
        """All that it multiplies with."""
        return (self.qkv, self.queries, self.keys_values, self.out, self.gate_up, self.down)


class FixedStack:
    """Callable form of a decoder stack, made of a :class:`DecoderStack`'s weights. Inference only."""

    def __init__(self, stack: DecoderStack):
        self.text, self.head_dim = stack.text, stack.head_dim
        hold = held(self.text.layers)
        self.layers = [_layer(layer, hold) for layer in stack.layers]
        attention = self.layers[0].source.self_attn
        self.heads, self.scale = attention.num_heads, attention.scaling
        self.kv_heads = self.heads // attention.num_key_value_groups
        weight = self.text.norm.weight
        self.device, self.dtype = weight.device, weight.dtype
        # Keys, values and attention are in fp32 where products are: the values are those of 16 bit.
        self.kv_dtype = torch.float32 if self.layers[0].qkv.widens else self.dtype
        # oneDNN multiplies 16-bit numbers twice as fast as fp32 ones; torch's own attention multiplies in fp32 only.
        self.blocks = self.device.type == "cpu" and self.kv_dtype == torch.bfloat16
        self.prompt_tiles, self.small_tiles = self.find_tiles()
        self._causal = functools.lru_cache(_MASKS)(self._causal_mask)
        self._future = functools.lru_cache(_MASKS)(_future)

    def __call__(
        self,
        hidden: torch.Tensor,
        n_prompt: int,
        positions: torch.Tensor,
        segments: Sequence[Segment],
        buffers: torch.Tensor,
    ) -> torch.Tensor:
        """Final hidden states (R, d) of the tokens read, in the order of the segments.

        Args:
            hidden: (N, d) embeddings, the first ``n_prompt`` of prompts, the others of answers or beams.
            positions: (3, N). segments: every token in one, a row's in the order in which they see one another.
            buffers: (2·layers, B, H, T, D) keys and values; those of the tokens are written at their places.
        """
        cos, sin = (table[0, :, None] for table in self.text.rotary_emb(hidden[None], positions[:, None]))  # (N, 1, D)
        masks = [self._mask(segment) for segment in segments]
        for i, layer in enumerate(self.layers[:-1]):
            joined = self._tiled(functools.partial(_entered, layer, layer.qkv), n_prompt, hidden)
            states = joined.unflatten(-1, (-1, self.head_dim))  # (N, heads + 2 H, D)
            n_rotated = self.heads + self.kv_heads
            rotated = _rotate(states[:, :n_rotated], (cos, sin))
            queries, keys, values = rotated[:, : self.heads], rotated[:, self.heads :], states[:, n_rotated:]
            seen = torch.empty(len(hidden), self.heads * self.head_dim, dtype=self.dtype, device=hidden.device)
            for segment, mask in zip(segments, masks, strict=True):
                stop = segment.at + segment.n
                own = self._write(buffers, i, segment, keys, values)
                self._attend(queries[segment.at : stop], own, mask, segment, seen[segment.at : stop])
            hidden = self._tiled(functools.partial(_left, layer), n_prompt, hidden, seen)
        return self._last(hidden, n_prompt, (cos, sin), segments, masks, buffers)

    def _last(
        self,
        hidden: torch.Tensor,
        n_prompt: int,
        rope: tuple[torch.Tensor, torch.Tensor],
        segments: Sequence[Segment],
        masks: Sequence[torch.Tensor | None],
        buffers: torch.Tensor,
    ) -> torch.Tensor:
        """The last layer, computed for the tokens that are read, and the final norm."""
        layer, index = self.layers[-1], len(self.layers) - 1
        joined = self._tiled(functools.partial(_entered, layer, layer.keys_values), n_prompt, hidden)
        keys, values = joined.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=1)  # (N, H, D) each
        keys = _rotate(keys, rope)
        if not any(segment.reads for segment in segments):
            for segment in segments:
                self._write(buffers, index, segment, keys, values)
            return hidden[:0]
        reads = [place for s in segments for place in range(s.at + s.n - s.reads, s.at + s.n)]
        read = torch.tensor(reads, dtype=torch.long, device=hidden.device)
        hidden = hidden[read]
        rows = functools.partial(_entered, layer, layer.queries)
        queries = _rotate(self._tiled(rows, 0, hidden).unflatten(-1, (-1, self.head_dim)), tuple(t[read] for t in rope))
        seen = torch.empty(len(read), self.heads * self.head_dim, dtype=self.dtype, device=hidden.device)
        start = 0
        for segment, mask in zip(segments, masks, strict=True):
            own = self._write(buffers, index, segment, keys, values)
            if segment.reads:
                stop = start + segment.reads
                self._attend(queries[start:stop], own, mask if segment.reads > 1 else None, segment, seen[start:stop])
                start = stop
        return self._tiled(lambda *block: self.text.norm(_left(layer, *block)), 0, hidden, seen)

    def _write(
        self, buffers: torch.Tensor, index: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a segment's keys and values (n, H, D) in their places; what it sees, (H, before + n, D) each."""
        start, stop = segment.before, segment.before + segment.n
        place = slice(segment.at, segment.at + segment.n)
        own = buffers[2 * index : 2 * index + 2, segment.row]  # (2, H, T, D)
        own[0, :, start:stop] = keys[place].transpose(0, 1)
        own[1, :, start:stop] = values[place].transpose(0, 1)
        return own[0, :, :stop], own[1, :, :stop]

    def _attend(
        self,
        queries: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        segment: Segment,
        out: torch.Tensor,
    ) -> None:
        """Queries (n, heads, D) over what they see -> ``out`` (n, heads · D)."""
        if self._in_blocks(segment) and len(queries) == segment.n:
            self._attend_in_blocks(queries, own, out)
            return
        keys, values = own
        count, groups = len(queries), self.heads // self.kv_heads
        # Heads that share keys are further queries.
        queries = queries.unflatten(1, (self.kv_heads, groups)).permute(1, 2, 0, 3).flatten(1, 2)  # (H, groups · n, D)
        found = functional.scaled_dot_product_attention(
            queries[None].to(self.kv_dtype), keys[None], values[None], attn_mask=mask, scale=self.scale
        )[0]
        out.copy_(found.unflatten(1, (groups, count)).permute(2, 0, 1, 3).flatten(1))

    def _in_blocks(self, segment: Segment) -> bool:
        whole = segment.reads in (0, 1, segment.n)  # all queries are there, or the last one, which sees everything
        return self.blocks and segment.sight is None and segment.n > BLOCK // 2 and whole

    def _attend_in_blocks(
        self, queries: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor
    ) -> None:
        """Causal attention of a whole piece: logits and softmax in fp32, the weighted sum of values in 16 bit.

        In blocks of queries, over the keys up to each block's last.
        """
        count, groups = len(queries), self.heads // self.kv_heads
        size = -(-count // -(-count // BLOCK))  # all blocks of nearly one length
        future = self._future(size)
        queries = queries.unflatten(1, (self.kv_heads, groups))
        out = out.unflatten(1, (self.kv_heads, groups, self.head_dim))
        for head, (keys, values) in enumerate(zip(*own, strict=True)):  # (before + n, D) each
            keys = keys.to(torch.float32, copy=True).mul_(self.scale).T
            before = keys.shape[1] - count
            for start in range(0, count, size):
                stop = min(start + size, count)
                n, seen = stop - start, before + stop
                logits = queries[start:stop, head].float().flatten(0, 1) @ keys[:, :seen]  # (n · groups, seen)
                logits.unflatten(0, (n, groups))[..., seen - n :].add_(future[:n, :, :n])
                weights = logits.softmax(-1).to(values.dtype)
                out[start:stop, head] = (weights @ values[:seen]).unflatten(0, (n, groups))

    def _mask(self, segment: Segment) -> torch.Tensor | None:
        """Additive mask (groups · n, before + n); None where every token sees all."""
        if segment.sight is not None:
            return self._additive(segment.sight)
        return None if segment.n == 1 or self._in_blocks(segment) else self._causal(segment.n, segment.before)

    def _causal_mask(self, n: int, before: int) -> torch.Tensor:
        sight = torch.ones(n, before + n, dtype=torch.bool, device=self.device).tril_(before)
        return self._additive(sight)

    def _additive(self, sight: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(sight.shape, dtype=self.kv_dtype, device=self.device).masked_fill_(~sight, -torch.inf)
        return mask.repeat(self.heads // self.kv_heads, 1)

    def padded(self, n_prompt: int, n: int) -> int:
        """Tokens that are computed for ``n``, the first ``n_prompt`` of prompts."""
        return sum(tiles.padded(stop - start) for tiles, start, stop in self._parts(n_prompt, n))

    def _tiled(self, work: Callable[..., torch.Tensor], n_prompt: int, *inputs: torch.Tensor) -> torch.Tensor:
        """``work`` on tiles of the first ``n_prompt`` rows of each input (N, …) and on small tiles of the others."""
        done = []
        for tiles, start, stop in self._parts(n_prompt, len(inputs[0])):
            for first, last, size in tiles.cuts(start, stop):
                blocks = [_filled(part[first:last], size) for part in inputs]
                done.append(work(*blocks)[: last - first])
        return torch.cat(done) if len(done) != 1 else done[0]

    def _parts(self, n_prompt: int, n: int) -> list[tuple[Tiles, int, int]]:
        """What is cut into which tiles; all alike where that makes no difference."""
        if self.prompt_tiles == self.small_tiles:
            return [(self.prompt_tiles, 0, n)]
        return [(self.prompt_tiles, 0, n_prompt), (self.small_tiles, n_prompt, n)]

    @torch.inference_mode()
    def find_tiles(self) -> tuple[Tiles, Tiles]:
        """Tiles for prompts, and for answers and beams, as they round on this machine."""
        wanted, alike = _TILES.get(self.device.type, _TILES["cuda"]), _ALIKE.get(self.device.type, ())
        layer, rows = self.layers[0], max(*wanted, *alike)
        hidden = _noise((rows, layer.qkv.weight.shape[1]), self)
        seen = _noise((rows, self.heads * self.head_dim), self)
        entering = (layer.qkv, layer.queries, layer.keys_values)
        works: list[Work] = [(functools.partial(_entered, layer, part), (hidden,)) for part in entering]
        works.append((functools.partial(_left, layer), (hidden, seen)))
        prompt = find_tiles(wanted[0], alike, works)
        small = prompt if wanted[1] in prompt.sizes else find_tiles(wanted[1], (), works)
        if prompt.base < wanted[0]:
            log.warning("products of %d tokens round by a token's place here; %d are used", wanted[0], prompt.base)
        return prompt, small


def _entered(layer: _Layer, part: Matrix, hidden: torch.Tensor) -> torch.Tensor:
    """A layer's first half up to attention, (n, d) -> (n, outputs of ``part``)."""
    return part(layer.source.input_layernorm(hidden))


def _left(layer: _Layer, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """A layer from attention's output ``seen`` (n, heads · D) on, (n, d)."""
    hidden = layer.out(seen).add_(hidden)
    gate, up = layer.gate_up(layer.source.post_attention_layernorm(hidden)).chunk(2, dim=-1)
    return hidden.add_(layer.down(layer.source.mlp.act_fn(gate).mul_(up)))


def _layer(layer: Any, hold: bool) -> _Layer:
    attention, mlp = layer.source.self_attn, layer.source.mlp
    n_query = attention.q_proj.out_features
    qkv = Matrix(layer.qkv, layer.qkv_bias, hold)
    return _Layer(
        layer.source, qkv, qkv.rows(0, n_query), qkv.rows(n_query, None), Matrix(attention.o_proj.weight, None, hold),
        Matrix(layer.gate_up, None, hold), Matrix(mlp.down_proj.weight, None, hold),
    )  # fmt: skip


def _future(n: int) -> torch.Tensor:
    """Additive mask (n, 1, n) of the tokens behind each of ``n``."""
    return torch.full((n, n), -torch.inf).triu_(1)[:, None]


def _filled(block: torch.Tensor, size: int) -> torch.Tensor:
    """``block`` with rows of zeros up to ``size``."""
    return block if len(block) == size else functional.pad(block, (0, 0, 0, size - len(block)))


def _noise(size: tuple[int, int], like: FixedStack) -> torch.Tensor:
    """The same random numbers whenever they are asked for."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return values.to(like.device, like.dtype)
