"""The committed tiny models: loaded by the calls that load the real ones, and asked the way they were trained."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPModel, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lever_plus.mini.episodes import EpisodeConfig, episode
from lever_plus.mini.gates import WEIGHTS
from lever_plus.mini.lvlm_model import build_model, positions
from lever_plus.mini.render import render_batch, rng_for
from lever_plus.mini.table import N_WORDS, answer_text
from lever_plus.mini.train_lvlm import Encoder
from lever_plus.mini.vocabulary import TYPES
from lever_plus.mini.wordpieces import qwen_tokenizer
from open_mmicl.interface.prompts import Demo, Prompt, PromptFormat


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(WEIGHTS / "lvlm")


def test_every_answer_is_the_same_tokens_in_a_demonstration_and_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = PromptFormat()
    for kind, rule in enumerate(TYPES):
        for word in range(N_WORDS):
            answer = answer_text(kind, word, (word + 3) % N_WORDS)
            alone = tokenizer(answer, add_special_tokens=False).input_ids
            prompt = Prompt((Demo("a", rule.questions[0], answer),), "b", rule.questions[1])
            text = tokenizer.apply_chat_template(chat.messages(prompt), tokenize=False, add_generation_prompt=True)
            assert text.endswith("<|im_start|>assistant\n") and text.count("<|image_pad|>") == 2
            ids = tokenizer(text, add_special_tokens=False).input_ids
            end = tokenizer.convert_tokens_to_ids("<|im_end|>")
            joined = tokenizer(text + answer + "<|im_end|>", add_special_tokens=False).input_ids
            assert joined == [*ids, *alone, end]
            assert any(ids[i : i + len(alone) + 1] == [*alone, end] for i in range(len(ids)))
            assert tokenizer.decode(alone) == answer and len(alone) <= 4


def test_loads_like_the_real_model_and_stops_at_the_turns_end(tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS / "lvlm")
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    processor = Qwen2VLImageProcessorPil.from_pretrained(WEIGHTS / "lvlm")
    out = processor(images=render_batch([0], [0], "test"), return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert CLIPModel.from_pretrained(WEIGHTS / "clip").config.projection_dim == 64


def test_training_positions_equal_the_models_own() -> None:
    tokenizer = qwen_tokenizer()
    model, encoder = build_model(tokenizer), Encoder(tokenizer)
    rng = rng_for("test-positions")
    ids, labels = encoder.batch([episode(EpisodeConfig(wrong=0.0), 0, 4, rng) for _ in range(3)])
    n_images = int((ids == encoder.image_token).sum()) // 4
    expected, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == encoder.image_token).int(),
        image_grid_thw=torch.tensor([[1, 4, 4]]).expand(n_images, 3),
    )
    assert torch.equal(positions(ids, encoder.image_token), expected)
    assert (labels == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 12  # every answer and its end


def test_the_log_beside_the_weights_is_of_these_settings() -> None:
    for name in ("train_lvlm.jsonl", "train_clip.jsonl"):
        rows = [json.loads(line) for line in (WEIGHTS / name).read_text().splitlines()]
        assert rows[0]["stage"] == "start" and rows[0]["seed"] == 0 and rows[-1]["saved"]
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 15e6
