"""Parts of the pointer selector: attention over the pool, scorers, query-state updates.

Shape legend: B queries, M pointers per query, K pool positions, h hidden width.
Every parameter is used inside its own module's ``forward``, so that ZeRO-3 gathers it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lever_plus.registries import SCORERS

TEMPERATURE = 0.1  # of the cosine scores (the original Lever-Plus's files assume it)
TABLE_ROWS = 64  # per pool position: products with a table of so many rows cost less than to gather the pools
STOP_STEPS = 5  # picks that STOP tells apart: 0 to 3, and more
STOP_FEATURES = STOP_STEPS + 8  # numbers that STOP reads beside the query state
STOP_WIDTH = 32
STOP_GAIN = 10.0  # of STOP's output once it is trained: without it Adam's steps do not cross the logits' range
STOP_START = -2.0  # an untrained policy seldom stops: STOP is as likely as exp(-2) of the best candidate


class _Normalised(torch.autograd.Function):
    """``functional.normalize`` over the last dimension, with its gradient in three passes instead of ten."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)
        unit = vectors / norm
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        unit, norm = ctx.saved_tensors
        along = (gradient * unit).sum(-1, keepdim=True)
        return torch.addcmul(gradient, unit, along, value=-1).div_(norm)


def normalised(vectors: Tensor) -> Tensor:
    """Vectors (…, h) of length 1; a zero stays zero. Differentiable once."""
    return _Normalised.apply(vectors)


class CrossAttention(nn.Module):
    """Single-head attention of one query vector over its pool.

    Holds the parameters of ``nn.MultiheadAttention(h, 1, batch_first=True)`` under the same names and computes
    the same function, but never projects the pool: with one query vector, ``q · (W_k c) = (W_k^T q) · c`` and
    ``sum_k a_k W_v c_k = W_v sum_k a_k c_k``. That is two h x h products per query instead of two per candidate.
    A bias on the keys adds the same number to every score and drops out of the softmax: it is held (old files
    have it) and has no effect.
    """

    def __init__(self, hidden_dim: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim)) if bias else None
        self.out_proj = nn.Linear(hidden_dim, hidden_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, pool: Tensor, absent: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """``query`` (B, h), ``pool`` (B, K, h), ``absent`` bool (B, K) true where there is no candidate -> (B, h).

        With ``rows`` int64 (B, K), ``pool`` is a table (U, h) and a query's pool its rows of it. Then the products are
        with the whole table: more arithmetic, but no candidate is copied, nor its gradient.
        """
        # unbind: its backward fills one gradient, where chunk's would fill three and add them.
        w_query, w_key, w_value = self.in_proj_weight.unflatten(0, (3, -1)).unbind()  # each (h, h)
        b_query = b_value = None
        if self.in_proj_bias is not None:
            b_query, _, b_value = self.in_proj_bias.chunk(3)
        into_pool = functional.linear(query, w_query, b_query) @ w_key  # (B, h)
        if rows is None:
            scores = torch.bmm(pool, into_pool.unsqueeze(2)).squeeze(2)
        else:
            scores = functional.linear(into_pool, pool).gather(1, rows)
        scores = scores.float() / math.sqrt(pool.shape[-1])  # (B, K)
        if absent is not None:
            scores = scores.masked_fill(absent, -math.inf)
        weights = self.dropout(scores.softmax(1)).to(pool.dtype)  # (B, K)
        if rows is None:
            mixed = torch.bmm(weights.unsqueeze(1), pool).squeeze(1)
        else:
            mixed = weights.new_zeros(len(rows), len(pool)).scatter_add(1, rows, weights) @ pool
        value = functional.linear(mixed, w_value)  # (B, h)
        if b_value is not None:
            value = value + weights.sum(1, keepdim=True) * b_value  # dropout: the weights need not sum to 1
        return self.out_proj(value)


@SCORERS.add("dot", "cosine over a temperature")
class DotScorer(nn.Module):
    """Cosine of query state and candidate over the temperature (both come in normalised)."""

    by_table = True  # also states (B, h) and a table (U, h) -> (B, U), which costs less than to gather the pools

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()

    def forward(self, state: Tensor, candidates: Tensor) -> Tensor:
        """``state`` (B, M, h), ``candidates`` (B, K, h) -> logits (B, M, K)."""
        return (state @ candidates.mT).float() / TEMPERATURE


@SCORERS.add("bilinear", "a learned matrix between them, the identity at first")
class BilinearScorer(nn.Module):
    """``q^T W c`` over the temperature; W starts as the identity, where it is the dot scorer."""

    by_table = True

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(hidden_dim))

    def forward(self, state: Tensor, candidates: Tensor) -> Tensor:
        """``state`` (B, M, h), ``candidates`` (B, K, h) -> logits (B, M, K)."""
        return (state @ self.weight @ candidates.mT).float() / TEMPERATURE


@SCORERS.add("additive", "a learned hidden layer added to dot")
class AdditiveScorer(nn.Module):
    """``v^T tanh(A q + C c)`` (Bahdanau et al., 2015) added to the dot scorer; v starts at zero."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.candidate = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.weight = nn.Parameter(torch.zeros(hidden_dim))

    def forward(self, state: Tensor, candidates: Tensor) -> Tensor:
        """``state`` (B, M, h), ``candidates`` (B, K, h) -> logits (B, M, K)."""
        mixed = torch.tanh(self.query(state).unsqueeze(2) + self.candidate(candidates).unsqueeze(1))  # (B, M, K, h)
        cosine = torch.bmm(state, candidates.transpose(1, 2))
        return (cosine + mixed @ self.weight).float() / TEMPERATURE


class GateUpdate(nn.Linear):
    """``g = sigmoid(W [q; c] + b)``; ``q <- normalise(g q + (1 - g) c)`` with c the picked candidate."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__(2 * hidden_dim, hidden_dim)

    def forward(self, state: Tensor, picked: Tensor) -> Tensor:
        """``state`` and ``picked`` (B, M, h), normalised -> the new state, normalised."""
        gate = super().forward(torch.cat([state, picked], dim=-1)).sigmoid()
        return normalised(gate * state + (1 - gate) * picked)


class GruUpdate(nn.Module):
    """The query state runs through a GRU cell over the picked candidates, beside a residual."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(hidden_dim, hidden_dim)

    def forward(self, state: Tensor, picked: Tensor) -> Tensor:
        """``state`` and ``picked`` (B, M, h), normalised -> the new state, normalised."""
        flat = self.cell(picked.flatten(0, 1), state.flatten(0, 1)).view_as(state)
        return normalised(state + flat)


class SumUpdate(nn.Module):
    """``q <- normalise(q + W c)`` with c the picked candidate; W starts at zero, where picks do not matter."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_dim, hidden_dim, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, state: Tensor, picked: Tensor) -> Tensor:
        """``state`` and ``picked`` (B, M, h), normalised -> the new state, normalised."""
        return normalised(state + self.linear(picked))


class Diversity(nn.Module):
    """MMR (Carbonell and Goldstein, 1998): a penalty of lambda times the highest cosine with what was picked.

    lambda = softplus(parameter) > 0 is learned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor([-2.0]))

    def forward(self, logits: Tensor, nearest: Tensor) -> Tensor:
        """``logits``, ``nearest`` (B, M, K): highest cosine of each candidate with the picks so far."""
        return logits - functional.softplus(self.strength).float() * nearest.float() / TEMPERATURE


class StopScorer(nn.Module):
    """The logit of ending the pointer here: the best remaining candidate's, plus what this module adds.

    So a greedy policy stops where the addition is above 0, however many candidates share the probability. It is a small
    network of the query state and of what the scores say: how many were picked, the best and second best remaining,
    how much of the probability the best has, the picks' own scores. It starts at :data:`STOP_START`.
    """

    def __init__(self, hidden_dim: int, gain: float = 1.0) -> None:
        """``gain``: what the network's output is multiplied by."""
        super().__init__()
        self.gain = gain
        self.hidden = nn.Linear(hidden_dim + STOP_FEATURES, STOP_WIDTH)
        self.linear = nn.Linear(STOP_WIDTH, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, STOP_START / gain)

    def forward(
        self, state: Tensor, scores: Tensor, logits: Tensor, picked: Tensor, unit: Tensor | float = TEMPERATURE
    ) -> Tensor:
        """``state`` (B, M or 1, h), ``scores`` (B, M or 1, K), ``logits`` (B, M, K) with -inf where taken or absent,
        ``picked`` bool (B, M, K) -> (B, M, 1). Scores times ``unit`` are cosines, whatever their temperature.
        """
        best = logits.topk(min(2, logits.shape[2]), 2)[0]  # (B, M, 2)
        left = torch.isfinite(best)
        first, second = (torch.where(left, best, 0.0)[..., [i if i < best.shape[2] else 0]] for i in (0, 1))
        # Where nothing is left the sum would be that of no candidates at all.
        some = left[..., :1]
        confidence = first - torch.where(some, logits, 0.0).logsumexp(2, keepdim=True)  # log-probability of the best
        of_picks = scores.expand_as(picked).float()
        count = picked.sum(2, keepdim=True)
        high = torch.where(picked, of_picks, -math.inf).amax(2, keepdim=True)
        low = torch.where(picked, of_picks, math.inf).amin(2, keepdim=True)
        high, low = (torch.where(count > 0, value, 0.0) for value in (high, low))
        steps = torch.arange(STOP_STEPS, device=picked.device)
        known = torch.cat(
            [(count.clamp(max=STOP_STEPS - 1) == steps).float(), some.float(),
             *(v * unit for v in (first, second, first - second, high, low, low - first)), confidence], 2,
        )  # fmt: skip
        seen = torch.cat([state.expand(-1, known.shape[1], -1).float(), known], 2).to(self.hidden.weight.dtype)
        return first + self.gain * self.linear(torch.tanh(self.hidden(seen))).float()


class Towers(nn.Module):
    """A matrix for queries and one for candidates, whose cosines over a learned temperature are the scores.

    A candidate's first ``query_dim`` dimensions are of the space that queries are in; the rest a query does not have.
    """

    def __init__(self, query_dim: int, candidate_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, hidden_dim, bias=False)
        self.candidate = nn.Linear(candidate_dim, hidden_dim, bias=False)
        self.log_gain = LogGain()

    @torch.no_grad()
    def start_as_cosine(self) -> None:
        """First weights with which a score is the cosine of what both have, up to a random projection."""
        nn.init.orthogonal_(self.query.weight)
        self.candidate.weight.zero_()
        self.candidate.weight[:, : self.query.weight.shape[1]] = self.query.weight


class Metric(nn.Module):
    """One matrix for what queries and candidates both have, so that a learned score is a similarity: what it learns of
    some answers holds for others. What only a candidate has (its answer) goes through a matrix of its own.

    As :class:`Towers`: a candidate's first ``query_dim`` dimensions are of the space that queries are in.
    """

    def __init__(self, query_dim: int, candidate_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, hidden_dim, bias=False)
        self.extra = nn.Linear(candidate_dim - query_dim, hidden_dim, bias=False) if candidate_dim > query_dim else None
        self.log_gain = LogGain()

    def candidate(self, embeddings: Tensor) -> Tensor:
        """(…, candidate_dim) -> (…, hidden_dim)."""
        width = self.query.in_features
        projected = self.query(embeddings[..., :width])
        return projected if self.extra is None else projected + self.extra(embeddings[..., width:])

    @torch.no_grad()
    def start_as_cosine(self) -> None:
        """First weights with which a score is the cosine of what both have, up to a random projection."""
        nn.init.orthogonal_(self.query.weight)
        if self.extra is not None:
            self.extra.weight.zero_()


class LogGain(nn.Module):
    """A learned positive factor; 1 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, logits: Tensor) -> Tensor:
        """``logits`` of any shape, times exp of the parameter."""
        return logits * self.value.float().exp()
