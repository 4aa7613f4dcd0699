"""Rewards of scored pointers, from the fields of RL data."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from open_mmicl.errors import DamagedInputError, UsageError

CLIP = 5.0
MODES = ("plan", "hard_plus_soft", "hard_only", "soft_only", "separated", "gt_prob")


@dataclass(frozen=True)
class RewardRule:
    """How a reward is made: every field is used by every mode it concerns, or named as unused by :meth:`unused`."""

    mode: str = "plan"
    alpha: float = 0.5
    beta: float = 0.8
    correctness: str = "pm1"
    shot_cost: float = 0.0

    def unused(self) -> list[str]:
        """Settings that this mode does not read (a user who set one is told so)."""
        return [] if self.mode == "plan" else ["REWARD_ALPHA", "REWARD_BETA", "REWARD_CORRECTNESS"]


def reward(candidate: Any, where: str, rule: RewardRule) -> float:
    """The reward of one scored pointer (an ``RlCandidate``): its answer's, less ``shot_cost`` per demonstration."""
    return answer_reward(candidate, where, rule) - rule.shot_cost * len(candidate.pointer)


def answer_reward(candidate: Any, where: str, rule: RewardRule) -> float:
    """The reward of a pointer's answer.

    * ``plan``: alpha x beam score (0 where it has none) + beta x correctness (-1/+1 or 0/1), clipped to [-5, 5]
    * ``hard_only``: 0/1 correct; ``soft_only``: VQA accuracy in [0, 1]; ``hard_plus_soft``: their sum
    * ``separated``: 2 + accuracy where correct, accuracy where wrong
    * ``gt_prob``: the teacher-forced expected accuracy in [0, 1]

    Raises:
        DamagedInputError: ``gt_prob`` was asked for and the data has none; ``where`` names the place.
        UsageError: the data has no LVLM answers and the rule needs them.
    """
    quality = 0.0 if candidate.beam_score is None else float(candidate.beam_score)
    if rule.mode == "gt_prob":
        if candidate.vqa_gt_prob is None:
            raise DamagedInputError(f"{where}: REWARD_MODE=gt_prob needs vqa_gt_prob, which is not there")
        return float(candidate.vqa_gt_prob)
    if candidate.vqa_correct is None or candidate.vqa_acc_score is None:
        if rule.mode == "plan" and rule.beta == 0:
            return float(np.clip(rule.alpha * quality, -CLIP, CLIP))
        raise UsageError(
            f"{where}: no LVLM answers in this file (plain beam data); make RL data with "
            "bash scripts/generate_rl_data.sh, or set REWARD_MODE=plan REWARD_BETA=0 to train on beam scores alone"
        )
    hard, soft = float(candidate.vqa_correct), float(candidate.vqa_acc_score)
    if rule.mode == "plan":
        correctness = 2.0 * hard - 1.0 if rule.correctness == "pm1" else hard
        return float(np.clip(rule.alpha * quality + rule.beta * correctness, -CLIP, CLIP))
    if rule.mode == "hard_plus_soft":
        return hard + soft
    if rule.mode == "hard_only":
        return hard
    if rule.mode == "soft_only":
        return soft
    if rule.mode == "separated":
        return 2.0 + soft if candidate.vqa_correct else soft
    raise ValueError(f"unknown reward mode {rule.mode!r}")
