"""Pointers answered by the LVLM and scored: the fields of RL data, and the environment of online GRPO."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lever_plus.data.dataset import VqaSplit
from lever_plus.settings.data import RlDataSettings
from lever_plus.stages import lvlm
from open_mmicl.metrics.vqa import cut_answer, gt_weights, vqa_accuracy

EVAL_MODE = "vqa_official"


class PointerAnswerer:
    """Has the LVLM answer train queries with given demonstrations and scores the answers.

    Per pointer one generation and one teacher-forced scoring of the annotators' distinct answers; per
    query one zero-shot scoring, the zero of the InfoScore.
    """

    def __init__(self, engine: Any, train: VqaSplit, settings: RlDataSettings) -> None:
        self.engine, self.train, self.settings = engine, train, settings
        self.generation = lvlm.generation(settings)

    def answer(
        self, rows: Sequence[int], pools: Sequence[np.ndarray], pointers: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[dict[str, Any]]]:
        """Answer every pointer of every query.

        Args:
            rows: [Q] train rows. pools: [Q] arrays [K] of train rows. pointers: [Q][M] pool positions, pick order.

        Returns: [Q][M] dicts with ``vqa_pred_answer``, ``vqa_correct``, ``vqa_acc_score`` (0..1), ``vqa_gt_prob``
        (0..1, expected accuracy under teacher forcing), ``beam_score`` (InfoScore of the whole pointer,
        as the beam search counts it) and ``vqa_eval_mode``.
        """
        flat = [(q, tuple(p)) for q, group in enumerate(pointers) for p in group]
        prompts = [
            lvlm.build_prompt(self.train, self.train, int(rows[q]), pools[q], p, self.settings.prompt_order)
            for q, p in flat
        ]
        weights = [gt_weights(self.train.answers(int(row))) for row in rows]
        raw = self.engine.generate(prompts, self.generation)
        whole = self.engine.score(prompts, [[a for a, _ in weights[q]] for q, _ in flat], end=True)
        info = self._info_scores(rows, prompts, [q for q, _ in flat])
        answered: list[list[dict[str, Any]]] = [[] for _ in rows]
        for (q, _), text, scores, info_score in zip(flat, raw, whole, info, strict=True):
            accuracy = vqa_accuracy(cut_answer(text), self.train.answers(int(rows[q])))
            expected = sum(w * math.exp(s.log_prob) for (_, w), s in zip(weights[q], scores, strict=True))
            answered[q].append(
                {
                    "beam_score": info_score,
                    "vqa_pred_answer": cut_answer(text),
                    "vqa_correct": int(accuracy > 0),
                    "vqa_acc_score": accuracy,
                    "vqa_gt_prob": expected,
                    "vqa_eval_mode": EVAL_MODE,
                }
            )
        return answered

    def _info_scores(self, rows: Sequence[int], prompts: list[Any], query_of: list[int]) -> list[float]:
        """Total InfoScore of each prompt's demonstrations for the true answer."""
        truth = [self.train.answer(int(row)) for row in rows]
        empty_pool = np.zeros(0, dtype=np.int64)
        zero_shot = [lvlm.build_prompt(self.train, self.train, int(row), empty_pool, (), "best_last") for row in rows]
        base = [self._value(s[0]) for s in self.engine.score(zero_shot, [[t] for t in truth])]
        with_demos = self.engine.score(prompts, [[truth[q]] for q in query_of])
        return [self._value(s[0]) - base[q] for s, q in zip(with_demos, query_of, strict=True)]

    def _value(self, score: Any) -> float:
        log_prob = score.log_prob / (score.n_tokens if self.settings.length_norm else 1)
        return log_prob if self.settings.infoscore == "logprob" else math.exp(log_prob)
