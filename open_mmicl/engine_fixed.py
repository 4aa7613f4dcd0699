"""Answers in 16 bit that depend on nothing but the prompt.

In 16 bit the rounding of a pass decides answers, and it depends on the shapes of the pass's matrix products: prompts
computed beside others, in another order or behind a prefix that happened to be held came out differently. Here the
shape of every pass is a function of the prompt (and of the device and TOKEN_BUDGET), whoever else is in it:

* A prompt is a chain of pieces (header, demonstrations, query). Each is computed behind the keys and values of those
  before it. Whether a beginning is shared or still held changes what is computed, not its bits.
* A long piece is alone in its pass, unpadded. Short ones, beams and answers are padded to one of a few widths and come
  a fixed number of rows to a pass; what is missing is filled with copies. That a row's place does not matter in a pass
  of such a shape is tried once, with equal rows; where it does, rows of that shape are computed alone.
* Logits are computed in fp32, in blocks of a fixed number of rows. Of equal ones the lowest token id is taken.

Legend: as in :mod:`open_mmicl.engine_fast`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from open_mmicl.engine_fast import Batch, FastRunner
from open_mmicl.errors import NumericError
from open_mmicl.interface.base import AnswerScore, GenerationSettings
from open_mmicl.interface.qwen_vl import Piece, QwenVL
from open_mmicl.prefix_tree import Leaf, Node, Plan, chained, plan_chains

_PASS_TOKENS = {"cpu": 256, "cuda": 2048}  # from here on a pass gains nothing from further rows
_MOST_ROWS = 16
_LOGIT_BLOCK = 16  # rows of logits in one product
_LOGIT_BLOCKS = 16  # of them held at once
_WIDE_ROWS = 4096  # vocabulary rows widened to fp32 at a time


class Shape(NamedTuple):
    """Rows of a pass, new tokens of a row, tokens of its prefix: what each row is padded to."""

    rows: int
    width: int
    prefix: int


class FixedRunner(FastRunner):
    """A :class:`FastRunner` whose replies do not depend on the prompts beside them."""

    fixed = True

    def __init__(self, lvlm: QwenVL, image_bytes: int, kv_bytes: int, token_budget: int):
        super().__init__(lvlm, image_bytes, kv_bytes)
        self.token_budget = token_budget
        self.pass_tokens = min(token_budget, _PASS_TOKENS.get(self.device.type, _PASS_TOKENS["cuda"]))
        self._place_matters: dict[Shape, bool] = {}
        self._logit_rows = 0

    def describe(self) -> str:
        """What decides the shapes of passes, and the machine that rounds."""
        machine = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
        if self.device.type == "cuda":
            machine = torch.cuda.get_device_name(self.device)
        return f"{self.device.type} {machine}, {self.token_budget} tokens, passes 1"

    def plan(self, prompts: Sequence[list[Piece]], extra: Sequence[int], token_budget: int, grows: bool) -> Plan:
        """Chunks of leaves; see :func:`plan_chains`. Every prompt may grow here."""
        rows = [(i, pieces, more) for i, (pieces, more) in enumerate(zip(prompts, extra, strict=True))]
        return plan_chains(rows, token_budget)

    def shape(self, own: int, before: int, padded: bool = True) -> Shape:
        """The shape of the pass that computes ``own`` tokens behind ``before`` others.

        ``padded``: rows of fewer tokens may be in it.
        """
        alone = Shape(1, own, before)
        if 2 * own > self.pass_tokens or self.stack is None:
            return alone
        width, prefix = _up(own, 8 if own <= 64 else 32) if padded else own, _prefix_width(before)
        rows = min(_MOST_ROWS, self.pass_tokens // width, self.token_budget // (width + prefix))
        if rows < 2:
            return alone
        shape = Shape(rows, width, prefix)
        if shape not in self._place_matters:
            self._place_matters[shape] = self._try(shape)
        return alone if self._place_matters[shape] else shape

    @torch.inference_mode()
    def run(
        self,
        plan: Plan,
        leaves: Sequence[Leaf],
        asked: Sequence[Sequence[tuple[str, bool]]],
        settings: GenerationSettings | None,
    ) -> tuple[list[str | None], list[list[AnswerScore]]]:
        """Scores of each leaf's (answer, end) pairs, and its generated text where ``settings``."""
        answers = [list(dict.fromkeys(pairs)) for pairs in asked]
        ends = [chained(leaf.node, leaf.pieces[0], b"leaf %d" % i) for i, leaf in enumerate(leaves)]
        texts: list[str | None] = [None] * len(leaves)
        try:
            last = self._chains(ends)  # (n, d)
            first, values = self._first(last, answers, settings is not None)
            self._further(ends, answers, values)
            if settings is not None:
                for shape, some in self._passes([(settings.num_beams, end.length) for end in ends], padded=False):
                    found = self._continue([ends[i] for i in some], first[some], shape, settings)
                    for i, text in zip(some, found, strict=True):
                        texts[i] = text
        finally:
            for end in ends:
                if end.name in self._kv:
                    self._held -= self._kv.pop(end.name)[0].shape[2]
        self.forget()
        scores = [
            [AnswerScore(sum(values[i, pair]), len(values[i, pair])) for pair in pairs] for i, pairs in enumerate(asked)
        ]
        return texts, scores

    def _chains(self, ends: Sequence[Node]) -> torch.Tensor:
        """Compute what is not held of the chains that lead to ``ends``; hidden states (n, d) of their last tokens."""
        levels: dict[int, dict[bytes, Node]] = {}
        for end in ends:
            node = end.parent
            while node is not None:
                if node.name in self._kv:
                    self._kv.move_to_end(node.name)
                else:
                    levels.setdefault(node.level, {})[node.name] = node
                node = node.parent
        # All images in one call: small ones come several to a pass of the vision tower.
        missing = [node for some in levels.values() for node in some.values()]
        self.features.get(dict(image for node in (*missing, *ends) for piece in node.pieces for image in piece.images))
        for level in sorted(levels):
            nodes = list(levels[level].values())
            for shape, some in self._passes([(node.n_own, node.n_before) for node in nodes]):
                self._piece([nodes[i] for i in some], shape, read=False)
        last: list[torch.Tensor] = [torch.empty(0)] * len(ends)
        for shape, some in self._passes([(end.n_own, end.n_before) for end in ends]):
            for i, row in zip(some, self._piece([ends[i] for i in some], shape, read=True), strict=False):
                last[i] = row
        return torch.stack(last)

    def _piece(self, nodes: Sequence[Node], shape: Shape, read: bool) -> torch.Tensor:
        """One pass over nodes whose parents are held; keeps their keys and values.

        Returns: hidden states (rows, d) of their last tokens where ``read``.
        """
        filled = _filled(nodes, shape.rows)
        rows = [Leaf(-1, node.parent, node.pieces, 0, node.n_own) for node in filled]
        batch = Batch(self, rows, [[]] * len(rows), keep=True, shape=shape[1:])
        batch.n_tokens = sum(node.n_own for node in nodes)
        columns = [[node.n_own - 1] if read else [] for node in filled]
        hidden = self._forward(batch, torch.tensor(columns, dtype=torch.long, device=self.device).view(len(rows), -1))
        for row, node in enumerate(nodes):
            start = batch.prefix_width
            self._keep(node, [b[:, row, :, start : start + node.n_own].clone() for b in batch.buffers])
        return hidden[:, 0] if read else hidden

    def _first(
        self, last: torch.Tensor, answers: Sequence[list[tuple[str, bool]]], generates: bool
    ) -> tuple[torch.Tensor, dict[tuple[int, tuple[str, bool]], list[float]]]:
        """Logits (n, V) of the first new token (none where nothing is generated), and each answer's first token."""
        logits, values = [], {}
        for start, some in self._logit_blocks(last):
            if not bool(torch.isfinite(some).all()):
                raise NumericError(f"{self.lvlm.name}: non-finite logits")
            pairs = [(start + i, pair) for i in range(len(some)) for pair in answers[start + i]]
            if pairs:
                log_probs = some.log_softmax(-1)
                tokens = [self.lvlm.answer_ids(answer)[0] for _, (answer, _) in pairs]
                found = log_probs[[i - start for i, _ in pairs], tokens].tolist()
                values |= {key: [value] for key, value in zip(pairs, found, strict=True)}
            if generates:
                logits.append(some)
        return torch.cat(logits) if logits else last, values

    def _further(
        self,
        ends: Sequence[Node],
        answers: Sequence[list[tuple[str, bool]]],
        values: dict[tuple[int, tuple[str, bool]], list[float]],
    ) -> None:
        """Append the log-probabilities of every answer's tokens after its first to ``values``.

        The width of a row is the same with and without the end of the turn: an answer's own tokens have one value.
        """
        jobs, rows = [], []
        for i, pairs in enumerate(answers):
            for pair in pairs:
                ids = list(self.lvlm.answer_ids(pair[0]))
                wanted = [*ids, *self.lvlm.layout.closing_ids(pair[0])[: int(pair[1])]][1:]
                if wanted:
                    jobs.append((i, pair, ids, wanted))
                    rows.append((len(ids), ends[i].length))
        for shape, some in self._passes(rows):
            filled = _filled(some, shape.rows)
            leaves = [Leaf(-1, ends[jobs[j][0]], (), 0, 0) for j in filled]
            batch = Batch(self, leaves, [[jobs[j][2]] for j in filled], keep=True, shape=shape[1:])
            batch.n_tokens = sum(len(jobs[j][3]) for j in some)
            every = torch.arange(shape.width, device=self.device).expand(len(filled), -1)
            hidden = self._forward(batch, every)  # (rows, S, d)
            wanted = [(row, column, token) for row, j in enumerate(some) for column, token in enumerate(jobs[j][3])]
            picked = hidden[[row for row, _, _ in wanted], [column for _, column, _ in wanted]]
            found: list[float] = []
            for start, logits in self._logit_blocks(picked):
                tokens = [token for _, _, token in wanted[start : start + len(logits)]]
                found += logits.log_softmax(-1)[range(len(logits)), tokens].tolist()
            for (row, _, _), value in zip(wanted, found, strict=True):
                i, pair, _, _ = jobs[some[row]]
                values[i, pair].append(value)

    def _continue(
        self, ends: Sequence[Node], first: torch.Tensor, shape: Shape, settings: GenerationSettings
    ) -> list[str]:
        """Texts that continue prompts whose keys and values are held and whose first logits are ``first``."""
        filled = _filled(ends, shape.rows)
        rows = [Leaf(-1, end, (), 0, 0) for end in filled]
        room = settings.num_beams * (settings.max_new_tokens - 1)
        batch = Batch(self, rows, [[]] * len(rows), keep=True, room=room, shape=(0, shape.prefix))
        first = torch.cat([first, first[-1:].expand(len(filled) - len(ends), -1)])
        return self._decode(batch, first, settings)[: len(ends)]

    def _passes(self, sizes: Sequence[tuple[int, int]], padded: bool = True) -> Iterator[tuple[Shape, list[int]]]:
        """Members of each pass over rows of (new tokens, tokens before)."""
        groups: dict[Shape, list[int]] = {}
        for i, (own, before) in enumerate(sizes):
            groups.setdefault(self.shape(own, before, padded), []).append(i)
        for shape, members in groups.items():
            for start in range(0, len(members), shape.rows):
                yield shape, members[start : start + shape.rows]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, d) -> (…, V) in fp32."""
        rows = hidden.flatten(0, -2)
        return torch.cat([some for _, some in self._logit_blocks(rows)]).unflatten(0, hidden.shape[:-1])

    def _logit_blocks(self, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, logits (n, V) in fp32) of hidden states (N, d), some rows at a time."""
        if not self._logit_rows:
            self._logit_rows = _LOGIT_BLOCK
            same = self._product(_noise((1, hidden.shape[-1]), hidden).expand(_LOGIT_BLOCK, -1))
            self._logit_rows = _LOGIT_BLOCK if bool((same == same[:1]).all()) else 1
        step = self._logit_rows * _LOGIT_BLOCKS
        for start in range(0, hidden.shape[0], step):
            yield start, self._product(hidden[start : start + step])

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) in fp32 from products of a fixed number of rows."""
        weight, count = self.model.lm_head.weight, hidden.shape[0]
        blocks = [_filled_rows(block, self._logit_rows) for block in hidden.split(self._logit_rows)]
        if self.stack is None:  # accelerate's hooks move the tensors
            found = [self.model.lm_head(block).float() for block in blocks]
        elif hidden.is_cuda:
            found = [torch.mm(block, weight.T, out_dtype=torch.float32) for block in blocks]
        else:
            found = [torch.empty(len(block), weight.shape[0]) for block in blocks]
            wide = [block.float() for block in blocks]
            for start in range(0, weight.shape[0], _WIDE_ROWS):
                part = weight[start : start + _WIDE_ROWS].float().T
                for block, out in zip(wide, found, strict=True):
                    out[:, start : start + _WIDE_ROWS] = block @ part
        return torch.cat(found)[:count]

    def _try(self, shape: Shape) -> bool:
        """Whether equal rows of a pass of this shape come out differently in different places."""
        rows, width, prefix = shape
        one = _noise((1, width, self.embed.weight.shape[1]), self.embed.weight)
        buffers = self.buffers(rows, prefix + width)
        outer = [buffers[0][:2], buffers[0][-2:]]  # keys and values of the first and the last layer
        for part in outer:
            part.copy_(_noise((2, 1, *part.shape[2:]), part))
        mask = None
        if prefix:
            allowed = torch.ones(rows, width, prefix + width, dtype=torch.bool, device=self.device)
            allowed[:, :, prefix:].tril_()
            allowed[:, :, prefix - prefix // 3 : prefix] = False
            mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, -torch.inf)
            mask = mask[:, None]
        positions = torch.arange(prefix, prefix + width, device=self.device).expand(3, rows, -1)
        read = torch.full((rows, 1), width - 1, device=self.device)
        same = True
        for columns in (None, read):
            cache = self.cache(buffers, prefix)
            out = self.stack(one.repeat(rows, 1, 1), positions, mask, cache, columns, ends=True)
            same = same and bool((out == out[:1]).all())
        return not (same and all(bool((part == part[:, :1]).all()) for part in outer))


def _filled(items: Sequence, rows: int) -> list:
    return [*items, *[items[-1]] * (rows - len(items))]


def _filled_rows(block: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([block, block[-1:].expand(rows - len(block), -1)]) if len(block) < rows else block


def _noise(size: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """The same random numbers whenever they are asked for."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return values.to(like.device, like.dtype)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _prefix_width(before: int) -> int:
    """A power of two, from 512 on a multiple of 256: few widths, so that short rows find others of their shape."""
    if before > 512:
        return _up(before, 256)
    return 1 << (before - 1).bit_length() if before else 0
