"""A results folder of the original Lever-Plus is picked up as it is (see tests/old_results.py for what that means)."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lever_plus.config import REPO_ROOT
from lever_plus.selectors import PointerSelector
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.stages.checkpoint_choice import choose_v3
from tests import old_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("old")
    return root, old_results.make(root)


def run(root: Path, target: str, **more: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **old_results.environment(root), "NPROC": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    command = [sys.executable, "-m", "lever_plus.pipeline", target]
    return subprocess.run(command, cwd=REPO_ROOT, env=env, capture_output=True, text=True, check=False)


def digests(files: dict[str, Path]) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_epochs_that_nobody_compared_are_compared_on_the_rl_data(old: tuple[Path, dict[str, Path]]) -> None:
    root, files = old
    content = torch.load(files["rce"], weights_only=True)
    others = [files["rce"].with_name(f"rce_epoch{n}.pt") for n in (6, 7, 8)]
    for number, path in enumerate(others):
        state = old_results.selector_weights(content["model_state_dict"]["input_proj.weight"].shape[1], seed=number)
        torch.save({**content, "model_state_dict": state, "metrics": {}}, path)
    words = {**old_results.environment(root), "VAL_FRACTION": "0"}
    chosen = choose_v3(load(InferenceSettings, words, {}))
    embeddings, pools = torch.load(files["candidate embeddings"]), json.loads(files["cache"].read_text())
    expected = {}
    for path in (files["rce"], *others):
        selector, per_query = PointerSelector.load(path), []
        for query, entry in json.loads(files["rl"].read_text()).items():
            pool, scored = pools[query], {tuple(c["pointer"]): c["vqa_acc_score"] for c in entry["pointer_candidates"]}
            pointers = torch.tensor([[pool.index(i) for i in pointer] for pointer in scored])
            log_probs = selector.log_prob(embeddings[int(query)][None], embeddings[pool][None], pointers[None])[0]
            per_query.append(float(log_probs.detach().softmax(0) @ torch.tensor(list(scored.values()))))
        expected[path] = sum(per_query) / len(per_query)
    for path in others:
        path.unlink()
    assert Path(chosen["path"]) == max(expected, key=expected.__getitem__)
    assert f"{100 * max(expected.values()):.1f}" in chosen["why"]


def test_an_old_folder_is_evaluated_and_trained_on(old: tuple[Path, dict[str, Path]]) -> None:
    root, files = old
    before = digests(files)
    done = run(root, "inference", METHODS="v3 v2", TEST_DATA_NUM="3", MAX_EVAL_SHOT="2", BOOTSTRAP="1000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rce_epoch5.pt (the only checkpoint there is)" in done.stdout
    assert "mapped lever_lm.pointer_selector.cross_attn.* -> cross_attn_layers.0.*" in done.stdout
    assert digests(files) == before

    done = run(root, "v3", RCE_EPOCHS="1", GRPO_EPOCHS="0")
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("train embeddings", "beam data", "v2", "RL data"):
        assert f"{what}: using the file found at" in done.stdout
    assert f"pools read from {files['cache'].resolve()}" in done.stdout
    folder = files["rce"].parent
    assert (folder / "rce_epoch1.pt").is_file() and (folder / "best.json").is_file()
    kept = {**files, "rce": next(folder.glob("previous_*/rce_epoch5.pt"))}  # moved aside, not overwritten
    assert digests(kept) == before
