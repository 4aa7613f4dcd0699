"""The selector's forward pass, one query and one pointer at a time, with torch's own attention module.

Written from the architecture's description (docs/training.md; docs/formats.md for the original Lever-Plus's files),
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
    values, raw = [], []
    for position in range(len(vectors)):
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
        raw.append(float(score / 0.1))
        values.append(torch.tensor(-math.inf) if position in picked else score / 0.1)
    if config.stop:
        values.append(stop_logit(weights, state, raw, picked))
    return torch.stack([v.reshape(()) for v in values])


def stop_logit(weights, state, raw, picked):
    """STOP's logit: the best remaining score, plus a small network of the state and of what the scores say."""
    left = sorted((raw[i] for i in range(len(raw)) if i not in picked), reverse=True)
    first, second = (left[0] if left else 0.0), (left[1] if len(left) > 1 else 0.0)
    mine = [raw[i] for i in picked]
    high, low = (max(mine), min(mine)) if mine else (0.0, 0.0)
    confidence = first - math.log(sum(math.exp(x) for x in left)) if left else -math.log(len(raw))
    known = [float(min(len(picked), 4) == n) for n in range(5)] + [float(bool(left))]
    known += [x * 0.1 for x in (first, second, first - second, high, low, low - first)] + [confidence]
    seen = torch.cat([state, torch.tensor(known)])
    hidden = torch.tanh(weights["stop.hidden.weight"] @ seen + weights["stop.hidden.bias"])
    return first + weights["stop.linear.weight"][0] @ hidden + weights["stop.linear.bias"][0]


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
    """The greedy pointer: at most ``shots`` picks, fewer where STOP is the most likely choice."""
    weights = {name: value.detach() for name, value in selector.state_dict().items()}
    start, vectors = encode(weights, selector.config.num_layers, query, pool)
    state, picked = start, []
    for _ in range(shots):
        choice = int(step_logits(selector, weights, start, state, vectors, picked).argmax())
        if choice == len(vectors):
            break
        picked.append(choice)
        state = advance(selector, weights, state, vectors[picked[-1]])
    return picked
