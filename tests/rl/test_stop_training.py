"""Training a policy that may stop: on half of a planted world's queries every demonstration harms."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from lever_plus.data.rl_data import RlCandidate, RlData, RlQuery, load_rl_data, save_rl_data
from lever_plus.rl import deepspeed_engine, losses
from lever_plus.rl.groups import build_groups
from lever_plus.rl.objectives import GrpoObjective, KlControl, RceObjective
from lever_plus.rl.online import OnlineRounds
from lever_plus.rl.planted import Planted, PlantedWorld
from lever_plus.rl.rewards import RewardRule, reward
from lever_plus.rl.trainer import Options, Phase, Trainer
from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.selectors.policy import picks

WORLD = PlantedWorld(queries=200, heldout=80, items=400, pool=8, pointers=4, dim=12, topic_dim=4, nuisance=0.5, seed=4)
RULE = RewardRule("soft_only")


@functools.lru_cache
def world():
    return Planted(WORLD)


def known(row):
    """Queries that the model answers without demonstrations and gets wrong with them."""
    return bool(world().topic[row, 0] > 0)


def accuracy(row, pointer):
    return float(known(row) == (len(pointer) == 0))


@functools.lru_cache
def data():
    queries = []
    for row in world().train_queries:
        q = world().rl_query(int(row))
        whole = [c.pointer for c in q.candidates]
        pointers = list(dict.fromkeys([*whole, *(p[:1] for p in whole), ()]))
        scored = [
            RlCandidate(p, "beam", vqa_correct=int(accuracy(row, p)), vqa_acc_score=accuracy(row, p)) for p in pointers
        ]
        queries.append(RlQuery(int(row), q.pool_ids, scored))
    return RlData(queries, "best_last", max_shot=2)


def groups_of(rl_data, rule=RULE, stop=True):
    table = torch.from_numpy(world().embeddings)
    return build_groups(rl_data, table, functools.partial(reward, rule=rule), stop=stop)


def train(folder, phases, groups=None, **options):
    torch.manual_seed(0)
    shape = SelectorConfig(input_dim=12, hidden_dim=32, stop=True, stop_shots=2, tied=True, **options)
    selector = PointerSelector(shape)
    groups = groups or groups_of(data())
    processes = deepspeed_engine.start_processes("cpu")
    trainer = Trainer(folder, processes, Options(batch_size=20), groups, groups.take(slice(0, 20)))
    trainer.run(selector, phases if isinstance(phases, list) else phases(trainer))
    last = trainer.history[-1]
    return PointerSelector.load(trainer.checkpoint(last["phase"], last["epoch"])), last


def right_stops(selector):
    """Share of held-out queries on which stopping at once or going on is what helps."""
    rows = world().heldout_queries
    table, pools = torch.from_numpy(world().embeddings), [world().pool_of(int(r)) for r in rows]
    found = picks(selector.select(table[rows], table[torch.from_numpy(np.stack(pools))], 2))
    return np.mean([known(row) == (len(p) == 0) for row, p in zip(rows, found, strict=True)])


@pytest.mark.parametrize("mode", ["clipped", "exact"])
@pytest.mark.parametrize("options", [{}, {"query_update_gate": True}])
def test_rce_and_grpo_learn_when_to_stop(mode, options, tmp_path):
    phases = [
        Phase("rce", 4, 5e-3, RceObjective(1.0, 0.3)),
        Phase("grpo", 6, 5e-3, GrpoObjective(KlControl(0.01), mode, pool_kl=mode == "exact")),
    ]
    selector, last = train(tmp_path, phases, **options)
    assert right_stops(selector) > 0.75  # never to stop, or always, is right in half of the cases
    assert last["val_expected_accuracy"] > 0.75


def naive_tree(steps, pointers):
    """{pointer: q} of one query by recursion; ``steps`` {prefix: log-probabilities (K + 1,)}."""
    q = {}

    def visit(prefix, weight):
        nexts = sorted({p[len(prefix)] for p in pointers if len(p) > len(prefix) and p[: len(prefix)] == prefix})
        if not nexts:
            q[prefix] = weight
            return
        chances = np.exp(steps[prefix])
        stop = chances[-1] if prefix in pointers else 0.0
        if prefix in pointers:
            q[prefix] = weight * stop
        total = sum(chances[k] for k in nexts)
        for k in nexts:
            visit((*prefix, k), weight * (1 - stop) * chances[k] / total)

    visit((), 1.0)
    return q


def test_the_tree_of_scored_pointers_by_recursion():
    torch.manual_seed(2)
    selector = PointerSelector(SelectorConfig(input_dim=12, hidden_dim=16, stop=True, stop_shots=3), "random").eval()
    query, cands = torch.randn(2, 12), torch.randn(2, 6, 12)
    groups = [
        [(), (1,), (1, 2), (1, 2, 3), (1, 4), (0,), (5, 3, 2)],  # (5,) and (5, 3) are not scored themselves
        [(2, 1), (2,), (3, 0, 1)],  # nor is the empty one here
    ]
    padded = torch.full((2, 7, 3), -1)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    for b, group in enumerate(groups):
        for j, pointer in enumerate(group):
            padded[b, j, : len(pointer)] = torch.tensor(pointer, dtype=torch.long)
            mask[b, j] = True
    enc = selector.encode(query, cands)
    steps = selector.step_log_probs(enc, padded)
    found = losses.tree_log_probs(steps, padded, mask)
    for b, group in enumerate(groups):
        by_prefix = {
            p[:t]: steps[b, j, t].double().numpy(force=True)
            for j, p in enumerate(group)
            for t in range(3)
            if t <= len(p)
        }
        expected = naive_tree(by_prefix, group)
        assert sum(expected.values()) == pytest.approx(1)
        for j, pointer in enumerate(group):
            assert found[b, j].exp().item() == pytest.approx(expected[pointer], rel=1e-5)
    assert (found[~mask] == 0).all()
    found.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in selector.parameters())


def test_exact_grpo_learns_to_stop_where_the_scored_pointers_are_few_of_many():
    """Renormalised over the group, the empty pointer would seem to be chosen already, and nothing would be learned."""
    torch.manual_seed(0)
    selector = PointerSelector(SelectorConfig(input_dim=12, hidden_dim=16, stop=True, stop_shots=2), "random")
    with torch.no_grad():
        selector.stop.linear.bias.fill_(0.0)
    query, cands = torch.randn(4, 12), torch.randn(4, 60, 12)
    pointers = torch.tensor([[[-1, -1], [3, -1], [3, 4], [7, -1], [7, 1]]]).expand(4, -1, -1)
    mask, rewards = torch.ones(4, 5, dtype=torch.bool), torch.tensor([[0.9, 0.3, 0.3, 0.3, 0.3]]).expand(4, -1)
    before = selector.select(query, cands, 2)
    assert (before[:, 0] >= 0).all()  # the greedy policy does not stop
    optimiser = torch.optim.Adam(selector.parameters(), 5e-3)
    for _ in range(60):
        steps = selector.step_log_probs(selector.encode(query, cands), pointers)
        log_q = losses.tree_log_probs(steps, pointers, mask)
        loss, _ = losses.grpo_exact_loss(log_q, log_q.detach(), rewards, mask, 0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (selector.select(query, cands, 2) < 0).all()


class Truth:
    """Answers fresh pointers, and remembers how many of them were empty."""

    computed = empty = 0

    def answer(self, rows, pools, pointers):
        self.empty += sum(p == () for group in pointers for p in group)
        return [
            [{"vqa_correct": int(accuracy(r, p)), "vqa_acc_score": accuracy(r, p), "beam_score": 0.0} for p in group]
            for r, group in zip(rows, pointers, strict=True)
        ]


def test_online_rounds_ask_for_empty_pointers_and_learn_from_them(tmp_path):
    truth = Truth()

    def phases(trainer):
        rounds = OnlineRounds(
            trainer.train, truth, functools.partial(reward, rule=RULE), trainer.state_folder, trainer.processes,
            samples=8, temperature=1.0, epochs_per_round=2, seed=1,
        )  # fmt: skip
        return [Phase("grpo", 10, 5e-3, GrpoObjective(KlControl(0.0), "online", weigh_kl=False), None, rounds)]

    selector, _ = train(tmp_path, phases)
    assert truth.empty > 0
    assert right_stops(selector) > 0.75


def test_a_cost_of_demonstrations_shortens_pointers(tmp_path):
    def mean_length(cost):
        rule = dataclasses.replace(RULE, shot_cost=cost)
        phases = [Phase("grpo", 5, 5e-3, GrpoObjective(KlControl(0.0), "exact"))]
        selector, _ = train(tmp_path / str(cost), phases, groups_of(data(), rule))
        rows = torch.from_numpy(world().train_queries)
        table, pools = torch.from_numpy(world().embeddings), np.stack([q.pool_ids for q in data().queries])
        found = picks(selector.select(table[rows], table[torch.from_numpy(pools)], 2))
        return np.mean([len(p) for p in found])

    free, some, all_of_it = mean_length(0.0), mean_length(0.3), mean_length(2.0)
    assert all_of_it == 0 < some <= free


def test_the_cost_is_taken_off_per_demonstration():
    candidate = RlCandidate((3, 1), "beam", beam_score=0.4, vqa_correct=1, vqa_acc_score=0.6)
    for mode in ("plan", "soft_only", "hard_only", "hard_plus_soft", "separated"):
        rule = RewardRule(mode)
        costly = dataclasses.replace(rule, shot_cost=0.25)
        assert reward(candidate, "", costly) == pytest.approx(reward(candidate, "", rule) - 0.5)
        empty = dataclasses.replace(candidate, pointer=())
        assert reward(empty, "", costly) == reward(empty, "", rule)


def test_losses_of_padded_groups_are_those_of_the_pointers_alone():
    groups = groups_of(data())
    torch.manual_seed(1)
    selector = PointerSelector(SelectorConfig(input_dim=12, hidden_dim=16, stop=True, stop_shots=2), "random").eval()
    table = groups.table

    def log_probs(part):
        return selector.log_prob(part.queries, table[part.pool_rows], part.pointers)

    part = groups.take(slice(0, 8))
    padded = log_probs(part)
    for i in range(8):
        for j in torch.nonzero(part.mask[i]).flatten().tolist():
            own = groups.take(slice(i, i + 1))
            own.pointers = own.pointers[:, j : j + 1]
            torch.testing.assert_close(log_probs(own)[0, 0], padded[i, j])
    kept = losses.rce_loss(padded, part.rewards, part.mask, 0.5)
    noise = torch.where(part.mask, padded, torch.nan)
    torch.testing.assert_close(losses.rce_loss(noise, part.rewards, part.mask, 0.5), kept)


def test_the_step_of_a_stop_counts_in_kl_and_entropy():
    steps = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]).log()[None]  # (1, 1, 2 steps, 2 candidates and STOP)
    other = torch.tensor([[[0.25, 0.25, 0.5], [0.3, 0.3, 0.4]]]).log()[None]
    mask = torch.ones(1, 1, dtype=torch.bool)
    kl = (steps.exp() * (steps - other)).sum(3)[0, 0]
    for pointer, expected in (([-1, -1], kl[0]), ([0, -1], kl.sum()), ([0, 1], kl.sum())):
        found = losses.step_kl(steps, other, torch.tensor([[pointer]]), mask, stop=True)
        torch.testing.assert_close(found, expected)
    entropy = -(steps.exp() * steps).sum(3)[0, 0]
    torch.testing.assert_close(losses.step_entropy(steps, torch.tensor([[[-1, -1]]]), mask, stop=True), entropy[0])


def test_the_longest_pointer_is_what_the_data_say_not_what_they_hold():
    short = RlData([RlQuery(q.query_idx, q.pool_ids, [c for c in q.candidates if len(c.pointer) < 2])
                    for q in data().queries], "best_last", max_shot=2)  # fmt: skip
    assert groups_of(short).pointers.shape[2] == 2


def test_without_stop_only_pointers_of_one_length_are_compared_and_empty_ones_left_out():
    groups = groups_of(data(), stop=False)
    lengths = [set((p[m] >= 0).sum(1).tolist()) for p, m in zip(groups.pointers, groups.mask, strict=True)]
    assert all(len(some) == 1 for some in lengths) and set().union(*lengths) == {1, 2}
    assert len(groups) == 2 * len(data().queries)


def test_with_stop_a_query_is_one_group_of_all_its_lengths():
    groups = groups_of(data())
    assert len(groups) == len(data().queries)
    for q, p, m in zip(data().queries, groups.pointers, groups.mask, strict=True):
        assert [tuple(row) for row in picks(p[m])] == [c.pointer for c in q.candidates]


def test_files_hold_all_lengths(tmp_path):
    save_rl_data(tmp_path / "rl.json", data())
    loaded = load_rl_data(tmp_path / "rl.json", WORLD.items)
    assert loaded.max_shot == 2
    assert [[c.pointer for c in q.candidates] for q in loaded.queries] == [
        [c.pointer for c in q.candidates] for q in data().queries
    ]
    save_rl_data(tmp_path / "again.json", loaded)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "rl.json").read_bytes()
