"""CHECKPOINT_METRIC=answers: epochs are compared by what the policy's own picks are worth."""

import numpy as np
import pytest
import torch

from lever_plus.rl.deepspeed_engine import start_processes
from lever_plus.rl.own_picks import ACCURACY, PROMPTS, OwnPicks
from lever_plus.settings.loading import load
from lever_plus.settings.selector import OnlineSettings
from lever_plus.stages import train_v3_online, work
from tests.rl.conftest import small_world
from tests.rl.test_online import PlantedResponder


def own_picks(small, responder, stop=False):
    return OwnPicks(small.val, responder, start_processes("cpu"), stop)


def success(groups, i, pointer):
    pool = groups.items[groups.pool_rows[i]].numpy()
    return float(small_world().success(int(groups.query_idx[i]), pool[list(pointer)]))


def test_the_value_is_the_mean_over_queries_and_lengths_of_the_planted_truth(small):
    picks = torch.tensor([[i % 9, (i + 4) % 9] for i in range(len(small.val))])
    responder = PlantedResponder()
    found = own_picks(small, responder)(picks)
    lists = [[tuple(p[:1]), tuple(p)] for p in picks.tolist()]
    assert found[ACCURACY] == pytest.approx(
        np.mean([[success(small.val, i, p) for p in own] for i, own in enumerate(lists)]), rel=1e-5
    )
    assert found[PROMPTS] == 2 * len(small.val) == len(responder.asked[0])
    assert [row for row, _ in responder.asked[0]][::2] == small.val.query_idx.tolist()


def test_a_policy_that_stops_is_asked_for_its_own_length_alone(small):
    picks = torch.tensor([[i % 9, -1] if i % 2 else [-1, -1] for i in range(len(small.val))])
    responder = PlantedResponder()
    assert own_picks(small, responder, stop=True)(picks)[PROMPTS] == len(small.val)
    assert {len(p) for _, p in responder.asked[0]} == {0, 1}


def test_a_query_whose_pointers_form_several_groups_is_asked_once(small):
    twice = small.val.take(torch.arange(len(small.val)).repeat(2))
    responder = PlantedResponder()
    value = OwnPicks(twice, responder, start_processes("cpu"), False)(torch.tensor([[0, 1]]).repeat(len(twice), 1))
    assert value[PROMPTS] == 2 * len(small.val)


def test_the_best_epoch_is_the_one_whose_picks_are_answered_best(small, tmp_path):
    """Also where the expected accuracy over scored pointers says otherwise: here the responder decides."""
    values = iter([0.1, 0.9, 0.2, 0.3, 0.8, 0.4])  # rce 0 1 2, grpo 0 1 2
    given = lambda greedy: {ACCURACY: next(values), PROMPTS: 3.0}  # noqa: E731
    trainer = small.trainer(tmp_path, own_picks=given, metric=ACCURACY)
    trainer.run(small.selector(), small.phases())
    assert (trainer.best()["phase"], trainer.best()["epoch"], trainer.best()["metric"]) == ("rce", 1, 0.9)
    assert trainer.best("grpo")["epoch"] == 1
    assert trainer.metric_name(trainer.best()) == ACCURACY


def test_it_needs_the_lvlm_and_says_what_it_costs():
    settings = load(OnlineSettings, {"RL_QUERY_NUM": "100", "RL_SHOT": "2", "RCE_EPOCHS": "1", "GRPO_EPOCHS": "4",
                                     "CHECKPOINT_METRIC": "answers"}, {})  # fmt: skip
    assert train_v3_online.asks(settings) and not settings.is_online
    (step,) = work.training(settings)
    assert step.queries == round(100 * settings.val_fraction) and step.by_shots == {1: 7, 2: 7}
    assert not train_v3_online.asks(load(OnlineSettings, {}, {}))
