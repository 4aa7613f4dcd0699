"""Rewards of scored pointers, from the fields of RL data. Each is one function of an :class:`Answer`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lever_plus.registries import REWARDS
from open_mmicl.errors import DamagedInputError, NumericError, UsageError

CLIP = 5.0
_PLAN_ONLY = ("REWARD_ALPHA", "REWARD_BETA", "REWARD_CORRECTNESS")


@dataclass(frozen=True)
class RewardRule:
    """How a reward is made: ``mode`` is a name in ``REWARDS``; what it does not read is named by :meth:`unused`."""

    mode: str = "plan"
    alpha: float = 0.5
    beta: float = 0.8
    correctness: str = "pm1"
    shot_cost: float = 0.0

    def unused(self) -> list[str]:
        """Settings that this mode does not read (a user who set one is told so)."""
        return list(_PLAN_ONLY) if self.mode != "plan" and REWARDS.file_of(self.mode) is None else []


@dataclass(frozen=True)
class Answer:
    """What is known of a pointer's answer. ``candidate`` is an ``RlCandidate``, ``where`` its place for messages."""

    candidate: Any
    where: str

    @property
    def answered(self) -> bool:
        """Whether the LVLM has answered it (plain beam data have InfoScores only)."""
        return self.candidate.vqa_correct is not None and self.candidate.vqa_acc_score is not None

    @property
    def correct(self) -> float:
        """1 where the answer is right, else 0.

        Raises:
            UsageError: the data has no LVLM answers.
        """
        return float(self._of_lvlm(self.candidate.vqa_correct))

    @property
    def accuracy(self) -> float:
        """VQA accuracy of the answer, in [0, 1]. Raises: as :attr:`correct`."""
        return float(self._of_lvlm(self.candidate.vqa_acc_score))

    @property
    def expected(self) -> float:
        """The teacher-forced expected accuracy, in [0, 1].

        Raises:
            DamagedInputError: the data has none.
        """
        if self.candidate.vqa_gt_prob is None:
            raise DamagedInputError(f"{self.where}: REWARD_MODE=gt_prob needs vqa_gt_prob, which is not there")
        return float(self.candidate.vqa_gt_prob)

    @property
    def beam_score(self) -> float:
        """The pointer's beam score; 0 where it has none."""
        return 0.0 if self.candidate.beam_score is None else float(self.candidate.beam_score)

    @property
    def shots(self) -> int:
        """Demonstrations of the pointer."""
        return len(self.candidate.pointer)

    def _of_lvlm(self, value: Any) -> Any:
        if not self.answered:
            raise UsageError(
                f"{self.where}: no LVLM answers in this file (plain beam data); make RL data with "
                "bash scripts/generate_rl_data.sh, or set REWARD_MODE=plan REWARD_BETA=0 to train on beam scores alone"
            )
        return value


def reward(candidate: Any, where: str, rule: RewardRule) -> float:
    """The reward of one scored pointer (an ``RlCandidate``): its answer's, less ``shot_cost`` per demonstration.

    Raises:
        UsageError, DamagedInputError: the data lacks what the rule needs; ``where`` names the place.
        NumericError: the rule gives no finite number.
    """
    value = REWARDS.get(rule.mode)(Answer(candidate, where), rule)
    if not np.isfinite(value):
        raise NumericError(f"{where}: REWARD_MODE={rule.mode} gives {value}")
    return float(value) - rule.shot_cost * len(candidate.pointer)


@REWARDS.add("plan", "REWARD_ALPHA x beam score + REWARD_BETA x correctness, clipped to [-5, 5]")
def plan(answer: Answer, rule: RewardRule) -> float:
    """The plan's; without LVLM answers it is the beam score alone, where ``beta`` is 0."""
    correctness = 0.0 if rule.beta == 0 and not answer.answered else answer.correct
    if rule.correctness == "pm1":
        correctness = 2 * correctness - 1
    return float(np.clip(rule.alpha * answer.beam_score + rule.beta * correctness, -CLIP, CLIP))


@REWARDS.add("hard_only", "1 where the answer is correct, else 0")
def hard_only(answer: Answer, rule: RewardRule) -> float:
    """Correctness."""
    return answer.correct


@REWARDS.add("soft_only", "VQA accuracy")
def soft_only(answer: Answer, rule: RewardRule) -> float:
    """VQA accuracy in [0, 1]."""
    return answer.accuracy


@REWARDS.add("hard_plus_soft", "correctness + VQA accuracy")
def hard_plus_soft(answer: Answer, rule: RewardRule) -> float:
    """Their sum."""
    return answer.correct + answer.accuracy


@REWARDS.add("separated", "VQA accuracy, 2 more where correct")
def separated(answer: Answer, rule: RewardRule) -> float:
    """Right and wrong answers lie apart."""
    return answer.accuracy + 2 * answer.correct


@REWARDS.add("gt_prob", "accuracy expected under the LVLM")
def gt_prob(answer: Answer, rule: RewardRule) -> float:
    """The teacher-forced expected accuracy in [0, 1]."""
    return answer.expected
