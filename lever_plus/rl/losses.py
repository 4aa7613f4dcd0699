"""The losses of RCE and GRPO: pure tensor functions, no configuration, no I/O.

Shape legend: B queries, M pointers per query, S picks, K pool positions. ``mask`` is true where a query has a
pointer; what stands elsewhere never matters (it may be NaN). A loss is the mean over the queries that have one.
"""

import math

import torch
from torch import Tensor

from lever_plus.registries import RCE_LOSSES
from lever_plus.selectors.policy import decisions

STD_EPSILON = 1e-4  # of the advantages' standard deviation


def _clean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros_like(values))


def mean_over_groups(values: Tensor, mask: Tensor) -> Tensor:
    """Mean within each query's group, then over the queries that have pointers: (B, M) -> scalar."""
    size = mask.sum(1)
    within = _clean(values, mask).sum(1) / size.clamp(min=1)  # (B,)
    return within.sum() / (size > 0).sum().clamp(min=1)


def group_advantages(rewards: Tensor, mask: Tensor, scale: str = "group") -> Tensor:
    """Advantages relative to the query's group: (r - mean) / (std + 1e-4), std with Bessel's correction.

    Args:
        rewards: (B, M). mask: bool (B, M).
        scale: ``group`` divides by the group's standard deviation, ``batch`` by that of the centred rewards of
            all groups, ``none`` does not divide.

    Returns: (B, M), 0 outside the mask. Equal rewards get equal advantages; a group whose rewards are all
    equal, or that has one member, gets exact zeros (it says nothing about which pointer is better).

    Source: Shao et al. 2024 (DeepSeekMath), eq. 3 and following; ``none``: Liu et al. 2025 (Dr. GRPO).
    """
    count = mask.sum(1, keepdim=True)  # (B, 1)
    kept = _clean(rewards, mask)
    mean = kept.sum(1, keepdim=True) / count.clamp(min=1)
    centred = _clean(rewards - mean, mask & ~zero_variance(rewards, mask).unsqueeze(1))
    if scale == "none":
        return centred
    if scale == "group":
        variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    elif scale == "batch":
        variance = centred.square().sum() / (count.sum() - 1).clamp(min=1)
    else:
        raise ValueError(f"unknown advantage scale {scale!r}")
    return centred / (variance.sqrt() + STD_EPSILON)


def zero_variance(rewards: Tensor, mask: Tensor) -> Tensor:
    """bool (B,): the group's rewards are all equal, or it has fewer than two members."""
    high = rewards.masked_fill(~mask, -math.inf).amax(1)
    low = rewards.masked_fill(~mask, math.inf).amin(1)
    return high <= low


def group_rewards(rewards: Tensor, mask: Tensor, form: str = "raw") -> Tensor:
    """Rewards as RCE weighs them: ``raw``, ``zscore`` (within the group), or ``rank`` (mid-ranks in [-1, 1])."""
    if form == "raw":
        return _clean(rewards, mask)
    if form == "zscore":
        return group_advantages(rewards, mask, "group")
    if form != "rank":
        raise ValueError(f"unknown form of rewards {form!r}")
    other = mask.unsqueeze(1)  # (B, 1, M)
    difference = rewards.unsqueeze(2) - rewards.unsqueeze(1)  # (B, M, M)
    balance = (((difference > 0) & other).sum(2) - ((difference < 0) & other).sum(2)).to(rewards.dtype)
    return _clean(balance / (mask.sum(1, keepdim=True) - 1).clamp(min=1), mask)


def _group_softmax(values: Tensor, mask: Tensor) -> Tensor:
    """Softmax within each group; a query without pointers gets zeros."""
    low = torch.finfo(values.dtype).min
    return _clean(torch.softmax(torch.where(mask, values, torch.full_like(values, low)), 1), mask)


@RCE_LOSSES.add("ce", "weighted cross-entropy")
def rce_loss(log_probs: Tensor, rewards: Tensor, mask: Tensor, tau: float) -> Tensor:
    """Reward-weighted cross-entropy: sum_b w_b (-log pi(s_b)), w = softmax(r / tau) within the group.

    (B, M) x 3 -> scalar, the mean over queries with pointers. Source: the plan, experiment 1.
    """
    weights = _group_softmax(rewards / tau, mask)  # (B, M)
    return -_mean_of_sums(weights * _clean(log_probs, mask), mask)


@RCE_LOSSES.add("listwise", "cross-entropy within the group")
def listwise_loss(log_probs: Tensor, rewards: Tensor, mask: Tensor, tau: float) -> Tensor:
    """Cross-entropy between softmax(r / tau) and pi renormalised over the group (ListNet, Cao et al. 2007).

    Unlike :func:`rce_loss` it is minimal when the group's relative probabilities are right: no probability mass
    is spent on imitating failures. (B, M) x 3 -> scalar.
    """
    weights = _group_softmax(rewards / tau, mask)
    return -_mean_of_sums(weights * _clean(group_log_softmax(log_probs, mask), mask), mask)


def group_log_softmax(log_probs: Tensor, mask: Tensor) -> Tensor:
    """log q(s) = log pi(s) - logsumexp over the scored group; 0 outside the mask. (B, M) -> (B, M)."""
    low = torch.finfo(log_probs.dtype).min
    return _clean(torch.where(mask, log_probs, torch.full_like(log_probs, low)).log_softmax(1), mask)


def tree_log_probs(step_log_probs: Tensor, pointers: Tensor, mask: Tensor) -> Tensor:
    """log q(s) of a policy that may stop, on the tree of its scored pointers: normalised step by step.

    At each prefix the policy stops with its own P(STOP) or goes on with the rest, and what it goes on with is its
    choice among the prefix's scored next picks. Renormalising whole pointers instead (:func:`group_log_softmax`) sets
    P(STOP), one probability, against products of picks from the whole pool: the empty pointer then has nearly all of q
    however rarely the policy stops, and nothing is left to learn. Where a prefix is not scored itself its P(STOP) does
    not count, and where nothing scored goes on from it, it stops for certain.

    Args: log-probabilities (B, M, S, K + 1) along each pointer's prefix, STOP last; pointers (B, M, S), distinct within
        a group, -1 after their end; mask bool (B, M).

    Returns: (B, M), 0 outside the mask; the exponentials of a group sum to 1.
    """
    shots, pool = pointers.shape[2], step_log_probs.shape[3] - 1
    length = (pointers >= 0).sum(2)  # (B, M)
    same = mask.unsqueeze(1) & mask.unsqueeze(2)  # (B, M, M): both have the first t picks in common, here t = 0
    found = torch.zeros_like(step_log_probs[:, :, 0, 0])
    for t in range(shots):
        longer = same & (length > t).unsqueeze(1)  # [b, i, j]: j goes on from i's first t picks
        ends = (same & (length == t).unsqueeze(1)).any(2)  # those picks are a scored pointer themselves
        follows = longer.any(2)
        picked = pointers[:, :, t]
        one_hot = torch.nn.functional.one_hot(picked.clamp(min=0), pool).to(step_log_probs.dtype)
        children = torch.bmm(longer.to(one_hot.dtype), one_hot) > 0  # (B, M, K)
        here, stop = step_log_probs[:, :, t, :pool], step_log_probs[:, :, t, pool]
        among = torch.where(children, here, torch.full_like(here, torch.finfo(here.dtype).min)).logsumexp(2)
        own = here.gather(2, picked.clamp(min=0).unsqueeze(2)).squeeze(2)
        going_on = torch.where(ends, _log_not(stop), 0.0) + own - among
        found = found + torch.where(mask & (length > t), going_on, 0.0)
        found = found + torch.where(mask & (length == t) & follows, stop, 0.0)
        same = longer & (picked.unsqueeze(1) == picked.unsqueeze(2))
    return _clean(found, mask)


def _log_not(log_probs: Tensor) -> Tensor:
    """log(1 - p) from log p, finite and with a finite gradient also where p rounds to 1."""
    return torch.log(-torch.expm1(log_probs.clamp(max=-1e-6)))


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """The k3 estimator of KL(pi || pi_ref) at samples of pi: exp(d) - d - 1 with d = log pi_ref - log pi.

    Non-negative, 0 where the two agree. Source: Schulman 2020, "Approximating KL divergence"; DeepSeekMath eq. 4.
    """
    difference = ref_log_probs - log_probs
    return difference.exp() - difference - 1


def grpo_clipped_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    eps_low: float,
    eps_high: float,
    kl_beta: float,
    kl_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's clipped surrogate, plus ``kl_beta`` times the k3 KL to the reference policy.

    -mean[min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)] + kl_beta mean[k3], ratio = pi / pi_old of the
    whole pointer; means within the group, then over queries.

    Args: all (B, M); ``old_log_probs``, ``ref_log_probs`` and ``advantages`` are constants (no gradient).
        ``kl_weights``: weights of the k3 terms, summing to 1 within a group, for pointers that pi did not draw
        (see :func:`policy_weights`); None is the published plain mean.

    Returns: the loss, and detached scalars: ``policy_loss``; ``kl``, the k3 term as it enters the loss;
    ``kl_group``, the KL of the two policies renormalised over the group; ``ratio_mean``; ``clip_low`` and
    ``clip_high``, fractions of pointers whose gradient was cut at that side; ``entropy_sample``, -mean log pi.

    Source: Shao et al. 2024 (DeepSeekMath) eq. 3-4; separate bounds: Yu et al. 2025 (DAPO).
    """
    log_probs = _clean(log_probs, mask)
    # Beyond e^88 float32 has no numbers: a clipped pointer's gradient would be 0 * inf.
    ratio = (log_probs - _clean(old_log_probs, mask)).clamp(max=88.0).exp()
    advantages = _clean(advantages, mask)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    policy_loss = -mean_over_groups(surrogate, mask)
    ref = _clean(ref_log_probs, mask)
    if kl_weights is None:
        kl = mean_over_groups(kl_k3(log_probs, ref), mask)
    else:
        kl = _mean_of_sums(_clean(_weighted_k3(kl_weights, log_probs, ref), mask), mask)
    # 0 * inf would be NaN: without the term its size must not matter.
    loss = policy_loss + kl_beta * kl if kl_beta else policy_loss
    metrics = {
        "policy_loss": policy_loss,
        "kl": kl,
        "kl_group": group_kl(log_probs, ref_log_probs, mask),
        "ratio_mean": mean_over_groups(ratio, mask),
        "clip_low": mean_over_groups(((ratio < 1 - eps_low) & (advantages < 0)).float(), mask),
        "clip_high": mean_over_groups(((ratio > 1 + eps_high) & (advantages > 0)).float(), mask),
        "entropy_sample": -mean_over_groups(log_probs, mask),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def policy_weights(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Self-normalised importance weights of a group's pointers under pi: q = pi / sum of pi over the group.

    k3 estimates KL(pi || pi_ref) from samples of pi. The scored pointers come from elsewhere: with plain means a
    pointer that pi has learned to avoid counts exp(log pi_ref - log pi) without bound, although pi hardly ever
    picks it. Weighted by q it counts as often as pi would pick it. No gradient. (B, M) -> float64 (B, M), since four
    picks reach probabilities that float32 rounds to 0.
    """
    return _clean(group_log_softmax(log_probs.detach().double(), mask).exp(), mask)


def _weighted_k3(weights: Tensor, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """q (exp(d) - d - 1) as exp(log q + d) - q (d + 1): a pointer that pi avoids has exp(d) = inf and q = 0."""
    q = weights.double()
    difference = ref_log_probs.double() - log_probs.double()
    return ((q.log() + difference).exp() - q * (difference + 1)).to(log_probs.dtype)


def _mean_of_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Sum within each query's group, then the mean over the queries that have pointers: (B, M) -> scalar."""
    return values.sum(1).sum() / mask.any(1).sum().clamp(min=1)


def group_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """KL(q || q_ref) with both policies renormalised over the scored group, mean over queries."""
    log_q, log_q_ref = group_log_softmax(log_probs, mask), group_log_softmax(ref_log_probs, mask)
    return _mean_of_sums(_clean(log_q.exp(), mask) * (log_q - log_q_ref), mask)


def grpo_exact_loss(
    log_probs: Tensor, ref_log_probs: Tensor, rewards: Tensor, mask: Tensor, kl_beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The group as a fully observed bandit: -sum q R + kl_beta sum q log(q / q_ref), q = pi over the scored set.

    Exact expectations: no ratios, no sampling noise. All (B, M). ``rewards`` may be advantages: subtracting a
    group constant leaves the gradient as it is.

    Returns: the loss, and detached ``policy_loss``, ``kl`` (over the scored set), ``entropy`` (of q).
    Source: docs/training.md, Rewards and losses.
    """
    log_q = group_log_softmax(log_probs, mask)
    q = _clean(log_q.exp(), mask)
    groups = mask.any(1).sum().clamp(min=1)
    policy_loss = -(q * _clean(rewards, mask)).sum() / groups
    kl = group_kl(log_probs, ref_log_probs, mask)
    loss = policy_loss + kl_beta * kl if kl_beta else policy_loss
    entropy = -(q * log_q).sum() / groups
    return loss, {"policy_loss": policy_loss.detach(), "kl": kl.detach(), "entropy": entropy.detach()}


def step_kl(
    step_log_probs: Tensor, ref_step_log_probs: Tensor, pointers: Tensor, mask: Tensor, stop: bool = False
) -> Tensor:
    """KL(pi || pi_ref) over the whole pool at each step, summed along a pointer, averaged over the group.

    Args: step log-probabilities (B, M, S, K), -inf where taken; pointers (B, M, S), -1 after their end. ``stop``: the
        last of the K choices is STOP, and the step at which a pointer stops counts, too.

    Returns: scalar >= 0. It sees probability that leaves the scored set, which a KL over that set cannot.
    """
    probability = step_log_probs.exp()
    possible = torch.isfinite(step_log_probs) & torch.isfinite(ref_step_log_probs)
    difference = torch.where(possible, step_log_probs, 0.0) - torch.where(possible, ref_step_log_probs, 0.0)
    per_step = (torch.where(possible, probability, 0.0) * difference).sum(3)  # (B, M, S)
    return mean_over_groups(per_step.masked_fill(~decisions(pointers, stop), 0.0).sum(2), mask)


def step_entropy(step_log_probs: Tensor, pointers: Tensor, mask: Tensor, stop: bool = False) -> Tensor:
    """Mean entropy of the policy's next-pick distributions along the pointers, in nats. Shapes as in step_kl."""
    possible = torch.isfinite(step_log_probs)
    per_step = -(step_log_probs.exp() * torch.where(possible, step_log_probs, 0.0)).sum(3)
    real = decisions(pointers, stop)
    per_pointer = per_step.masked_fill(~real, 0.0).sum(2) / real.sum(2).clamp(min=1)
    return mean_over_groups(per_pointer, mask)
