import pytest

from lever_plus.data.rl_data import RlCandidate
from lever_plus.rl.rewards import RewardRule, reward
from open_mmicl.errors import DamagedInputError, UsageError

RIGHT = RlCandidate((0,), "beam", beam_score=0.4, vqa_correct=1, vqa_acc_score=0.6, vqa_gt_prob=0.35)
WRONG = RlCandidate((1,), "sample", vqa_correct=0, vqa_acc_score=0.0, vqa_gt_prob=0.05)


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (RewardRule(), 0.5 * 0.4 + 0.8, -0.8),
        (RewardRule(correctness="01"), 0.5 * 0.4 + 0.8, 0.0),
        (RewardRule(alpha=0.0, beta=1.0), 1.0, -1.0),
        (RewardRule(alpha=0.8, beta=0.5), 0.8 * 0.4 + 0.5, -0.5),
        (RewardRule(alpha=20.0), 5.0, -0.8),
        (RewardRule(beta=9.0), 5.0, -5.0),
        (RewardRule("hard_plus_soft"), 1.6, 0.0),
        (RewardRule("hard_only"), 1.0, 0.0),
        (RewardRule("soft_only"), 0.6, 0.0),
        (RewardRule("separated"), 2.6, 0.0),
        (RewardRule("gt_prob"), 0.35, 0.05),
    ],
)
def test_modes(rule, right, wrong):
    assert reward(RIGHT, "here", rule) == pytest.approx(right)
    assert reward(WRONG, "here", rule) == pytest.approx(wrong)


def test_missing_fields_are_errors_not_zeros():
    with pytest.raises(DamagedInputError, match="query 5: REWARD_MODE=gt_prob needs vqa_gt_prob"):
        reward(RlCandidate((0,), "beam", vqa_correct=1, vqa_acc_score=1.0), "query 5", RewardRule("gt_prob"))
    beam = RlCandidate((0,), "beam", beam_score=0.4)
    with pytest.raises(UsageError, match="no LVLM answers"):
        reward(beam, "here", RewardRule())
    assert reward(beam, "here", RewardRule(beta=0.0)) == pytest.approx(0.2)


def test_fault_06_the_modes_that_ignore_the_weights_name_them():
    assert RewardRule("plan").unused() == []
    assert RewardRule("gt_prob").unused() == ["REWARD_ALPHA", "REWARD_BETA", "REWARD_CORRECTNESS"]
