import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_plus.rl import losses
from tests.reference import naive_rl

NAN = float("nan")


def ragged(*groups):
    """Lists of numbers -> padded (B, M) with NaN outside the mask, and the mask."""
    width = max(len(g) for g in groups)
    values = torch.tensor([list(g) + [NAN] * (width - len(g)) for g in groups])
    return values, ~values.isnan()


def some_groups(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [3, 5, 1, 4]
    columns = [[torch.randn(n, generator=generator).tolist() for n in sizes] for _ in range(4)]
    rewards = [[round(r) / 2 for r in group] for group in columns[3]]
    log_probs = [[-3 + x for x in group] for group in columns[0]]
    old = [[lp + 0.3 * x for lp, x in zip(a, b, strict=True)] for a, b in zip(log_probs, columns[1], strict=True)]
    ref = [[lp + 0.5 * x for lp, x in zip(a, b, strict=True)] for a, b in zip(log_probs, columns[2], strict=True)]
    return log_probs, old, ref, rewards


def test_rce_loss_by_hand():
    log_probs = torch.tensor([[-1.0, -2.0]])
    rewards = torch.tensor([[math.log(3.0), 0.0]])  # weights 3/4 and 1/4 at tau 1
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert losses.rce_loss(log_probs, rewards, mask, 1.0).item() == pytest.approx(0.75 * 1 + 0.25 * 2)
    weight = math.sqrt(3) / (1 + math.sqrt(3))  # at tau 2
    assert losses.rce_loss(log_probs, rewards, mask, 2.0).item() == pytest.approx(weight + 2 * (1 - weight))


def test_group_advantages_by_hand():
    rewards, mask = ragged([1.0, 2.0, 3.0], [0.5, 0.5], [7.0])
    found = losses.group_advantages(rewards, mask)
    assert found[0].tolist() == pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001])
    assert found[1:].tolist() == [[0.0] * 3] * 2
    assert losses.group_advantages(rewards, mask, "none")[0].tolist() == pytest.approx([-1, 0, 1])
    batch = math.sqrt(2 / 5)  # centred squares sum to 2 over six rewards
    assert losses.group_advantages(rewards, mask, "batch")[0, 2].item() == pytest.approx(1 / (batch + 1e-4))
    with pytest.raises(ValueError, match="unknown"):
        losses.group_advantages(rewards, mask, "rank")


@pytest.mark.parametrize("seed", range(5))
def test_losses_equal_the_published_formulas_one_number_at_a_time(seed):
    log_probs, old, ref, rewards = some_groups(seed)
    padded, mask = ragged(*log_probs)
    reward, _ = ragged(*rewards)
    advantage = [naive_rl.advantages(g) for g in rewards]
    torch.testing.assert_close(losses.group_advantages(reward, mask)[mask], torch.tensor(sum(advantage, [])))
    for tau in (2.0, 0.5):
        pairs = [list(zip(a, b, strict=True)) for a, b in zip(log_probs, rewards, strict=True)]
        assert losses.rce_loss(padded, reward, mask, tau).item() == pytest.approx(naive_rl.rce(pairs, tau), rel=1e-5)
        assert losses.listwise_loss(padded, reward, mask, tau).item() == pytest.approx(
            naive_rl.listwise(pairs, tau), rel=1e-5, abs=1e-6
        )
    groups = [list(zip(*g, strict=True)) for g in zip(log_probs, old, ref, advantage, strict=True)]
    tensors = [ragged(*values)[0] for values in (log_probs, old, ref, advantage)]
    for eps_low, eps_high, beta in ((0.2, 0.28, 0.0), (0.1, 0.1, 0.7)):
        found, metrics = losses.grpo_clipped_loss(*tensors, mask, eps_low, eps_high, beta)
        assert found.item() == pytest.approx(naive_rl.grpo(groups, eps_low, eps_high, beta), rel=1e-4, abs=1e-6)
        assert metrics["kl"] >= 0
    groups = [list(zip(*g, strict=True)) for g in zip(log_probs, ref, rewards, strict=True)]
    found, _ = losses.grpo_exact_loss(padded, tensors[2], reward, mask, 0.3)
    assert found.item() == pytest.approx(naive_rl.exact(groups, 0.3), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [(1.0, 1.1, True), (1.0, 1.3, False), (1.0, 0.5, True), (-1.0, 0.9, True), (-1.0, 0.7, False), (-1.0, 1.5, True)],
)
def test_clipping_stops_the_gradient_only_where_the_ratio_left_on_the_profitable_side(advantage, ratio, moves):
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    zero = torch.zeros(1, 1)
    loss, metrics = losses.grpo_clipped_loss(log_prob, zero, zero, torch.tensor([[advantage]]), mask, 0.2, 0.28, 0.0)
    loss.backward()
    assert (log_prob.grad.item() != 0) is moves
    assert metrics["clip_high"].item() == float(not moves and advantage > 0)
    assert metrics["clip_low"].item() == float(not moves and advantage < 0)


def test_k3_estimates_kl_of_the_policy_to_the_reference_in_that_direction():
    torch.manual_seed(0)
    policy, reference = torch.randn(6).log_softmax(0), torch.randn(6).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    other_way = (reference.exp() * (reference - policy)).sum()
    found = (policy.exp() * losses.kl_k3(policy, reference)).sum()
    torch.testing.assert_close(found, exact)
    assert abs(found - other_way) > 0.01


def test_kl_alone_pulls_the_policy_to_the_reference():
    reference = torch.tensor([[-1.0, -2.0, -3.0]])
    log_probs = torch.tensor([[-2.0, -2.0, -2.0]], requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, _ = losses.grpo_clipped_loss(log_probs, log_probs.detach(), reference, torch.zeros(1, 3), mask, 0.2, 0.2, 1.0)
    loss.backward()
    assert log_probs.grad[0, 0] < 0 < log_probs.grad[0, 2] and log_probs.grad[0, 1] == 0


def test_fault_07_equal_rewards_get_equal_advantages_and_constant_groups_no_gradient():
    rewards, mask = ragged([0.1, 0.7, 0.1, 0.7], [0.1] * 3, [-0.8] * 4, [0.3])
    found = losses.group_advantages(rewards, mask)
    assert found[0, 0] == found[0, 2] and found[0, 1] == found[0, 3]
    log_probs = torch.full_like(rewards, -2.0).requires_grad_()
    loss, _ = losses.grpo_clipped_loss(log_probs, log_probs.detach(), log_probs.detach(), found, mask, 0.2, 0.2, 0.0)
    loss.backward()
    assert (log_probs.grad[1:] == 0).all()
    assert (log_probs.grad[0] != 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([-0.8, 0.1, 0.3, 0.8, 5.0]), min_size=0, max_size=5), min_size=1, max_size=4))
def test_advantages_are_centred_and_order_preserving(groups):
    groups = [*groups, [1.0]]  # at least one member somewhere
    rewards, mask = ragged(*groups)
    for scale in ("group", "batch", "none"):
        found = losses.group_advantages(rewards, mask, scale)
        assert torch.isfinite(found).all() and (found[~mask] == 0).all()
        for b, group in enumerate(groups):
            row = found[b, : len(group)]
            assert abs(row.sum().item()) < 1e-3
            for i in range(len(group)):
                for j in range(len(group)):
                    assert (row[i] == row[j]) if group[i] == group[j] else ((row[i] > row[j]) == (group[i] > group[j]))


def test_empty_groups_count_nothing_and_nan_outside_the_mask_is_harmless():
    log_probs, mask = ragged([-1.0, -2.0], [])
    log_probs.requires_grad_()
    rewards = torch.tensor([[1.0, 0.0], [NAN, NAN]])
    full = torch.ones(1, 2, dtype=torch.bool)
    alone = losses.rce_loss(log_probs[:1], rewards[:1], full, 1.0)
    torch.testing.assert_close(losses.rce_loss(log_probs, rewards, mask, 1.0), alone)
    advantages = losses.group_advantages(rewards, mask)
    loss, _ = losses.grpo_clipped_loss(
        log_probs, log_probs.detach(), log_probs.detach(), advantages, mask, 0.2, 0.2, 1.0
    )
    exact, _ = losses.grpo_exact_loss(log_probs, log_probs.detach(), rewards, mask, 1.0)
    (loss + exact + losses.listwise_loss(log_probs, rewards, mask, 1.0)).backward()
    assert torch.isfinite(log_probs.grad[0]).all() and (log_probs.grad[1] == 0).all()
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert losses.rce_loss(log_probs, rewards, nothing, 1.0).item() == 0.0


def test_without_kl_an_overflowing_k3_does_not_poison_the_loss():
    log_probs = torch.tensor([[-400.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[-1.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = losses.grpo_clipped_loss(
        log_probs, log_probs.detach(), reference, torch.tensor([[-1.0, 1.0]]), mask, 0.2, 0.2, 0.0
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(log_probs.grad).all() and metrics["kl"].isinf()


def test_rank_and_zscore_rewards():
    rewards, mask = ragged([0.0, 10.0, 0.0, 1.0], [2.0])
    assert losses.group_rewards(rewards, mask, "rank")[0].tolist() == pytest.approx([-2 / 3, 1.0, -2 / 3, 1 / 3])
    assert losses.group_rewards(rewards, mask, "rank")[1, 0] == 0
    assert (
        losses.group_rewards(rewards, mask, "zscore")[0].tolist() == losses.group_advantages(rewards, mask)[0].tolist()
    )
    assert losses.group_rewards(rewards, mask)[0].tolist() == [0.0, 10.0, 0.0, 1.0]


def test_step_kl_sees_probability_that_leaves_the_scored_set():
    pointers = torch.tensor([[[0], [1]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    reference = torch.tensor([0.25, 0.25, 0.25, 0.25]).log().expand(1, 2, 1, 4)
    moved = torch.tensor([0.05, 0.05, 0.05, 0.85]).log().expand(1, 2, 1, 4)
    scored = moved[..., :2].squeeze(2)
    _, metrics = losses.grpo_exact_loss(
        torch.diagonal(scored, dim1=1, dim2=2), reference[:, :, 0, 0], torch.zeros(1, 2), mask, 1.0
    )
    assert metrics["kl"].item() == pytest.approx(0.0, abs=1e-6)
    expected = sum(p * math.log(p / 0.25) for p in (0.05, 0.05, 0.05, 0.85))
    assert losses.step_kl(moved, reference, pointers, mask).item() == pytest.approx(expected, rel=1e-5)
    taken = torch.tensor([0.5, 0.5, 0.0, 0.0]).log().expand(1, 2, 1, 4)
    assert losses.step_entropy(taken, pointers, mask).item() == pytest.approx(math.log(2))


def exact_k3(groups: list[list[tuple[float, float]]]) -> float:
    """The weighted k3 of groups of (log pi, log pi_ref), in 60 digits."""
    import decimal

    with decimal.localcontext(prec=60):
        total = decimal.Decimal(0)
        for group in groups:
            pi = [decimal.Decimal(lp).exp() for lp, _ in group]
            for p, (lp, ref) in zip(pi, group, strict=True):
                d = decimal.Decimal(ref) - decimal.Decimal(lp)
                total += p / sum(pi) * (d.exp() - d - 1)
        return float(total / len(groups))


LOG_PROB = st.floats(-320, 0, width=32)


@given(st.lists(st.lists(st.tuples(LOG_PROB, LOG_PROB), min_size=1, max_size=5), min_size=1, max_size=3))
def test_weighted_k3_where_exp_of_the_difference_has_no_float32(groups) -> None:
    log_probs, mask = ragged(*[[lp for lp, _ in group] for group in groups])
    ref, _ = ragged(*[[r for _, r in group] for group in groups])
    log_probs.requires_grad_()
    weights = losses.policy_weights(log_probs, mask)
    loss, metrics = losses.grpo_clipped_loss(
        log_probs, log_probs.detach(), ref, torch.zeros_like(ref), mask, 0.2, 0.2, 1.0, weights
    )
    true = exact_k3(groups)
    if true < 1e37:
        assert metrics["kl"].item() == pytest.approx(true, rel=1e-4, abs=1e-4)
        loss.backward()
        assert not log_probs.grad[mask].isnan().any()
    assert not metrics["kl"].isnan()


@pytest.mark.parametrize("difference", [60.0, 89.0, 199.0, 400.0, 700.0])
def test_a_pointer_that_pi_avoids_gives_no_nan(difference: float) -> None:
    log_probs = torch.tensor([[0.0, -difference]], requires_grad=True)
    ref, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
    weights = losses.policy_weights(log_probs, mask)
    rewards = torch.tensor([[1.0, 0.0]])
    loss, _ = losses.grpo_clipped_loss(
        log_probs, log_probs.detach(), ref, rewards, mask, 0.2, 0.2, 0.1, weights
    )
    exact, _ = losses.grpo_exact_loss(log_probs, ref, rewards, mask, 0.1)
    total = loss + exact + losses.rce_loss(log_probs, rewards, mask, 0.1)
    total = total + losses.listwise_loss(log_probs, rewards, mask, 1e-3)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(log_probs.grad).all()
