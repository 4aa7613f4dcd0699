"""The generic interface on tiny random models of seven families: batches with cached features equal one prompt at a
time with pixels.
"""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch

from open_mmicl.answer_cache import model_key
from open_mmicl.engine import Engine
from open_mmicl.errors import DamagedInputError, UsageError
from open_mmicl.interface.base import GenerationSettings
from open_mmicl.interface.hf_chat import HfChat
from tests.reference import tiny_chat, tiny_lvlm


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    images = tiny_lvlm.make_images(tmp_path_factory.mktemp("images"), 4)
    return tiny_lvlm.make_prompts(images, 8, seed=4, shots=3)


def engine(subject: HfChat, mode: str = "fast", cache: Path | None = None) -> Engine:
    return Engine(subject, mode, cache, 0, 0)


def chat(family: str, folder: Path, **changes: object) -> tuple[HfChat, tiny_chat.ChatTruth]:
    model, processor = tiny_chat.make_chat(family, folder)
    config = tiny_lvlm.make_config(folder, interface="hf_chat", token_budget=400, **changes)
    return HfChat(config, model, processor, folder, "fp", "fp32"), tiny_chat.ChatTruth(
        model, processor, config.prompt_format
    )


@pytest.mark.parametrize("family", tiny_chat.FAMILIES)
def test_batches_equal_one_prompt_at_a_time(family, prompts, tmp_path) -> None:
    lvlm, truth = chat(family, tmp_path)
    wanted, texts = [truth.score(p, "blue boat") for p in prompts], [truth.generate(p) for p in prompts]
    assert len({round(value, 3) for value in wanted}) > 4
    alone = {path for p in prompts if not p.demos for path in p.images}
    distinct = len({path for p in prompts for path in p.images})
    for mode, encoded in (("naive", None), ("fast", {distinct, distinct + len(alone)})):  # LLaVA: alone is different
        subject = engine(lvlm, mode, tmp_path / f"{mode}.sqlite")
        lvlm.work.images = 0
        found = [row[0].log_prob for row in subject.score(prompts, [["blue boat"]] * len(prompts))]
        assert torch.allclose(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-4)
        assert subject.generate(prompts) == texts
        assert subject.generate(prompts) == texts and subject.stats.cache_hits > 0
        assert subject.stats.images_encoded in (encoded or {2 * sum(len(p.images) for p in set(prompts))})
    assert lvlm.features is not None and subject.stats.tokens_computed > 0
    lengths = [truth.inputs(p, None)["input_ids"].shape[1] for p in prompts]
    assert lvlm.prompt_lengths(prompts) == lengths


@pytest.mark.parametrize("family", tiny_chat.FAMILIES)
def test_all_that_is_asked_of_a_prompt_takes_one_pass_over_it(family, prompts, tmp_path) -> None:
    lvlm, truth = chat(family, tmp_path)
    answers = ["blue boat", "7", "a long answer here", "blue boat"]
    asked = [[(answer, end) for answer in answers[: 1 + i % 4] for end in (False, True)] for i in range(len(prompts))]
    asked[1] = [("7", False)]
    settings = GenerationSettings()
    subject, naive = engine(lvlm), engine(chat(family, tmp_path)[0], "naive")
    replies, plain = subject.ask(prompts, settings, asked), naive.ask(prompts, settings, asked)
    assert lvlm.shared is not None
    for prompt, pairs, ours, theirs in zip(prompts, asked, replies, plain, strict=True):
        assert ours.text == theirs.text == truth.generate(prompt)
        assert [s.n_tokens for s in ours.scores] == [s.n_tokens for s in theirs.scores]
        for (answer, end), ours_score, other in zip(pairs, ours.scores, theirs.scores, strict=True):
            assert ours_score.log_prob == pytest.approx(other.log_prob, abs=1e-4)
            if not end:
                assert ours_score.log_prob == pytest.approx(truth.score(prompt, answer), abs=1e-4)
    distinct = {prompt: length for prompt, length in zip(prompts, lvlm.prompt_lengths(prompts), strict=True)}
    behind = len(prompts) * (2 + 6 + 12 + 3 * 3)  # the answers' and the beams' tokens
    assert sum(distinct.values()) < subject.stats.tokens_computed < sum(distinct.values()) + behind
    assert naive.stats.tokens_computed > 3 * subject.stats.tokens_computed


def test_a_model_that_does_not_go_on_from_its_cache_is_asked_pass_by_pass_and_the_log_says_so(
    prompts, tmp_path, caplog
) -> None:
    lvlm, truth = chat("qwen3_vl", tmp_path)
    real = lvlm.model.forward

    @functools.wraps(real)
    def forgetting(*args, past_key_values=None, **kwargs):  # positions begin anew behind the prompt
        if past_key_values is not None and kwargs["input_ids"].shape[1] <= 4:
            kwargs["position_ids"] = torch.zeros(3, *kwargs["input_ids"].shape, dtype=torch.long)
        return real(*args, past_key_values=past_key_values, **kwargs)

    lvlm.model.forward = forgetting
    subject = engine(lvlm)
    assert lvlm.shared is None and "no shared prefill" in caplog.text and "log-probabilities differ" in caplog.text
    assert subject.score(prompts[:2], [["blue boat"]] * 2)[1][0].log_prob == pytest.approx(
        truth.score(prompts[1], "blue boat"), abs=1e-4
    )


def test_features_that_are_not_what_pixels_give_are_not_used_and_the_log_says_so(prompts, tmp_path, caplog) -> None:
    lvlm, truth = chat("idefics3", tmp_path)
    real = lvlm.model.model.get_image_features

    @functools.wraps(real)
    def shifting(*args, **kwargs):  # what comes out depends on what stands beside it
        out = real(*args, **kwargs)
        out.pooler_output = [part + len(out.pooler_output) for part in out.pooler_output]
        return out

    lvlm.model.model.get_image_features = shifting
    subject = engine(lvlm)
    assert lvlm.features is None and "no feature cache" in caplog.text and "log-probabilities differ" in caplog.text
    lvlm.model.model.get_image_features = real
    assert subject.generate(prompts[:2]) == [truth.generate(p) for p in prompts[:2]]


def test_features_are_dropped_within_their_budget_and_answers_stay(prompts, tmp_path) -> None:
    lvlm, truth = chat("internvl", tmp_path)
    subject = engine(lvlm)
    lvlm.features.budget = 1
    lvlm.features.start(lvlm.work)
    assert subject.generate(prompts) == [truth.generate(p) for p in prompts]
    assert subject.stats.images_encoded > len({path for p in prompts for path in p.images})


def test_the_token_that_begins_a_text_stands_there_once(prompts, tmp_path) -> None:
    lvlm, _ = chat("gemma3", tmp_path)
    words = lvlm.tokenizer
    words.bos_token = "<|endoftext|>"
    for template, count in (("{{ bos_token }}" + lvlm.processor.chat_template, 1), (lvlm.processor.chat_template, 0)):
        lvlm.processor.chat_template = template
        batch = lvlm.inputs([lvlm.layout.text(prompts[0])], [prompts[0].images], "left")
        assert batch["input_ids"][0].tolist().count(words.bos_token_id) == count


def test_a_question_with_the_image_token_is_asked_as_plain_text(prompts, tmp_path) -> None:
    lvlm, _ = chat("internvl", tmp_path)
    texts = ("what is <IMG_CONTEXT>?", "what is < IMG_CONTEXT>?")
    asked = [dataclasses.replace(prompts[0], question=text) for text in texts]
    assert len(set(engine(lvlm).generate(asked))) == 1
    assert lvlm.layout.text(asked[0]) == lvlm.layout.text(asked[1])


@pytest.mark.parametrize("family", tiny_chat.FAMILIES)
def test_a_saved_folder_loads_without_torchvision(family, prompts, tmp_path) -> None:
    tiny_chat.make_chat(family, tmp_path)
    config = tiny_lvlm.make_config(tmp_path, interface="hf_chat")
    subject = Engine.load(config, device="cpu")
    texts = subject.generate(prompts[:2])
    assert len(texts) == 2 and subject.lvlm.features is not None
    template = tmp_path / "chat_template.jinja"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()  # older folders have the JSON file alone
    assert Engine.load(config, device="cpu").generate(prompts[:2]) == texts
    (tmp_path / "chat_template.json").unlink()
    with pytest.raises(DamagedInputError, match="chat template"):
        Engine.load(config, device="cpu")


def test_a_family_without_the_fast_path_is_sent_to_the_generic_one(tmp_path) -> None:
    tiny_chat.make_chat("qwen3_vl", tmp_path)
    with pytest.raises(UsageError, match="interface: hf_chat"):
        Engine.load(tiny_lvlm.make_config(tmp_path), device="cpu")


def test_interfaces_do_not_share_answers() -> None:
    assert model_key({"interface": "hf_chat"}) != model_key({"interface": "qwen_vl"})
