"""The generic interface on tiny random models of five families: batches equal one prompt at a time."""

import pytest
import torch

from open_mmicl.answer_cache import model_key
from open_mmicl.engine import Engine
from open_mmicl.errors import UsageError
from open_mmicl.interface.hf_chat import HfChat
from tests.reference import tiny_chat, tiny_lvlm


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    images = tiny_lvlm.make_images(tmp_path_factory.mktemp("images"), 4)
    return tiny_lvlm.make_prompts(images, 8, seed=4, shots=3)


@pytest.mark.parametrize("family", tiny_chat.FAMILIES)
def test_batches_equal_one_prompt_at_a_time(family, prompts, tmp_path) -> None:
    model, processor = tiny_chat.make_chat(family, tmp_path)
    config = tiny_lvlm.make_config(tmp_path, interface="hf_chat", token_budget=400)
    truth = tiny_chat.ChatTruth(model, processor, config.prompt_format)
    wanted, texts = [truth.score(p, "blue boat") for p in prompts], [truth.generate(p) for p in prompts]
    assert len({round(value, 3) for value in wanted}) > 4
    for mode in ("fast", "naive"):
        subject = Engine(
            HfChat(config, model, processor, tmp_path, "fp", "fp32"), mode, tmp_path / f"{mode}.sqlite", 0, 0
        )
        found = [row[0].log_prob for row in subject.score(prompts, [["blue boat"]] * len(prompts))]
        assert torch.allclose(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-4)
        assert subject.generate(prompts) == texts
        assert subject.generate(prompts) == texts and subject.stats.cache_hits > 0


@pytest.mark.parametrize("family", ["idefics3", "llava_onevision", "qwen3_vl", "internvl"])
def test_a_saved_folder_loads_without_torchvision(family, prompts, tmp_path) -> None:
    tiny_chat.make_chat(family, tmp_path)
    config = tiny_lvlm.make_config(tmp_path, interface="hf_chat")
    assert len(Engine.load(config, device="cpu").generate(prompts[:2])) == 2


def test_a_family_without_the_fast_path_is_sent_to_the_generic_one(tmp_path) -> None:
    tiny_chat.make_chat("qwen3_vl", tmp_path)
    with pytest.raises(UsageError, match="interface: hf_chat"):
        Engine.load(tiny_lvlm.make_config(tmp_path), device="cpu")


def test_interfaces_do_not_share_answers() -> None:
    assert model_key({"interface": "hf_chat"}) != model_key({"interface": "qwen_vl"})
