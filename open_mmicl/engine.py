"""The LVLM engine: every image encoded once, every prompt paid once.

``mode="fast"`` shares prefixes, visual features and prefills (Qwen-VL) or at least batches by length (other models);
``mode="naive"`` is the plain path that it is measured against. Both give the same answers; log-probabilities agree to
1e-4 in fp32. An engine belongs to one process; several processes may share one answer cache.

Composition of forward passes depends on the prompts of the call alone, not on what the cache holds, and one pass is
one transaction: a run that is killed and started again computes the missing passes exactly as they would have been.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from open_mmicl.answer_cache import AnswerCache, Rate, entry_key, model_key
from open_mmicl.errors import NumericError, UsageError
from open_mmicl.interface import load_interface
from open_mmicl.interface.base import AnswerScore, GenerationSettings
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.prompts import Prompt

__all__ = ["AnswerScore", "Engine", "EngineStats", "GenerationSettings"]

log = logging.getLogger("lever_plus.engine")
MODES = ("fast", "naive")
_WINDOW_BUDGETS = 32  # prompts planned together: as many as fill this many forward passes
_DECIMALS = 6  # of a log-probability: below what two ways of batching differ by in fp32


@dataclass
class EngineStats:
    """Totals since the engine was loaded. ``*_naive``: what the naive path would have computed for the same requests
    that were not in the cache. ``tokens_padded`` counts padding too; ``seconds`` is time in score and generate.
    """

    prompts: int = 0
    cache_hits: int = 0
    computed: int = 0
    passes: int = 0
    images_encoded: int = 0
    images_naive: int = 0
    tokens_computed: int = 0
    tokens_padded: int = 0
    tokens_naive: int = 0
    seconds: float = 0.0
    shrinks: int = 0


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """What a list of prompts costs: prompts, distinct images, images and tokens of the naive path."""

    prompts: int
    distinct_images: int
    images: int
    tokens: int


class Engine:
    """Scores and generates answers with one LVLM, through the answer cache. Made by :meth:`load`."""

    def __init__(self, lvlm: Any, mode: str, cache_path: Path | None, token_budget: int, image_cache_mb: int):
        if mode not in MODES:
            raise UsageError(f"ENGINE={mode} is not allowed: {' | '.join(MODES)}")
        config = lvlm.config
        self.lvlm, self.mode, self.name, self.fingerprint = lvlm, mode, lvlm.name, lvlm.fingerprint
        self.device = str(lvlm.model.device)
        self.token_budget = token_budget or config.token_budget
        self.stats = EngineStats()
        self._description = {
            "fingerprint": lvlm.fingerprint, "prompt_format": config.prompt_format.fingerprint(), "dtype": lvlm.dtype_name,
            "processor": lvlm.processor_fingerprint, "mode": mode, "interface": config.interface, "decimals": _DECIMALS,
        }  # fmt: skip
        self.key = model_key(self._description)
        self.cache = AnswerCache(cache_path) if cache_path is not None else None
        self._model_row = self.cache.register(self.key, self.name, self._description) if self.cache else 0
        lvlm.full_logits = mode == "naive"
        if lvlm.fast and mode == "fast":
            from open_mmicl.engine_fast import FastRunner

            self._runner: Any = FastRunner(
                lvlm, (image_cache_mb or config.image_cache_mb) << 20, config.kv_cache_mb << 20
            )
            self._windows = self._tree_windows
        else:
            self._runner = None
            self._windows = self._plain_windows

    @classmethod
    def load(
        cls,
        config: InferModelConfig,
        device: str = "auto",
        mode: str = "fast",
        precision: str = "auto",
        cache_path: Path | None = None,
        token_budget: int = 0,
        image_cache_mb: int = 0,
    ) -> "Engine":
        """Load the model. ``token_budget`` [tokens in a pass] and ``image_cache_mb`` [MiB]: 0 takes the configuration's.

        Raises:
            MissingInputError, DamagedInputError, UsageError (see :func:`open_mmicl.interface.load_interface`).
        """
        if mode not in MODES:
            raise UsageError(f"ENGINE={mode} is not allowed: {' | '.join(MODES)}")
        return cls(load_interface(config, device, precision), mode, cache_path, token_budget, image_cache_mb)

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[str]],
        end: bool = False,
        progress: str | None = None,
    ) -> list[list[AnswerScore]]:
        """Teacher-forced log P(answer | prompt) of each prompt's answers.

        Args:
            answers: one list per prompt; blanks around an answer do not count.
            end: add the log-probability of the token that ends the turn (it then counts in ``n_tokens``).
            progress: label of a progress bar.

        Raises:
            UsageError: an answer that cannot be scored. NumericError: a non-finite score; nothing of its pass is kept.
            MissingInputError, DamagedInputError: an image file.
        """
        wanted: dict[bytes, tuple[Prompt, dict[str, bytes]]] = {}
        asked: list[list[bytes]] = []
        for prompt, some in zip(prompts, answers, strict=True):
            images = self._digests(prompt)
            _, entries = wanted.setdefault(self._key(prompt, images, "prompt", ()), (prompt, {}))
            for answer in some:
                if answer.strip() not in entries:
                    entries[answer.strip()] = self._key(prompt, images, "score", (end,), answer.strip())
            asked.append([entries[answer.strip()] for answer in some])
        requests = [(prompt, entries) for prompt, entries in wanted.values() if entries]

        def compute(unit: Any, members: list[int], found: dict[bytes, list]) -> dict[bytes, list]:
            todo = [{a: key for a, key in requests[i][1].items() if key not in found} for i in members]
            scores = self._score_unit(
                unit, members, [requests[i][0] for i in members], [list(entries) for entries in todo], end
            )
            fresh = {}
            for entries, row in zip(todo, scores, strict=True):
                for (answer, key), score in zip(entries.items(), row, strict=True):
                    if not abs(score.log_prob) < float("inf"):
                        raise NumericError(f"{self.name}: the log-probability of {answer!r} is {score.log_prob}")
                    fresh[key] = [round(score.log_prob, _DECIMALS), score.n_tokens]
            return fresh

        extra = [sum(len(self.lvlm.answer_ids(a)) - 1 + end for a in entries) for _, entries in requests]
        found = self._run("score", [(p, list(entries.values())) for p, entries in requests], extra, compute, progress)
        return [[AnswerScore(*found[key]) for key in keys] for keys in asked]

    def generate(
        self, prompts: Sequence[Prompt], settings: GenerationSettings | None = None, progress: str | None = None
    ) -> list[str]:
        """Generated answers, raw text without special tokens, uncut.

        Raises:
            NumericError: non-finite logits. MissingInputError, DamagedInputError: an image file.
        """
        settings = settings or GenerationSettings()
        kind = (settings.max_new_tokens, settings.num_beams, float(settings.length_penalty))
        wanted: dict[bytes, Prompt] = {}
        asked = []
        for prompt in prompts:
            asked.append(self._key(prompt, self._digests(prompt), "generate", kind))
            wanted.setdefault(asked[-1], prompt)
        keys = list(wanted)

        def compute(unit: Any, members: list[int], found: dict[bytes, list]) -> dict[bytes, list]:
            texts = self._generate_unit(unit, members, [wanted[keys[i]] for i in members], settings)
            return {keys[i]: [text] for i, text in zip(members, texts, strict=True)}

        found = self._run(
            "generate", [(prompt, [key]) for key, prompt in wanted.items()], [0] * len(keys), compute, progress
        )
        return [found[key][0] for key in asked]

    def plan_tokens(self, prompts: Sequence[Prompt]) -> TokenPlan:
        """What these prompts cost; reads image headers, computes nothing."""
        images = [image for prompt in prompts for image in prompt.images]
        distinct = {self.lvlm.images.digest(path) for path in set(images)}
        return TokenPlan(len(prompts), len(distinct), len(images), sum(self.lvlm.prompt_lengths(prompts)))

    def close(self) -> None:
        """Close the answer cache."""
        if self.cache:
            self.cache.close()

    def _digests(self, prompt: Prompt) -> list[bytes]:
        return [self.lvlm.images.digest(path) for path in prompt.images]

    def _key(self, prompt: Prompt, images: list[bytes], kind: str, settings: tuple, answer: str = "") -> bytes:
        items = [(digest, demo.question, demo.answer) for digest, demo in zip(images, prompt.demos, strict=False)]
        return entry_key(self.key, kind, settings, items, (images[-1], prompt.question), answer)

    def _run(
        self,
        kind: str,
        requests: list[tuple[Prompt, list[bytes]]],
        extra: list[int],
        compute: Any,
        progress: str | None,
    ) -> dict[bytes, list]:
        """Values of every key, from the cache or computed pass by pass, each pass written before the next begins."""
        started, before = time.perf_counter(), self._work()
        keys = [key for _, some in requests for key in some]
        found = self.cache.get(keys) if self.cache else {}
        open_now = [i for i, (_, some) in enumerate(requests) if any(key not in found for key in some)]
        self.stats.prompts += len(requests)
        self.stats.cache_hits += len(requests) - len(open_now)
        bar = tqdm(total=len(open_now), desc=progress, unit="prompt", disable=progress is None or not open_now)
        for members, unit in self._windows([prompt for prompt, _ in requests], extra, set(open_now)):
            todo = [i for i in members if any(key not in found for key in requests[i][1])]
            fresh = compute(unit, todo, found)
            if self.cache:
                self.cache.put(self._model_row, kind, fresh)
            found.update(fresh)
            bar.update(len(todo))
        bar.close()
        self._account(kind, len(open_now), before, time.perf_counter() - started)
        return found

    def _tree_windows(
        self, prompts: list[Prompt], extra: list[int], open_now: set[int]
    ) -> Iterator[tuple[list[int], Any]]:
        """Passes of the fast path as (members with open requests, (plan, leaves by member))."""
        if not open_now:
            return
        from open_mmicl.prefix_tree import windows

        lengths = self.lvlm.prompt_lengths(prompts)
        for window in windows(lengths, _WINDOW_BUDGETS * self.token_budget):
            if open_now.isdisjoint(window):
                continue
            plan = self._runner.plan([prompts[i] for i in window], [extra[i] for i in window], self.token_budget)
            for chunk in plan.chunks:
                leaves = {window[leaf.index]: leaf for leaf in chunk}
                members = [i for i in leaves if i in open_now]
                if members:
                    self.stats.images_naive += sum(len(prompts[i].images) for i in members)
                    yield members, (plan, leaves)
            self._runner.forget()

    def _plain_windows(
        self, prompts: list[Prompt], extra: list[int], open_now: set[int]
    ) -> Iterator[tuple[list[int], Any]]:
        """Batches in the order given (naive) or sorted by number of images, cut by the token budget."""
        if not open_now:
            return
        if self.mode == "naive":
            size, order = self.lvlm.config.naive_batch, list(range(len(prompts)))
            batches = [order[start : start + size] for start in range(0, len(order), size)]
        else:
            from open_mmicl.prefix_tree import fill

            lengths = self.lvlm.prompt_lengths(prompts)
            order = sorted(range(len(prompts)), key=lambda i: lengths[i] + extra[i])
            batches = fill(order, [lengths[i] + extra[i] for i in order], self.token_budget)
        for batch in batches:
            members = [i for i in batch if i in open_now]
            if members:
                yield members, None

    def _score_unit(
        self, unit: Any, members: list[int], prompts: list[Prompt], answers: list[list[str]], end: bool
    ) -> list[list[AnswerScore]]:
        if unit is not None:
            plan, leaves = unit
            return self._shrinking(
                members, answers, lambda some, words: self._runner.score(plan, [leaves[i] for i in some], words, end)
            )
        pairs = [(prompt, answer) for prompt, some in zip(prompts, answers, strict=True) for answer in some]
        flat: list[AnswerScore] = []
        for start in range(0, len(pairs), len(members)):
            part = pairs[start : start + len(members)]
            flat += self._shrinking(
                [p for p, _ in part], [a for _, a in part], lambda ps, words: self.lvlm.score_batch(ps, words, end)
            )
        scores = iter(flat)
        return [[next(scores) for _ in some] for some in answers]

    def _generate_unit(
        self, unit: Any, members: list[int], prompts: list[Prompt], settings: GenerationSettings
    ) -> list[str]:
        if unit is not None:
            plan, leaves = unit
            return self._shrinking(
                members, members, lambda some, _: self._runner.generate(plan, [leaves[i] for i in some], settings)
            )
        return self._shrinking(prompts, prompts, lambda some, _: self.lvlm.generate_batch(some, settings))

    def _shrinking(self, rows: list, more: list, run: Any) -> list:
        """``run(rows, more)``; on out-of-memory in two halves, and with half the token budget from then on."""
        try:
            return run(rows, more)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise UsageError(
                    f"{self.name}: out of memory with a single prompt; use smaller images (processor: max_pixels) or a larger GPU"
                ) from None
            torch.cuda.empty_cache()
            self.token_budget = max(1, self.token_budget // 2)
            self.stats.shrinks += 1
            log.warning(
                "%s: out of memory with %d prompts; the token budget is now %d", self.name, len(rows), self.token_budget
            )
        middle = len(rows) // 2
        return [
            *self._shrinking(rows[:middle], more[:middle], run),
            *self._shrinking(rows[middle:], more[middle:], run),
        ]

    def _work(self) -> tuple[int, int, int, int]:
        work = self._runner.work if self._runner else None
        return (work.passes, work.images, work.tokens, work.padded_tokens) if work else (0, 0, 0, 0)

    def _account(self, kind: str, computed: int, before: tuple, seconds: float) -> None:
        passes, images, tokens, padded = (now - then for now, then in zip(self._work(), before, strict=True))
        stats = self.stats
        stats.computed += computed
        stats.passes += passes
        stats.images_encoded += images
        stats.tokens_computed += tokens
        stats.tokens_padded += padded
        stats.seconds += seconds
        if self.cache and computed:
            self.cache.add_rate(
                self._model_row, kind, str(self.lvlm.model.device.type), Rate(computed, tokens, images, seconds)
            )
