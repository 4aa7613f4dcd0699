"""Runs the sides in turns and compares them; see benchmarks/peers.sh.

Jobs: (a) InfoScore beam search (beam 5, 2 shots, pools of 64); (b) RL data: 12 two-shot pointers a query, a greedy
answer and the annotators' answers and the true one scored; (c) greedy answers with 1 to 4 demonstrations of four
methods.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lever_plus import cli, config, io
from lever_plus.benchmark_lvlm import World
from open_mmicl.arguments import Parser, whole
from open_mmicl.errors import LeverError, UsageError

SIDES = ("ours", "vllm", "generic", "batches", "naive")
PARTS = {"a": "InfoScore beam search", "b": "RL data, greedy and scores", "c": "shots 1-4, greedy"}
EMBEDDED = config.REPO_ROOT / "lever_plus/mini/weights/lvlm"
MIDDLE_IMAGE = (448, 448)
# A decoder of 93 million parameters and a vision tower of 26, in the real model's proportions.
MIDDLE_TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 11, "num_attention_heads": 12,
    "num_key_value_heads": 2, "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}  # fmt: skip
MIDDLE_VISION = {
    "depth": 8, "hidden_size": 512, "intermediate_size": 1408, "num_heads": 8, "out_hidden_size": 768,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "fullatt_block_indexes": [3, 7],
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Make model and jobs, run every side, print and write the comparison."""
    options = _options(argv)
    python = {side: sys.executable for side in SIDES}
    python["vllm"] = os.environ.get("PEERS_VLLM_PYTHON", "")
    sides = [side for side in options.sides.split(",") if python[side]]
    if "vllm" in options.sides.split(",") and "vllm" not in sides:
        print("vLLM is left out: no PEERS_VLLM_PYTHON (benchmarks/peers.sh makes its environment)")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="lever_peers_") as scratch:
        folder = Path(scratch)
        model = EMBEDDED if options.model == "embedded" else middle_model(folder / "model")
        jobs = make_jobs(folder / "world", options)
        io.write_json(folder / "jobs.json", {"model": str(model), "precision": options.precision, **jobs})
        for number in range(options.rounds):
            for i in range(len(sides)):
                side = sides[(number + i) % len(sides)]
                found = _run(side, python[side], folder)
                if found is None:
                    raise LeverError(f"{side} failed; what it said stands above")
                runs[side].append(found)
    report = compare(runs)
    out = options.out or config.REPO_ROOT / "results/benchmark" / f"peers_{options.model}_{options.precision}.json"
    io.write_json(out, {"options": {k: str(v) for k, v in vars(options).items()}, **report}, indent=1)
    print(as_table(report))
    print(f"written: {out}")
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bash benchmarks/peers.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded", choices=["embedded", "middle"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rounds", type=whole(1), default=3, help="every side this often; medians (%(default)s)")
    parser.add_argument("--anchors", type=whole(1), default=2, help="beam searches of (a) (%(default)s)")
    parser.add_argument("--queries", type=whole(1), default=6, help="queries of (b) and (c) (%(default)s)")
    parser.add_argument("--pool", type=whole(4, 512), default=64, help="candidates per query (%(default)s)")
    parser.add_argument("--beams", type=whole(1), default=5, help="of (a) (%(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="the JSON that is written (in results/benchmark)")
    options = parser.parse_args(argv)
    if not set(options.sides.split(",")) <= set(SIDES) or "ours" not in options.sides.split(","):
        raise UsageError(f"--sides={options.sides} is not allowed: some of {','.join(SIDES)}, ours among them")
    return options


def middle_model(folder: Path) -> Path:
    """A random model with the embedded model's tokenizer and template, as a folder that every side reads."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = AutoTokenizer.from_pretrained(EMBEDDED, local_files_only=True)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = words.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    shape = AutoConfig.for_model(
        "qwen2_5_vl", text_config={**MIDDLE_TEXT, "vocab_size": len(words), "tie_word_embeddings": True},
        vision_config=MIDDLE_VISION, tie_word_embeddings=True, **dict(zip(names, ids, strict=True)),
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(shape, dtype=torch.float32)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=1024 * 1024).save_pretrained(folder)
    return folder


def make_jobs(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked, as JSON: rows of the embedded benchmark's train split."""
    from open_mmicl.metrics.vqa import gt_weights

    world = World(folder, MIDDLE_IMAGE if options.model == "middle" else None)
    train = world.train
    used: dict[str, list[str]] = {}

    def row(i: int) -> str:
        used[str(i)] = [str(train.image_path(i)), train.question(i), train.answer(i)]
        return str(i)

    searches = []
    for query, pool in (world.draw(options.pool) for _ in range(options.anchors)):
        searches.append({"query": row(query), "pool": [row(i) for i in pool]})
    pointers, shots = [], []
    for query, pool in (world.draw(options.pool) for _ in range(options.queries)):
        answers = [[a, True] for a, _ in gt_weights(train.answers(query))] + [[train.answer(query), False]]
        chosen = [world.random.choice(options.pool, 2, replace=False) for _ in range(12)]
        pointers.append({"query": row(query), "demos": [[row(pool[i]) for i in c] for c in chosen], "answers": answers})
        methods = [world.random.permutation(options.pool)[:4] for _ in range(4)]
        demos = [[row(pool[i]) for i in m[:k]][::-1] for m in methods for k in range(1, 5)]
        shots.append({"query": row(query), "demos": demos})
    return {"rows": used, "beams": options.beams, "a": searches, "b": pointers, "c": shots}


def _run(side: str, python: str, folder: Path) -> dict[str, Any] | None:
    """One side in a process of its own with one thread."""
    out = folder / f"{side}.json"
    out.unlink(missing_ok=True)
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": str(config.REPO_ROOT),
    }  # fmt: skip
    command = [python, "-m", "benchmarks.sides", side, str(folder / "jobs.json"), str(out)]
    done = subprocess.run(command, env=env, cwd=config.REPO_ROOT, check=False)
    return json.loads(out.read_text(encoding="utf-8")) if done.returncode == 0 and out.is_file() else None


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Per part and side: median CPU and wall seconds, ratio to ours, agreement with ours, tokens."""
    report: dict[str, Any] = {"parts": {}, "matmul_flops": runs["ours"][0]["matmul_flops"]}
    for part in PARTS:
        ours = [run["parts"][part] for run in runs["ours"]]
        base = statistics.median(run["cpu"] for run in ours)
        report["parts"][part] = {}
        for side, found in runs.items():
            theirs = [run["parts"][part] for run in found]
            cpu = statistics.median(run["cpu"] for run in theirs)
            first, mine = theirs[0], ours[0]
            pairs = list(zip(first["log_probs"], mine["log_probs"], strict=True)) if part != "a" else []
            report["parts"][part][side] = {
                "cpu_seconds": cpu, "wall_seconds": statistics.median(run["wall"] for run in theirs),
                "all_cpu_seconds": [run["cpu"] for run in theirs], "times_ours": cpu / base,
                "same": sum(a == b for a, b in zip(first["texts"], mine["texts"], strict=True)) / len(mine["texts"]),
                "max_log_prob_difference": max((abs(a - b) for a, b in pairs), default=0.0),
                "tokens": first["tokens"], "fewest_tokens": mine["fewest_tokens"], "naive_tokens": mine["naive_tokens"],
                "share_of_matmul": first["flops"] / cpu / report["matmul_flops"] if first["flops"] else None,
            }  # fmt: skip
    return report


def as_table(report: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    rows = []
    for part, sides in report["parts"].items():
        for side, row in sides.items():
            share = "" if row["share_of_matmul"] is None else f"{row['share_of_matmul']:.0%}"
            tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
            rows.append(
                [f"({part}) {PARTS[part]}", side, f"{row['cpu_seconds']:.2f}", f"{row['times_ours']:.2f}x",
                 f"{row['same']:.1%}", f"{row['max_log_prob_difference']:.1e}", tokens, f"{row['fewest_tokens']:,}",
                 f"{row['naive_tokens']:,}", share]
            )  # fmt: skip
    head = ["job", "side", "CPU s", "times ours", "same", "max |d|", "tokens", "fewest", "naive", "of matmul rate"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(cli.guard(lambda: main(sys.argv[1:])))
