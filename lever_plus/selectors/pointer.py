"""The pointer selector: a policy over ordered picks from a query's candidate pool.

Architecture (the existing project's files load into it): bias-free projection d -> h shared by query
and candidates; per layer single-head cross-attention of the query over the pool with residual and LayerNorm;
bias-free query and candidate projections; L2 normalisation; dot product / 0.1; picked positions masked.
Variants are fields of :class:`SelectorConfig`.

Shape legend: B queries, M pointers per query, S picks, K pool positions, d embedding width, h hidden width.
A pointer is a row of distinct pool positions in pick order, -1 after its end.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lever_plus import io
from lever_plus.selectors.parts import (
    SCORERS,
    CrossAttention,
    Diversity,
    GateUpdate,
    GruUpdate,
    StopScorer,
    SumUpdate,
    Towers,
)
from open_mmicl.errors import DamagedInputError, UsageError

FORMAT = "lever_plus.selector/1"
ENCODERS = ("shared", "towers")
# Scale of a tied selector's first projections. No cosine depends on it, but the smaller the weights, the further a step
# of Adam, whose size is the learning rate whatever the gradient's, turns what they project.
TIED_GAIN = 1 / math.sqrt(3)


@dataclass(frozen=True)
class SelectorConfig:
    """The selector's shape. ``num_layers=0`` is v1; ``attn_bias`` is for files of the existing project.

    ``tied``: query and candidate projection are one matrix, so the learned similarity is symmetric up to the
    attention. Files list it under both names; files of the existing project are never tied.

    ``encoder``: ``shared`` projects query and candidates by one input projection (item embeddings of one table);
    ``towers`` gives each a matrix of its own (channels, of which a query has the first ``query_dim`` only) and learns
    the temperature. It starts as the cosine of the channels that both have.
    """

    input_dim: int = 512
    hidden_dim: int = 256
    num_layers: int = 1
    dropout: float = 0.0
    attn_bias: bool = False
    query_update_gate: bool = False
    gru_state: bool = False
    mmr: bool = False
    scorer: str = "dot"
    stop: bool = False
    tied: bool = False
    encoder: str = "shared"
    query_dim: int = 0
    sum_state: bool = False

    @property
    def stateful(self) -> bool:
        """Whether the score of the next pick depends on the earlier ones beyond their being taken."""
        return self.query_update_gate or self.gru_state or self.sum_state or self.mmr

    def __post_init__(self) -> None:
        if self.query_update_gate + self.gru_state + self.sum_state > 1:
            raise UsageError("QUERY_UPDATE_GATE, GRU_STATE and SUM_STATE are updates of the same state: choose one")
        if self.encoder not in ENCODERS:
            raise UsageError(f"unknown encoder {self.encoder!r}; there are: {', '.join(ENCODERS)}")
        if self.encoder == "towers" and not 0 < self.query_dim <= self.input_dim:
            raise UsageError(f"a query of width {self.query_dim} beside candidates of width {self.input_dim}")
        if self.scorer not in SCORERS:
            raise UsageError(f"unknown scorer {self.scorer!r}; there are: {', '.join(SCORERS)}")


@dataclass
class Encoded:
    """A batch of queries and pools, encoded once and shared by all pointers."""

    query: Tensor  # (B, h) normalised state before the first pick
    candidates: Tensor  # (B, K, h) normalised
    absent: Tensor | None  # bool (B, K), true where the pool has no candidate


class PointerSelector(nn.Module):
    """The policy pi(pointer | query): product over picks of the softmax over the positions not yet picked."""

    def __init__(self, config: SelectorConfig, init: str = "similarity") -> None:
        """``init``: ``similarity`` starts as the cosine of randomly projected embeddings, ``random`` does not."""
        super().__init__()
        self.config = config
        h = config.hidden_dim
        self.towers = Towers(config.query_dim, config.input_dim, h) if config.encoder == "towers" else None
        if self.towers is None:
            # An embedding as wide as the hidden state is not projected (as in the existing project's files).
            self.input_proj = nn.Linear(config.input_dim, h, bias=False) if config.input_dim != h else nn.Identity()
        self.cross_attn_layers = nn.ModuleList(
            CrossAttention(h, config.dropout, config.attn_bias) for _ in range(config.num_layers)
        )
        self.attn_norms = nn.ModuleList(nn.LayerNorm(h) for _ in range(config.num_layers))
        if self.towers is None:
            self.query_proj = nn.Linear(h, h, bias=False)
            self.cand_proj = self.query_proj if config.tied else nn.Linear(h, h, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.scorer = SCORERS[config.scorer](h)
        if config.query_update_gate:
            self.query_update_gate = GateUpdate(h)
        if config.gru_state:
            self.query_update_gru = GruUpdate(h)
        if config.sum_state:
            self.query_update_sum = SumUpdate(h)
        if config.mmr:
            self.diversity = Diversity()
        if config.stop:
            self.stop = StopScorer(h)
        self._initialise(init)

    @torch.no_grad()
    def _initialise(self, init: str) -> None:
        if init == "random":
            return
        if self.towers is not None:
            self.towers.start_as_cosine()
            for layer in self.cross_attn_layers:
                nn.init.zeros_(layer.out_proj.weight)
            return
        # Untied selectors (v2) keep the first weights that their recorded measurements were made with.
        gain, attention = (TIED_GAIN, 0.0) if self.config.tied else (1.0, 0.1)
        if isinstance(self.input_proj, nn.Linear):
            nn.init.orthogonal_(self.input_proj.weight, gain)
        # Equal projections: the untrained score is the embeddings' cosine, up to the random projection.
        nn.init.orthogonal_(self.query_proj.weight, gain)
        self.cand_proj.weight.copy_(self.query_proj.weight)
        for layer in self.cross_attn_layers:
            layer.out_proj.weight.mul_(attention)

    def set_dropout(self, probability: float) -> None:
        """Set every dropout; 0 wherever a ratio or a KL is computed."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability

    # ---- encoding ---------------------------------------------------------------------------------------------

    @property
    def query_dim(self) -> int:
        """Width of a query's embedding."""
        return self.config.query_dim or self.config.input_dim

    def encode(self, query_emb: Tensor, cand_emb: Tensor, pool_mask: Tensor | None = None) -> Encoded:
        """Encode queries (B, d_q) and their pools (B, K, d); ``pool_mask`` bool (B, K) is true where there is one."""
        projected, candidates = self.encode_items(cand_emb)
        return self._attend(self._project_query(query_emb), projected, candidates, pool_mask)

    def encode_items(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates (…, d) -> (projected (…, h), candidate vectors (…, h)): what no query touches."""
        embeddings = embeddings.to(self._dtype)
        if self.towers is not None:
            projected = self.towers.candidate(embeddings)
            return projected, functional.normalize(self.dropout(projected), dim=-1)
        projected = self.input_proj(embeddings)
        return projected, functional.normalize(self.dropout(self.cand_proj(projected)), dim=-1)

    def encode_rows(
        self, items: tuple[Tensor, Tensor], queries: Tensor, pool_rows: Tensor, pool_mask: Tensor | None = None
    ) -> Encoded:
        """:meth:`encode` for queries (B, d_q) and pools (B, K) given as rows of :meth:`encode_items`' output."""
        projected, candidates = items
        pool = functional.embedding(pool_rows, projected) if len(self.cross_attn_layers) else projected  # (B, K, h)
        return self._attend(self._project_query(queries), pool, functional.embedding(pool_rows, candidates), pool_mask)

    @property
    def _dtype(self) -> torch.dtype:
        return (self.query_proj if self.towers is None else self.towers.candidate).weight.dtype

    def _project_query(self, queries: Tensor) -> Tensor:
        queries = queries.to(self._dtype)
        return self.input_proj(queries) if self.towers is None else self.towers.query(queries)

    def _attend(self, query: Tensor, pool: Tensor, candidates: Tensor, pool_mask: Tensor | None) -> Encoded:
        absent = None if pool_mask is None else ~pool_mask
        for attention, norm in zip(self.cross_attn_layers, self.attn_norms, strict=True):
            query = norm(query + attention(query, pool, absent))
        state = query if self.towers is not None else self.query_proj(query)
        return Encoded(functional.normalize(self.dropout(state), dim=-1), candidates, absent)

    # ---- one step ---------------------------------------------------------------------------------------------

    def _logits(self, enc: Encoded, state: Tensor, taken: Tensor, nearest: Tensor | None, step: int) -> Tensor:
        """Logits of the next pick given states (B, M, h) and taken bool (B, M, K) -> (B, M, K or K + 1 with STOP)."""
        logits = self.scorer(state, enc.candidates)  # (B, M or 1, K)
        if self.towers is not None:
            logits = self.towers.log_gain(logits)
        if nearest is not None:
            logits = self.diversity(logits, nearest)
        logits = torch.masked_fill(logits, taken, -math.inf)  # (B, M, K)
        if not self.config.stop:
            return logits
        if step == 0:  # a pointer has at least one pick
            return functional.pad(logits, (0, 1), value=-math.inf)
        return torch.cat([logits, self.stop(state).expand(-1, logits.shape[1], -1)], 2)

    def _advance(self, enc: Encoded, state: Tensor, position: Tensor, nearest: Tensor | None) -> tuple[Tensor, Any]:
        """State and highest cosines after picking ``position`` (B, M); rows at -1 keep theirs."""
        if not self.config.stateful:
            return state, nearest
        index = position.clamp(min=0).unsqueeze(2).expand(-1, -1, enc.candidates.shape[2])
        picked = enc.candidates.gather(1, index)  # (B, M, h)
        if self.config.mmr:
            cosine = torch.bmm(picked, enc.candidates.transpose(1, 2))  # (B, M, K)
            nearest = cosine if nearest is None else torch.maximum(nearest, cosine)
        if self.config.query_update_gate:
            return self.query_update_gate(state, picked), nearest
        if self.config.gru_state:
            return self.query_update_gru(state, picked), nearest
        if self.config.sum_state:
            return self.query_update_sum(state, picked), nearest
        return state, nearest

    def _take(self, enc: Encoded, taken: Tensor, position: Tensor) -> Tensor:
        real = position.unsqueeze(2) >= 0
        return taken | (functional.one_hot(position.clamp(min=0), enc.candidates.shape[1]).bool() & real)

    def _start(self, enc: Encoded, pointers: int) -> tuple[Tensor, Tensor]:
        batch, pool = enc.candidates.shape[:2]
        # Without a running state all pointers share one: the scores are computed once per query.
        state = enc.query.unsqueeze(1).expand(-1, pointers if self.config.stateful else 1, -1)  # (B, M or 1, h)
        taken = torch.zeros(batch, pointers, pool, dtype=torch.bool, device=state.device)
        return state, taken if enc.absent is None else taken | enc.absent.unsqueeze(1)

    # ---- the policy -------------------------------------------------------------------------------------------

    def step_log_probs(self, enc: Encoded, pointers: Tensor) -> Tensor:
        """Log-probabilities of every next pick along each pointer's own prefix.

        ``pointers`` (B, M, S) -> float32 (B, M, S, K), or K + 1 with STOP as the last; -inf where already picked.
        """
        steps = []
        state, taken = self._start(enc, pointers.shape[1])
        nearest = None
        for step in range(pointers.shape[2]):
            logits = self._logits(enc, state, taken, nearest, step)
            # A padded step of a pointer that took its whole pool has no choice left: keep its gradient finite.
            nothing_left = (logits == -math.inf).all(2, keepdim=True)
            steps.append(logits.masked_fill(nothing_left, 0.0).log_softmax(2))
            taken = self._take(enc, taken, pointers[:, :, step])
            state, nearest = self._advance(enc, state, pointers[:, :, step], nearest)
        return torch.stack(steps, 2)

    def pointer_log_probs(self, steps: Tensor, pointers: Tensor) -> Tensor:
        """Sum ``step_log_probs`` along the pointers: (B, M, S, K), (B, M, S) -> (B, M).

        A pointer's padding counts nothing; with STOP, the first -1 after its picks is the STOP.
        """
        index, counted = pointers, pointers >= 0
        if self.config.stop:
            ended = ~counted
            first = ended & functional.pad(~ended, (1, 0), value=False)[..., :-1]  # -1 right after a pick
            index = torch.where(ended, steps.shape[3] - 1, pointers)
            counted = counted | first
        picked = steps.gather(3, index.clamp(min=0).unsqueeze(3)).squeeze(3)  # (B, M, S)
        return picked.masked_fill(~counted, 0.0).sum(2)

    def log_prob(
        self, query_emb: Tensor, cand_emb: Tensor, pointers: Tensor, pool_mask: Tensor | None = None
    ) -> Tensor:
        """log pi(pointer | query): (B, d), (B, K, d), LongTensor (B, M, S) -> (B, M) float32.

        Differentiable. A pointer that repeats a position has probability 0 (-inf).

        Raises:
            UsageError: a position outside the pool.
        """
        pool = cand_emb.shape[1]
        if pointers.numel() and (int(pointers.max()) >= pool or int(pointers.min()) < -1):
            raise UsageError(f"a pointer names a position outside the pool of {pool} candidates")
        enc = self.encode(query_emb, cand_emb, pool_mask)
        return self.pointer_log_probs(self.step_log_probs(enc, pointers), pointers)

    def forward(
        self,
        embeddings: Tensor,
        queries: Tensor,
        pool_rows: Tensor,
        pointers: Tensor,
        pool_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The training pass, which DeepSpeed wraps: every distinct candidate of a batch is projected once.

        ``embeddings`` (U, d), of which ``pool_rows`` (B, K) are rows; ``queries`` (B, d_q); ``pointers`` (B, M, S).

        Returns: log_probs (B, M), step log-probabilities (B, M, S, K).
        """
        enc = self.encode_rows(self.encode_items(embeddings), queries, pool_rows, pool_mask)
        steps = self.step_log_probs(enc, pointers)
        return self.pointer_log_probs(steps, pointers), steps

    @torch.no_grad()
    def select(self, query_emb: Tensor, cand_emb: Tensor, shots: int, pool_mask: Tensor | None = None) -> Tensor:
        """Greedy picks: (B, d), (B, K, d) -> LongTensor (B, shots), best first, no repeats (-1 after a STOP).

        ``shots`` may exceed the number trained on.

        Raises:
            UsageError: a pool has fewer candidates than ``shots``.
        """
        return self.beam(query_emb, cand_emb, shots, 1, pool_mask)[0][:, 0]

    @torch.no_grad()
    def beam(
        self, query_emb: Tensor, cand_emb: Tensor, shots: int, beams: int, pool_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Beam search over whole-pointer log-probability.

        Returns: pointers LongTensor (B, n, shots) best first and their log_probs (B, n); n is ``beams``, or the
        number of different pointers where there are fewer.

        Raises:
            UsageError: a pool has fewer candidates than ``shots``.
        """
        return self._beam(self._encode_for(query_emb, cand_emb, shots, pool_mask), shots, beams)

    def greedy(self, enc: Encoded, shots: int) -> Tensor:
        """:meth:`select` for queries that are encoded already -> (B, shots)."""
        return self._beam(enc, shots, 1)[0][:, 0]

    def _beam(self, enc: Encoded, shots: int, beams: int) -> tuple[Tensor, Tensor]:
        batch, pool = enc.candidates.shape[:2]
        state, taken = self._start(enc, 1)
        nearest, total = None, torch.zeros(batch, 1, device=state.device)
        pointers = torch.zeros(batch, 1, 0, dtype=torch.long, device=state.device)
        for _ in range(shots):
            log_probs = self._logits_or_ended(enc, state, taken, nearest, pointers).log_softmax(2)
            scores = (total.unsqueeze(2) + log_probs).flatten(1)  # (B, n * choices)
            legal = int((scores > -math.inf).sum(1).min())
            if beams == 1:  # argmax breaks ties towards the lower position
                chosen = scores.argmax(1, keepdim=True)
                total = scores.gather(1, chosen)
            else:
                total, chosen = scores.topk(min(beams, legal), dim=1)
            row, position = chosen // log_probs.shape[2], chosen % log_probs.shape[2]
            position = torch.where(position == pool, -1, position)
            pointers = torch.cat([_rows(pointers, row), position.unsqueeze(2)], 2)
            taken = self._take(enc, _rows(taken, row), position)
            nearest = None if nearest is None else _rows(nearest, row)
            state = _rows(state, row) if self.config.stateful else state
            state, nearest = self._advance(enc, state, position, nearest)
        return pointers, total

    @torch.no_grad()
    def sample(
        self,
        query_emb: Tensor,
        cand_emb: Tensor,
        shots: int,
        n: int,
        temperature: float,
        generator: torch.Generator | None = None,
        pool_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``n`` independent pointers per query, each pick drawn from softmax(logits / temperature).

        Returns: pointers LongTensor (B, n, shots) and log_probs (B, n) under the policy itself (temperature 1).

        Raises:
            UsageError: a pool has fewer candidates than ``shots``.
        """
        enc = self._encode_for(query_emb, cand_emb, shots, pool_mask)
        pool = enc.candidates.shape[1]
        state, taken = self._start(enc, n)
        nearest, total = None, torch.zeros(taken.shape[:2], device=state.device)
        pointers = torch.zeros(*taken.shape[:2], 0, dtype=torch.long, device=state.device)
        for _ in range(shots):
            logits = self._logits_or_ended(enc, state, taken, nearest, pointers)  # (B, n, choices)
            draw = torch.multinomial((logits / temperature).softmax(2).flatten(0, 1), 1, generator=generator)
            position = draw.view(taken.shape[:2])
            total = total + logits.log_softmax(2).gather(2, position.unsqueeze(2)).squeeze(2)
            position = torch.where(position == pool, -1, position)
            pointers = torch.cat([pointers, position.unsqueeze(2)], 2)
            taken = self._take(enc, taken, position)
            state, nearest = self._advance(enc, state, position, nearest)
        return pointers, total

    def _encode_for(self, query_emb: Tensor, cand_emb: Tensor, shots: int, pool_mask: Tensor | None) -> Encoded:
        smallest = cand_emb.shape[1] if pool_mask is None else int(pool_mask.sum(1).min())
        if not 1 <= shots <= smallest:
            raise UsageError(f"{shots} shots from a pool of {smallest} candidates: need 1 <= shots <= pool size")
        return self.encode(query_emb, cand_emb, pool_mask)

    def _logits_or_ended(self, enc: Encoded, state: Tensor, taken: Tensor, nearest: Any, pointers: Tensor) -> Tensor:
        """Logits of the next pick; a pointer that has stopped can only stay stopped, at no cost."""
        step = pointers.shape[2]
        logits = self._logits(enc, state, taken, nearest, step)
        if self.config.stop and step:
            ended = (pointers[:, :, -1] < 0).unsqueeze(2)
            only_stop = torch.full_like(logits[:1, :1], -math.inf)
            only_stop[..., -1] = 0.0
            logits = torch.where(ended, only_stop, logits)
        return logits

    # ---- files ------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, widths: tuple[int, int] | None = None) -> "PointerSelector":
        """Load a v2 or v3 file, this project's or the existing project's; strict; in evaluation mode.

        ``widths``: of the queries' and the candidates' embeddings that it is to read.

        Raises:
            MissingInputError, DamagedInputError: see :func:`.checkpoint.load_selector`; other widths.
        """
        from lever_plus.selectors.checkpoint import load_selector

        state, config, _ = load_selector(Path(path))
        selector = cls(SelectorConfig(**config))
        reads = (selector.query_dim, selector.config.input_dim)
        if widths is not None and widths != reads:
            raise DamagedInputError(
                f"selector checkpoint {path} reads queries and candidates of widths {reads}, here they have {widths}: "
                "EMBEDDING must be that of its training"
            )
        selector.load_state_dict(state, strict=True)
        return selector.eval()

    def checkpoint(self, phase: str, epoch: int, metrics: dict, settings: dict, provenance: dict) -> dict[str, Any]:
        """The content of a checkpoint file in this project's format: tensors and plain data only."""
        state = {name: value.detach().float().cpu().clone() for name, value in self.state_dict().items()}
        return native_checkpoint(self.config, state, phase, epoch, metrics, settings, provenance)

    def save(self, path: Path, phase: str, epoch: int, metrics: dict, settings: dict, provenance: dict) -> None:
        """Write :meth:`checkpoint` atomically."""
        io.save_torch(path, self.checkpoint(phase, epoch, metrics, settings, provenance))


def native_checkpoint(
    config: SelectorConfig,
    state: dict[str, Tensor],
    phase: str,
    epoch: int,
    metrics: dict,
    settings: dict,
    provenance: dict,
) -> dict[str, Any]:
    """A checkpoint in this project's format from a state dict that was gathered elsewhere (ZeRO)."""
    return {
        "format": FORMAT, "config": dataclasses.asdict(config), "model_state_dict": state, "phase": phase,
        "epoch": epoch, "metrics": metrics, "settings": settings, "provenance": provenance,
    }  # fmt: skip


def _rows(tensor: Tensor, row: Tensor) -> Tensor:
    """Rows ``row`` (B, n) of ``tensor`` (B, m, x) -> (B, n, x)."""
    return tensor.gather(1, row.unsqueeze(2).expand(-1, -1, tensor.shape[2]))
