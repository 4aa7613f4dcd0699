import itertools
import math

import pytest
import torch

from lever_plus.selectors import PointerSelector, SelectorConfig, pointer
from lever_plus.selectors.parts import normalised
from open_mmicl.errors import UsageError
from tests.reference.naive_selector import naive_greedy, naive_log_prob

VARIANTS = {
    "v1": {"num_layers": 0},
    "v2": {},
    "three_layers_biased": {"num_layers": 3, "attn_bias": True},
    "tied": {"tied": True},
    "gate": {"query_update_gate": True},
    "gru": {"gru_state": True},
    "mmr": {"mmr": True},
    "bilinear": {"scorer": "bilinear"},
    "additive_gate_mmr": {"scorer": "additive", "query_update_gate": True, "mmr": True},
    "unprojected": {"input_dim": 16, "hidden_dim": 16},
}


def make(seed=0, **options):
    torch.manual_seed(seed)
    selector = PointerSelector(SelectorConfig(**{"input_dim": 24, "hidden_dim": 16, **options}), "random").eval()
    with torch.no_grad():  # also what starts at zero or one must matter
        for parameter in selector.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return selector


def embeddings(selector, batch=3, pool=7, seed=1):
    torch.manual_seed(seed)
    d = selector.config.input_dim
    return torch.randn(batch, d), torch.randn(batch, pool, d)


def all_pointers(pool, shots):
    return torch.tensor(list(itertools.permutations(range(pool), shots)))


def check_beams(selector, size, every):
    """With as many beams as there are pointers of 3 picks, the search gives all of them, the likeliest first."""
    query, pool = embeddings(selector, pool=size)
    scores = selector.log_prob(query, pool, every.expand(3, -1, -1))
    pointers, log_probs = selector.beam(query, pool, 3, len(every))
    order = scores.argsort(1, descending=True)
    torch.testing.assert_close(log_probs, scores.gather(1, order), atol=1e-5, rtol=1e-5)
    assert pointers.tolist() == [every[order[b]].tolist() for b in range(3)]
    torch.testing.assert_close(selector.log_prob(query, pool, pointers), log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_log_prob_equals_the_naive_product_past_the_trained_shots(name):
    selector = make(**VARIANTS[name])
    query, pool = embeddings(selector)
    pointers = torch.stack([torch.stack([torch.randperm(7)[:4] for _ in range(5)]) for _ in range(3)])
    found = selector.log_prob(query, pool, pointers)
    expected = [[naive_log_prob(selector, query[b], pool[b], p.tolist()) for p in pointers[b]] for b in range(3)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_equals_the_naive_loop(name):
    selector = make(**VARIANTS[name])
    query, pool = embeddings(selector)
    expected = [naive_greedy(selector, query[b], pool[b], 5) for b in range(3)]
    assert selector.select(query, pool, 5).tolist() == expected


@pytest.mark.parametrize("name", ["v2", "gate", "additive_gate_mmr", "gru"])
def test_beam_search_with_enough_beams_is_brute_force(name):
    check_beams(make(**VARIANTS[name]), 5, all_pointers(5, 3))


def test_narrow_beam_keeps_the_best_of_each_step():
    selector = make(query_update_gate=True)
    query, pool = embeddings(selector)
    pointers, log_probs = selector.beam(query, pool, 3, 4)
    assert pointers.shape == (3, 4, 3)
    assert (log_probs.diff(dim=1) <= 0).all()
    for b in range(3):  # two steps by hand
        first = [(naive_log_prob(selector, query[b], pool[b], [i]), [i]) for i in range(7)]
        for _ in range(2):
            first = sorted(first, reverse=True)[:4]
            first = [
                (naive_log_prob(selector, query[b], pool[b], [*p, i]), [*p, i])
                for _, p in first
                for i in range(7)
                if i not in p
            ]
        assert pointers[b].tolist() == [p for _, p in sorted(first, reverse=True)[:4]]


@pytest.mark.parametrize("options", [{}, {"query_update_gate": True}])
def test_probabilities_of_all_pointers_sum_to_one(options):
    selector = make(**options)
    query, pool = embeddings(selector, pool=4)
    pointers = all_pointers(4, 2).expand(3, -1, -1)
    total = selector.log_prob(query, pool, pointers).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(3))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_follow_the_tempered_policy(temperature):
    selector = make(query_update_gate=True)
    query, pool = embeddings(selector, batch=1, pool=3)
    generator = torch.Generator().manual_seed(3)
    pointers, log_probs = selector.sample(query, pool, 2, 20000, temperature, generator)
    torch.testing.assert_close(selector.log_prob(query, pool, pointers), log_probs, atol=1e-5, rtol=1e-5)
    enc = selector.encode(query, pool)
    every = all_pointers(3, 2)
    steps = selector.step_log_probs(enc, every[None])[0]  # (6, 2, 3)
    tempered = (steps / temperature).log_softmax(2).gather(2, every.unsqueeze(2)).squeeze(2).sum(1).exp()
    counts = (pointers[0].unsqueeze(1) == every).all(2).double().mean(0)
    assert (counts - tempered).abs().max() < 4 * math.sqrt(0.25 / 20000)


def check_padding(selector, pointers):
    """A query's scores and picks are the same whether its pool is padded or not."""
    query, pool = embeddings(selector)
    mask = torch.arange(7) < torch.tensor([[4], [7], [5]])
    pointers = torch.tensor([pointers] * 3)
    found = selector.log_prob(query, pool, pointers, mask)
    greedy = selector.select(query, pool, 4, mask)
    for b, size in enumerate([4, 7, 5]):
        one, own = query[b : b + 1], pool[b : b + 1, :size]
        alone = selector.log_prob(one, own, pointers[b : b + 1])
        torch.testing.assert_close(found[b : b + 1], alone, atol=1e-5, rtol=1e-5)
        assert greedy[b].tolist() == selector.select(one, own, 4)[0].tolist()


def test_padded_pools_equal_smaller_pools():
    check_padding(make(query_update_gate=True), [[0, 3], [2, 1]])


def test_rows_form_equals_the_embedding_form():
    selector = make(num_layers=2, query_update_gate=True)
    items = torch.randn(9, 24)
    query_rows, pool_rows = torch.tensor([0, 8]), torch.tensor([[1, 2, 3, 4], [4, 3, 0, 7]])
    pointers = torch.tensor([[[0, 1], [3, 2]]] * 2)
    by_rows, steps = selector(items, items[query_rows], pool_rows, pointers)
    torch.testing.assert_close(by_rows, selector.log_prob(items[query_rows], items[pool_rows], pointers))
    assert steps.shape == (2, 2, 2, 4)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_table_of_candidates_has_the_values_and_gradients_of_gathered_pools(name, monkeypatch):
    selector = make(**VARIANTS[name])
    query, _ = embeddings(selector)
    table, rows = torch.randn(9, query.shape[1]), torch.randint(0, 9, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 5:], rows[1, 5:] = False, 0
    pointers = torch.tensor([[0, 3, 1], [2, 1, 4]]).expand(3, -1, -1)

    def outcome():
        selector.zero_grad()
        log_probs = selector(table, query, rows, pointers, mask)[0]
        (log_probs * torch.linspace(-1, 2, log_probs.numel()).view_as(log_probs)).sum().backward()
        return [log_probs, *(p.grad for p in selector.parameters() if p.grad is not None)]

    by_table = outcome()
    monkeypatch.setattr(pointer, "TABLE_ROWS", 0)
    gathered = outcome()
    assert len(by_table) > 2
    torch.testing.assert_close(by_table, gathered, atol=2e-5, rtol=1e-4)


def test_normalised_vectors_have_torchs_values_and_gradients():
    torch.manual_seed(0)
    vectors = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(normalised(vectors), torch.nn.functional.normalize(vectors, dim=-1), atol=0, rtol=0)
    assert torch.autograd.gradcheck(normalised, vectors)
    assert (normalised(torch.zeros(1, 8)) == 0).all()


def test_a_pointer_longer_than_the_pool_is_refused_and_padding_keeps_gradients_finite():
    selector = make()
    query, pool = embeddings(selector, pool=2)
    with pytest.raises(UsageError, match="3 shots from a pool of 2"):
        selector.select(query, pool, 3)
    with pytest.raises(UsageError, match="outside the pool"):
        selector.log_prob(query, pool, torch.tensor([[[0, 2]]] * 3))
    log_prob = selector.log_prob(query, pool, torch.tensor([[[0, 1, -1]]] * 3))
    log_prob.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in selector.parameters() if p.grad is not None)


def test_repeated_positions_are_impossible():
    selector = make()
    query, pool = embeddings(selector)
    assert (selector.log_prob(query, pool, torch.tensor([[[1, 1]]] * 3)) == -math.inf).all()


def test_untrained_similarity_weights_pick_similar_candidates():
    torch.manual_seed(0)
    selector = PointerSelector(SelectorConfig(input_dim=512)).eval()
    query = torch.randn(50, 512)
    pool = torch.randn(50, 20, 512)
    pool[:, 7] = query + 0.5 * torch.randn(50, 512)
    assert (selector.select(query, pool, 1)[:, 0] == 7).float().mean() > 0.95


@pytest.mark.parametrize("width", [24, 64])
def test_an_untrained_tied_selector_scores_by_the_cosine_whatever_its_attention(width):
    torch.manual_seed(0)
    selector = PointerSelector(SelectorConfig(input_dim=width, hidden_dim=64, tied=True)).eval()
    query, pool = torch.randn(5, width), torch.randn(5, 9, width)
    with torch.no_grad():
        found = selector.encode(query, pool)
    scores = (found.query.unsqueeze(1) * found.candidates).sum(2)
    # The layer norm centres the query, which is all that may stand between the score and the cosine.
    cosine = torch.nn.functional.cosine_similarity(query.unsqueeze(1), pool, dim=2)
    torch.testing.assert_close(scores, cosine, atol=0.1, rtol=0)
    selector.attn_norms[0] = torch.nn.Identity()
    with torch.no_grad():
        found = selector.encode(query, pool)
    torch.testing.assert_close((found.query.unsqueeze(1) * found.candidates).sum(2), cosine)


def test_a_tied_selector_is_symmetric_and_equals_two_projections_of_the_same_weights():
    tied = make(tied=True, num_layers=0)
    separate = make(num_layers=0)
    separate.load_state_dict(tied.state_dict(), strict=True)
    query, pool = embeddings(tied)
    pointers = torch.tensor([[[0, 3]]] * 3)
    assert torch.equal(tied.log_prob(query, pool, pointers), separate.log_prob(query, pool, pointers))
    a, b = torch.randn(2, 1, 24)
    forth, back = tied.encode(a, b.unsqueeze(1)), tied.encode(b, a.unsqueeze(1))
    torch.testing.assert_close(forth.query @ forth.candidates[0].T, back.query @ back.candidates[0].T)
    assert sum(p.numel() for p in separate.parameters()) - sum(p.numel() for p in tied.parameters()) == 16 * 16
    assert tied.state_dict().keys() == separate.state_dict().keys()


def test_two_updates_of_one_state_and_an_unknown_scorer_are_refused():
    with pytest.raises(UsageError, match="choose one"):
        SelectorConfig(query_update_gate=True, gru_state=True)
    with pytest.raises(UsageError, match="dot, bilinear, additive"):
        SelectorConfig(scorer="cosine")


@pytest.mark.parametrize("name", VARIANTS)
def test_files_load_back(name, tmp_path):
    selector = make(**VARIANTS[name])
    selector.save(tmp_path / "s.pt", "rce", 3, {"metric": 0.5}, {"SEED": 1}, {})
    loaded = PointerSelector.load(tmp_path / "s.pt")
    assert loaded.config == selector.config
    query, pool = embeddings(selector)
    pointers = torch.tensor([[[0, 3]]] * 3)
    assert torch.equal(loaded.log_prob(query, pool, pointers), selector.log_prob(query, pool, pointers))
