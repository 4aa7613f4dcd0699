"""The generic interface with one prefill for all that is asked of a prompt: every answer's score, and the generation.

The model's own cache of keys and values is all that this uses, so nothing here knows a model. Answers follow one
another behind the prompt: each is run on the cache, which is then cut back (or, where a cache cannot be cut, run on a
copy). Beams are rows of the cache, reordered as transformers' ``generate`` does it. Whether all this gives what whole
passes give is tried when a model is loaded, see :func:`shared_prefill`.
"""

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_mmicl.beam import beam_search
from open_mmicl.errors import DamagedInputError, NumericError, foreign
from open_mmicl.interface.base import AnswerScore, GenerationSettings
from open_mmicl.interface.features import EXACT, ROUNDED, trial_prompts
from open_mmicl.interface.prompts import Prompt

_ANSWERS = ("blue", "a long answer")


@dataclasses.dataclass
class Behind:
    """The place behind some prompts: keys and values, mask (B, P), and the next position (..., B, 1) or None."""

    cache: Any
    mask: Tensor
    position: Tensor | None

    def arguments(self, count: int) -> dict[str, Any]:
        """What the model is called with for ``count`` further tokens a row."""
        given = {"past_key_values": self.cache, "use_cache": True}
        if self.position is not None:
            given["position_ids"] = self.position + torch.arange(count, device=self.position.device)
        return given


class SharedPrefill:
    """What a loaded :class:`~open_mmicl.interface.hf_chat.HfChat` is asked, from one pass over each prompt."""

    def __init__(self, lvlm: Any):
        self.lvlm, self.model = lvlm, lvlm.model
        self.end = torch.tensor(lvlm.end_ids, device=self.model.device)

    @torch.inference_mode()
    def ask(
        self,
        prompts: Sequence[Prompt],
        asked: Sequence[Sequence[tuple[str, bool]]],
        settings: GenerationSettings | None,
    ) -> tuple[list[str | None], list[list[AnswerScore]]]:
        """(texts, scores) of a batch; ``asked``: (answer, end) pairs of each prompt; texts are None without settings.

        Raises:
            NumericError: non-finite logits.
        """
        first, start, batch = self.prefill(prompts)
        if not bool(torch.isfinite(first).all()):
            raise NumericError(f"{self.lvlm.name}: non-finite logits")
        self.lvlm.count(batch, prompts)
        scores = self._scores(first, start, asked)
        if settings is None:
            return [None] * len(prompts), scores
        return self._generate(first, start, settings), scores

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[Tensor, "Behind", dict[str, Any]]:
        """(logits (B, V) behind the prompts, the place behind them, the model's inputs)."""
        batch = self.lvlm.prompt_inputs(prompts, "left")
        positions = self._positions(batch)
        given = {} if positions is None else {"position_ids": positions}
        out = self.model(**batch, **given, use_cache=True, **self.lvlm.one_logit())
        after = None if positions is None else positions[..., -1:] + 1
        return out.logits[:, -1], Behind(out.past_key_values, batch["attention_mask"], after), batch

    def _positions(self, batch: dict[str, Any]) -> Tensor | None:
        """Positions (..., B, P) as ``generate`` has the model make them; None where the model takes none."""
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return None
        others = {name: value for name, value in batch.items() if name != "input_ids"}
        return self.model._prepare_position_ids_for_generation(batch["input_ids"], others)

    def _scores(
        self, first: Tensor, place: "Behind", asked: Sequence[Sequence[tuple[str, bool]]]
    ) -> list[list[AnswerScore]]:
        """Scores of every prompt's answers; ``first`` (B, V) are the logits behind the prompts."""
        distinct = [self._distinct(pairs) for pairs in asked]
        found: list[dict[str, list[float]]] = [{} for _ in asked]
        start = first.float().log_softmax(-1)
        for turn in range(max(map(len, distinct), default=0)):  # the prompts' first answers, then their second ones, …
            wanted = [some[turn][1] if turn < len(some) else () for some in distinct]
            log_probs = self.after(place, [ids[:-1] for ids in wanted])  # (B, T, V)
            for row, ids in enumerate(wanted):
                if ids:
                    values = [start[row, ids[0]], *(log_probs[row, i, token] for i, token in enumerate(ids[1:]))]
                    found[row][distinct[row][turn][0]] = torch.stack(values).double().cumsum(0).tolist()
        scores = []
        for values_of, pairs in zip(found, asked, strict=True):
            sizes = [len(self.lvlm.layout.answer_ids(answer)) + end for answer, end in pairs]
            scores.append([AnswerScore(values_of[a][n - 1], n) for (a, _), n in zip(pairs, sizes, strict=True)])
        return scores

    def _distinct(self, pairs: Sequence[tuple[str, bool]]) -> list[tuple[str, tuple[int, ...]]]:
        """The different answers with their tokens; with the one that ends the turn where any pair asks for it."""
        layout, ends = self.lvlm.layout, {answer for answer, end in pairs if end}
        return [
            (answer, (*layout.answer_ids(answer), *layout.closing_ids(answer)[: int(answer in ends)]))
            for answer in dict.fromkeys(answer for answer, _ in pairs)
        ]

    def after(self, place: "Behind", rows: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities (B, T, V) after each token of ``rows`` behind the prompts; the cache stays as it was."""
        longest, mask = max(map(len, rows)), place.mask
        if longest == 0:
            return torch.empty(len(rows), 0, 0, device=mask.device)
        ids = torch.full((len(rows), longest), self.lvlm.tokenizer.pad_token_id, device=mask.device)
        seen = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
            seen[row, : len(tokens)] = 1
        kept = place.cache.is_croppable
        used = dataclasses.replace(place, cache=place.cache if kept else copy.deepcopy(place.cache))
        out = self.model(input_ids=ids, attention_mask=torch.cat([mask, seen], 1), **used.arguments(longest))
        if kept:
            place.cache.crop(-longest)
        self.lvlm.count_more(int(seen.sum()), ids.numel())
        return out.logits.float().log_softmax(-1)

    def _generate(self, first: Tensor, place: "Behind", settings: GenerationSettings) -> list[str]:
        """Texts that continue the prompts; takes the cache over."""
        rows, cache, seen = first.shape[0], place.cache, place.mask

        def next_logits(tokens: Tensor, parents: Tensor, step: int) -> Tensor:
            nonlocal seen
            beams = tokens.shape[1]
            if step == 1:
                cache.batch_repeat_interleave(beams)
                seen = seen.repeat_interleave(beams, 0)
                if place.position is not None:
                    place.position = place.position.repeat_interleave(beams, -2)
            else:
                cache.reorder_cache((torch.arange(rows, device=parents.device)[:, None] * beams + parents).flatten())
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
            ids = tokens.reshape(rows * beams, 1)
            out = self.model(input_ids=ids, attention_mask=seen, **place.arguments(1), **self.lvlm.one_logit())
            if place.position is not None:
                place.position = place.position + 1
            self.lvlm.count_more(ids.numel(), ids.numel())
            return out.logits[:, -1].view(rows, beams, -1)

        tokens = beam_search(first, next_logits, settings, self.end)
        return self.lvlm.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def shared_prefill(lvlm: Any) -> tuple[SharedPrefill | None, str]:
    """(shared prefills of an :class:`~open_mmicl.interface.hf_chat.HfChat`, "") where they give what whole passes give,
    else (None, the reason).

    Two prompts of different lengths are asked both ways: log-probabilities of answers of different lengths must be
    equal to 1e-4 and generated texts the same (in 16 bit the logits behind an answer, to their rounding).
    """
    shared = SharedPrefill(lvlm)
    try:
        with foreign("model", lvlm.name, "does not go on from its own cache"), trial_prompts() as prompts:
            reason = _difference(lvlm, shared, prompts)
    except (DamagedInputError, NumericError) as error:
        reason = str(error)[:200]
    return (None, reason) if reason else (shared, "")


@torch.inference_mode()
def _difference(lvlm: Any, shared: SharedPrefill, prompts: Sequence[Prompt]) -> str:
    """In what answers from one prefill differ from those of whole passes; "" where they do not."""
    exact = lvlm.model.dtype == torch.float32
    settings = GenerationSettings(max_new_tokens=4, num_beams=3)
    pairs = [(answer, end) for answer in _ANSWERS for end in (False, True)]
    texts, scores = shared.ask(prompts, [pairs] * len(prompts), settings)
    if exact:
        for place, (answer, end) in enumerate(pairs):
            plain = lvlm.score_batch(prompts, [answer] * len(prompts), end)
            apart = max(abs(a.log_prob - row[place].log_prob) for a, row in zip(plain, scores, strict=True))
            if apart > EXACT:
                return f"log-probabilities differ by {apart:.1e} from those of whole passes"
        if texts != lvlm.generate_batch(prompts, settings):
            return "generated texts differ from those of transformers' generate"
        return ""
    ids = list(lvlm.layout.answer_ids(_ANSWERS[1]))
    ours = shared.after(shared.prefill(prompts)[1], [ids] * len(prompts))[:, -1]
    for prompt, own in zip(prompts, ours, strict=True):
        closed = lvlm.layout.text(prompt, _ANSWERS[1])
        whole = lvlm.inputs([closed], [prompt.images], "right")
        place = whole["input_ids"].shape[1] - len(lvlm.layout.closing_ids(_ANSWERS[1])) - 1
        plain = lvlm.model(**whole).logits[0, place].float().log_softmax(-1)
        apart = float((plain - own).std() / plain.std())
        if apart > ROUNDED:
            return f"log-probabilities differ by {apart:.1e} of their spread from those of whole passes"
    return ""
