"""The policy over pointers: what every selector inherits, however it scores a candidate.

A pointer is a row of 0 to S distinct pool positions in pick order, best first, -1 after its end. Without STOP it ends
where it is asked to end. With STOP (``config.stop``) ending is an action like any other, legal from the first step on:

    log pi(pointer) = sum of its picks' log-probabilities + that of the STOP after them (none after the S-th pick)

so the pointers of 0 to S picks share all probability. S is the width of the tensor that holds the pointers.

Shape legend: B queries, M pointers per query, S picks, K pool positions, h hidden width.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lever_plus.selectors.parts import TEMPERATURE, StopScorer
from open_mmicl.errors import NumericError, UsageError, plain

PAD = -1  # after a pointer's end


@dataclass
class Encoded:
    """A batch of queries and pools, encoded once and shared by all pointers."""

    query: Tensor  # (B, h) normalised state before the first pick
    vectors: Tensor  # (B, K, h) normalised candidates, or with ``rows`` a table (U, h) of them
    absent: Tensor | None  # bool (B, K), true where the pool has no candidate
    rows: Tensor | None = None  # int64 (B, K), each pool's rows of the table
    scores: Tensor | None = None  # (B, 1, K), once they are known, of a selector whose state never changes

    @property
    def pool(self) -> int:
        """K, pool positions."""
        return (self.vectors if self.rows is None else self.rows).shape[1]

    @functools.cached_property
    def candidates(self) -> Tensor:
        """Candidates (B, K, h), copied out of the table where there is one."""
        return self.vectors if self.rows is None else functional.embedding(self.rows, self.vectors)


def picks(pointers: Tensor) -> list[list[int]]:
    """Rows of padded pointers (n, S) -> their picks alone: lists of 0 to S positions, the only form to index with.

    Raises:
        ValueError: a pick after a pointer's end.
    """
    found = []
    for row in pointers.tolist():
        kept = [position for position in row if position != PAD]
        if row[: len(kept)] != kept:
            raise ValueError(f"pointer {row} goes on after its end")
        found.append(kept)
    return found


def decisions(pointers: Tensor, stop: bool) -> Tensor:
    """Steps at which a pointer decides: its picks and, with STOP, the step of its STOP. (…, S) -> bool (…, S)."""
    picked = pointers >= 0
    if not stop:
        return picked
    return picked | functional.pad(picked, (1, 0), value=True)[..., :-1]


class PointerPolicy(nn.Module):
    """pi(pointer | query): product over steps of the softmax over the positions not yet picked, and STOP.

    A selector gives ``config`` (with ``stop``, ``stop_shots`` and ``stateful``), :meth:`encode`, :meth:`encode_items`,
    :meth:`encode_rows`, :meth:`_scores` and, where its state changes with the picks, :meth:`_advance`; with
    ``config.stop`` it holds a :class:`.parts.StopScorer` as ``stop``.
    """

    config: Any
    stop: StopScorer
    _may_stop = True

    def encode(self, query_emb: Tensor, cand_emb: Tensor, pool_mask: Tensor | None = None) -> Encoded:
        """Encode queries (B, d_q) and their pools (B, K, d); ``pool_mask`` bool (B, K) is true where there is one."""
        raise NotImplementedError

    def encode_items(self, embeddings: Tensor) -> Any:
        """The part of encoding that no query touches, of candidates (…, d)."""
        raise NotImplementedError

    def encode_rows(self, items: Any, queries: Tensor, pool_rows: Tensor, pool_mask: Tensor | None = None) -> Encoded:
        """:meth:`encode` for queries (B, d_q) and pools (B, K) given as rows of :meth:`encode_items`' output."""
        raise NotImplementedError

    def _scores(self, enc: Encoded, state: Tensor, nearest: Tensor | None) -> Tensor:
        """Scores of all positions given states (B, M or 1, h) -> (B, M or 1, K)."""
        raise NotImplementedError

    def _cosine_unit(self, scores: Tensor) -> Tensor | float:
        """What makes scores cosines again, for what STOP reads."""
        return TEMPERATURE

    def _advance(self, enc: Encoded, state: Tensor, position: Tensor, nearest: Tensor | None) -> tuple[Tensor, Any]:
        """State and highest cosines after picking ``position`` (B, M); rows at -1 keep theirs."""
        return state, nearest

    @property
    def stops(self) -> bool:
        """Whether STOP is among the choices: only once something has taught it (``config.stop_shots``)."""
        return self.config.stop and self.config.stop_shots > 0 and self._may_stop

    @contextlib.contextmanager
    def fixed_shots(self) -> Iterator[None]:
        """Within it the policy cannot stop: every pointer has all the picks that are asked for."""
        self._may_stop = False
        try:
            yield
        finally:
            self._may_stop = True

    # ---- one step ---------------------------------------------------------------------------------------------

    def _logits(self, enc: Encoded, state: Tensor, taken: Tensor, nearest: Tensor | None) -> Tensor:
        """Logits of the next choice given states (B, M, h) and taken bool (B, M, K) -> (B, M, K or K + 1 with STOP)."""
        scores = self._scores(enc, state, nearest) if enc.scores is None else enc.scores  # (B, M or 1, K)
        if not self.config.stateful:
            enc.scores = scores
        logits = torch.masked_fill(scores, taken, -math.inf)  # (B, M, K)
        if not self.stops:
            return logits
        picked = taken if enc.absent is None else taken & ~enc.absent.unsqueeze(1)
        stop = self.stop(state, scores, logits, picked, self._cosine_unit(scores))
        return torch.cat([logits, stop], 2)

    def _take(self, enc: Encoded, taken: Tensor, position: Tensor) -> Tensor:
        real = position.unsqueeze(2) >= 0
        return taken | (functional.one_hot(position.clamp(min=0), enc.pool).bool() & real)

    def _start(self, enc: Encoded, pointers: int) -> tuple[Tensor, Tensor]:
        batch, pool = len(enc.query), enc.pool
        # Without a running state all pointers share one: the scores are computed once per query.
        state = enc.query.unsqueeze(1).expand(-1, pointers if self.config.stateful else 1, -1)  # (B, M or 1, h)
        taken = torch.zeros(batch, pointers, pool, dtype=torch.bool, device=state.device)
        return state, taken if enc.absent is None else taken | enc.absent.unsqueeze(1)

    # ---- the policy -------------------------------------------------------------------------------------------

    def step_log_probs(self, enc: Encoded, pointers: Tensor) -> Tensor:
        """Log-probabilities of every next choice along each pointer's own prefix.

        ``pointers`` (B, M, S) -> float32 (B, M, S, K), or K + 1 with STOP as the last; -inf where already picked.
        """
        steps = []
        state, taken = self._start(enc, pointers.shape[1])
        nearest = None
        for step in range(pointers.shape[2]):
            logits = self._logits(enc, state, taken, nearest)
            # A padded step of a pointer that took its whole pool has no choice left: keep its gradient finite.
            nothing_left = (logits == -math.inf).all(2, keepdim=True)
            steps.append(logits.masked_fill(nothing_left, 0.0).log_softmax(2))
            taken = self._take(enc, taken, pointers[:, :, step])
            state, nearest = self._advance(enc, state, pointers[:, :, step], nearest)
        return torch.stack(steps, 2)

    def pointer_log_probs(self, steps: Tensor, pointers: Tensor) -> Tensor:
        """Sum ``step_log_probs`` along the pointers: (B, M, S, K), (B, M, S) -> (B, M).

        Padding counts nothing; with STOP, the first -1 is the STOP. A pointer of S picks has none.
        """
        index = torch.where(pointers >= 0, pointers, steps.shape[3] - 1)
        picked = steps.gather(3, index.unsqueeze(3)).squeeze(3)  # (B, M, S)
        return picked.masked_fill(~decisions(pointers, self.stops), 0.0).sum(2)

    def log_prob(
        self, query_emb: Tensor, cand_emb: Tensor, pointers: Tensor, pool_mask: Tensor | None = None
    ) -> Tensor:
        """log pi(pointer | query): (B, d), (B, K, d), LongTensor (B, M, S) -> (B, M) float32.

        Differentiable. A pointer that repeats a position has probability 0 (-inf).

        Raises:
            UsageError: tensors of another form, or a position outside the pool.
        """
        check_embeddings(query_emb, cand_emb)
        if not isinstance(pointers, Tensor) or pointers.dim() != 3 or pointers.is_floating_point():
            raise UsageError(f"expected pointers [B, M, S] of whole numbers, got {_form(pointers)}")
        if len(pointers) != len(query_emb):
            raise UsageError(f"pointers of {len(pointers)} queries for embeddings of {len(query_emb)}")
        pool = cand_emb.shape[1]
        if pointers.numel() and (int(pointers.max()) >= pool or int(pointers.min()) < PAD):
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
        """Greedy picks: (B, d), (B, K, d) -> LongTensor (B, shots), best first, no repeats, -1 after a STOP (see
        :func:`picks`).

        ``shots`` may exceed the number trained on.

        Raises:
            UsageError: a pool has fewer candidates than ``shots``. NumericError: an embedding is not finite.
        """
        check_embeddings(query_emb, cand_emb)
        if len(query_emb) == len(cand_emb) == 0:
            return torch.zeros((0, shots), dtype=torch.long, device=query_emb.device)
        return self.beam(query_emb, cand_emb, shots, 1, pool_mask)[0][:, 0]

    @torch.no_grad()
    def beam(
        self, query_emb: Tensor, cand_emb: Tensor, shots: int, beams: int, pool_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Beam search over whole-pointer log-probability.

        Returns: pointers LongTensor (B, n, shots) best first, -1 after a STOP, and their log_probs (B, n); n is
        ``beams``, or the number of different pointers where there are fewer.

        Raises:
            UsageError: a pool has fewer candidates than ``shots``.
        """
        return self._beam(self._encode_for(query_emb, cand_emb, shots, pool_mask), shots, beams)

    @torch.no_grad()
    def stop_probabilities(self, query_emb: Tensor, cand_emb: Tensor, shots: int) -> Tensor:
        """P(STOP) before each of the ``shots`` picks that the policy makes if it may not stop: (B, d), (B, K, d) ->
        (B, shots).
        """
        with self.fixed_shots():
            pointers = self.select(query_emb, cand_emb, shots)
        steps = self.step_log_probs(self.encode(query_emb, cand_emb), pointers.unsqueeze(1))  # (B, 1, shots, K + 1)
        return steps[:, 0, :, -1].exp()

    def greedy(self, enc: Encoded, shots: int) -> Tensor:
        """:meth:`select` for queries that are encoded already -> (B, shots)."""
        return self._beam(enc, shots, 1)[0][:, 0]

    def _beam(self, enc: Encoded, shots: int, beams: int) -> tuple[Tensor, Tensor]:
        batch, pool = len(enc.query), enc.pool
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
            position = torch.where(position == pool, PAD, position)
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
        """``n`` independent pointers per query, each choice drawn from softmax(logits / temperature).

        Returns: pointers LongTensor (B, n, shots), -1 after a STOP, and log_probs (B, n) under the policy itself
        (temperature 1).

        Raises:
            UsageError: a pool has fewer candidates than ``shots``.
        """
        enc = self._encode_for(query_emb, cand_emb, shots, pool_mask)
        pool = enc.pool
        state, taken = self._start(enc, n)
        nearest, total = None, torch.zeros(taken.shape[:2], device=state.device)
        pointers = torch.zeros(*taken.shape[:2], 0, dtype=torch.long, device=state.device)
        for _ in range(shots):
            logits = self._logits_or_ended(enc, state, taken, nearest, pointers)  # (B, n, choices)
            draw = torch.multinomial((logits / temperature).softmax(2).flatten(0, 1), 1, generator=generator)
            position = draw.view(taken.shape[:2])
            total = total + logits.log_softmax(2).gather(2, position.unsqueeze(2)).squeeze(2)
            position = torch.where(position == pool, PAD, position)
            pointers = torch.cat([pointers, position.unsqueeze(2)], 2)
            taken = self._take(enc, taken, position)
            state, nearest = self._advance(enc, state, position, nearest)
        return pointers, total

    def _encode_for(self, query_emb: Tensor, cand_emb: Tensor, shots: int, pool_mask: Tensor | None) -> Encoded:
        check_embeddings(query_emb, cand_emb)
        if isinstance(shots, bool) or not isinstance(shots, Integral):
            raise UsageError(f"shots={plain(repr(shots), 40)}: a whole number is expected")
        smallest = cand_emb.shape[1] if pool_mask is None else int(pool_mask.sum(1).min())
        if not 1 <= shots <= smallest:
            raise UsageError(f"{shots} shots from a pool of {smallest} candidates: need 1 <= shots <= pool size")
        asked = cand_emb if pool_mask is None else cand_emb[pool_mask.bool()]
        if not (torch.isfinite(query_emb).all() and torch.isfinite(asked).all()):
            raise NumericError("the embeddings hold NaN or infinity: no candidate is best")
        return self.encode(query_emb, cand_emb, pool_mask)

    def _logits_or_ended(self, enc: Encoded, state: Tensor, taken: Tensor, nearest: Any, pointers: Tensor) -> Tensor:
        """Logits of the next choice; a pointer that has stopped can only stay stopped, at no cost."""
        logits = self._logits(enc, state, taken, nearest)
        if self.stops and pointers.shape[2]:
            ended = (pointers[:, :, -1] < 0).unsqueeze(2)
            only_stop = torch.full_like(logits[:1, :1], -math.inf)
            only_stop[..., -1] = 0.0
            logits = torch.where(ended, only_stop, logits)
        return logits


class FixedShots:
    """A policy asked for a fixed number of demonstrations: whether it would have stopped does not matter."""

    def __init__(self, policy: PointerPolicy) -> None:
        self.policy = policy

    def select(self, query_emb: Tensor, cand_emb: Tensor, shots: int) -> Tensor:
        """:meth:`PointerPolicy.select`, never with a STOP."""
        with self.policy.fixed_shots():
            return self.policy.select(query_emb, cand_emb, shots)


def _rows(tensor: Tensor, row: Tensor) -> Tensor:
    """Rows ``row`` (B, n) of ``tensor`` (B, m, x) -> (B, n, x)."""
    return tensor.gather(1, row.unsqueeze(2).expand(-1, -1, tensor.shape[2]))


def check_embeddings(query_emb: object, cand_emb: object) -> None:
    """Raises UsageError where queries are no [B, d] tensor or candidates no [B, K, d] tensor."""
    both = isinstance(query_emb, Tensor) and isinstance(cand_emb, Tensor)
    if not both or query_emb.dim() != 2 or cand_emb.dim() != 3:  # type: ignore[attr-defined]
        raise UsageError(
            "expected query embeddings [B, d] and candidate embeddings [B, K, d], tensors, got "
            f"{_form(query_emb)} and {_form(cand_emb)}"
        )


def _form(value: object) -> str:
    return f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
