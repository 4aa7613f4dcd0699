"""Pointers answered by the LVLM and scored: the fields of RL data, and the environment of online GRPO."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lever_plus.cli import log
from lever_plus.data.dataset import VqaSplit
from lever_plus.settings.data import RlDataSettings
from lever_plus.stages import lvlm
from open_mmicl.metrics.vqa import cut_answer, gt_weights, vqa_accuracy

EVAL_MODE = "vqa_official"


class PointerAnswerer:
    """Has the LVLM answer train queries with given demonstrations and scores the answers.

    Per pointer one prompt: a generation and the teacher-forced scores of the annotators' distinct answers
    share it; per query one zero-shot prompt, the zero of the InfoScore.
    """

    def __init__(self, engine: Any, train: VqaSplit, settings: RlDataSettings, progress: str | None = None) -> None:
        self.engine, self.train, self.settings, self.progress = engine, train, settings, progress
        self.generation = lvlm.generation(settings)
        if not engine.gives_scores:
            log.info(f"{engine.name}: no log-probabilities (scores: none), so no beam_score (REWARD_ALPHA then weighs "
                     "nothing) and no vqa_gt_prob")  # fmt: skip

    @property
    def computed(self) -> int:
        """Prompts that the LVLM had to compute so far; the others were in the answer cache."""
        return self.engine.stats.computed

    def answer(
        self, rows: Sequence[int], pools: Sequence[np.ndarray], pointers: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[dict[str, Any]]]:
        """Answer every pointer of every query.

        Args:
            rows: [Q] train rows. pools: [Q] arrays [K] of train rows. pointers: [Q][M] pool positions, pick order.

        Returns: [Q][M] dicts with ``vqa_pred_answer``, ``vqa_correct``, ``vqa_acc_score`` (0..1), ``vqa_gt_prob``
        (0..1, expected accuracy under teacher forcing), ``beam_score`` (InfoScore of the whole pointer,
        as the beam search counts it) and ``vqa_eval_mode``. ``vqa_gt_prob`` and ``beam_score`` are None where the
        model's configuration says that there are no log-probabilities (``scores: none`` of a server).
        """
        train, order = self.train, self.settings.prompt_order
        flat = [(q, tuple(p)) for q, group in enumerate(pointers) for p in group]
        prompts = [lvlm.build_prompt(train, train, int(rows[q]), pools[q], p, order) for q, p in flat]
        if not self.engine.gives_scores:
            return self._texts_only(rows, flat, prompts, len(pointers))
        truths = [train.answer(int(row)) for row in rows]
        weights = [gt_weights(train.answers(int(row))) for row in rows]
        scored = [[*((a, True) for a, _ in weights[q]), (truths[q], False)] for q, _ in flat]  # the last: InfoScore
        replies = self.engine.ask(prompts, self.generation, scored, self.progress)
        zero_shot = self._zero_shot(rows, truths)
        answered: list[list[dict[str, Any]]] = [[] for _ in rows]
        for (q, _), reply in zip(flat, replies, strict=True):
            *whole, info = reply.scores
            gt_prob = sum(w * math.exp(s.log_prob) for (_, w), s in zip(weights[q], whole, strict=True))
            answered[q].append(self._fields(rows[q], reply.text, self._value(info) - zero_shot[q], gt_prob))
        return answered

    def _texts_only(self, rows: Sequence[int], flat: list, prompts: list, queries: int) -> list[list[dict[str, Any]]]:
        """Without the fields that are log-probabilities, where the model's configuration says ``scores: none``."""
        answered: list[list[dict[str, Any]]] = [[] for _ in range(queries)]
        texts = self.engine.generate(prompts, self.generation, self.progress)
        for (q, _), text in zip(flat, texts, strict=True):
            answered[q].append(self._fields(rows[q], text, None, None))
        return answered

    def _fields(self, row: int, text: str, beam_score: float | None, gt_prob: float | None) -> dict[str, Any]:
        answer = cut_answer(text)
        accuracy = vqa_accuracy(answer, self.train.answers(int(row)))
        return {
            "beam_score": beam_score, "vqa_pred_answer": answer, "vqa_correct": int(accuracy > 0),
            "vqa_acc_score": accuracy, "vqa_gt_prob": gt_prob, "vqa_eval_mode": EVAL_MODE,
        }  # fmt: skip

    def _zero_shot(self, rows: Sequence[int], truths: Sequence[str]) -> list[float]:
        """The true answer's value without demonstrations, the zero of the InfoScore: [Q]."""
        none = np.zeros(0, dtype=np.int64)
        prompts = [lvlm.build_prompt(self.train, self.train, int(row), none, (), "best_last") for row in rows]
        return [self._value(s[0]) for s in self.engine.score(prompts, [[truth] for truth in truths])]

    def _value(self, score: Any) -> float:
        log_prob = score.log_prob / (score.n_tokens if self.settings.length_norm else 1)
        return log_prob if self.settings.infoscore == "logprob" else math.exp(log_prob)
