"""The benchmark of the LVLM engine runs on both kinds of model and counts what goes through them."""

import json

import pytest
import torch

from lever_plus import benchmark_arch, benchmark_lvlm
from open_mmicl.errors import UsageError


@pytest.fixture
def small(monkeypatch):
    """A hundredth of the work."""
    for name, value in {"POOL": 6, "BEAMS": 2, "POINTERS": 3, "BLOCK": 10}.items():
        monkeypatch.setattr(benchmark_lvlm, name, value)


def check(report: dict) -> None:
    for name in "abc":
        part = report["parts"][name]
        assert part["identical_answers"] == 1 and part["max_log_prob_difference"] < 1e-4
        assert 0 < part["fast"]["tokens"] < part["naive"]["tokens"]
        assert 0 < part["fast"]["images"] < part["naive"]["images"]
    assert report["parts"]["d"]["fast"]["tokens"] == 0 and report["parts"]["d"]["identical_answers"] == 1
    assert report["rate_of_matmul"]["achieved_flops"] > 0 and report["targets"].keys() <= report["parts"].keys()


def test_on_the_embedded_model(small, tmp_path, capsys) -> None:
    out = tmp_path / "report.json"
    argv = ["--anchors", "1", "--queries", "2", "--growth", "2", "--out", str(out)]
    assert benchmark_lvlm.main(argv) == 0
    report = json.loads(out.read_text())
    check(report)
    assert [row["thousand"] for row in report["growth"]] == [1, 2]
    assert "InfoScore beam search" in capsys.readouterr().out


def test_on_random_weights_of_an_architecture(small, tmp_path, monkeypatch) -> None:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    monkeypatch.setattr(
        benchmark_arch, "_TEXT_3B", {**benchmark_arch._TEXT_3B, **text, "vocab_size": 2000, "rope_parameters": rope}
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    monkeypatch.setattr(
        benchmark_arch, "_VISION_3B", {**benchmark_arch._VISION_3B, **vision, "fullatt_block_indexes": [1]}
    )
    monkeypatch.setattr(benchmark_lvlm, "ARCH_IMAGE", (112, 84))
    out = tmp_path / "report.json"
    argv = ["--arch", "qwen2.5_vl_3B", "--random-weights", "--precision", "fp32", "--anchors", "1", "--queries", "1"]
    assert benchmark_lvlm.main([*argv, "--growth", "0", "--out", str(out)]) == 0
    check(json.loads(out.read_text()))


def test_wrong_options_are_named() -> None:
    with pytest.raises(UsageError, match="--anchors"):
        benchmark_lvlm.main(["--anchors", "0"])
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="NVIDIA GPU"):
            benchmark_lvlm.main(["--arch", "qwen2.5_vl_3B", "--random-weights", "--device", "cuda"])
