import functools
import threading

import numpy as np
import pytest
import torch

from lever_plus.rl.deepspeed_engine import Processes
from lever_plus.rl.objectives import GrpoObjective, KlControl
from lever_plus.rl.online import OnlineRounds
from lever_plus.rl.rewards import RewardRule, reward
from lever_plus.rl.trainer import Phase
from tests.rl.conftest import small_world


class PlantedResponder:
    """Answers with the planted truth: right where the success probability is above a half."""

    def __init__(self):
        self.asked = []

    @property
    def computed(self):
        return sum(len(set(asked)) for asked in self.asked)

    def answer(self, rows, pools, pointers):
        world = small_world()
        self.asked.append([(row, p) for row, group in zip(rows, pointers, strict=True) for p in group])
        answers = []
        for row, pool, group in zip(rows, pools, pointers, strict=True):
            chances = [float(world.success(row, pool[list(p)])) for p in group]
            answers.append(
                [
                    {"vqa_correct": int(c > 0.5), "vqa_acc_score": c, "vqa_gt_prob": c, "beam_score": 0.0}
                    for c in chances
                ]
            )
        return answers


def online(trainer, responder, samples=8, epochs_per_round=2):
    return OnlineRounds(
        trainer.train, responder, functools.partial(reward, rule=RewardRule("gt_prob")), trainer.state_folder,
        trainer.processes, samples=samples, temperature=1.0, epochs_per_round=epochs_per_round, seed=1,
    )  # fmt: skip


def phase(refresh, epochs=4, lr=2e-3):
    return Phase("grpo", epochs, lr, GrpoObjective(KlControl(0.0), "online", weigh_kl=False), None, refresh)


def test_each_round_draws_from_the_current_policy_and_asks_for_each_pointer_once(small, tmp_path):
    trainer, responder = small.trainer(tmp_path), PlantedResponder()
    rounds = online(trainer, responder)
    trainer.run(small.selector(), [phase(rounds)])
    assert len(responder.asked) == 2
    for asked in responder.asked:
        assert len(asked) == len(set(asked)) <= 8 * len(small.train)
        assert {row for row, _ in asked} == set(small.train.query_idx.tolist())
        assert all(len(set(p)) == 2 and 0 <= min(p) and max(p) < 9 for _, p in asked)
    assert responder.asked[0] != responder.asked[1]
    assert rounds.prompts() == sum(map(len, responder.asked))
    assert not list(trainer.state_folder.glob("online_round1.pt"))


def test_the_answers_become_the_rewards_of_the_sampled_pointers(small, tmp_path):
    trainer = small.trainer(tmp_path)
    groups = online(trainer, PlantedResponder())(1, small.selector().eval())
    world = small_world()
    for i in (0, 7):
        pool = groups.items[groups.pool_rows[i]].numpy()
        expected = [world.success(int(groups.query_idx[i]), pool[p]) for p in groups.pointers[i].numpy()]
        np.testing.assert_allclose(groups.rewards[i].numpy(), expected, rtol=1e-5)
    assert groups.mask.all() and groups.pointers.shape == (len(small.train), 8, 2)


class Exchange:
    """Two processes' gather, as two threads."""

    def __init__(self):
        self.values, self.barrier_of_two = [None, None], threading.Barrier(2, timeout=60)

    def processes(self, rank):
        exchange = self

        class One(Processes):
            def gather(self, value):
                exchange.values[rank] = value
                exchange.barrier_of_two.wait()
                values = list(exchange.values)
                exchange.barrier_of_two.wait()  # until both have read them
                return values

            def barrier(self):
                exchange.barrier_of_two.wait()

        return One(rank, 2, torch.device("cpu"))


def test_two_processes_share_the_queries_and_get_the_groups_of_one(small, tmp_path):
    alone = small.trainer(tmp_path / "one")
    expected = online(alone, PlantedResponder())(1, small.selector().eval())
    exchange, groups, responders = Exchange(), [None, None], [PlantedResponder(), PlantedResponder()]
    trainers = [small.trainer(tmp_path / "two") for _ in range(2)]
    policies = [small.selector(seed).eval() for seed in (0, 7)]  # made here: threads share the random numbers

    def process(rank):
        trainers[rank].processes = exchange.processes(rank)
        groups[rank] = online(trainers[rank], responders[rank])(1, policies[rank])

    other = threading.Thread(target=process, args=(1,))
    other.start()
    process(0)
    other.join()
    for got in groups:
        assert torch.equal(got.pointers, expected.pointers) and torch.equal(got.rewards, expected.rewards)
    rows = [{row for row, _ in responder.asked[0]} for responder in responders]
    assert rows[0] | rows[1] == set(small.train.query_idx.tolist()) and not rows[0] & rows[1]


def test_learning_from_fresh_pointers_raises_their_reward(small, tmp_path):
    trainer = small.trainer(tmp_path)
    trainer.run(small.selector(), [phase(online(trainer, PlantedResponder(), 12, 1), epochs=8, lr=5e-3)])
    means = [r["reward_mean"] for r in trainer.history if r["epoch"] > 0]
    assert means[-1] > means[0] + 0.03


@pytest.mark.parametrize("at", [2, 3])
def test_a_run_cut_in_a_round_goes_on_with_the_same_pointers(small, tmp_path, monkeypatch, at):
    from lever_plus.rl import trainer as module

    whole = small.trainer(tmp_path / "whole")
    whole.run(small.selector(), [phase(online(whole, PlantedResponder()))])
    real, count = module.Engine.step, 0
    per_epoch = -(-len(small.train) // 8)

    class Cut(Exception):
        pass

    def step(self, loss, lr):
        nonlocal count
        count += 1
        if count == (at - 1) * per_epoch + 2:
            raise Cut
        return real(self, loss, lr)

    monkeypatch.setattr(module.Engine, "step", step)
    cut = small.trainer(tmp_path / "cut")
    with pytest.raises(Cut):
        cut.run(small.selector(), [phase(online(cut, PlantedResponder()))])
    again, responder = small.trainer(tmp_path / "cut"), PlantedResponder()
    rounds = online(again, responder)
    again.run(small.selector(seed=4), [phase(rounds)])
    complete = online(whole, PlantedResponder())
    assert rounds.prompts() == complete.prompts() > 0
    a, b = (
        torch.load(tmp_path / n / "grpo_epoch4.pt", weights_only=True)["model_state_dict"] for n in ("whole", "cut")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(responder.asked) == 1  # only the round that the cut fell into or that was still to come
