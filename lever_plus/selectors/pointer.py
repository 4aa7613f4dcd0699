"""The pointer selector: a policy over ordered picks from a query's candidate pool.

Architecture (the original Lever-Plus's files load into it): bias-free projection d -> h shared by query
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
from lever_plus.registries import SCORERS
from lever_plus.selectors.checkpoint import load_selector
from lever_plus.selectors.parts import (
    STOP_GAIN,
    TABLE_ROWS,
    TEMPERATURE,
    CrossAttention,
    Diversity,
    GateUpdate,
    GruUpdate,
    Metric,
    StopScorer,
    SumUpdate,
    Towers,
    normalised,
)
from lever_plus.selectors.policy import Encoded, PointerPolicy, check_embeddings
from open_mmicl.errors import DamagedInputError, UsageError

FORMAT = "lever_plus.selector/1"
TIMINGS = ("seconds", "queries_per_s")  # of an epoch's record: not in a checkpoint, which is the same bytes every time
BY_CHANNELS = {"towers": Towers, "metric": Metric}
ENCODERS = ("shared", *BY_CHANNELS)
# Scale of a tied selector's first projections. No cosine depends on it, but the smaller the weights, the further a step
# of Adam, whose size is the learning rate whatever the gradient's, turns what they project.
TIED_GAIN = 1 / math.sqrt(3)


@dataclass(frozen=True)
class SelectorConfig:
    """The selector's shape. ``num_layers=0`` is v1; ``attn_bias`` is for files of the original Lever-Plus.

    ``tied``: query and candidate projection are one matrix, so the learned similarity is symmetric up to the
    attention. Files list it under both names; files of the original Lever-Plus are never tied.

    ``encoder``: ``shared`` projects query and candidates by one input projection (item embeddings of one table);
    ``towers`` gives each a matrix of its own (channels, of which a query has the first ``query_dim`` only) and learns
    the temperature. It starts as the cosine of the channels that both have. ``metric`` is ``towers`` with one matrix
    for the channels that both have.

    ``stop``: see :mod:`.policy`; ``stop_shots``: the most picks of a pointer that its STOP was trained with, 0 where it
    is untrained: then it is no choice and takes no part in any loss (labels say nothing of when to stop).
    ``stop_gain``: what its output is multiplied by, so that steps of Adam, all of one size, take it across the range
    of logits within an epoch or two; 1 in files from before there was a gain.
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
    stop_shots: int = 0
    stop_gain: float = 1.0

    @property
    def stateful(self) -> bool:
        """Whether the score of the next pick depends on the earlier ones beyond their being taken."""
        return self.query_update_gate or self.gru_state or self.sum_state or self.mmr

    def __post_init__(self) -> None:
        if self.query_update_gate + self.gru_state + self.sum_state > 1:
            raise UsageError("QUERY_UPDATE_GATE, GRU_STATE and SUM_STATE are updates of the same state: choose one")
        if self.encoder not in ENCODERS:
            raise UsageError(f"unknown encoder {self.encoder!r}; there are: {', '.join(ENCODERS)}")
        if self.encoder in BY_CHANNELS and not 0 < self.query_dim <= self.input_dim:
            raise UsageError(f"a query of width {self.query_dim} beside candidates of width {self.input_dim}")
        SCORERS.entry(self.scorer)


class PointerSelector(PointerPolicy):
    """The policy pi(pointer | query): product over picks of the softmax over the positions not yet picked."""

    config_class = SelectorConfig

    def __init__(self, config: SelectorConfig, init: str = "similarity") -> None:
        """``init``: ``similarity`` starts as the cosine of randomly projected embeddings, ``random`` does not."""
        super().__init__()
        self.config = config
        h = config.hidden_dim
        kind = BY_CHANNELS.get(config.encoder)
        self.towers = None if kind is None else kind(config.query_dim, config.input_dim, h)
        if self.towers is None:
            # An embedding as wide as the hidden state is not projected (as in the original Lever-Plus's files).
            self.input_proj = nn.Linear(config.input_dim, h, bias=False) if config.input_dim != h else nn.Identity()
        self.cross_attn_layers = nn.ModuleList(
            CrossAttention(h, config.dropout, config.attn_bias) for _ in range(config.num_layers)
        )
        self.attn_norms = nn.ModuleList(nn.LayerNorm(h) for _ in range(config.num_layers))
        if self.towers is None:
            self.query_proj = nn.Linear(h, h, bias=False)
            self.cand_proj = self.query_proj if config.tied else nn.Linear(h, h, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.scorer = SCORERS.get(config.scorer)(h)
        if scalars := [name for name, weight in self.scorer.named_parameters() if weight.dim() == 0]:
            raise UsageError(f"scorer {config.scorer}: {scalars[0]} has no dimension; DeepSpeed wants one: (1,)")
        if config.query_update_gate:
            self.query_update_gate = GateUpdate(h)
        if config.gru_state:
            self.query_update_gru = GruUpdate(h)
        if config.sum_state:
            self.query_update_sum = SumUpdate(h)
        if config.mmr:
            self.diversity = Diversity()
        self._initialise(init)
        if config.stop:  # last, so that the other first weights are those of a selector without it
            self.stop = StopScorer(h, config.stop_gain)

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

    def trained_to_stop(self, shots: int) -> None:
        """Note that training continues with pointers of at most ``shots`` picks; nothing without STOP."""
        if not self.config.stop:
            return
        gain = self.config.stop_gain
        if self.config.stop_shots == 0 and gain != STOP_GAIN:  # untrained: the same output at first, by another gain
            with torch.no_grad():
                self.stop.linear.weight.mul_(gain / STOP_GAIN)
                self.stop.linear.bias.mul_(gain / STOP_GAIN)
            gain = STOP_GAIN
        self.config = dataclasses.replace(self.config, stop_shots=shots, stop_gain=gain)
        self.stop.gain = gain

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
        """Encode queries (B, d_q) and their pools (B, K, d); ``pool_mask`` bool (B, K) is true where there is one.

        Raises:
            UsageError: tensors of other shapes.
        """
        self._check_shapes(query_emb, cand_emb)
        projected, candidates = self.encode_items(cand_emb)
        return self._attend(self._project_query(query_emb), projected, candidates, pool_mask)

    def _check_shapes(self, query_emb: Tensor, cand_emb: Tensor) -> None:
        check_embeddings(query_emb, cand_emb)
        for what, tensor, width in (
            ("query", query_emb, self.query_dim), ("candidate", cand_emb, self.config.input_dim),
        ):  # fmt: skip
            if tensor.shape[-1] != width:
                raise UsageError(f"{what} embeddings of width {tensor.shape[-1]}: this selector reads {width}")
        if len(query_emb) != len(cand_emb):
            raise UsageError(f"embeddings of {len(query_emb)} queries for pools of {len(cand_emb)}")

    def encode_items(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates (…, d) -> (projected (…, h), candidate vectors (…, h)): what no query touches."""
        embeddings = embeddings.to(self._dtype)
        if self.towers is not None:
            projected = self.towers.candidate(embeddings)
            return projected, normalised(self.dropout(projected))
        projected = self.input_proj(embeddings)
        return projected, normalised(self.dropout(self.cand_proj(projected)))

    def encode_rows(
        self, items: tuple[Tensor, Tensor], queries: Tensor, pool_rows: Tensor, pool_mask: Tensor | None = None
    ) -> Encoded:
        """:meth:`encode` for queries (B, d_q) and pools (B, K) given as rows of :meth:`encode_items`' output."""
        projected, candidates = items
        query = self._project_query(queries)
        if len(projected) > TABLE_ROWS * pool_rows.shape[1]:
            pool = functional.embedding(pool_rows, projected) if len(self.cross_attn_layers) else projected
            return self._attend(query, pool, functional.embedding(pool_rows, candidates), pool_mask)
        return self._attend(query, projected, candidates, pool_mask, pool_rows)

    @property
    def _dtype(self) -> torch.dtype:
        return (self.query_proj if self.towers is None else self.towers.query).weight.dtype

    def _project_query(self, queries: Tensor) -> Tensor:
        queries = queries.to(self._dtype)
        return self.input_proj(queries) if self.towers is None else self.towers.query(queries)

    def _attend(
        self, query: Tensor, pool: Tensor, candidates: Tensor, pool_mask: Tensor | None, rows: Tensor | None = None
    ) -> Encoded:
        absent = None if pool_mask is None else ~pool_mask
        for attention, norm in zip(self.cross_attn_layers, self.attn_norms, strict=True):
            query = norm(query + attention(query, pool, absent, rows))
        state = query if self.towers is not None else self.query_proj(query)
        return Encoded(normalised(self.dropout(state)), candidates, absent, rows)

    # ---- one step ---------------------------------------------------------------------------------------------

    def _scores(self, enc: Encoded, state: Tensor, nearest: Tensor | None) -> Tensor:
        if enc.rows is not None and not self.config.stateful and getattr(self.scorer, "by_table", False):
            scores = self.scorer(state.squeeze(1), enc.vectors).gather(1, enc.rows).unsqueeze(1)  # (B, 1, K)
        else:
            scores = self.scorer(state, enc.candidates)  # (B, M or 1, K)
        if self.towers is not None:
            scores = self.towers.log_gain(scores)
        return scores if nearest is None else self.diversity(scores, nearest)

    def _cosine_unit(self, scores: Tensor) -> Tensor | float:
        if self.towers is None:
            return TEMPERATURE
        return TEMPERATURE / self.towers.log_gain(scores.new_ones(1)).detach()

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

    # ---- files ------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, widths: tuple[int, int] | None = None) -> "PointerSelector":
        """Load a v2 or v3 file, this project's or the original Lever-Plus's; strict; in evaluation mode.

        ``widths``: of the queries' and the candidates' embeddings that it is to read.

        Raises:
            MissingInputError, DamagedInputError: see :func:`.checkpoint.load_selector`; other widths.
        """
        state, config, _ = load_selector(Path(path), cls)
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
    """A checkpoint in this project's format from a state dict that was gathered elsewhere (ZeRO); no clock in it."""
    shape = {k: v for k, v in dataclasses.asdict(config).items() if config.stop or not k.startswith("stop_")}
    return {
        "format": FORMAT, "config": shape, "model_state_dict": state, "phase": phase, "epoch": epoch,
        "metrics": {k: v for k, v in metrics.items() if k not in TIMINGS}, "settings": settings,
        "provenance": provenance,
    }  # fmt: skip
