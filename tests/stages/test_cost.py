"""Dry runs: the counts of the design, and image tokens against transformers' own rule."""

import pytest

from lever_plus.stages.cost import COCO_IMAGE, estimate, image_tokens


def test_image_tokens_equal_transformers_smart_resize() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for low, high in ((3136, 28 * 28 * 1280), (3136, 3136), (256 * 784, 512 * 784)):
        for width, height in (COCO_IMAGE, (56, 56), (333, 500), (3000, 2000), (28, 280)):
            h, w = smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
            assert image_tokens(width, height, {"min_pixels": low, "max_pixels": high}) == h * w // 784


def test_a_beam_search_of_one_query_looks_at_65_images() -> None:
    cost = estimate(1, 380, 2, 64, 391)
    assert cost.distinct_images == 65 and cost.prompts == 380 and cost.images == 1140


@pytest.mark.parametrize("size", ["okvqa", "vqav2"])
def test_sizes_can_be_assumed_without_files_or_weights(size: str, tmp_path, capsys) -> None:
    from lever_plus import cli
    from lever_plus.settings.data import BeamSettings
    from lever_plus.stages import generate_data

    argv = f"--dry-run --assume {size} --dataset {size}_local --sample-num 800 --result-dir {tmp_path}".split()
    assert cli.stage_main(BeamSettings, generate_data.run, "", argv) == 0
    out = capsys.readouterr().out
    assert "800 queries x 380 prompts = 304,000 prompts" in out and "391 an image" in out and "not measured" in out
    assert not list(tmp_path.rglob("*.json"))
