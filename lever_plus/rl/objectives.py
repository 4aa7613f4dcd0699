"""What a phase minimises: RCE and GRPO as objects that the trainer asks for a loss per batch.

Shape legend: Q training queries, B queries of a batch, M pointers, S picks, K pool positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lever_plus.registries import RCE_LOSSES
from lever_plus.rl import losses
from lever_plus.rl.groups import Groups


@dataclass
class Scores:
    """The policy's output for a batch."""

    log_probs: Tensor  # (B, M)
    steps: Tensor  # (B, M, S, K), or K + 1 where the policy may stop
    stop: bool = False


@dataclass
class Batch:
    """A batch as one process sees it. ``whole`` are the rows of all processes' queries, ``rows`` this one's."""

    whole: Tensor  # int64, rows of the training groups
    rows: Tensor
    groups: Groups  # at ``rows``
    ref_log_probs: Tensor  # (B, M)
    ref_steps: Tensor | None  # (B, M, S, K), where the objective wants them
    progress: float  # 0 at the phase's first step, 1 at its last


class Objective:
    """A phase's loss, with nothing to remember between epochs."""

    wants_old = False
    """Whether it takes the log-probabilities of the epoch's first policy."""
    wants_ref_steps = False
    """Whether it takes the reference's whole step distributions."""
    wants_tree = False
    """Of a policy that may stop: whether it takes log-probabilities on the tree of scored pointers."""

    def begin(self, train: Groups) -> None:
        """Called with the training groups at the start, and again when they are replaced."""
        raise NotImplementedError

    def begin_epoch(self, old_log_probs: Tensor | None) -> None:
        """``old_log_probs`` (Q, M), where wanted."""

    def loss(self, batch: Batch, scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the batch's non-empty groups, and detached metrics of the same kind."""
        raise NotImplementedError

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Told the epoch's mean metrics."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put :meth:`state` back."""


class RceObjective(Objective):
    """Reward-weighted cross-entropy, or its listwise form."""

    def __init__(self, tau_start: float, tau_end: float, form: str = "ce", rewards: str = "raw") -> None:
        self.tau = (tau_start, tau_end)
        self.rewards = rewards
        self.function = RCE_LOSSES.get(form)
        self._weights_from = torch.empty(0)

    def begin(self, train: Groups) -> None:
        self._weights_from = losses.group_rewards(train.rewards, train.mask, self.rewards)

    def loss(self, batch: Batch, scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        start, end = self.tau
        tau = start + (end - start) * batch.progress  # linear over the phase's steps
        loss = self.function(scores.log_probs, self._weights_from[batch.rows], batch.groups.mask, tau)
        with torch.no_grad():
            kl = losses.group_kl(scores.log_probs, batch.ref_log_probs, batch.groups.mask)
        metrics = {"tau": torch.tensor(tau), "kl": kl}
        return loss, metrics


@dataclass
class KlControl:
    """The weight of the KL. It is what the user set, unless ``adaptive``: then it follows ``target``."""

    beta: float
    adaptive: bool = False
    target: float = 0.1
    band: float = 1.5

    def update(self, kl: float) -> None:
        """After an epoch with mean ``kl``: doubled above band x target, halved below target / band."""
        if not self.adaptive:
            return
        if kl > self.band * self.target:
            self.beta *= 2
        elif kl < self.target / self.band:
            self.beta /= 2


class GrpoObjective(Objective):
    """GRPO: clipped surrogate (``clipped``; ``online`` has the same loss), or the exact bandit (``exact``)."""

    def __init__(
        self,
        kl: KlControl,
        mode: str = "clipped",
        scale: str = "group",
        eps_low: float = 0.2,
        eps_high: float = 0.2,
        pool_kl: bool = False,
        weigh_kl: bool = True,
    ) -> None:
        """``weigh_kl``: k3 weighted by :func:`losses.policy_weights`, for pointers that the policy did not draw."""
        self.kl, self.mode, self.scale, self.weigh_kl = kl, mode, scale, weigh_kl
        self.eps = (eps_low, eps_high)
        self.wants_old, self.wants_tree = mode != "exact", mode == "exact"
        self.wants_ref_steps = pool_kl and mode == "exact"
        self._train: Groups | None = None
        self._advantages: Tensor | None = None
        self._old = torch.empty(0)

    def begin(self, train: Groups) -> None:
        self._train = train
        self._advantages = None
        if self.scale != "batch":
            self._advantages = losses.group_advantages(train.rewards, train.mask, self.scale)

    def begin_epoch(self, old_log_probs: Tensor | None) -> None:
        if old_log_probs is not None:
            self._old = old_log_probs

    def _advantages_of(self, batch: Batch) -> Tensor:
        if self._advantages is not None:
            return self._advantages[batch.rows]
        # The batch's scale is that of the whole batch, also where several processes share it.
        whole = losses.group_advantages(self._train.rewards[batch.whole], self._train.mask[batch.whole], "batch")
        place = {int(row): i for i, row in enumerate(batch.whole)}
        return whole[[place[int(row)] for row in batch.rows]]

    def loss(self, batch: Batch, scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch.groups.mask
        if self.mode != "exact":
            weights = losses.policy_weights(scores.log_probs, mask) if self.weigh_kl else None
            old, ref, advantages = self._old[batch.rows], batch.ref_log_probs, self._advantages_of(batch)
            return losses.grpo_clipped_loss(
                scores.log_probs, old, ref, advantages, mask, *self.eps, self.kl.beta, weights
            )
        scored_beta = 0.0 if self.wants_ref_steps else self.kl.beta
        loss, metrics = losses.grpo_exact_loss(
            scores.log_probs, batch.ref_log_probs, self._advantages_of(batch), mask, scored_beta
        )
        if self.wants_ref_steps:
            pool_kl = losses.step_kl(scores.steps, batch.ref_steps, batch.groups.pointers, mask, scores.stop)
            loss = loss + self.kl.beta * pool_kl
            metrics["kl_scored"], metrics["kl"] = metrics["kl"], pool_kl.detach()
        return loss, metrics

    def end_epoch(self, metrics: dict[str, float]) -> None:
        self.kl.update(metrics["kl"])

    def state(self) -> dict[str, Any]:
        return {"kl_beta": self.kl.beta}

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl.beta = state["kl_beta"]
