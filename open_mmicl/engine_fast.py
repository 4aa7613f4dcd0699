"""Runs the plan of :mod:`open_mmicl.prefix_tree` on a Qwen-VL model.

Legend: B rows, S new tokens of a row (right-padded), P tokens of its prefix (right-padded), T = P + S (+ generated),
L layers, H key/value heads, D head size, d hidden size, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from open_mmicl.beam import Ancestry, beam_search
from open_mmicl.decoder import DecoderStack, Packing, PatchProjection, columns
from open_mmicl.errors import NumericError
from open_mmicl.interface.base import AnswerScore, GenerationSettings, Work
from open_mmicl.interface.features import FeatureCache
from open_mmicl.interface.qwen_vl import Piece, QwenVL
from open_mmicl.prefix_tree import Leaf, Node, Plan, plan_window

_PACKED_FROM = 1.1  # padded / real tokens of a pass from which packing costs less than padding
_LOGIT_ROWS = 512  # rows of full-vocabulary logits held at once


class _SlotLayer(DynamicLayer):
    """A cache layer that writes into a preallocated buffer instead of concatenating."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int):
        super().__init__()
        self.buffer, self.filled = (keys, values), filled
        self.keys, self.values = keys[:, :, :filled], values[:, :, :filled]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        # Concatenating, as transformers' layer does, would copy every row's prefix at every step of a generation.
        for buffer, new in zip(self.buffer, (key_states, value_states), strict=True):
            buffer[:, :, start : self.filled] = new
        self.keys, self.values = self.buffer[0][:, :, : self.filled], self.buffer[1][:, :, : self.filled]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.filled


class FastRunner:
    """Answers and scores prompts with everything shared that can be."""

    fixed = False  # whether a reply depends on its prompt alone, to the last bit

    def __init__(self, lvlm: QwenVL, image_bytes: int, kv_bytes: int):
        self.lvlm, self.work = lvlm, Work()
        self.features = FeatureCache(lvlm.encode_images, image_bytes, self.work)
        self.model = lvlm.model
        self.text = lvlm.language_model
        patches = lvlm.model.model.visual.patch_embed
        if isinstance(patches.proj, torch.nn.Conv3d) and patches.proj.kernel_size == patches.proj.stride:
            patches.proj = PatchProjection(patches.proj)
        self.embed = self.model.get_input_embeddings()
        config = self.model.config.get_text_config()
        self.heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.device, self.dtype = self.embed.weight.device, self.embed.weight.dtype
        self.layer_devices = [next(layer.parameters()).device for layer in self.text.layers]
        # Tokens whose keys and values (2 of each, in every layer) fit into the memory allowed for shared prefixes.
        self.prefix_budget = kv_bytes // (
            2 * len(self.layer_devices) * self.heads * self.head_dim * self.dtype.itemsize
        )
        # accelerate moves tensors between devices at whole layers, so a spread model keeps transformers' own stack
        self.stack = None if lvlm.config.device_map else DecoderStack(self.text)
        self.end = torch.tensor(lvlm.end_ids, device=self.device)
        self.filler = lvlm.end_ids[0]
        self._kv: dict[Node, list[torch.Tensor]] = {}
        self._devices = list(dict.fromkeys(self.layer_devices))
        self._scratch: dict[torch.device, torch.Tensor] = {}

    def plan(self, prompts: Sequence[list[Piece]], extra: Sequence[int], token_budget: int) -> Plan:
        """Plan a window of prompts given as pieces; ``extra``: tokens that follow each prompt."""
        rows = [(i, pieces, more) for i, (pieces, more) in enumerate(zip(prompts, extra, strict=True))]
        return plan_window(rows, token_budget, self.prefix_budget)

    def forget(self) -> None:
        """Drop the shared prefixes of a finished window."""
        self._kv.clear()

    @torch.inference_mode()
    def run(
        self,
        plan: Plan,
        leaves: Sequence[Leaf],
        asked: Sequence[Sequence[tuple[str, bool]]],
        settings: GenerationSettings | None,
    ) -> tuple[list[str | None], list[list[AnswerScore]]]:
        """One pass over leaves: scores of each one's (answer, end) pairs, and its generated text where ``settings``.

        A prompt's answers are branches behind it that do not see one another; so are the beams of its generation.
        """
        branches = [self._branches(pairs) for pairs in asked]
        tokens = [[ids[:-1] for ids in some.values()] for some in branches]
        room = settings.num_beams * (settings.max_new_tokens - 1) if settings else 0
        for leaf in leaves:
            self._need(plan, leaf.node)
        batch = Batch(self, leaves, tokens, keep=settings is not None, room=room)
        # A token's probability is read where the one before it stands, so an answer's first token is read at the
        # prompt's last, and an answer's own last token need not be computed at all (``ids[:-1]`` above).
        # Read per row: the prompt's last token, then every token of its answers but their last ones.
        behind = [sum(map(len, some)) for some in tokens]
        width = 1 + max(behind)
        reads = [
            [own - 1, *range(own, own + more), *[0] * (width - 1 - more)]
            for own, more in zip(batch.own, behind, strict=True)
        ]
        hidden = self._forward(batch, torch.tensor(reads, device=self.device))  # (B, R, d)
        scores = self._scores(hidden, branches, asked)
        if settings is None:
            return [None] * len(leaves), scores
        return self._generate(batch, hidden[:, 0], settings), scores

    def _branches(self, pairs: Sequence[tuple[str, bool]]) -> dict[str, list[int]]:
        """Token ids of each distinct answer, with the end of the turn where it is asked for anywhere."""
        ends: dict[str, bool] = {}
        for answer, end in pairs:
            ends[answer] = end or ends.get(answer, False)
        closing = self.lvlm.layout.closing_ids
        return {answer: [*self.lvlm.answer_ids(answer), *closing(answer)[: int(end)]] for answer, end in ends.items()}

    def _scores(
        self,
        hidden: torch.Tensor,
        branches: Sequence[dict[str, list[int]]],
        asked: Sequence[Sequence[tuple[str, bool]]],
    ) -> list[list[AnswerScore]]:
        """Scores from the hidden states (B, R, d) of the columns read."""
        sources, wanted = [], []
        for row, some in enumerate(branches):
            first = row * hidden.shape[1]
            column = first + 1
            for ids in some.values():
                sources += [first, *range(column, column + len(ids) - 1)]
                wanted += ids
                column += len(ids) - 1
        if not wanted:
            return [[] for _ in asked]
        # The first tokens of all answers are read in one place: one row of logits for each place, not for each token.
        unique = {source: i for i, source in enumerate(dict.fromkeys(sources))}
        picked = hidden.flatten(0, 1)[torch.tensor(list(unique), device=hidden.device)]
        log_probs = self._token_log_probs(picked, [unique[source] for source in sources], wanted)
        found, at = [], 0
        for some, pairs in zip(branches, asked, strict=True):
            values = {}
            for answer, ids in some.items():
                values[answer] = log_probs[at : at + len(ids)]
                at += len(ids)
            # Asked with and without its end, an answer is computed once: the score without it is the shorter sum.
            lengths = [len(self.lvlm.answer_ids(answer)) + end for answer, end in pairs]
            found.append(
                [AnswerScore(sum(values[answer][:n]), n) for (answer, _), n in zip(pairs, lengths, strict=True)]
            )
        return found

    def _generate(self, batch: "Batch", last: torch.Tensor, settings: GenerationSettings) -> list[str]:
        """Texts that continue the prompts whose last hidden states are ``last`` (B, d).

        Beams are branches of one tree behind the prompt: each step adds one token per beam to a row's keys and values,
        and a beam's token sees its own ancestors. Nothing is copied or reordered.
        """
        first = self.model.lm_head(last)  # (B, V)
        if not bool(torch.isfinite(first).all()):
            raise NumericError(f"{self.lvlm.name}: non-finite logits")
        rows, beams = last.shape[0], settings.num_beams
        next_position = torch.tensor(batch.next_position, device=self.device)  # (B,)
        prompt_mask = batch.seen()  # (B, P + S)
        ancestry = Ancestry(rows, beams, self.device)

        def next_logits(tokens: torch.Tensor, parents: torch.Tensor, step: int) -> torch.Tensor:
            sight = ancestry.grow(parents)
            allowed = torch.cat([prompt_mask[:, None].expand(-1, beams, -1), sight], dim=-1)  # (B, beams, T)
            mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, -torch.inf)
            positions = (next_position + step - 1)[None, :, None].expand(3, -1, beams)
            out = self._language(self.embed(tokens), positions, mask[:, None], batch.cache)
            self._count(tokens.numel(), tokens.numel())
            return self.model.lm_head(out)

        tokens = beam_search(first, next_logits, settings, self.end)
        return self.lvlm.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _token_log_probs(self, hidden: torch.Tensor, rows: list[int], wanted: list[int]) -> list[float]:
        """Log-probability of token ``wanted[i]`` given hidden state ``hidden[rows[i]]``."""
        of_row: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            of_row.setdefault(row, []).append(i)
        values = [0.0] * len(rows)
        for start in range(0, hidden.shape[0], _LOGIT_ROWS):
            log_probs = self.model.lm_head(hidden[start : start + _LOGIT_ROWS]).float().log_softmax(-1)
            asked = [i for row in range(start, start + log_probs.shape[0]) for i in of_row[row]]
            picked = log_probs[[rows[i] - start for i in asked], [wanted[i] for i in asked]].tolist()
            for i, value in zip(asked, picked, strict=True):
                values[i] = value
        return values

    def _need(self, plan: Plan, node: Node | None) -> None:
        """Compute the groups of a node's path that are not held yet, whole groups in the plan's order."""
        path = []
        while node is not None and node not in self._kv:
            path.append(node)
            node = node.parent
        for node in reversed(path):
            if node in self._kv:  # computed on the way, with the group of another
                continue
            members = plan.groups[node.group]
            for member in members:
                self._need(plan, member.parent)
            self._prefill(members)

    def _prefill(self, members: Sequence[Node]) -> None:
        """Compute and keep the keys and values of nodes whose parents are held; in halves where memory runs out."""
        try:
            # A node is computed as a prompt without answers, of which nothing is read but its keys and values.
            rows = [Leaf(-1, n.parent, n.pieces, 0, n.n_own) for n in members]
            batch = Batch(self, rows, [[]] * len(members), keep=True)
            self._forward(batch, torch.empty(len(members), 0, dtype=torch.long, device=self.device))
            width = batch.prefix_width
            for row, member in enumerate(members):
                # Cloned: the buffers are scratch room that the next pass writes over.
                self._kv[member] = [b[:, row, :, width : width + member.n_own].clone() for b in batch.buffers]
            return
        except torch.OutOfMemoryError:
            if len(members) == 1:
                raise
        torch.cuda.empty_cache()  # out here: within the handler the exception still holds the tensors of the pass
        for half in (members[: len(members) // 2], members[len(members) // 2 :]):
            self._prefill(half)

    def _embeds(self, ids: torch.Tensor, images: Sequence[tuple[bytes, str]]) -> torch.Tensor:
        """Embeddings (…, d) of token ids (…); those of image tokens are the images' features, in their order."""
        embeds = self.embed(ids)
        if not images:
            return embeds
        found = self.features.get(dict(images))
        features = torch.cat([found[digest] for digest, _ in images]).to(embeds.dtype)  # (tokens, d)
        return embeds.masked_scatter((ids == self.lvlm.layout.image_token_id)[..., None], features)

    def _forward(self, batch: "Batch", read: torch.Tensor) -> torch.Tensor:
        embeds = self._embeds(batch.ids, batch.images)
        self._count(batch.n_tokens, batch.n_tokens if batch.packing else batch.ids.numel())
        return self._language(embeds, batch.positions, batch.mask, batch.cache, read, batch.packing)

    def _language(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        read: torch.Tensor | None = None,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """Decoder stack: (B, S, d) -> hidden states (B, S, d), or (B, R, d) of the columns ``read`` (B, R)."""
        if self.stack is not None:
            return self.stack(embeds, positions, mask, cache, read, packing)
        out = self.text(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return out if read is None else columns(out, read)

    def _count(self, tokens: int, padded: int) -> None:
        self.work.passes += 1
        self.work.tokens += tokens
        self.work.padded_tokens += padded

    def buffers(self, rows: int, length: int) -> list[torch.Tensor]:
        """Key/value room (2·layers, B, H, T, D) on each device that holds layers; reused from pass to pass."""
        found = []
        for device in self._devices:
            shape = (2 * self.layer_devices.count(device), rows, self.heads, length, self.head_dim)
            size = int(np.prod(shape))
            flat = self._scratch.get(device)
            if flat is None or flat.numel() < size:
                flat = self._scratch[device] = torch.empty(size, dtype=self.dtype, device=device)
            found.append(flat[:size].view(shape))
        return found

    def cache(self, buffers: list[torch.Tensor], filled: int) -> Cache:
        """A transformers cache whose layers write into ``buffers`` behind ``filled`` tokens."""
        used, layers = dict.fromkeys(self._devices, 0), []
        for device in self.layer_devices:
            buffer, i = buffers[self._devices.index(device)], used[device]
            layers.append(_SlotLayer(buffer[2 * i], buffer[2 * i + 1], filled))
            used[device] += 1
        return Cache(layers=layers)

    def path_kv(self, node: Node | None) -> list[list[torch.Tensor]]:
        """Key/value parts along a node's path, root first; each (2·layers, H, n_own, D) per device."""
        parts = []
        while node is not None:
            parts.append(self._kv[node])
            node = node.parent
        return parts[::-1]


class Batch:
    """One forward pass: padded ids, 3-D positions, tree mask, prefix keys and values.

    Rows are leaf tokens, then ``branches`` (each sees the leaf and itself). ``keep``: the rows' keys and values are
    read afterwards; ``room``: tokens that will be added behind them.
    """

    def __init__(
        self,
        runner: FastRunner,
        leaves: Sequence[Leaf],
        branches: Sequence[Sequence[list[int]]],
        keep: bool = False,
        room: int = 0,
    ):
        device = runner.device
        prefix = [leaf.start[0] for leaf in leaves]
        lengths = [leaf.n_own + sum(map(len, some)) for leaf, some in zip(leaves, branches, strict=True)]
        self.prefix_width, width = max(prefix), max(lengths)
        ids = np.full((len(leaves), width), runner.filler, dtype=np.int64)
        positions = np.zeros((3, len(leaves), width), dtype=np.int64)
        self.images: list[tuple[bytes, str]] = []
        self.own, self.next_position = [leaf.n_own for leaf in leaves], []
        forks = []  # (row, start, stop) of branches that must not see each other
        for row, (leaf, some) in enumerate(zip(leaves, branches, strict=True)):
            at, position = 0, leaf.start[1]
            for piece in leaf.pieces:
                at, position = self._put(ids, positions, row, at, position, piece)
            self.next_position.append(position)
            filled = [branch for branch in some if branch]
            for branch in filled:
                stop = at + len(branch)
                ids[row, at:stop] = branch
                positions[:, row, at:stop] = position + np.arange(len(branch))  # as if no other branch were there
                if len(filled) > 1:
                    forks.append((row, at, stop))
                at = stop
        self.n_tokens = sum(lengths)
        padded = len(leaves) * width
        self.packing = Packing.of(lengths, width, device) if padded > _PACKED_FROM * self.n_tokens else None
        self.ids, self.positions = torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device)
        self._prefix = torch.tensor(prefix, device=device)
        self._own = torch.tensor(self.own, device=device)
        self.mask = self._mask(runner, prefix, lengths, forks)
        self.buffers, self.cache = [], None
        if keep or self.prefix_width:
            self.buffers = runner.buffers(len(leaves), self.prefix_width + width + room)
            self._fill_prefix(runner, leaves)
            self.cache = runner.cache(self.buffers, self.prefix_width)

    def seen(self) -> torch.Tensor:
        """(B, P + S) bool: real prompt tokens among the cached ones."""
        before = torch.arange(self.prefix_width, device=self._prefix.device) < self._prefix[:, None]
        own = torch.arange(self.ids.shape[1], device=self._prefix.device) < self._own[:, None]
        return torch.cat([before, own], dim=1)

    def _put(
        self, ids: np.ndarray, positions: np.ndarray, row: int, at: int, position: int, piece: Piece
    ) -> tuple[int, int]:
        stop = at + piece.length
        ids[row, at:stop] = piece.ids
        positions[:, row, at:stop] = piece.positions + position
        self.images += piece.images
        return stop, position + piece.advance

    def _mask(
        self, runner: FastRunner, prefix: list[int], lengths: list[int], forks: list[tuple[int, int, int]]
    ) -> torch.Tensor | None:
        """Additive mask (B or 1, 1, S, P + S); None where plain causal attention over right-padded rows is enough."""
        width, device = self.ids.shape[1], self.ids.device
        if not self.prefix_width and not forks:
            return None
        uneven = min(prefix) < self.prefix_width
        rows = len(prefix) if forks or uneven else 1
        allowed = torch.ones(rows, width, self.prefix_width + width, dtype=torch.bool, device=device)
        allowed[:, :, self.prefix_width :].tril_()
        if uneven:
            before = torch.arange(self.prefix_width, device=device) < self._prefix[:, None]
            allowed[:, :, : self.prefix_width] &= before[:, None]
        # Causal order lets a branch see those before it in its row: hidden is what lies between prompt and branch.
        for row, start, stop in forks:
            first = self.own[row]
            allowed[row, start:stop, self.prefix_width + first : self.prefix_width + start] = False
        return torch.zeros(allowed.shape, dtype=runner.dtype, device=device).masked_fill_(~allowed, -torch.inf)[:, None]

    def _fill_prefix(self, runner: FastRunner, leaves: Sequence[Leaf]) -> None:
        if not self.prefix_width:
            return
        for row, leaf in enumerate(leaves):
            at = 0
            for part in runner.path_kv(leaf.node):
                stop = at + part[0].shape[2]
                for buffer, own in zip(self.buffers, part, strict=True):
                    buffer[:, row, :, at:stop] = own
                at = stop
            # The mask hides these places, but scratch room may hold NaN, and 0 x NaN in the weighted sum is NaN.
            for buffer in self.buffers:
                buffer[:, row, :, at : self.prefix_width] = 0
