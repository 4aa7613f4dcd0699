"""The original Lever-Plus's selector, restated in numpy from its published description; float64, query by query."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attend(weights, layer, query, pool):
    """Single-head attention of one query [h] over a pool [K, h]."""
    h = len(query)
    w = weights[f"cross_attn_layers.{layer}.in_proj_weight"]
    b = weights[f"cross_attn_layers.{layer}.in_proj_bias"]
    q = w[:h] @ query + b[:h]
    keys = pool @ w[h : 2 * h].T + b[h : 2 * h]
    values = pool @ w[2 * h :].T + b[2 * h :]
    mixed = softmax(keys @ q / np.sqrt(h)) @ values
    return (
        weights[f"cross_attn_layers.{layer}.out_proj.weight"] @ mixed
        + weights[f"cross_attn_layers.{layer}.out_proj.bias"]
    )


def layer_norm(x, weight, bias, eps=1e-5):
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def unit(x):
    return x / max(np.linalg.norm(x), 1e-12)


def forward(weights, layers, query, pool, shots, given=None):
    """(logits [shots, K] with chosen positions at -100, picks [shots]) for query [d] and pool [K, d].

    ``given``: the picks to follow instead of the best ones.
    """
    weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    query, pool = np.asarray(query, dtype=np.float64), np.asarray(pool, dtype=np.float64)
    if "input_proj.weight" in weights:
        query, pool = weights["input_proj.weight"] @ query, pool @ weights["input_proj.weight"].T
    for i in range(layers):
        attended = attend(weights, i, query, pool) + query
        query = layer_norm(attended, weights[f"attn_norms.{i}.weight"], weights[f"attn_norms.{i}.bias"])
    state = unit(weights["query_proj.weight"] @ query)
    candidates = np.stack([unit(weights["cand_proj.weight"] @ c) for c in pool])
    logits, picks = [], []
    for step in range(shots):
        scores = candidates @ state / 0.1
        scores[picks] = -100.0
        logits.append(scores)
        picks.append(int(scores.argmax()) if given is None else given[step])
        if "query_update_gate.weight" in weights:
            c = candidates[picks[-1]]
            x = weights["query_update_gate.weight"] @ np.concatenate([state, c]) + weights["query_update_gate.bias"]
            gate = 1 / (1 + np.exp(-x))
            state = unit(gate * state + (1 - gate) * c)
    return np.stack(logits), picks
