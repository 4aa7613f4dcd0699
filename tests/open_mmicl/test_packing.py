"""A pass without its padding gives what a padded one gives, and what transformers gives."""

import random

import pytest
import torch

from open_mmicl import engine_fast
from open_mmicl.decoder import Packing
from open_mmicl.engine import Engine, GenerationSettings
from tests.open_mmicl.test_engine import ANSWERS
from tests.reference import tiny_lvlm
from tests.reference.naive_lvlm import NaiveLvlm

BEAMS = GenerationSettings(num_beams=3, length_penalty=0.0)


def test_tokens_go_in_and_out_of_their_places() -> None:
    packing = Packing.of([2, 4, 1], 4, torch.device("cpu"))
    padded = torch.arange(24.0).view(3, 4, 2)
    packed = packing.pack(padded)
    assert packed[0, :, 0].tolist() == [0, 2, 8, 10, 12, 14, 16]
    back = packing.pad(packed)
    for row, length in enumerate((2, 4, 1)):
        assert torch.equal(back[row, :length], padded[row, :length])
    read = torch.tensor([[1, 0], [3, 2], [0, 0]])
    assert torch.equal(packing.take(packed, read), torch.take_along_dim(padded, read[..., None], dim=1))


@pytest.mark.parametrize("packed_from", [0.0, float("inf")])
def test_packed_and_padded_passes_equal_transformers(tmp_path, monkeypatch, packed_from) -> None:
    monkeypatch.setattr(engine_fast, "_PACKED_FROM", packed_from)
    folder = tiny_lvlm.make_folder(tmp_path / "model")
    prompts = tiny_lvlm.make_prompts(tiny_lvlm.make_images(tmp_path / "images", 7), 16, seed=4)
    rng = random.Random(5)
    asked = [[(a, rng.random() < 0.5) for a in rng.sample(ANSWERS, rng.randint(0, 3))] for _ in prompts]
    config = tiny_lvlm.make_config(folder)
    subject, truth = Engine.load(config, device="cpu"), NaiveLvlm(folder, config.prompt_format)
    for prompt, pairs, reply in zip(prompts, asked, subject.ask(prompts, BEAMS, asked), strict=True):
        assert reply.text == truth.generate(prompt, num_beams=3)
        for (answer, end), score in zip(pairs, reply.scores, strict=True):
            assert abs(score.log_prob - truth.score(prompt, answer, end)[0]) <= 1e-4
    if packed_from == 0:
        assert subject.stats.tokens_padded == subject.stats.tokens_computed
    else:
        assert subject.stats.tokens_padded > 1.05 * subject.stats.tokens_computed
