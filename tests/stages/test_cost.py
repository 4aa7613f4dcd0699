"""Dry runs: the counts of the design, and image tokens against transformers' own rule."""

import pytest

from lever_plus.config import REPO_ROOT
from lever_plus.settings.data import BeamSettings, RlDataSettings
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import flops, work
from lever_plus.stages.cost import ASSUMED, COCO_IMAGE, Sizes, image_tokens, price
from open_mmicl.interface.config import InferModelConfig


def test_image_tokens_equal_transformers_smart_resize() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for low, high in ((3136, 28 * 28 * 1280), (3136, 3136), (256 * 784, 512 * 784)):
        for width, height in (COCO_IMAGE, (56, 56), (333, 500), (3000, 2000), (28, 280)):
            h, w = smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
            assert image_tokens(width, height, {"min_pixels": low, "max_pixels": high}) == h * w // 784


SIZES = Sizes(ASSUMED["okvqa"], 391.0, "", None, "bf16")


def test_a_beam_search_of_one_query_looks_at_65_images() -> None:
    step = work.beam_data(BeamSettings(sample_num=1))
    assert step.by_shots == {0: 1, 1: 64, 2: 315}
    cost = price(RlDataSettings(), step, SIZES)
    assert (cost.distinct_images, cost.prompts, cost.images) == (65, 380, 1 + 2 * 64 + 3 * 315)
    assert cost.image_tokens == 391 * cost.images and cost.operations is None


def test_prices_are_capped_at_what_the_data_set_holds() -> None:
    for step in (work.beam_data(BeamSettings(sample_num=99_999)), work.rl_data(RlDataSettings(rl_query_num=99_999))):
        assert price(RlDataSettings(), step, SIZES).queries == 9009
    for count, queries in ((99_999, 5046), (-1, 5046), (200, 200)):
        step = work.inference(InferenceSettings(test_data_num=count), ["v3", "random", "zero_shot"])
        cost = price(InferenceSettings(), step, SIZES)
        assert (cost.queries, cost.prompts) == (queries, queries * (4 + 20 + 1))


def test_the_step_prices_its_own_prompts_as_the_stage_counts_them() -> None:
    """2,000 queries with 10 pointers and one prompt without demonstrations each: 22,000, everywhere."""
    assert price(RlDataSettings(), work.rl_data(RlDataSettings()), SIZES).prompts == 22_000


def test_operations_equal_those_that_torch_counts() -> None:
    """torch's own counter over a forward pass of transformers' model, vision tower and decoder."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 256, "vocab_size": 1000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    sizes = flops.Architecture(128, 3, 4, 2, 256, 1000, 64, 2, 96, tied=False)
    layers = model.model.language_model.layers.named_parameters()
    assert sum(p.numel() for name, p in layers if name.endswith("proj.weight")) == sizes.decoder_weights
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.language_model(input_ids=torch.zeros(1, 500, dtype=torch.long))
    attention_twice = 2 * 3 * 128 * 500 * 500  # torch counts the masked half too
    assert sizes.decoder(500, 500, 0) + attention_twice == pytest.approx(counter.get_total_flops(), rel=0.01)
    grid = torch.tensor([[1, 16, 16]])  # 256 patches, 64 tokens
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.visual(torch.zeros(256, 3 * 2 * 14 * 14), grid_thw=grid)
    assert sizes.vision(64) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_hours_on_named_cards_need_no_gpu() -> None:
    three = flops.architecture(InferModelConfig.load(REPO_ROOT / "configs/infer_model/qwen2.5_vl_3B.yaml"))
    assert three is not None and 2.7e9 < three.decoder_weights < 2.9e9 and 3.6e9 < three.weights < 4.1e9
    sizes = Sizes(ASSUMED["okvqa"], 391.0, "", three, "bf16")
    cost = price(RlDataSettings(), work.beam_data(BeamSettings(sample_num=800)), sizes)
    h100, _, a100, _ = flops.CARDS
    assert flops.hours(cost.operations, a100) / flops.hours(cost.operations, h100) == pytest.approx(989 / 312)
    assert 2e18 < cost.operations < 3e18  # 2 operations x 2.8e9 weights x 3.7e8 tokens, and the images once


@pytest.mark.parametrize("size", ["okvqa", "vqav2"])
def test_sizes_can_be_assumed_without_files_or_weights(size: str, tmp_path, capsys) -> None:
    from lever_plus import cli
    from lever_plus.settings.data import BeamSettings
    from lever_plus.stages import generate_data

    argv = f"--dry-run --assume {size} --dataset {size}_local --sample-num 800 --result-dir {tmp_path}".split()
    assert cli.stage_main(BeamSettings, generate_data.run, "", argv) == 0
    out = capsys.readouterr().out
    assert "H100" in out and "RTX 4090" in out and "floating-point operations" in out
    assert "800 queries x 380 prompts = 304,000 prompts" in out and "391 an image" in out and "not measured" in out
    assert not list(tmp_path.rglob("*.json"))
