import math

import pytest
import torch

from lever_plus.rl.validation import expected_value, greedy_regret, pairwise_accuracy, validation_metrics

LOG_PROBS = torch.tensor([[0.5, 0.25, 0.125], [0.1, 0.3, 0.0]]).log()
REWARDS = torch.tensor([[1.0, 0.0, 2.0], [3.0, 1.0, 99.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_expected_value_renormalises_over_the_scored_pointers():
    first = (0.5 * 1 + 0.125 * 2) / 0.875
    second = (0.1 * 3 + 0.3 * 1) / 0.4
    assert expected_value(LOG_PROBS, REWARDS, MASK) == pytest.approx((first + second) / 2)


def test_pairwise_accuracy_by_hand():
    # group 1: (2>1) wrong, (2>0) wrong, (1>0) right; group 2: (3>1) wrong
    assert pairwise_accuracy(LOG_PROBS, REWARDS, MASK) == pytest.approx(1 / 4)
    assert pairwise_accuracy(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)) == 0.5


def test_greedy_regret_counts_only_queries_whose_greedy_pointer_was_scored():
    pointers = torch.tensor([[[0, 1], [1, 0], [2, 0]], [[0, 1], [1, 0], [2, 1]]])
    greedy = torch.tensor([[1, 0], [2, 1]])  # the second stands outside the mask
    assert greedy_regret(greedy, pointers, REWARDS, MASK) == (2.0, 1)


def test_the_metric_is_the_accuracy_where_there_is_one():
    pointers = torch.zeros(2, 3, 1, dtype=torch.long)
    accuracy = torch.tensor([[0.3, 0.6, 1.0], [0.0, 0.9, math.nan]])
    arguments = (LOG_PROBS, REWARDS, accuracy, MASK, torch.ones(2, 1), pointers, 0.5)
    found = validation_metrics(*arguments)
    assert found["metric"] == found["val_expected_accuracy"] == pytest.approx(expected_value(LOG_PROBS, accuracy, MASK))
    without = validation_metrics(LOG_PROBS, REWARDS, torch.full_like(accuracy, math.nan), *arguments[3:])
    assert without["metric"] == without["val_expected_reward"] and "val_expected_accuracy" not in without
