"""What a policy is worth on scored groups: pure functions of log-probabilities and rewards.

Shape legend: B queries, M pointers, S picks. Every function takes all queries of the split at once.
"""

import torch
from torch import Tensor

from lever_plus.rl.losses import group_log_softmax, rce_loss


def expected_value(log_probs: Tensor, values: Tensor, mask: Tensor) -> float:
    """Mean over queries of sum_s q(s) value(s), q = pi renormalised over the scored group. All (B, M)."""
    q = torch.where(mask, group_log_softmax(log_probs, mask).exp(), 0.0)
    per_query = (q * torch.where(mask, values, 0.0)).sum(1)
    return (per_query.sum() / mask.any(1).sum().clamp(min=1)).item()


def pairwise_accuracy(log_probs: Tensor, rewards: Tensor, mask: Tensor) -> float:
    """Share of the pointer pairs of a group with different rewards that pi orders as the rewards do (ties 1/2)."""
    better = (rewards.unsqueeze(2) > rewards.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)  # (B, M, M)
    difference = log_probs.unsqueeze(2) - log_probs.unsqueeze(1)
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    pairs = better.sum()
    return (right[better].sum() / pairs).item() if pairs else 0.5


def greedy_regret(greedy: Tensor, pointers: Tensor, rewards: Tensor, mask: Tensor) -> tuple[float, int]:
    """(mean of best reward of the group minus the greedy pointer's, number of queries whose greedy was scored).

    ``greedy`` (B, S), ``pointers`` (B, M, S), the rest (B, M). The regret is 0 where none was scored.
    """
    same = (pointers == greedy.unsqueeze(1)).all(2) & mask  # (B, M)
    scored = same.any(1)
    if not scored.any():
        return 0.0, 0
    best = rewards.masked_fill(~mask, -torch.inf).amax(1)
    own = torch.where(same, rewards, -torch.inf).amax(1)
    return (best - own)[scored].mean().item(), int(scored.sum())


def greedy_value(greedy: Tensor, pointers: Tensor, values: Tensor, mask: Tensor) -> float:
    """Mean over queries of the greedy pointer's value, 0 where it is none of the group's: for groups that hold every
    pointer that is worth anything (labels). Shapes as in :func:`greedy_regret`.
    """
    same = (pointers == greedy.unsqueeze(1)).all(2) & mask  # (B, M)
    return torch.where(same, values, 0.0).sum(1).mean().item()


def validation_metrics(
    log_probs: Tensor,
    rewards: Tensor,
    accuracy: Tensor,
    mask: Tensor,
    greedy: Tensor,
    pointers: Tensor,
    tau: float,
    within: Tensor | None = None,
) -> dict[str, float]:
    """The validation quantities of docs/training.md, Log, and ``metric``, by which checkpoints are compared.

    ``metric`` is the expected VQA accuracy under q over the scored pointers of held-out queries, where the data
    has accuracies; else the expected reward. It is what inference is judged by, on queries not trained on,
    and uses every scored pointer of a query, so it varies far less than the accuracy of the one greedy pick.
    ``within``: the log-probabilities of which q is made, where these are not ``log_probs`` (a policy that may stop).
    """
    weighed = log_probs if within is None else within
    regret, scored = greedy_regret(greedy, pointers, rewards, mask)
    metrics = {
        "val_rce_loss": rce_loss(log_probs, rewards, mask, tau).item(),
        "val_pairwise_accuracy": pairwise_accuracy(log_probs, rewards, mask),
        "val_expected_reward": expected_value(weighed, rewards, mask),
        "val_greedy_regret": regret,
        "val_greedy_scored": float(scored),
    }
    if bool(torch.isfinite(accuracy[mask]).all()):
        metrics["val_expected_accuracy"] = expected_value(weighed, accuracy, mask)
    metrics["metric"] = metrics.get("val_expected_accuracy", metrics["val_expected_reward"])
    return metrics
