"""The fast path in 16 bit: a prompt's answer and scores do not depend on the prompts beside it.

The plan is :mod:`open_mmicl.prefix_tree`'s, but a pass has no padding: the tokens of its rows stand one behind the
other, and :class:`~open_mmicl.decoder_fixed.FixedStack` computes each so that its bits are a function of its prompt.
Neither other prompts, nor their order, nor which prefixes are shared, nor what the cache holds, nor the budgets can
change them. Keys and values of demonstrations are therefore kept from call to call: the second step of a beam search
begins with the demonstrations of the first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from open_mmicl.beam import Ancestry, beam_search
from open_mmicl.decoder_fixed import BLOCK, FixedStack, Segment
from open_mmicl.engine_fast import FastRunner
from open_mmicl.errors import NumericError
from open_mmicl.interface.base import AnswerScore, GenerationSettings
from open_mmicl.interface.qwen_vl import Piece, QwenVL
from open_mmicl.prefix_tree import Leaf, Node, Plan
from open_mmicl.wide import widen

_LOGIT_TILE = 16  # rows of logits in one product
_LOGIT_TILES = 16  # of them held at once
_WIDE_ROWS = 4096  # vocabulary rows widened to fp32 at a time
_ALIGNED = 16  # a row's keys begin at a multiple of so many: some products round by where their inputs lie in memory


@dataclass
class _Rows:
    """Rows of a pass: token ids and positions one behind the other, segments, images in order."""

    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    images: list[tuple[bytes, str]] = field(default_factory=list)
    n: int = 0

    def add_pieces(self, row: int, pieces: Sequence[Piece], start: tuple[int, int], read: bool) -> tuple[int, int]:
        """Pieces behind ``start`` (tokens, position counter); ``read``: the last token is. Returns where they end."""
        before, position = start
        for piece in pieces:
            self._add(row, piece.ids, piece.positions + position, before, int(read and piece is pieces[-1]))
            self.images += piece.images
            before, position = before + piece.length, position + piece.advance
        return before, position

    def add_answer(self, row: int, ids: Sequence[int], start: tuple[int, int]) -> None:
        """An answer's tokens behind its prompt, all of them read."""
        places = np.broadcast_to(start[1] + np.arange(len(ids)), (3, len(ids)))
        self._add(row, np.array(ids, dtype=np.int64), places, start[0], len(ids))

    def _add(self, row: int, ids: np.ndarray, positions: np.ndarray, before: int, reads: int) -> None:
        self.segments.append(Segment(row, self.n, len(ids), before, reads))
        self.ids.append(ids)
        self.positions.append(positions)
        self.n += len(ids)


class FixedRunner(FastRunner):
    """A :class:`FastRunner` whose replies depend on the prompt alone."""

    fixed = True

    def __init__(self, lvlm: QwenVL, image_bytes: int, kv_bytes: int):
        super().__init__(lvlm, image_bytes, kv_bytes)
        vision = widen(lvlm.model.model.visual)
        self.decoder = FixedStack(self.stack)
        # oneDNN's products of fp32 copies have other bits than torch's own.
        self._onednn = any(part.widens and part.packs for part in (*vision, *self.decoder.layers[0].products))
        self._logit_rows = 0  # of one product; found with the first logits, on the machine itself
        self.prefix_budget //= 2  # one half for a window's shared prefixes, one for those of earlier calls
        self._held: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # (2·layers, H, n, D) of a piece behind others
        self._held_tokens = 0

    def describe(self) -> str:
        """What rounds: the machine, and how passes are cut."""
        machine = torch.backends.cpu.get_cpu_capability()
        if self.device.type == "cuda":
            machine = torch.cuda.get_device_name(self.device)
        blocks = f", attention in blocks of {BLOCK}" if self.decoder.blocks else ""
        tiles = f"tiles of {self.decoder.prompt_tiles.base} and {self.decoder.small_tiles.base}"
        library = ", fp32 by oneDNN" if self._onednn else ""
        return f"{machine}, {tiles}, version 1{blocks}{library}"

    @torch.inference_mode()
    def run(
        self,
        plan: Plan,
        leaves: Sequence[Leaf],
        asked: Sequence[Sequence[tuple[str, bool]]],
        settings: GenerationSettings | None,
    ) -> tuple[list[str | None], list[list[AnswerScore]]]:
        """Scores of each leaf's (answer, end) pairs, and its generated text where ``settings``."""
        for leaf in leaves:
            self._need(plan, leaf.node)
        # Whatever is held from earlier calls has the bits that it would be given here: taking it changes no reply.
        leaves = [self._shortened(leaf) for leaf in leaves]
        answers = [self._tokens(pairs) for pairs in asked]
        rows, room = _Rows(), settings.num_beams * (settings.max_new_tokens - 1) if settings else 0
        stops = [rows.add_pieces(i, leaf.pieces, leaf.start, read=True) for i, leaf in enumerate(leaves)]
        n_prompt = rows.n
        for i, some in enumerate(answers):
            for ids, wanted in some.values():
                if len(wanted) > 1:  # whole, whether its end is asked for or not: its own tokens have one value
                    rows.add_answer(i, ids, stops[i])
                    room = max(room, len(ids))
        buffers = self._buffers(leaves, max(stop for stop, _ in stops) + room)
        hidden = self._states(rows, n_prompt, buffers)  # (R, d): the prompts' last tokens, then the answers'
        # All but the last piece, the query, whose end is computed whenever it is read.
        for row, leaf in enumerate(leaves):
            self._hold(leaf.node, leaf.pieces[:-1], buffers[:, row])
        scores = self._score(hidden, answers, asked)
        if settings is None:
            return [None] * len(leaves), scores
        first = torch.cat([logits for _, logits in self._logits(hidden[: len(leaves)])])
        if not bool(torch.isfinite(first).all()):
            raise NumericError(f"{self.lvlm.name}: non-finite logits")
        return self._continue(first, stops, buffers, settings), scores

    def _tokens(self, pairs: Sequence[tuple[str, bool]]) -> dict[str, tuple[list[int], list[int]]]:
        """(token ids, those scored: with the end of the turn where it is asked for) of each distinct answer."""
        found = {}
        for answer, end in pairs:
            ids = list(self.lvlm.answer_ids(answer))
            closing = list(self.lvlm.layout.closing_ids(answer)[: int(end)])
            if answer not in found or closing:
                found[answer] = (ids, [*ids, *closing])
        return found

    def _score(
        self,
        hidden: torch.Tensor,
        answers: Sequence[dict[str, tuple[list[int], list[int]]]],
        asked: Sequence[Sequence[tuple[str, bool]]],
    ) -> list[list[AnswerScore]]:
        """Scores from the hidden states (R, d) of what was read."""
        wanted: list[list[tuple[tuple[int, str], int, int]]] = [[] for _ in hidden]  # (answer, place, token) by row
        at = len(answers)
        for i, some in enumerate(answers):
            for answer, (ids, tokens) in some.items():
                # Token 0 is read at the prompt's last row, token k at the row of the answer's token k - 1.
                sources = [i, *range(at, at + len(tokens) - 1)]
                at += len(ids) if len(tokens) > 1 else 0
                for place, (source, token) in enumerate(zip(sources, tokens, strict=True)):
                    wanted[source].append(((i, answer), place, token))
        used = [row for row, some in enumerate(wanted) if some]
        values = {(i, answer): [0.0] * len(tokens) for i, some in enumerate(answers) for answer, (_, tokens) in some.items()}  # fmt: skip  # noqa: E501
        for start, logits in self._logits(hidden[used]):
            log_probs = logits.log_softmax(-1)
            some = [(row, item) for row in range(len(logits)) for item in wanted[used[start + row]]]
            found = log_probs[[row for row, _ in some], [token for _, (_, _, token) in some]].tolist()
            for (_, (key, place, _)), value in zip(some, found, strict=True):
                values[key][place] = value
        result = []
        for i, pairs in enumerate(asked):
            counts = [len(answers[i][answer][0]) + end for answer, end in pairs]
            result.append([AnswerScore(sum(values[i, answer][:n]), n) for (answer, _), n in zip(pairs, counts, strict=True)])  # fmt: skip  # noqa: E501
        return result

    def _continue(
        self, first: torch.Tensor, stops: Sequence[tuple[int, int]], buffers: torch.Tensor, settings: GenerationSettings
    ) -> list[str]:
        """Texts that continue the prompts whose first logits are ``first`` (B, V)."""
        beams, rows = settings.num_beams, len(stops)
        ancestry = Ancestry(rows, beams, self.device)
        prompts = [torch.ones(beams, stop, dtype=torch.bool, device=self.device) for stop, _ in stops]
        starts = torch.tensor([position for _, position in stops], device=self.device)

        def next_logits(tokens: torch.Tensor, parents: torch.Tensor, step: int) -> torch.Tensor:
            sight = ancestry.grow(parents)
            segments = []
            for row, (stop, _) in enumerate(stops):
                seen = torch.cat([prompts[row], sight[row]], dim=-1) if beams > 1 else None
                segments.append(Segment(row, row * beams, beams, stop + (step - 1) * beams, beams, seen))
            positions = (starts + step - 1).repeat_interleave(beams).expand(3, -1)
            hidden = self.decoder(self.embed(tokens.flatten()), 0, positions, segments, buffers)
            self._count(tokens.numel(), self.decoder.padded(0, tokens.numel()))
            return torch.cat([logits for _, logits in self._logits(hidden)]).unflatten(0, (rows, beams))

        tokens = beam_search(first, next_logits, settings, self.end)
        return self.lvlm.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _shortened(self, leaf: Leaf) -> Leaf:
        """The leaf without the pieces at its beginning whose keys and values are held."""
        names, count = _names(leaf.node, leaf.pieces[:-1]), 0
        while count < len(names) and names[count] in self._held:
            count += 1
        if not count:
            return leaf
        (before, position), pieces = leaf.start, leaf.pieces[:count]
        node = Node(leaf.node, pieces, -1, position, before, sum(piece.length for piece in pieces))
        self._kv[node] = [self._take(names[:count])]
        return Leaf(leaf.index, node, leaf.pieces[count:], leaf.extra, leaf.n_own - node.n_own)

    def _take(self, names: Sequence[bytes]) -> torch.Tensor:
        """Keys and values that are held, one piece behind the other."""
        for name in names:
            self._held.move_to_end(name)
        return torch.cat([self._held[name] for name in names], dim=2)

    def _hold(self, node: Node | None, pieces: Sequence[Piece], own: torch.Tensor) -> None:
        """Keep the keys and values of pieces behind a node, from a row of a pass (2·layers, H, T, D)."""
        at = node.length if node else 0
        for name, piece in zip(_names(node, pieces), pieces, strict=True):
            stop = at + piece.length
            if name not in self._held and piece.length <= self.prefix_budget:
                self._held[name] = own[:, :, at:stop].to(self.dtype, copy=True)
                self._held_tokens += piece.length
            at = stop
        # Least recently used first. A chain's end may outlive its beginning; then it is found again only with that.
        while self._held_tokens > self.prefix_budget:
            self._held_tokens -= self._held.popitem(last=False)[1].shape[2]

    def _prefill(self, members: Sequence[Node]) -> None:
        """Find or compute the keys and values of nodes whose parents are there; in halves where memory runs out."""
        missing = []
        for node in members:
            names = _names(node.parent, node.pieces)
            if all(name in self._held for name in names):
                self._kv[node] = [self._take(names)]
            else:
                missing.append(node)
        if missing:
            self._compute(missing)

    def _compute(self, members: Sequence[Node]) -> None:
        try:
            rows = _Rows()
            leaves = [Leaf(-1, node.parent, node.pieces, 0, node.n_own) for node in members]
            for i, leaf in enumerate(leaves):
                rows.add_pieces(i, leaf.pieces, leaf.start, read=False)
            buffers = self._buffers(leaves, max(node.length for node in members))
            self._states(rows, rows.n, buffers)
            for row, node in enumerate(members):
                self._kv[node] = [buffers[:, row, :, node.n_before : node.length].to(self.dtype, copy=True)]
                self._hold(node.parent, node.pieces, buffers[:, row])
            return
        except torch.OutOfMemoryError:
            if len(members) == 1:
                raise
        torch.cuda.empty_cache()
        for half in (members[: len(members) // 2], members[len(members) // 2 :]):
            self._compute(half)

    def _states(self, rows: _Rows, n_prompt: int, buffers: torch.Tensor) -> torch.Tensor:
        """Hidden states (R, d) of what is read of rows."""
        ids = torch.from_numpy(np.concatenate(rows.ids)).to(self.device)
        positions = torch.from_numpy(np.concatenate(rows.positions, axis=1)).to(self.device)
        embeds = self._embeds(ids, rows.images)
        self._count(rows.n, self.decoder.padded(n_prompt, rows.n))
        return self.decoder(embeds, n_prompt, positions, rows.segments, buffers)

    def _buffers(self, leaves: Sequence[Leaf], length: int) -> torch.Tensor:
        """Room (2·layers, B, H, T, D) for keys and values, with those of the leaves' prefixes in place."""
        shape = (2 * len(self.layer_devices), len(leaves), self.heads, -(-length // _ALIGNED) * _ALIGNED, self.head_dim)
        size, flat = int(np.prod(shape)), self._scratch.get(self.device)
        if flat is None or flat.numel() < size:
            flat = self._scratch[self.device] = torch.empty(size, dtype=self.decoder.kv_dtype, device=self.device)
        buffers = flat[:size].view(shape)
        for row, leaf in enumerate(leaves):
            at = 0
            for (part,) in self.path_kv(leaf.node):
                buffers[:, row, :, at : at + part.shape[2]] = part
                at += part.shape[2]
        return buffers

    def _logits(self, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, logits (n, V) in fp32) of hidden states (N, d), some rows at a time."""
        if not self._logit_rows:
            self._logit_rows = _LOGIT_TILE
            noise = torch.randn(_LOGIT_TILE, hidden.shape[1], generator=torch.Generator().manual_seed(0))
            noise = noise.to(hidden.device, hidden.dtype)
            # If a row's bits depend on its place in the product, rows are multiplied one at a time.
            if not torch.equal(self._product(noise.roll(1, 0)), self._product(noise).roll(1, 0)):
                self._logit_rows = 1
        step = self._logit_rows * _LOGIT_TILES
        for start in range(0, hidden.shape[0], step):
            yield start, self._product(hidden[start : start + step])

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) in fp32 from products of a fixed number of rows."""
        weight, count, size = self.model.lm_head.weight, len(hidden), self._logit_rows
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, -count % size))
        if hidden.is_cuda:
            found = [torch.mm(block, weight.T, out_dtype=torch.float32) for block in hidden.split(size)]
            return torch.cat(found)[:count]
        out = torch.empty(len(hidden), len(weight))
        wide = hidden.float()
        for start in range(0, len(weight), _WIDE_ROWS):
            part = weight[start : start + _WIDE_ROWS].float().T
            for first in range(0, len(hidden), size):
                out[first : first + size, start : start + _WIDE_ROWS] = wide[first : first + size] @ part
        return out[:count]


def _names(node: Node | None, pieces: Sequence[Piece]) -> list[bytes]:
    """A name for each piece and all that stands before it: the pieces of ``node``'s path, then the earlier ones."""
    path: list[Piece] = []
    while node is not None:
        path[:0] = node.pieces
        node = node.parent
    names, name = [], b""
    for piece in (*path, *pieces):
        name = hashlib.sha256(name + repr(piece.key).encode()).digest()  # a chain: keys and values see all before them
        names.append(name)
    return names[len(path) :]
