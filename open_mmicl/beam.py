"""Beam search over any next-token function, equal to transformers' ``generate`` (5.23) step by step.

Written for *tree* decoding: the caller keeps every beam's tokens and is told each new beam's parent, so no key/value
cache is ever reordered or copied per beam.
"""

from collections.abc import Callable

import torch

from open_mmicl.interface.base import GenerationSettings

_NEVER = -1.0e9  # transformers' own marker of an impossible score

# (tokens (B, n), parents (B, n), step) -> logits (B, n, V) of the token after each
NextLogits = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def beam_search(
    first: torch.Tensor, next_logits: NextLogits, settings: GenerationSettings, end: torch.Tensor
) -> list[list[int]]:
    """Best continuation of each prompt.

    Args:
        first: logits (B, V) of the first new token.
        next_logits: called for steps 1, 2, … with the chosen tokens and the beams that they extend.
        end: (n_end,) token ids that finish an answer.

    Returns: token ids of each prompt's answer, an end token included where one was generated.
    """
    if settings.num_beams == 1:
        return _greedy(first, next_logits, settings, end)
    beams, steps = settings.num_beams, settings.max_new_tokens
    batch, device = first.shape[0], first.device
    keep = max(2, 1 + len(end)) * beams  # enough that `beams` unfinished ones are always among them
    is_top = torch.arange(keep, device=device) < beams
    log_probs = first.float().log_softmax(-1)  # (B, V)
    running = torch.full((batch, beams, steps), -1, device=device)
    finished = running.clone()
    finished_scores = torch.full((batch, beams), _NEVER, device=device)
    is_finished = torch.zeros(batch, beams, dtype=torch.bool, device=device)
    improvable = torch.ones(batch, 1, dtype=torch.bool, device=device)
    for step in range(steps):
        top_scores, top = highest(log_probs, keep)  # (B, keep)
        vocabulary = first.shape[-1]
        parents, tokens = top // vocabulary, top % vocabulary
        candidates = running.gather(1, parents[..., None].expand(-1, -1, steps)).clone()
        candidates[:, :, step] = tokens
        stops = torch.isin(tokens, end) | (step + 1 == steps)
        chosen = _first_highest(top_scores + stops.float() * _NEVER, beams)
        running = _take(candidates, chosen)
        running_scores = (top_scores + stops.float() * _NEVER).gather(1, chosen)
        final = top_scores / ((step + 1) ** settings.length_penalty)
        final = final + (~improvable).float() * _NEVER + (~(stops & is_top)).float() * _NEVER
        merged = torch.cat([finished_scores, final], dim=1)
        best = _first_highest(merged, beams)
        finished = _take(torch.cat([finished, candidates], dim=1), best)
        finished_scores = merged.gather(1, best)
        is_finished = torch.cat([is_finished, stops & is_top], dim=1).gather(1, best)
        best_possible = running_scores[:, :1] / ((step + 1) ** settings.length_penalty)
        worst = torch.where(is_finished, finished_scores.min(dim=1, keepdim=True)[0], _NEVER)
        improvable = improvable & (best_possible > worst).any(dim=1, keepdim=True)
        if step + 1 == steps or not bool(improvable.any()):
            break
        logits = next_logits(running[:, :, step], parents.gather(1, chosen), step + 1)  # (B, beams, V)
        log_probs = (logits.float().log_softmax(-1) + running_scores[..., None]).flatten(1)
    return [[t for t in row if t >= 0] for row in finished[:, 0].tolist()]


class Ancestry:
    """Which of the tokens generated so far each beam's next one sees, where they all lie in one row: its ancestors."""

    def __init__(self, batch: int, beams: int, device: torch.device):
        self._itself = torch.eye(beams, dtype=torch.bool, device=device).expand(batch, -1, -1)
        self._seen = self._itself[..., :0]

    def grow(self, parents: torch.Tensor) -> torch.Tensor:
        """(B, beams, beams · steps) bool after one more token per beam; ``parents`` (B, beams): what each extends.

        A new beam sees what its parent saw, the parent's token included, and itself.
        """
        inherited = self._seen.gather(1, parents[..., None].expand(-1, -1, self._seen.shape[-1]))
        self._seen = torch.cat([inherited, self._itself], dim=-1)
        return self._seen


def highest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` highest of (B, n) values and their places, highest first, of equal ones the lowest place first.

    ``topk`` leaves open which of equal values it takes. Ties are rare, so they are only looked for in its result (one
    place more than wanted) and put right in the rows that have them.
    """
    found, places = values.topk(min(count + 1, values.shape[1]), dim=1)
    tied = (found[:, 1:] == found[:, :-1]).any(dim=1)
    for row in tied.nonzero().flatten().tolist():
        reach = (values[row] >= found[row, count - 1]).nonzero().flatten()  # in ascending order
        places[row, :count] = reach[_first_highest(values[row, reach][None], count)[0]]
    return found[:, :count], places[:, :count]


def _first_highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the ``count`` highest of a few values (B, n), of equal ones the first first."""
    return values.sort(dim=1, descending=True, stable=True)[1][:, :count]


def _greedy(
    first: torch.Tensor, next_logits: NextLogits, settings: GenerationSettings, end: torch.Tensor
) -> list[list[int]]:
    token = first.float().argmax(-1)  # (B,)
    done = torch.isin(token, end)
    found = [token]
    for step in range(1, settings.max_new_tokens):
        if bool(done.all()):
            break
        logits = next_logits(token[:, None], torch.zeros_like(token)[:, None], step)[:, 0]
        token = torch.where(done, -1, logits.float().argmax(-1))
        done = done | torch.isin(token, end)
        found.append(token)
        token = token.clamp(min=0)
    return [[t for t in row if t >= 0] for row in torch.stack(found, dim=1).tolist()]


def _take(sequences: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return sequences.gather(1, chosen[..., None].expand(-1, -1, sequences.shape[-1]))
