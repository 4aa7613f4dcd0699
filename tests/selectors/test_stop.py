"""STOP: a pointer is 0 to S picks. Truths: brute force over all pointers of a small pool, and the naive selector."""

import dataclasses
import itertools
import math

import pytest
import torch

from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.selectors.policy import FixedShots, decisions, picks
from tests.reference.naive_selector import naive_greedy, naive_log_prob
from tests.selectors.test_pointer import check_beams, check_padding, embeddings, make

VARIANTS = {
    "plain": {},
    "tied": {"tied": True},
    "gate": {"query_update_gate": True},
    "gru": {"gru_state": True},
    "mmr": {"mmr": True},
    "additive": {"scorer": "additive"},
}


def stopper(bias=-0.5, **options):
    """A selector whose STOP depends on everything that it reads."""
    selector = make(stop=True, stop_shots=4, **options)
    with torch.no_grad():
        selector.stop.hidden.weight.normal_()
        selector.stop.linear.weight.normal_()
        selector.stop.linear.bias.fill_(bias)
    return selector


def every_pointer(pool, shots):
    """All pointers of 0 to ``shots`` picks, padded: (n, shots)."""
    found = [p for length in range(shots + 1) for p in itertools.permutations(range(pool), length)]
    return torch.tensor([[*p, *[-1] * (shots - len(p))] for p in found])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shots", [1, 2, 3])
def test_the_pointers_of_all_lengths_share_all_probability(name, shots):
    selector = stopper(**VARIANTS[name])
    query, pool = embeddings(selector, pool=4)
    every = every_pointer(4, shots)
    total = selector.log_prob(query, pool, every.expand(3, -1, -1)).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(3))


def test_also_where_pools_are_padded_and_smaller_than_the_shots():
    selector = stopper(query_update_gate=True)
    query, pool = embeddings(selector, pool=4)
    mask = torch.arange(4) < torch.tensor([[4], [3], [2]])
    every = every_pointer(4, 3)
    real = torch.stack([(every < size).all(1) for size in (4, 3, 2)])
    log_probs = selector.log_prob(query, pool, every.expand(3, -1, -1), mask)
    torch.testing.assert_close(log_probs.masked_fill(~real, -math.inf).exp().sum(1), torch.ones(3))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_length_has_the_naive_probability(name):
    selector = stopper(**VARIANTS[name])
    query, pool = embeddings(selector)
    pointers = [[-1, -1, -1], [2, -1, -1], [2, 5, -1], [2, 5, 0]]
    ends = [[7], [2, 7], [2, 5, 7], [2, 5, 0]]
    found = selector.log_prob(query, pool, torch.tensor([pointers] * 3))
    expected = [[naive_log_prob(selector, query[b], pool[b], p) for p in ends] for b in range(3)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_equals_the_naive_loop(name):
    lengths = set()
    for seed in range(6):
        selector = stopper(bias=0.0, seed=seed, **VARIANTS[name])
        query, pool = embeddings(selector, seed=seed)
        found = picks(selector.select(query, pool, 4))
        assert found == [naive_greedy(selector, query[b], pool[b], 4) for b in range(3)]
        lengths |= {len(p) for p in found}
    assert len(lengths) > 1  # else the test would say nothing about STOP


@pytest.mark.parametrize("name", VARIANTS)
def test_beam_search_with_enough_beams_is_brute_force(name):
    check_beams(stopper(**VARIANTS[name]), 4, every_pointer(4, 3))


def test_samples_of_all_lengths_follow_the_policy():
    selector = stopper(query_update_gate=True)
    query, pool = embeddings(selector, batch=1, pool=3)
    pointers, log_probs = selector.sample(query, pool, 2, 20000, 1.0, torch.Generator().manual_seed(3))
    torch.testing.assert_close(selector.log_prob(query, pool, pointers), log_probs, atol=1e-5, rtol=1e-5)
    every = every_pointer(3, 2)
    counts = (pointers[0].unsqueeze(1) == every).all(2).double().mean(0)
    expected = selector.log_prob(query, pool, every[None])[0].exp()
    assert counts.sum().item() == pytest.approx(1)
    assert (counts - expected).abs().max() < 4 * math.sqrt(0.25 / 20000)


def test_with_towers_the_pointers_share_all_probability_and_stop_reads_cosines_at_any_temperature():
    torch.manual_seed(0)
    shape = SelectorConfig(
        input_dim=9, query_dim=6, hidden_dim=16, num_layers=0, encoder="towers", stop=True, stop_shots=2
    )
    selector = PointerSelector(shape).eval()
    with torch.no_grad():
        selector.stop.hidden.weight.normal_()
        selector.stop.linear.weight.normal_()
    query, pool = torch.randn(3, 6), torch.randn(3, 4, 9)
    every = every_pointer(4, 2)
    read, stop = [], selector.stop.hidden.forward
    selector.stop.hidden.forward = lambda seen: read.append(seen) or stop(seen)
    for gain in (0.0, 1.5):
        selector.towers.log_gain.value.data.fill_(gain)
        total = selector.log_prob(query, pool, every.expand(3, -1, -1)).exp().sum(1)
        torch.testing.assert_close(total, torch.ones(3))
    half = len(read) // 2
    for cold, warm in zip(read[:half], read[half:], strict=True):  # all but the log-probability of the best
        torch.testing.assert_close(cold[..., :-1], warm[..., :-1], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(cold[..., -1], warm[..., -1])


def test_padded_batches_equal_unpadded_ones():
    check_padding(stopper(gru_state=True), [[-1, -1], [0, -1], [2, 1]])


@pytest.mark.parametrize("bias", [1e3, 1e9])
def test_a_policy_forced_to_stop_picks_nothing_and_fixed_shots_pick_all(bias):
    selector = stopper(bias=bias)
    query, pool = embeddings(selector)
    stopped = selector.select(query, pool, 3)
    assert (stopped == -1).all() and picks(stopped) == [[], [], []]
    assert (selector.sample(query, pool, 3, 5, 1.0)[0] == -1).all()
    fixed = FixedShots(selector).select(query, pool, 3)
    assert fixed.tolist() == [naive_greedy(without_stop(selector), query[b], pool[b], 3) for b in range(3)]
    assert (selector.select(query, pool, 3) == -1).all()  # the fixed shots were a view


def without_stop(selector):
    plain = PointerSelector(SelectorConfig(input_dim=24, hidden_dim=16), "random").eval()
    plain.load_state_dict({k: v for k, v in selector.state_dict().items() if not k.startswith("stop.")})
    return plain


def test_gradients_are_finite_at_every_length_and_where_the_pool_is_used_up():
    selector = stopper()
    query, pool = embeddings(selector, pool=2)
    selector.log_prob(query, pool, torch.tensor([[[-1, -1, -1], [0, -1, -1], [0, 1, -1]]] * 3)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in selector.parameters() if p.grad is not None)
    assert selector.stop.hidden.weight.grad.abs().sum() > 0


def test_a_stop_that_nothing_has_taught_is_no_choice():
    torch.manual_seed(2)
    selector = PointerSelector(SelectorConfig(input_dim=24, hidden_dim=16, stop=True)).eval()
    torch.manual_seed(2)
    plain = PointerSelector(SelectorConfig(input_dim=24, hidden_dim=16)).eval()
    query, pool = embeddings(selector, batch=20)
    pointers = torch.arange(3).expand(20, 1, 3)
    assert torch.equal(selector.log_prob(query, pool, pointers), plain.log_prob(query, pool, pointers))
    selector.log_prob(query, pool, pointers).sum().backward()  # so labels, which say nothing of it, do not move it
    assert all(p.grad is None for p in selector.stop.parameters())
    with torch.no_grad():
        selector.stop.linear.bias.fill_(1e6)
    assert (selector.select(query, pool, 3) >= 0).all()
    selector.trained_to_stop(3)
    assert (selector.select(query, pool, 3) == -1).all()


def test_picks_and_decisions_of_padded_pointers():
    padded = torch.tensor([[3, 1, 0], [4, -1, -1], [-1, -1, -1]])
    assert picks(padded) == [[3, 1, 0], [4], []]
    with pytest.raises(ValueError, match="goes on after its end"):
        picks(torch.tensor([[-1, 2]]))
    assert decisions(padded, False).tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert decisions(padded, True).tolist() == [[True] * 3, [True, True, False], [True, False, False]]


def test_a_file_keeps_the_shots_that_stop_was_trained_with(tmp_path):
    selector = stopper()
    selector.trained_to_stop(3)
    selector.save(tmp_path / "s.pt", "grpo", 1, {}, {}, {})
    loaded = PointerSelector.load(tmp_path / "s.pt")
    assert loaded.config == selector.config and loaded.config.stop_shots == 3
    plain = make()
    plain.trained_to_stop(3)
    assert plain.config.stop_shots == 0
    assert not {"stop_shots", "stop_gain"} & set(plain.checkpoint("grpo", 1, {}, {}, {})["config"])


def test_training_begins_with_the_same_stop_by_a_higher_gain(tmp_path):
    torch.manual_seed(3)
    selector = PointerSelector(SelectorConfig(input_dim=24, hidden_dim=16, stop=True, stop_shots=2)).eval()
    with torch.no_grad():
        selector.stop.linear.weight.normal_()
    query, pool = embeddings(selector, batch=20)
    trained_before = selector.stop_probabilities(query, pool, 2)
    selector.config = dataclasses.replace(selector.config, stop_shots=0)  # as from labels
    selector.trained_to_stop(2)
    assert selector.config.stop_gain > 1
    torch.testing.assert_close(selector.stop_probabilities(query, pool, 2), trained_before)
    selector.save(tmp_path / "new.pt", "grpo", 1, {}, {}, {})
    loaded = PointerSelector.load(tmp_path / "new.pt").eval()
    assert torch.equal(loaded.stop_probabilities(query, pool, 2), selector.stop_probabilities(query, pool, 2))
    weights = loaded.stop.linear.weight.clone()
    loaded.trained_to_stop(2)  # what is trained keeps its gain
    assert torch.equal(loaded.stop.linear.weight, weights)


def test_a_file_from_before_there_was_a_gain_decides_as_it_did(tmp_path):
    torch.manual_seed(4)
    selector = PointerSelector(SelectorConfig(input_dim=24, hidden_dim=16, stop=True, stop_shots=2)).eval()
    query, pool = embeddings(selector, batch=20)
    content = selector.checkpoint("grpo", 1, {}, {}, {})
    del content["config"]["stop_gain"]
    torch.save(content, tmp_path / "old.pt")
    loaded = PointerSelector.load(tmp_path / "old.pt").eval()
    loaded.trained_to_stop(2)
    assert loaded.config.stop_gain == 1
    assert torch.equal(loaded.stop_probabilities(query, pool, 2), selector.stop_probabilities(query, pool, 2))
