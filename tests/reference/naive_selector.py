"""The selector's forward pass, one query and one pointer at a time, with torch's own attention module.

Written from the architecture's description (docs/training.md; docs/formats.md for the existing project's files),
not from lever_plus/selectors; it reads a PointerSelector's weights by name.
"""

import math

import torch
from torch import nn
from torch.nn import functional


def attention_module(weights, layer, hidden_dim):
    """torch's MultiheadAttention with a layer's weights (zero biases where the selector has none)."""
    prefix = f"cross_attn_layers.{layer}."
    module = nn.MultiheadAttention(hidden_dim, 1, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.copy_(weights[prefix + "in_proj_weight"])
        module.out_proj.weight.copy_(weights[prefix + "out_proj.weight"])
        module.in_proj_bias.copy_(weights.get(prefix + "in_proj_bias", torch.zeros(3 * hidden_dim)))
        module.out_proj.bias.copy_(weights.get(prefix + "out_proj.bias", torch.zeros(hidden_dim)))
    return module.eval()


def encode(weights, layers, query, pool):
    """One query (d,), one pool (K, d) -> normalised query vector (h,), candidate vectors (K, h)."""
    projection = weights.get("input_proj.weight")
    q = query if projection is None else projection @ query
    c = pool if projection is None else pool @ projection.T
    hidden = q.shape[0]
    for layer in range(layers):
        attended, _ = attention_module(weights, layer, hidden)(q.view(1, 1, -1), c[None], c[None])
        norm = f"attn_norms.{layer}."
        q = functional.layer_norm(q + attended.view(-1), (hidden,), weights[norm + "weight"], weights[norm + "bias"])
    q = weights["query_proj.weight"] @ q
    c = c @ weights["cand_proj.weight"].T
    return q / q.norm(), c / c.norm(dim=1, keepdim=True)


def step_logits(selector, weights, start, state, vectors, picked):
    """Logits of every candidate after ``picked``, by a loop over candidates; STOP's comes last where there is one."""
    config = selector.config
    values = []
    for position in range(len(vectors)):
        if position in picked:
            values.append(torch.tensor(-math.inf))
            continue
        c = vectors[position]
        if config.scorer == "dot":
            score = state @ c
        elif config.scorer == "bilinear":
            score = state @ weights["scorer.weight"] @ c
        else:
            mixed = torch.tanh(weights["scorer.query.weight"] @ state + weights["scorer.candidate.weight"] @ c)
            score = state @ c + weights["scorer.weight"] @ mixed
        if config.mmr and picked:
            strength = functional.softplus(weights["diversity.strength"])[0]
            score = score - strength * max(vectors[p] @ c for p in picked)
        values.append(score / 0.1)
    if config.stop:
        stop = weights["stop.linear.weight"][0] @ state + weights["stop.linear.bias"][0]
        values.append(stop if picked else torch.tensor(-math.inf))
    return torch.stack([v.reshape(()) for v in values])


def advance(selector, weights, state, picked_vector):
    """The query state after a pick."""
    if selector.config.query_update_gate:
        pair = torch.cat([state, picked_vector])
        g = torch.sigmoid(weights["query_update_gate.weight"] @ pair + weights["query_update_gate.bias"])
        new = g * state + (1 - g) * picked_vector
        return new / new.norm()
    if selector.config.gru_state:
        cell = nn.GRUCell(len(state), len(state))
        cell.load_state_dict({k.removeprefix("query_update_gru.cell."): v for k, v in weights.items() if ".cell." in k})
        new = state + cell(picked_vector[None], state[None])[0]
        return new / new.norm()
    return state


@torch.no_grad()
def naive_log_prob(selector, query, pool, pointer):
    """log pi(pointer | query) as the product of its steps' softmax probabilities."""
    weights = {name: value.detach() for name, value in selector.state_dict().items()}
    start, vectors = encode(weights, selector.config.num_layers, query, pool)
    state, picked, total = start, [], 0.0
    for position in pointer:
        logits = step_logits(selector, weights, start, state, vectors, picked)
        total += float(torch.log(torch.softmax(logits, 0)[position]))
        if position == len(vectors):  # STOP
            break
        picked.append(position)
        state = advance(selector, weights, state, vectors[position])
    return total


@torch.no_grad()
def naive_greedy(selector, query, pool, shots):
    """The greedy pointer (without STOP)."""
    weights = {name: value.detach() for name, value in selector.state_dict().items()}
    start, vectors = encode(weights, selector.config.num_layers, query, pool)
    state, picked = start, []
    for _ in range(shots):
        picked.append(int(step_logits(selector, weights, start, state, vectors, picked).argmax()))
        state = advance(selector, weights, state, vectors[picked[-1]])
    return picked
