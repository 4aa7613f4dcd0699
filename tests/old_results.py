"""A results folder as the original Lever-Plus leaves it, small: its names, its formats, its habits.

Rows are numbered in ascending question_id; beam data has no pools, they lie in the sampler's cache; RL data holds
global pointers beside positions in a union pool; both embedding files hold the train split; the v2 file is a
Lightning checkpoint with CLIP in it; the v3 folder has epochs and no best.json.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lever_plus import paths
from lever_plus.config import REPO_ROOT
from lever_plus.data.clip_features import combine_modalities, embed_split
from lever_plus.data.dataset import VqaSplit, load_split
from lever_plus.mini import world
from lever_plus.settings.shared import SharedSettings

WEIGHTS = REPO_ROOT / "lever_plus" / "mini" / "weights"
MODEL, SAMPLER, K, QUERIES = "Qwen2_5-VL-3B-Instruct", "RandSampler", 64, 16
SEARCH = "scorer:infoscore-construct_order:left-beam_size:5-{}:2-candidate_num:64-sample_num:800"
BEAMS = f"vqa-okvqa-{MODEL}-{SAMPLER}-{SEARCH}.json"


def environment(root: Path) -> dict[str, str]:
    """What the user's .env says: where the data and the models lie."""
    return {
        "DATASET": "okvqa_local",
        "OKVQA_PATH": str(root / "okvqa"),
        "COCO_PATH": str(root / "okvqa"),
        "RESULT_DIR": str(root / "results"),
        "QWEN2_5_VL_3B_PATH": str(WEIGHTS / "lvlm"),
        "CLIP_PATH": str(WEIGHTS / "clip"),
        "PRECISION": "fp32",
    }


def make(root: Path, beam_name: str = "few_shot") -> dict[str, Path]:
    """Build data set and results under ``root``; returns the files by what they are."""
    world.generate(root / "okvqa", seed=3, n_train=160, n_val=24)
    folder = str(root / "okvqa")
    settings = SharedSettings(dataset="okvqa_local", okvqa_path=folder, coco_path=folder)
    split = load_split(paths.dataset(settings), "train")
    folder = root / "results" / "okvqa"
    rng = np.random.default_rng(0)
    rows = sorted(rng.permutation(len(split))[:QUERIES].tolist())
    pools = {row: rng.choice(np.setdiff1d(np.arange(len(split)), [row]), K, replace=False).tolist() for row in rows}
    files = {
        "cache": folder / "cache" / f"okvqa-{SAMPLER}-anchor_sample_num: 800:64.json",
        "beams": folder / "generated_data" / BEAMS.format(beam_name),
        "rl": folder / "generated_data" / f"rl_data_{SAMPLER}_{MODEL}.json",
        "query embeddings": folder / "cache" / "query_embeddings.pt",
        "candidate embeddings": folder / "cache" / "candidate_embeddings.pt",
        "v2": folder / "model_cpk" / "v2" / f"{MODEL}_{SAMPLER}_infoscore_left_beam5_shot2_cand64_sample800_best.ckpt",
        "rce": folder / "model_cpk" / f"v3_{SAMPLER}_{MODEL}" / "rce_epoch5.pt",
    }
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    files["cache"].write_text(json.dumps(pools))
    files["beams"].write_text(json.dumps({row: _beams(rng, row, pool) for row, pool in pools.items()}))
    union = sorted({index for pool in pools.values() for index in pool})
    files["rl"].write_text(
        json.dumps({row: _rl(rng, split, row, pool, union) for row, pool in pools.items()}, indent=2)
    )
    parts = embed_split(split, str(WEIGHTS / "clip"), "cpu", 64)
    embeddings = combine_modalities(parts, "mean", "query_img_text_icd_img_text")
    for name in ("query embeddings", "candidate embeddings"):
        torch.save(embeddings, files[name])
    state = selector_weights(embeddings.shape[1])
    one_layer = {
        n.replace("cross_attn_layers.0.", "cross_attn.").replace("attn_norms.0.", "attn_norm."): v
        for n, v in state.items()
    }
    clip = {"lever_lm.img_model.visual_projection.weight": torch.zeros(4, 4)}
    torch.save(
        {
            "epoch": 19,
            "global_step": 500,
            "pytorch-lightning_version": "2.5.1",
            "state_dict": {**clip, **{f"lever_lm.pointer_selector.{n}": v for n, v in one_layer.items()}},
            "hyper_parameters": {"lr": 1e-4, "weight_decay": 0.001, "warm_steps": 0.05},
        },
        files["v2"],
    )
    torch.save(
        {"epoch": 5, "phase": "rce", "model_state_dict": state, "kl_beta": 0.1, "metrics": {"val_loss": 3.9}},
        files["rce"],
    )
    return files


def _beams(rng: np.random.Generator, row: int, pool: list[int]) -> dict[str, Any]:
    beams = [[*rng.choice(pool, 2, replace=False).tolist(), row] for _ in range(5)]
    return {"id_list": beams, "score_list": sorted(rng.normal(size=5).tolist(), reverse=True)}


def _rl(rng: np.random.Generator, split: VqaSplit, row: int, pool: list[int], union: list[int]) -> dict[str, Any]:
    candidates = []
    for number in range(8):
        pointer = rng.choice(pool, 2, replace=False).tolist()
        score = float(rng.choice([0.0, 0.3, 0.6, 1.0]))
        candidates.append(
            {
                "pointer": pointer,
                "pointer_pos": [union.index(index) for index in pointer],
                "gen_method": "beam" if number < 5 else "sample",
                "beam_rank": number if number < 5 else None,
                "beam_score": float(rng.normal()) if number < 5 else None,
                "logprob_score": float(-rng.random()),
                "temperature": None if number < 5 else 1.0,
                "vqa_raw_generation": "x",
                "vqa_pred_answer": "x",
                "vqa_correct": int(score > 0),
                "vqa_acc_score": score,
                "vqa_gt_prob": float(rng.random()),
                "vqa_rel_score": 0.0,
                "vqa_eval_mode": "vqaEval",
                "eval_split_used": "train",
                "eval_failed": False,
            }
        )
    query = {"query_id": row, "question_id": int(split.question_ids[row]), "question": split.question(row)}
    return {"query": query, "pointer_candidates": candidates}


def selector_weights(width: int, hidden: int = 256, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of the original Lever-Plus's one-layer selector."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    return {
        "input_proj.weight": random(hidden, width),
        "cross_attn_layers.0.in_proj_weight": random(3 * hidden, hidden),
        "cross_attn_layers.0.in_proj_bias": random(3 * hidden),
        "cross_attn_layers.0.out_proj.weight": random(hidden, hidden),
        "cross_attn_layers.0.out_proj.bias": random(hidden),
        "attn_norms.0.weight": torch.ones(hidden),
        "attn_norms.0.bias": torch.zeros(hidden),
        "query_proj.weight": random(hidden, hidden),
        "cand_proj.weight": random(hidden, hidden),
    }
