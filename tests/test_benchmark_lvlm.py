"""The benchmark of the LVLM engine runs on both kinds of model and counts what goes through them."""

import json

import pytest
import torch

from lever_plus import benchmark_arch, benchmark_lvlm, benchmark_rl
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
        benchmark_arch, "TEXT_3B", {**benchmark_arch.TEXT_3B, **text, "vocab_size": 2000, "rope_parameters": rope}
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    monkeypatch.setattr(
        benchmark_arch, "_VISION_3B", {**benchmark_arch._VISION_3B, **vision, "fullatt_block_indexes": [1]}
    )
    monkeypatch.setattr(benchmark_lvlm, "ARCH_IMAGE", (112, 84))
    out = tmp_path / "report.json"
    argv = ["--arch", "qwen2.5_vl_3B", "--random-weights", "--precision", "fp32", "--anchors", "1", "--queries", "1"]
    assert benchmark_lvlm.main([*argv, "--growth", "0", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    check(report)
    for name in "abc":  # held against what its own geometry saves, not against a wish
        part = report["parts"][name]
        decoder = 3 * (2 * 64 * (64 + 32) + (64 + 2 * 32) + 3 * 64 * 96 + 2 * 64)  # products, biases, norms
        vision = 2 * (4 * 32 * 32 + 4 * 32 + 3 * 32 * 48 + 2 * 48 + 32 + 2 * 32)
        naive, fast = (2.0 * (decoder * s["tokens"] + vision * s["patches"]) for s in (part["naive"], part["fast"]))
        assert part["fast"]["operations"] == fast and part["operations_ratio"] == pytest.approx(naive / fast)
        assert report["targets"][name]["at_least"] == pytest.approx(0.9 * naive / fast)
        assert report["targets"][name]["met"] == (part["speedup"] >= 0.9 * naive / fast)


RL_ONE_TOO_LOW = {"queries": 9, "pool": 7, "dim": 15, "pointers": 1, "naive-queries": 0, "batch": 0, "epochs": 0}


@pytest.mark.parametrize(
    ("module", "option", "value"),
    [(benchmark_lvlm, "anchors", 0), (benchmark_lvlm, "queries", 0), (benchmark_rl, "zero-stage", 4)]
    + [(benchmark_rl, option, value) for option, value in RL_ONE_TOO_LOW.items()],
)
def test_a_number_out_of_range_is_refused_by_name(module, option: str, value: int, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        module.main([f"--{option}", str(value)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"--{option}: '{value}' is not a whole number from" in said


def test_what_cannot_be_measured_is_refused() -> None:
    assert benchmark_rl.main(["--pool", "8", "--pointers", "29"]) == 2
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="NVIDIA GPU"):
            benchmark_lvlm.main(["--arch", "qwen2.5_vl_3B", "--random-weights", "--device", "cuda"])
