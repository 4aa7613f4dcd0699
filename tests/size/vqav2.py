"""Does the data layer hold at VQAv2's size? Makes a synthetic folder of that size and measures.

    python -m tests.size.vqav2 [--folder DIR] [--queries 256] [--scale 1.0]

443,757 train and 214,354 validation questions over 82,783 and 40,504 images, ten answers each, in the official
layout (about 0.6 GB of JSON, no images), and features [443757, 768]. Each part runs in a process of its own;
its figures are wall-clock seconds and peak resident memory. docs/formats.md quotes them. Not part of the suite.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = {"train": (443_757, 82_783), "val": (214_354, 40_504)}
WIDTH, POOL = 768, 64


def make_folder(folder: Path, scale: float) -> None:
    """Questions and annotations JSON of both splits."""
    rng = np.random.default_rng(0)
    words = [f"answer number {i}" if i % 3 else f"a{i}" for i in range(20_000)]
    for split, (questions, images) in SIZES.items():
        n, m = int(questions * scale), int(images * scale)
        image_of = np.sort(rng.integers(0, m, n)) * 7 + 9
        ids = image_of * 1000 + np.arange(n) % 1000
        kind = rng.zipf(1.3, n) % 150_000
        given = (rng.zipf(1.6, (n, 10)) % len(words)).tolist()
        with (folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json").open("w") as out:
            out.write('{"info": {"year": 2017}, "task_type": "Open-Ended", "questions": [')
            for i in range(n):
                row = {
                    "image_id": int(image_of[i]),
                    "question": f"What is on the table number {kind[i]}?",
                    "question_id": int(ids[i]),
                }
                out.write((", " if i else "") + json.dumps(row))
            out.write('], "data_type": "mscoco"}')
        with (folder / f"v2_mscoco_{split}2014_annotations.json").open("w") as out:
            out.write('{"info": {"year": 2017}, "annotations": [')
            for i in range(n):
                answers = [
                    {"answer": words[a], "answer_confidence": "yes", "answer_id": j + 1} for j, a in enumerate(given[i])
                ]
                row = {
                    "question_type": "what is on the",
                    "multiple_choice_answer": answers[0]["answer"],
                    "answers": answers,
                    "image_id": int(image_of[i]),
                    "answer_type": "other",
                    "question_id": int(ids[i]),
                }
                out.write((", " if i else "") + json.dumps(row))
            out.write("]}")


def make_features(folder: Path, scale: float) -> None:
    """Image features (equal for equal images), question features (a third distinct, and all distinct); normalised."""
    import torch

    questions, images = (int(size * scale) for size in SIZES["train"])
    generator = torch.Generator().manual_seed(0)
    for name, distinct in (("image", images), ("text", questions // 3), ("distinct", questions)):
        values = torch.nn.functional.normalize(torch.randn(distinct, WIDTH, generator=generator), dim=1)
        row = (
            torch.randint(0, distinct, (questions,), generator=generator)
            if distinct < questions
            else torch.arange(questions)
        )
        torch.save((values, row), folder / f"{name}.pt")
    torch.save({"image": values, "text": values.flip(0)}, folder / "clip_train.pt")  # as export_embeddings writes it


def peak_mb() -> int:
    """Peak resident memory of this process (ru_maxrss would count the parent's)."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) // 1024


def measure_split(folder: Path, split: str) -> dict:
    """Start-up: both JSON files to columns."""
    from lever_plus import paths
    from lever_plus.data.dataset import load_split
    from lever_plus.settings.shared import SharedSettings

    started = time.perf_counter()
    settings = SharedSettings(dataset="vqav2_local", vqav2_path=str(folder), coco_path=str(folder))
    found = load_split(paths.dataset(settings), split)
    seconds = time.perf_counter() - started
    return {
        "part": f"load_split {split}",
        "rows": len(found),
        "seconds": seconds,
        "sample": found.answer(len(found) // 2),
    }


def measure_sampler(folder: Path, modality: str, queries: int) -> dict:
    """Exact top-64 of the whole train split for some queries."""
    import torch

    from lever_plus.data.samplers import sample_pools

    values, row = torch.load(folder / f"{modality}.pt", weights_only=True)
    name = "image" if modality == "image" else "text"
    features = {name: values if modality == "distinct" else values[row]}
    del values
    image_ids = np.random.default_rng(1).integers(0, SIZES["train"][1], len(row))
    rows = np.random.default_rng(2).permutation(len(row))[:queries]
    started = time.perf_counter()
    pools = sample_pools(
        {"image": "ImgSimSampler", "text": "TextSimSampler"}[name],
        query_rows=rows,
        query_image_ids=image_ids,
        train_image_ids=image_ids,
        k=POOL,
        seed=0,
        same_split=True,
        query_features=features,
        train_features=features,
    )
    seconds = time.perf_counter() - started
    peak = peak_mb()
    check = exact_check(features[name], rows[:4], image_ids, pools[:4])
    return {
        "part": f"top-{POOL} by {modality}",
        "rows": len(row),
        "queries": queries,
        "seconds": seconds,
        "equals_brute_force": check,
        "peak_mb": peak,
    }


def exact_check(items, rows, image_ids, pools) -> bool:
    """Whether a plain double-precision sort over all items gives the same pools."""
    for row, pool in zip(rows, pools, strict=True):
        scores = np.concatenate([(part.double() * items[row].double()).sum(1).numpy() for part in items.split(20_000)])
        scores[image_ids == image_ids[row]] = -np.inf
        if not np.array_equal(np.lexsort((np.arange(len(scores)), -scores))[:POOL], pool):
            return False
    return True


def measure_random(folder: Path, scale: float) -> dict:
    """Random pools of 20,000 queries."""
    from lever_plus.data.samplers import sample_pools

    n = int(SIZES["train"][0] * scale)
    image_ids = np.random.default_rng(1).integers(0, SIZES["train"][1], n)
    rows = np.arange(min(20_000, n))
    started = time.perf_counter()
    sample_pools(
        "RandSampler",
        query_rows=rows,
        query_image_ids=image_ids,
        train_image_ids=image_ids,
        k=POOL,
        seed=0,
        same_split=True,
    )
    return {"part": "random pools", "rows": n, "queries": len(rows), "seconds": time.perf_counter() - started}


def measure_combine(folder: Path, embedding: str) -> dict:
    """The embeddings that the selector sees, made from the stage's file of both modalities and written."""
    from lever_plus import io
    from lever_plus.data.clip_features import combine_file
    from lever_plus.data.embeddings import ModalityFile

    started = time.perf_counter()
    apart = ModalityFile(folder / "clip_train.pt", "CLIP embeddings")
    combined = combine_file(apart, embedding, "query_img_text_icd_img_text")
    io.save_torch(folder / "combined.pt", combined)
    return {"part": f"combine {embedding}", "rows": len(combined), "seconds": time.perf_counter() - started}


def main() -> None:
    """Make the folder, then run each part in a process of its own and print one JSON line for it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--part", default="")
    args = parser.parse_args()
    if args.part:
        parts = {
            "train": lambda: measure_split(args.folder, "train"),
            "val": lambda: measure_split(args.folder, "val"),
            "image": lambda: measure_sampler(args.folder, "image", args.queries),
            "text": lambda: measure_sampler(args.folder, "text", args.queries),
            "distinct": lambda: measure_sampler(args.folder, "distinct", args.queries),
            "random": lambda: measure_random(args.folder, args.scale),
            "mean": lambda: measure_combine(args.folder, "mean"),
            "concat": lambda: measure_combine(args.folder, "concat"),
        }
        found = parts[args.part]()
        used = resource.getrusage(resource.RUSAGE_SELF)
        found = {"peak_mb": peak_mb(), **found, "process_cpu_s": round(used.ru_utime + used.ru_stime, 1)}
        print(json.dumps({**found, "seconds": round(found["seconds"], 1)}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        make_folder(folder, args.scale)
        make_features(folder, args.scale)
        sizes = {path.name: path.stat().st_size >> 20 for path in sorted(folder.iterdir())}
        print(json.dumps({"folder_mb": sizes}))
        for part in ("train", "val", "random", "image", "text", "distinct", "mean", "concat"):
            words = [
                "--folder",
                str(folder),
                "--part",
                part,
                "--queries",
                str(args.queries),
                "--scale",
                str(args.scale),
            ]
            subprocess.run([sys.executable, "-m", "tests.size.vqav2", *words], check=True)


if __name__ == "__main__":
    main()
