"""What the engine shows of a model's inside: hidden states before the answer, embeddings of answers."""

import numpy as np
import pytest
import torch

from open_mmicl.engine import Engine
from open_mmicl.errors import UsageError
from open_mmicl.interface.prompts import Prompt
from tests.reference import tiny_lvlm


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("lvlm")
    folder = tiny_lvlm.make_folder(root / "model")
    prompts = tiny_lvlm.make_prompts(tiny_lvlm.make_images(root / "images", 7), 20)
    config = tiny_lvlm.make_config(folder)
    return config, [Prompt((), prompt.image, prompt.question) for prompt in prompts]


def test_the_last_state_times_an_answers_embedding_is_its_logit(world):
    config, prompts = world
    engine = Engine.load(config, device="cpu")
    answers = [a for a in ("red", "two", "fish", "blue", "a", "b", "c") if len(engine.lvlm.answer_ids(a)) == 1]
    assert len(answers) >= 3
    states = engine.hidden_states(prompts, (-1,))[:, 0]  # (N, d)
    logits = states @ engine.answer_embeddings(answers).T  # (N, A)
    scores = engine.score(prompts, [answers] * len(prompts))
    log_probs = torch.tensor([[score.log_prob for score in row] for row in scores])
    torch.testing.assert_close(logits - logits[:, :1], log_probs - log_probs[:, :1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("pool", ["last", "image"])
def test_states_do_not_depend_on_their_neighbours_and_are_transformers_own(world, pool):
    config, prompts = world
    engine = Engine.load(config, device="cpu")
    together = engine.hidden_states(prompts, (0, 1, -1), pool)
    small = Engine.load(config, device="cpu", token_budget=1)
    alone = torch.cat([small.hidden_states([prompt], (0, 1, -1), pool) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    lvlm = engine.lvlm
    batch = lvlm.prompt_inputs(prompts[:1], "right")
    states = lvlm.model(**batch, output_hidden_states=True).hidden_states
    is_image = batch["input_ids"][0] == lvlm.image_token_id()
    for i, layer in enumerate((0, 1, -1)):
        rows = states[layer][0, -1] if pool == "last" else states[layer][0][is_image].mean(0)
        torch.testing.assert_close(together[0, i], rows.detach(), rtol=0, atol=1e-5)


def test_a_layer_that_is_not_there_is_named(world):
    config, prompts = world
    with pytest.raises(UsageError, match=r"LVLM_LAYERS takes -\d+ to \d+"):
        Engine.load(config, device="cpu").hidden_states(prompts[:2], (99,))


def test_an_answers_embedding_is_the_mean_of_its_tokens(world):
    config, _ = world
    engine = Engine.load(config, device="cpu")
    weight = engine.lvlm.model.get_output_embeddings().weight.detach().numpy()
    answer = "large metal fish"
    expected = np.mean([weight[token] for token in engine.lvlm.answer_ids(answer)], axis=0)
    np.testing.assert_allclose(engine.answer_embeddings([answer])[0].numpy(), expected, atol=1e-6)
