"""The pointers that RL data are made of."""


import numpy as np
import pytest
import torch

from lever_plus.data.channels import Tables
from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.settings.data import RlDataSettings
from lever_plus.stages.generate_rl_data import propose
from lever_plus.stages.lvlm import build_prompt


def selector_of(stop, bias=0.0):
    torch.manual_seed(3)
    selector = PointerSelector(SelectorConfig(input_dim=8, hidden_dim=16, stop=stop, stop_shots=int(stop))).eval()
    if stop:
        with torch.no_grad():
            selector.stop.linear.bias.fill_(bias)
    return selector


def proposed(selector, **settings):
    embeddings = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    tables = Tables(embeddings, embeddings, False)
    return propose(selector, tables, 7, np.arange(10, 22), RlDataSettings(**settings)), embeddings


@pytest.mark.parametrize("shots", [1, 2, 3])
@pytest.mark.parametrize("bias", [-1.0, 0.0, 1e6])
def test_a_policy_that_may_stop_gets_pointers_of_all_lengths(shots, bias):
    selector = selector_of(True, bias)
    found, embeddings = proposed(selector, rl_shot=shots)
    pointers = [tuple(c["pointer"]) for c in found]
    assert len(set(pointers)) == len(pointers) and () in pointers
    assert all(p[:length] in pointers for p in pointers for length in range(len(p)))  # every prefix is there
    assert max(map(len, pointers)) == shots  # the random ones, whatever the policy does
    assert all(0 <= i < 12 for p in pointers for i in p)
    padded = torch.tensor([[*p, *[-1] * (shots - len(p))] for p in pointers])
    expected = selector.log_prob(embeddings[7][None], embeddings[10:22][None], padded[None])[0].tolist()
    assert [c["logprob_score"] for c in found] == pytest.approx(expected, rel=1e-5)


def test_without_stop_they_are_what_they_were_and_stop_1_adds_prefixes_only():
    plain, _ = proposed(selector_of(False))
    assert {len(c["pointer"]) for c in plain} == {2} and len(plain) <= 10
    more, _ = proposed(selector_of(False), stop=True)
    assert more[: len(plain)] == plain
    firsts = list(dict.fromkeys(tuple(c["pointer"][:1]) for c in plain))
    assert [tuple(c["pointer"]) for c in more[len(plain) :]] == [*firsts, ()]
    assert {c["gen_method"] for c in more[len(plain) :]} == {"prefix"}


def test_no_prompt_takes_padding_for_a_position():
    pool = np.arange(5)
    for pointer in ([-1], [2, -1], [5]):
        with pytest.raises(ValueError, match="outside the pool"):
            build_prompt(None, None, 0, pool, pointer, "best_last")
