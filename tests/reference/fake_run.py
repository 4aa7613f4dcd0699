"""Makes the folders that training and inference leave behind, with answers drawn from a seed: no model needed."""

import hashlib
import json
from pathlib import Path

import numpy as np

from open_mmicl.metrics.vqa import normalize_answer, vqa_accuracy

VOCABULARY = ["dog", "cat", "hot dog", "red bus", "two", "a tree", "blue", "apple pie"]
SETTINGS = {
    "RCE_EPOCHS": 3, "GRPO_EPOCHS": 2, "BATCH_SIZE": 4, "RCE_LR": 1e-5, "GRPO_LR": 1e-5, "KL_BETA": 0.05,
    "REWARD_MODE": "plan", "REWARD_ALPHA": 0.5, "REWARD_BETA": 0.8, "REWARD_CORRECTNESS": "pm1",
}  # fmt: skip


def make_samples(seed=0, n=60, shots=(1, 2, 3, 4), right=None, random_seeds=3, image=None, world=0, only=None):
    """Lines of samples.jsonl. ``right`` {method: probability of the true answer}; ``world`` fixes the questions;
    ``only`` these methods.
    """
    right = {"v3": 0.55, "v2": 0.5, "random": 0.3, "similarity": 0.4, "zero_shot": 0.25} | (right or {})
    right = {method: p for method, p in right.items() if only is None or method in only}
    questions, rng = np.random.default_rng([world, 1]), np.random.default_rng([world, seed, 2])
    lines = []
    for i in range(n):
        truth = VOCABULARY[questions.integers(len(VOCABULARY))]
        others = [VOCABULARY[questions.integers(len(VOCABULARY))] for _ in range(3)]
        answers = [truth] * 7 + others
        for method, probability in right.items():
            seeds = range(random_seeds) if method == "random" else [None]
            for shot in [0] if method == "zero_shot" else shots:
                for s in seeds:
                    icds = [(int(rng.integers(500)) + 37 * k) % 500 for k in range(shot)]
                    icd_answers = [truth if rng.random() < probability else VOCABULARY[x % 8] for x in icds]
                    raw = truth if rng.random() < probability else VOCABULARY[rng.integers(len(VOCABULARY))]
                    prompt = hashlib.sha256(f"{i} {method} {shot} {s} {icds}".encode()).hexdigest()[:16]
                    lines.append(
                        {
                            "question_id": 1000 + i, "query_idx": i, "image_id": 7 + i // 2,
                            "image": image or "missing.jpg",
                            "question": f"what is in picture {i}?", "answers": answers, "method": method, "shot": shot,
                            "seed": s, "icd_ids": icds, "icd_questions": [f"what is {x}?" for x in icds],
                            "icd_answers": icd_answers, "icd_images": [image or "missing.jpg"] * shot,
                            "prompt_hash": prompt, "raw_answer": raw, "cut_answer": raw,
                            "answer": normalize_answer(raw), "score": vqa_accuracy(raw, answers),
                        }
                    )  # fmt: skip
    return lines


def write_run(folder: Path, lines, dataset="mini_okvqa", model="tiny", checkpoint="v3.pt", settings=None):
    """Write metrics.json and samples.jsonl of an inference run; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    accuracy: dict = {}
    for method, shot in dict.fromkeys((r["method"], r["shot"]) for r in lines):
        scores = [r["score"] for r in lines if (r["method"], r["shot"]) == (method, shot)]
        accuracy.setdefault(method, {})[str(shot)] = 100 * float(np.mean(scores))
    metrics = {
        "dataset": dataset, "split": "val", "n_queries": len({r["question_id"] for r in lines}),
        "lvlm": {"name": model, "fingerprint": "f" * 8},
        "checkpoint": {"path": checkpoint, "phase": "grpo", "epoch": 2, "why": "best expected reward"},
        "accuracy": accuracy, "ci95": {}, "comparisons": [],
        "run": {"settings": {"BOOTSTRAP": 1000, "DATA_SEED": 0, "SAMPLER": "rand_sampler", **(settings or {})}},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_training(folder: Path, seed=1, settings=None):
    """Write train_log.jsonl, best.json and run.json of a v3 folder; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(seed), []
    for phase, epochs in (("rce", 3), ("grpo", 2)):
        for epoch in range(1, epochs + 1):
            for step in range(5):
                lines.append(
                    {"kind": "step", "phase": phase, "epoch": epoch, "step": (epoch - 1) * 5 + step,
                     "loss": 8.0 / (epoch + step / 5) + rng.random() / 10, "reward_mean": 0.1 * epoch,
                     "reward_std": 0.4,
                     "grad_norm": 1.0, "lr": 1e-5, "entropy": 2.5 - 0.1 * epoch}
                    | ({"kl": 0.01 * epoch, "ratio_mean": 1.0, "clip_high": 0.02} if phase == "grpo" else {})
                )  # fmt: skip
            lines.append(
                {"kind": "epoch", "phase": phase, "epoch": epoch, "loss": 8.0 / epoch, "val_rce_loss": 9.0 - epoch,
                 "val_ranking_accuracy": 0.5 + 0.02 * epoch, "val_expected_reward": 0.2 + 0.05 * epoch}
            )  # fmt: skip
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    entry = {"file": "grpo_epoch2.pt", "phase": "grpo", "epoch": 2, "value": 0.3}
    best = {"metric": "val_expected_reward", **entry, "per_phase": {"grpo": entry}}
    (folder / "best.json").write_text(json.dumps(best), encoding="utf-8")
    run = {"settings": {**SETTINGS, "SEED": seed, **(settings or {})}}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder
