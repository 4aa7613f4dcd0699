"""The whole flow on the embedded benchmark, small: every stage through its own command, then again, then killed.

Uses the committed tiny weights; the same code serves OK-VQA (see test_okvqa_layout).
"""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lever_plus import paths
from lever_plus.config import REPO_ROOT
from lever_plus.data.dataset import load_split
from lever_plus.picker import Picker
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.stages import lvlm
from lever_plus.stages.lvlm import query_pools
from open_mmicl.inferencer import majority_vote
from open_mmicl.metrics.vqa import vqa_accuracy
from tests.reference.openai_server import Served, Server

pytestmark = pytest.mark.slow
SMALL = {
    "DATASET": "mini_okvqa", "SAMPLE_NUM": "12", "CANDIDATE_NUM": "10", "BEAM_SIZE": "3", "RL_QUERY_NUM": "24",
    "V2_EPOCHS": "2", "RCE_EPOCHS": "2", "GRPO_EPOCHS": "1", "BATCH_SIZE": "4", "TEST_DATA_NUM": "8",
    "RANDOM_SEEDS": "2", "BOOTSTRAP": "1000", "RECORD_LANG": "en", "VAL_FRACTION": "0.3",
    "NPROC": "1",
}  # fmt: skip
PRODUCTS = (
    "generated_data/*.json",
    "model_cpk/v2/*.ckpt",
    "model_cpk/v3*/*.pt",
    "icl_inference/*/metrics.json",
    "icl_inference/*/samples.jsonl",
)


def environment(results: Path, **more: str) -> dict[str, str]:
    base = {k: v for k, v in os.environ.items() if k not in SMALL and k != "OMP_NUM_THREADS"}
    return {**base, **SMALL, "RESULT_DIR": str(results), "CUDA_VISIBLE_DEVICES": "", **more}


def pipeline(target: str, results: Path, *options: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lever_plus.pipeline", target, *options],
        cwd=REPO_ROOT, env=environment(results, **more), capture_output=True, text=True, check=False,
    )  # fmt: skip


def products(results: Path) -> dict[str, str]:
    """SHA-256 of every product, by path relative to the data set's folder.

    Of a checkpoint its tensors count, of metrics.json all but ``run``: the rest names the results folder.
    """
    folder = results / "mini_okvqa"
    found = sorted(p for pattern in PRODUCTS for p in folder.glob(pattern) if not p.name.endswith(".meta.json"))
    digests = {}
    for path in found:
        data = path.read_bytes().replace(str(results).encode(), b"RESULTS")
        if path.suffix in (".pt", ".ckpt"):
            state = torch.load(path, weights_only=True)["model_state_dict"]
            data = b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state))
        elif path.name == "metrics.json":
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "run"}).encode()
        digests[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return digests


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run from nothing to the record."""
    results = tmp_path_factory.mktemp("whole") / "results"
    done = pipeline("v3", results, "record")
    assert done.returncode == 0, done.stdout + done.stderr
    return results


def settings_of(results: Path) -> InferenceSettings:
    return load(InferenceSettings, {}, {**SMALL, "RESULT_DIR": str(results)})


def run_dir(results: Path) -> Path:
    return next((results / "mini_okvqa" / "icl_inference").iterdir())


def test_all_four_shots_all_methods_on_the_same_queries(finished: Path) -> None:
    metrics = json.loads((run_dir(finished) / "metrics.json").read_text())
    assert metrics["n_queries"] == 8 and metrics["checkpoint"]["phase"] in ("rce", "grpo")
    for method in ("v3", "v2", "random", "similarity", "oracle", "majority_vote_v3"):
        assert set(metrics["accuracy"][method]) == {"1", "2", "3", "4"}
    assert set(metrics["accuracy"]["zero_shot"]) == {"0"}
    asked: dict = {}
    for line in (run_dir(finished) / "samples.jsonl").read_text().splitlines():
        s = json.loads(line)
        asked.setdefault((s["method"], s["shot"], s["seed"]), []).append(s["question_id"])
    rivals = ("v2", "label", "similarity", "sim_clip_image", "sim_clip_text", "sim_lvlm")
    rivals += ("rices", "question_knn", "mmices", "bm25")
    assert {method for method, _, _ in asked} == {"v3", *rivals, "random", "zero_shot"}
    assert len(asked) == 4 * (1 + len(rivals)) + 4 * 2 + 1 and len({tuple(q) for q in asked.values()}) == 1


def test_every_number_can_be_recomputed_from_the_samples(finished: Path) -> None:
    metrics = json.loads((run_dir(finished) / "metrics.json").read_text())
    samples = [json.loads(line) for line in (run_dir(finished) / "samples.jsonl").read_text().splitlines()]
    for s in samples:
        assert s["score"] == vqa_accuracy(s["cut_answer"], s["answers"])
    for method, by in metrics["accuracy"].items():
        for shot, value in by.items():
            own = [
                s for s in samples if s["method"] == method.removeprefix("majority_vote_") and s["shot"] == int(shot)
            ]
            if method.startswith("majority_vote"):
                scores = [vqa_accuracy(majority_vote(s["icd_answers"]), s["answers"]) for s in own]
            elif method == "oracle":
                by_query: dict = {}
                for s in samples:
                    if s["shot"] == int(shot):
                        by_query[s["question_id"]] = max(by_query.get(s["question_id"], 0), s["score"])
                scores = list(by_query.values())
            else:
                scores = [s["score"] for s in own]
            assert value == pytest.approx(100 * sum(scores) / len(scores))
    for shot in (1, 2, 3, 4):
        written = json.loads((run_dir(finished) / f"vqa_result_v3_shot{shot}.json").read_text())
        rows = {r["question_id"]: r["answer"] for r in written}
        assert rows == {s["question_id"]: s["cut_answer"] for s in samples if s["method"] == "v3" and s["shot"] == shot}


def test_fault_01_and_05_one_pool_everywhere_and_it_is_the_querys_own(finished: Path) -> None:
    from lever_plus.data.beam_data import load_beam_data
    from lever_plus.data.dataset import load_split
    from lever_plus.data.rl_data import load_rl_data

    settings = settings_of(finished)
    train, val = load_split(paths.dataset(settings), "train"), load_split(paths.dataset(settings), "val")
    beams = {q.query_idx: q for q in load_beam_data(paths.beam_data(settings)).queries}
    rl = {q.query_idx: q for q in load_rl_data(paths.rl_data(settings)).queries}
    assert len(beams) == 12 and set(beams) <= set(rl)
    for row, query in beams.items():
        assert query.pool_ids.tolist() == rl[row].pool_ids.tolist()
    pools = {row: q.pool_ids.tolist() for row, q in rl.items()}
    assert len({tuple(p) for p in pools.values()}) == len(pools)  # not the first K items for everybody
    for row, pool in pools.items():
        assert len(set(pool)) == 10 and train.image_ids[row] not in train.image_ids[pool]
    used = set()
    for line in (run_dir(finished) / "samples.jsonl").read_text().splitlines():
        s = json.loads(line)
        assert int(val.image_ids[s["query_idx"]]) == s["image_id"] and len(set(s["icd_ids"])) == s["shot"]
        used |= set(s["icd_ids"])
    assert max(used) > 100  # candidates come from all over the train split


def test_a_second_run_recognises_everything_as_done(finished: Path) -> None:
    before = products(finished)
    stamps = {p: p.stat().st_mtime_ns for p in finished.rglob("*.pt")}
    again = pipeline("v3", finished)
    assert again.returncode == 0 and again.stdout.count("done before") >= 6, again.stdout
    again = pipeline("record", finished)
    assert again.returncode == 0 and "inference: done before" in again.stdout
    for target, steps in (("rl_data", ("beam data", "RL data")), ("inference", ("inference",))):
        dry = pipeline(target, finished, "--dry-run")
        assert dry.returncode == 0 and "would" not in dry.stdout and "prompts" not in dry.stdout
        assert all(f"{step}: done before" in dry.stdout for step in steps), dry.stdout
    assert products(finished) == before and stamps == {p: p.stat().st_mtime_ns for p in finished.rglob("*.pt")}


def test_the_record_has_the_plans_parts(finished: Path) -> None:
    record = next((finished / "mini_okvqa" / "experiments").iterdir()) / "record.md"
    text = record.read_text()
    for part in ("RCE_EPOCHS", "GRPO_EPOCHS", "RCE loss", "v2", "shot"):
        assert part in text, part


def test_the_number_of_processes_changes_no_file(finished: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(finished / "mini_okvqa" / "dataset", results / "mini_okvqa" / "dataset")
    done = pipeline("beam_data", results, NPROC="3")
    assert done.returncode == 0, done.stdout + done.stderr
    theirs, mine = products(results), products(finished)
    assert theirs and all(mine[name] == digest for name, digest in theirs.items())


def test_killed_at_random_moments_it_ends_with_the_same_files(finished: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(finished / "mini_okvqa" / "dataset", results / "mini_okvqa" / "dataset")
    rng = random.Random(0)
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-m", "lever_plus.pipeline", "v3", "record"],
            cwd=REPO_ROOT, env=environment(results, NPROC="2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        time.sleep(rng.uniform(4, 14))
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    done = pipeline("v3", results, "record")
    assert done.returncode == 0, done.stdout + done.stderr
    assert products(results) == products(finished)


def test_rl_data_of_probed_queries_and_mined_pools(finished: Path, tmp_path: Path) -> None:
    """RL_BALANCE keeps the queries nearest to half right, POSITIVE_MINING fills pools; the same with two processes."""
    files = {}
    for nproc in ("1", "2"):
        files[nproc] = tmp_path / f"data{nproc}.json"
        more = {"RL_BALANCE": "3", "POSITIVE_MINING": "1", "RL_PREFIXES": "1", "RL_QUERY_NUM": "8", "NPROC": nproc}
        done = pipeline("rl_data", finished, RL_DATA_PATH=str(files[nproc]), **more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "8 of 24 probed queries kept" in done.stdout + done.stderr
    assert files["1"].read_bytes() == files["2"].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name + end for name in ("data1.json", "data2.json") for end in ("", ".meta.json")
    )
    kept = {k: v for k, v in json.loads(files["1"].read_text()).items() if k.isdigit()}
    usual = json.loads(next((finished / "mini_okvqa" / "generated_data").glob("rl_data_*[!a].json")).read_text())
    train = load_split(paths.dataset(settings_of(finished)), "train")
    for row, query in kept.items():
        pool, own = query["candidate_pool_ids"], usual[row]["candidate_pool_ids"]
        right = [i for i in own if vqa_accuracy(train.answer(i), train.answers(int(row))) > 0]
        assert sum(a != b for a, b in zip(pool, own, strict=True)) == (0 if right else 1)
        assert any(vqa_accuracy(train.answer(i), train.answers(int(row))) > 0 for i in pool)
    assert len(kept) == 8 and set(kept) < set(usual)


def test_a_selector_forced_to_stop_answers_as_zero_shot_does(finished: Path, tmp_path: Path) -> None:
    """Byte for byte, and no demonstration is read; the fixed shots have all of theirs."""
    from lever_plus.selectors import PointerSelector

    shape = dataclasses.replace(PointerSelector.load(_best(finished)).config, hidden_dim=16, stop=True, stop_shots=4)
    torch.manual_seed(0)
    selector = PointerSelector(shape)
    with torch.no_grad():
        selector.stop.linear.bias.fill_(1e6)
    selector.save(tmp_path / "forced.pt", "grpo", 1, {}, {}, {})
    more = {
        "METHODS": "v3_adaptive", "LEVER_LM_CHECKPOINT_PATH": str(tmp_path / "forced.pt"), "RUN_NAME": "forced",
        "MAX_EVAL_SHOT": "2", "CHOICE_QUERIES": "3", "TEST_DATA_NUM": "6",
    }  # fmt: skip
    done = pipeline("inference", finished, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = finished / "mini_okvqa" / "icl_inference" / "forced"
    by: dict = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        by.setdefault((row["method"], row["shot"]), {})[row["question_id"]] = row
    mine, zero = by["v3_adaptive", 2], by["zero_shot", 0]
    assert set(mine) == set(zero) and len(mine) == 6
    for question, row in mine.items():
        for name in ("raw_answer", "cut_answer", "answer", "score", "prompt_hash", "prompt_tokens", "icd_ids"):
            assert row[name] == zero[question][name], name
        assert row["icd_ids"] == row["icd_images"] == [] and row["stop_probs"] == [1.0, 1.0]
        assert [len(by["v3", k][question]["icd_ids"]) for k in (1, 2)] == [1, 2]
    found = json.loads((folder / "metrics.json").read_text())["adaptive"]
    assert found["abstentions"] == 100 and found["accuracy"] == found["zero_shot"]
    assert found["best_fixed"]["n_queries"] == 3
    refused = pipeline("inference", finished, **{**more, "LEVER_LM_CHECKPOINT_PATH": str(_best(finished))})
    assert refused.returncode == 2 and "trained without STOP" in refused.stderr
    shutil.rmtree(folder)


def test_a_cascade_asks_for_the_probability_of_each_answer_and_again_while_it_is_low(finished: Path) -> None:
    more = {"METHODS": "v3_cascade", "RUN_NAME": "cascade", "MAX_EVAL_SHOT": "2", "CHOICE_QUERIES": "6"}
    told = pipeline("inference", finished, "-n", **more)
    assert "6 held-out train queries x 6 prompts" in told.stdout + told.stderr
    done = pipeline("inference", finished, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = finished / "mini_okvqa" / "icl_inference" / "cascade"
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    engine, train, val = lvlm.load_engine(settings_of(finished)), *(
        load_split(paths.dataset(settings_of(finished)), split) for split in ("train", "val")
    )
    asked = [row for row in rows if row["method"] != "v3_cascade"]
    prompts = [
        lvlm.build_prompt(train, val, row["query_idx"], row["icd_ids"], range(row["shot"]), "best_last")
        for row in asked
    ]
    scores = engine.score(prompts, [[row["raw_answer"]] for row in asked])
    for row, (score,) in zip(asked, scores, strict=True):
        assert row["answer_prob"] == pytest.approx(math.exp(score.log_prob), abs=2e-6)
    found = json.loads((folder / "metrics.json").read_text())["cascades"]["v3_cascade"]
    mine = [row for row in rows if row["method"] == "v3_cascade"]
    assert found["prompts"] == pytest.approx(sum(len(row["asked"]) for row in mine) / len(mine))
    meta = json.loads((folder / "metrics.json.meta.json").read_text())
    held_out = len((folder / "choice_samples.jsonl").read_text().splitlines())
    assert meta["prompts"]["evaluation"] == 2 * (len(asked) + held_out)  # an answer, and its probability
    shutil.rmtree(folder)


def test_a_server_that_is_killed_and_restarted_answers_as_our_own_engine(finished: Path, tmp_path: Path) -> None:
    """Inference of the same selector on the loopback; its channels are the reference's, so they are the same files."""
    results = tmp_path / "results"
    shutil.copytree(finished, results, ignore=shutil.ignore_patterns("answers.sqlite*", "icl_inference", "logs"))
    for path in (results / "mini_okvqa" / "cache").glob("*Mini-Qwen2_5-VL_*"):
        path.rename(path.with_name(path.name.replace("VL_", "VL-server_")))
    served, name = Served(REPO_ROOT / "lever_plus" / "mini" / "weights" / "lvlm"), "mini-qwen2.5-vl"
    first, last = Server(served, tmp_path / "first.log", name=name).start(), []

    def restart() -> None:
        while not first.log.exists() or len(first.log.read_text().split()) < 20:  # 12 to 15 are trial prompts
            time.sleep(0.05)
        first.stop()
        last.append(Server(served, tmp_path / "last.log", first.server_address[1], name).start())

    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    more = {
        "BEAM_MODEL": "mini_qwen2.5_vl_server", "LVLM_SERVER_URLS": first.url, "METHODS": "v3", "RUN_NAME": "served",
        "LEVER_LM_CHECKPOINT_PATH": str(_best(finished)),
    }  # fmt: skip
    done = pipeline("inference", results, **more)
    thread.join(60)
    last[0].stop()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "channels: done before with the same inputs and settings" in done.stdout + done.stderr

    def answers(folder: Path) -> dict:
        rows = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
        return {(r["method"], r["shot"], r["question_id"]): (r["raw_answer"], r["icd_ids"]) for r in rows}

    (own,) = (finished / "mini_okvqa" / "icl_inference").glob("*")
    mine = answers(results / "mini_okvqa" / "icl_inference" / "served")
    assert len(mine) >= 8 * 4 and mine.items() <= answers(own).items()
    assert 0 < len(last[0].log.read_text().split()) < len(mine) + 20


def _best(results: Path) -> Path:
    folder = next((results / "mini_okvqa" / "model_cpk").glob("v3*"))
    return folder / json.loads((folder / "best.json").read_text())["file"]


def test_a_bundle_reproduces_its_rows_where_no_selector_is(finished: Path, tmp_path: Path) -> None:
    def command(module: str, *words: str, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"lever_plus.release.{module}", *words],
            cwd=REPO_ROOT, env=environment(finished, **more), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    packed, results = tmp_path / "run.zip", tmp_path / "elsewhere"
    digest = command("pack", run_dir(finished).name, str(packed)).split("digest ")[1].split(")")[0]
    dry = command("reproduce", str(packed), "-n", RESULT_DIR=str(results))
    assert "compared with the bundle's once it is there" in dry
    for part in ("dataset", "cache"):  # the data set and what the models make of it are no part of a bundle
        there = results / "reproduced" / digest / "mini_okvqa" / part
        shutil.copytree(finished / "mini_okvqa" / part, there, ignore=shutil.ignore_patterns("answers.*"))
    told = command("reproduce", str(packed), "v3", "random", RESULT_DIR=str(results))
    assert "reproduced: all 8 rows to the digit, every pick and answer the same" in told


def test_a_picker_from_python_chooses_and_answers_as_the_run_did(finished: Path, tmp_path: Path) -> None:
    given = {name.lower(): value for name, value in SMALL.items()} | {"result_dir": str(finished)}
    picker = Picker.from_run(**given)
    settings = settings_of(finished)
    train, val = load_split(paths.dataset(settings), "train"), load_split(paths.dataset(settings), "val")
    lines = [json.loads(line) for line in (run_dir(finished) / "samples.jsonl").read_text().splitlines()]
    wanted = [line for line in lines if line["method"] == "v3" and line["shot"] == 3][:4]
    rows = np.array([line["query_idx"] for line in wanted])
    picker.save_pretrained(tmp_path)
    again = Picker.from_pretrained(tmp_path, engine=picker.engine)
    for line, row, pool in zip(wanted, rows, query_pools(settings, val, rows, train, "val"), strict=True):
        demos = [train.demo(int(item)) for item in pool]
        query = val.image_path(int(row)), val.question(int(row))
        best = picker.pick(*query, picker.examples(demos), shots=3)
        assert [int(pool[demos.index(demo)]) for demo in best] == line["icd_ids"]
        assert again.pick(*query, demos, shots=3) == best
        assert picker.answer(*query, best) == line["raw_answer"].strip()
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "config.json", "selector.safetensors", "centres.safetensors",
    }  # fmt: skip


def test_okvqa_layout_with_paths_from_the_environment(finished: Path, tmp_path: Path) -> None:
    """The same files as DATASET=okvqa_local: OKVQA_PATH, COCO_PATH, the model and CLIP by path."""
    source, okvqa, coco = finished / "mini_okvqa" / "dataset", tmp_path / "okvqa", tmp_path / "coco"
    okvqa.mkdir()
    for path in source.glob("*mscoco*.json"):
        shutil.copy(path, okvqa)
    shutil.copytree(source / "mscoco2014", coco)
    weights = REPO_ROOT / "lever_plus" / "mini" / "weights"
    done = pipeline(
        "beam_data", tmp_path / "results", DATASET="auto", OKVQA_PATH=str(okvqa), COCO_PATH=str(coco), PRECISION="fp32",
        QWEN2_5_VL_3B_PATH=str(weights / "lvlm"), CLIP_PATH=str(weights / "clip"), SAMPLE_NUM="2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(
        (tmp_path / "results" / "okvqa" / "generated_data").glob("vqa-okvqa-Qwen2_5-VL-3B-Instruct-RandSampler-*.json")
    )
