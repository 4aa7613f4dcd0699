"""RCE and GRPO one number at a time in plain Python, and the training epoch that works pointer by pointer."""

import math
import statistics

import torch
from torch import nn
from torch.nn import functional


def advantages(rewards):
    """Published GRPO: (r - mean) / (std + 1e-4) with Bessel's correction; constant or single groups say nothing."""
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(r - mean) / (std + 1e-4) for r in rewards]


def softmax(values):
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def rce(groups, tau):
    """``groups``: per query a list of (log_prob, reward)."""
    losses = []
    for group in groups:
        weights = softmax([r / tau for _, r in group])
        losses.append(-sum(w * lp for w, (lp, _) in zip(weights, group, strict=True)))
    return statistics.fmean(losses)


def listwise(groups, tau):
    losses = []
    for group in groups:
        target = softmax([r / tau for _, r in group])
        q = softmax([lp for lp, _ in group])
        losses.append(-sum(t * math.log(p) for t, p in zip(target, q, strict=True)))
    return statistics.fmean(losses)


def grpo(groups, eps_low, eps_high, beta):
    """``groups``: per query a list of (log_prob, old, ref, advantage) -> loss."""
    losses = []
    for group in groups:
        terms = []
        for log_prob, old, ref, advantage in group:
            ratio = math.exp(log_prob - old)
            clipped = min(max(ratio, 1 - eps_low), 1 + eps_high)
            k3 = math.exp(ref - log_prob) - (ref - log_prob) - 1
            terms.append(-min(ratio * advantage, clipped * advantage) + beta * k3)
        losses.append(statistics.fmean(terms))
    return statistics.fmean(losses)


def exact(groups, beta):
    """``groups``: per query a list of (log_prob, ref, reward) -> loss."""
    losses = []
    for group in groups:
        q, q_ref = softmax([g[0] for g in group]), softmax([g[1] for g in group])
        losses.append(sum(-p * g[2] + beta * p * math.log(p / r) for p, r, g in zip(q, q_ref, group, strict=True)))
    return statistics.fmean(losses)


class NaiveSelector(nn.Module):
    """The default architecture as plain modules, for one query at a time."""

    def __init__(self, dim, hidden=256):
        super().__init__()
        self.input_proj = nn.Linear(dim, hidden, bias=False)
        self.attention = nn.MultiheadAttention(hidden, 1, batch_first=True)
        self.norm = nn.LayerNorm(hidden)
        self.query_proj = nn.Linear(hidden, hidden, bias=False)
        self.cand_proj = nn.Linear(hidden, hidden, bias=False)

    def log_prob(self, query, pool, pointer):
        """query (d,), pool (K, d), pointer list -> scalar; the pool is encoded for every pointer."""
        q, c = self.input_proj(query).view(1, 1, -1), self.input_proj(pool)[None]
        q = self.norm(q + self.attention(q, c, c)[0])
        q = functional.normalize(self.query_proj(q)[0, 0], dim=-1)
        c = functional.normalize(self.cand_proj(c)[0], dim=-1)
        scores = c @ q / 0.1
        total, taken = 0.0, torch.zeros(len(scores), dtype=torch.bool)
        for position in pointer:
            total = total + scores.masked_fill(taken, -100.0).log_softmax(0)[position]
            taken = taken.clone()
            taken[position] = True
        return total


def naive_epoch(phase, selector, optimiser, queries, kl_beta=0.05, tau=1.0, batch=4):
    """One epoch of per-pointer training. ``queries``: list of (query (d,), pool (K, d), pointers, rewards)."""
    old = None
    if phase == "grpo":
        with torch.no_grad():
            old = [[float(selector.log_prob(q, pool, p)) for p in pointers] for q, pool, pointers, _ in queries]
    for start in range(0, len(queries), batch):
        optimiser.zero_grad()
        for index in range(start, min(start + batch, len(queries))):
            query, pool, pointers, rewards = queries[index]
            log_probs = [selector.log_prob(query, pool, pointer) for pointer in pointers]
            if phase == "rce":
                weights = softmax([r / tau for r in rewards])
                loss = -sum(w * lp for w, lp in zip(weights, log_probs, strict=True))
            else:
                loss = 0.0
                for lp, before, a in zip(log_probs, old[index], advantages(rewards), strict=True):
                    ratio = (lp - before).exp()
                    difference = before - lp
                    k3 = difference.exp() - difference - 1
                    loss = loss - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) + kl_beta * k3
                loss = loss / len(pointers)
            (loss / batch).backward()
        nn.utils.clip_grad_norm_(selector.parameters(), 1.0)
        optimiser.step()
