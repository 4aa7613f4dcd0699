"""Small, valid files of every form that the readers accept; tests damage or vary them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import paths
from lever_plus.data.dataset import VqaSplit, load_split
from lever_plus.settings.shared import SharedSettings

K, ROWS = 6, 40
POOLS = {3: [10, 21, 5, 7, 33, 12], 8: [0, 1, 2, 39, 4, 6]}
POINTERS = {3: [[0, 2], [2, 0], [5, 1]], 8: [[3, 4], [1, 0]]}


def split_of(settings: SharedSettings, split: str) -> VqaSplit:
    """A split of the settings' data set."""
    return load_split(paths.dataset(settings), split)


def candidate(pointer: list[int], number: int, **more: Any) -> dict[str, Any]:
    """One entry of pointer_candidates."""
    return {
        "pointer": pointer,
        "gen_method": "beam" if number == 0 else "sample",
        "beam_rank": 0 if number == 0 else None,
        "beam_score": 0.25 if number == 0 else None,
        "logprob_score": -1.5 - number,
        "temperature": None if number == 0 else 1.0,
        "vqa_pred_answer": "yes",
        "vqa_correct": number % 2,
        "vqa_acc_score": 0.6 * (number % 2),
        "vqa_gt_prob": 0.1,
        "vqa_eval_mode": "official",
        **more,
    }


def rl_json(form: str = "local", pool_name: str = "candidate_pool_ids") -> dict[str, Any]:
    """RL data of a form: local, global_pos, global."""
    content = {}
    for query, pool in POOLS.items():
        entry: dict[str, Any] = {pool_name: pool} if form == "local" else {}
        entry["pointer_candidates"] = []
        for number, pointer in enumerate(POINTERS[query]):
            indices = [pool[p] for p in pointer]
            if form == "local":
                c = candidate(pointer, number, pointer_global=indices)
            else:
                more = {"pointer_pos": [39 - i for i in indices]} if form == "global_pos" else {}
                c = candidate(indices, number, **more)
            entry["pointer_candidates"].append(c)
        content[str(query)] = entry
    return content


def beam_json(pools: bool = True) -> dict[str, Any]:
    """Beam data with construct order left: the last pick stands first."""
    content = {}
    for query, pool in POOLS.items():
        ids = [[*(pool[p] for p in reversed(pointer)), query] for pointer in POINTERS[query]]
        content[str(query)] = {"id_list": ids, "score_list": [0.5 - 0.1 * i for i in range(len(ids))]}
        if pools:
            content[str(query)]["candidate_pool_ids"] = pool
    return content


def sampler_cache() -> dict[str, list[int]]:
    """The original Lever-Plus's file of pools."""
    return {str(query): pool for query, pool in POOLS.items()}


def write(path: Path, content: Any) -> Path:
    """JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def vqa_json(image_ids: list[int], first_id: int = 100, answers: int = 10) -> tuple[dict[str, Any], dict[str, Any]]:
    """Official questions and annotations, one per image id, question ids ascending."""
    rng = np.random.default_rng(len(image_ids))
    words = ["yes", "no", "red", "two", "café"]
    questions, annotations = [], []
    for i, image_id in enumerate(image_ids):
        question_id = first_id + 3 * i
        questions.append({"image_id": image_id, "question": f"What is thing {i % 7}?", "question_id": question_id})
        given = [words[j] for j in rng.integers(0, len(words), answers)]
        annotations.append(
            {
                "image_id": image_id,
                "question_id": question_id,
                "answer_type": "other",
                "question_type": "what is",
                "answers": [
                    {"answer_id": n + 1, "raw_answer": a, "answer_confidence": "yes", "answer": a}
                    for n, a in enumerate(given)
                ],
            }
        )
    head = {"info": {"year": 2014}, "license": {"name": "CC"}, "data_subtype": "train2014"}
    return {**head, "task_type": "Open-Ended", "questions": questions}, {**head, "annotations": annotations}
