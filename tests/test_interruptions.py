"""Stages that ask the LVLM: killed (-9) they end with the same bytes and ask at most one pass more; two at once share.

Every kill is at a planned pass of the LVLM, line of progress or write, none at a moment of the clock.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lever_plus import paths
from lever_plus.config import REPO_ROOT
from lever_plus.mini import world
from lever_plus.selectors.pointer import PointerSelector, SelectorConfig
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load

pytestmark = pytest.mark.slow
SETTINGS = {
    "DATASET": "mini_okvqa", "DEVICE": "cpu", "SAMPLE_NUM": "5", "CANDIDATE_NUM": "8", "BEAM_SIZE": "2",
    "RL_QUERY_NUM": "40", "RL_BEAMS": "2", "RL_SAMPLES_LOW": "2", "RL_SAMPLES_HIGH": "1", "RL_RANDOM": "1",
    "TEST_DATA_NUM": "40", "METHODS": "v3 random", "RANDOM_SEEDS": "1", "MAX_EVAL_SHOT": "2", "RUN_NAME": "run",
    "BOOTSTRAP": "1000", "TOKEN_BUDGET": "900", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
STAGES = {
    "generate_data": "generated_data/vqa-*.json",
    "generate_rl_data": "generated_data/rl_data_*.json",
    "inference": "icl_inference/run/*",
}


class Server:
    """The warm process (see stage_server)."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.reference.stage_server"]
        env = {**os.environ, **SETTINGS, "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=REPO_ROOT, env=env, **pipes)

    def run(self, *jobs: dict[str, Any]) -> list[int]:
        """Exit codes of jobs that run at the same time."""
        print(json.dumps(jobs), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.process.stdin.close()
    assert started.process.wait() == 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with everything that the stages read, of random numbers where anything would do."""
    results = tmp_path_factory.mktemp("inputs")
    settings = load(InferenceSettings, {}, {**SETTINGS, "RESULT_DIR": str(results)})
    world.generate(paths.dataset_dir(settings) / "dataset")
    from lever_plus.data.dataset import load_split

    torch.manual_seed(0)
    paths.candidate_embeddings(settings).parent.mkdir(parents=True)
    for path, split in ((paths.candidate_embeddings(settings), "train"), (paths.query_embeddings(settings), "val")):
        torch.save(torch.randn(len(load_split(paths.dataset(settings), split)), 16), path)
    PointerSelector(SelectorConfig(input_dim=16, hidden_dim=16)).save(results / "selector.pt", "v2", 1, {}, {}, {})
    return results


class Folder:
    """A results folder of its own, and the log of what the LVLM computed for it."""

    def __init__(self, server: Server, inputs: Path, root: Path) -> None:
        self.server, self.results, self.log = server, root / "results", root / "log"
        shutil.copytree(inputs, self.results)
        self.log.touch()

    def job(self, stage: str, kill: tuple[int, str] | None = None) -> dict[str, Any]:
        """A command for the server."""
        selector = str(self.results / "selector.pt")
        env = {"RESULT_DIR": str(self.results), "LEVER_LM_CHECKPOINT_PATH": selector}
        return {"stage": stage, "env": env, "log": str(self.log), "kill": kill}

    def run(self, *jobs: dict[str, Any]) -> list[int]:
        """Exit codes."""
        return self.server.run(*jobs)

    def passes(self) -> list[list[str]]:
        """What was computed so far: keys, pass by pass."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def files(self, *stages: str) -> dict[str, bytes]:
        """The stages' final files. Of metrics.json all but ``run``, which holds the commit."""
        folder = self.results / "mini_okvqa"
        found = [path for stage in stages for path in sorted(folder.glob(STAGES[stage]))]
        content = {str(path.relative_to(folder)): path.read_bytes() for path in found if ".meta" not in path.name}
        for name, data in content.items():
            content[name] = data.replace(str(self.results).encode(), b"RESULTS")
            if name.endswith("metrics.json"):
                content[name] = json.dumps({k: v for k, v in json.loads(content[name]).items() if k != "run"}).encode()
        return content

    def hidden(self) -> list[Path]:
        """Files that only a run in progress needs."""
        return [path for path in self.results.rglob("*") if path.name.startswith(".")]


@pytest.fixture(scope="module")
def whole(server: Server, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every stage alone and uninterrupted: final files and passes."""
    found = {}
    for stage in STAGES:
        folder = Folder(server, inputs, tmp_path_factory.mktemp(stage))
        assert folder.run(folder.job(stage)) == [0]
        found[stage] = (folder.files(stage), folder.passes())
        assert found[stage][0] and len(found[stage][1]) > 8 and not folder.hidden()
    return found


@pytest.mark.parametrize("stage", list(STAGES))
def test_killed_again_and_again_a_stage_ends_with_the_same_bytes(server, inputs, whole, tmp_path, stage) -> None:
    files, passes = whole[stage]
    folder, rng = Folder(server, inputs, tmp_path), random.Random(stage)
    third = len(passes) // 3
    kills = [(rng.randint(1, third), "computed"), (rng.randint(1, third), "written"), (1, "part"), (1, "stamping")]
    for kill in kills:
        assert folder.run(folder.job(stage, kill)) == [-9]
    assert folder.run(folder.job(stage)) == [0]
    assert folder.files(stage) == files
    assert {key for some in folder.passes() for key in some} == {key for some in passes for key in some}
    assert repeated(folder.passes()) <= max(map(len, passes))  # the first of the kills lost a pass, the others none
    assert not folder.hidden()


def repeated(passes: list[list[str]]) -> int:
    """How many answers and scores were computed more than once."""
    return sum(count - 1 for count in Counter(key for some in passes for key in some).values())


@pytest.mark.parametrize(
    "stages",
    [("generate_data",) * 2, ("generate_rl_data",) * 2, ("inference",) * 3, ("generate_data", "inference")],
    ids="+".join,
)
def test_stages_at_once_on_one_folder_share_the_work(server, inputs, whole, tmp_path, stages) -> None:
    folder = Folder(server, inputs, tmp_path)
    assert folder.run(*(folder.job(stage) for stage in stages)) == [0] * len(stages)
    for stage in set(stages):
        assert folder.files(stage) == whole[stage][0]
    assert repeated(folder.passes()) == 0 and not folder.hidden()


def test_one_of_two_is_killed_and_the_other_goes_on(server, inputs, whole, tmp_path) -> None:
    folder, (files, passes) = Folder(server, inputs, tmp_path), whole["inference"]
    killed, other = folder.run(folder.job("inference", (3, "computed")), folder.job("inference"))
    assert other == 0 and killed in (-9, 0)  # 0: it came so late that there was nothing left for it
    assert folder.files("inference") == files
    assert repeated(folder.passes()) <= max(map(len, passes))


def test_an_image_missing_in_the_middle_is_exit_3_and_loses_nothing(server, inputs, whole, tmp_path) -> None:
    folder, (files, passes) = Folder(server, inputs, tmp_path), whole["inference"]
    last = json.loads(files["icl_inference/run/samples.jsonl"].splitlines()[-1])
    image = Path(last["image"].replace("RESULTS", str(folder.results)))
    image.rename(tmp_path / "away")
    assert folder.run(folder.job("inference")) == [3] and 0 < len(folder.passes()) < len(passes)
    (tmp_path / "away").rename(image)
    assert folder.run(folder.job("inference")) == [0]
    assert folder.files("inference") == files and repeated(folder.passes()) == 0
