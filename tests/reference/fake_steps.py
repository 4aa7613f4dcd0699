"""Stands in for the steps that experiments start: writes what training and inference would leave behind."""

import json
import re
from pathlib import Path

from lever_plus import paths, provenance
from lever_plus.data.rl_data import save_rl_data
from lever_plus.settings import loading
from lever_plus.settings.experiment import ExperimentSettings
from tests.reference.fake_run import make_samples, write_run, write_training


class FakeSteps:
    """``right`` {experiment: probability that v3 answers right}; the calls are kept in ``calls``."""

    def __init__(self, result_dir: Path, right: dict, rl_data, n: int = 120, v2: float = 0.5, fail_at: int = 0) -> None:
        self.result_dir, self.right, self.rl_data, self.n, self.v2 = result_dir, right, rl_data, n, v2
        self.calls: list[tuple[str, str]] = []
        self.fail_at = fail_at
        self.base = make_samples(0, n=n, right={"v2": v2})  # v2 and the baselines are the same in every run

    def __call__(self, words: list[str], env: dict[str, str]) -> int:
        self.calls.append((words[-1].rsplit(".", 1)[-1], env.get("RUN_NAME", env.get("EXP_NAME", ""))))
        if len(self.calls) == self.fail_at:
            return 5
        s = loading.load(ExperimentSettings, {}, env)
        step = self.calls[-1][0]
        if step == "rl_data":
            save_rl_data(paths.rl_data(s), self.rl_data)
            _price(paths.rl_data(s), rl_data_scored=40000)
            _price(paths.beam_data(s), beam_data=152000)
            _price(paths.lvlm_states(s, "train"), hidden_states=3200)
        elif step == "train_v3_online":
            training = {k: env[k] for k in ("RCE_EPOCHS", "GRPO_EPOCHS", "REWARD_ALPHA", "REWARD_BETA") if k in env}
            write_training(paths.v3_dir(s), s.seed, training)
        elif step == "inference":
            self._inference(s, env)
        return 0

    def _inference(self, s, env) -> None:
        rival = env["RUN_NAME"].startswith("rival")
        arm = re.sub(r"_seed\d+$", "", env["RUN_NAME"])
        experiment = re.match(r"exp(\d[ab]?)", arm)[1] if not rival else ""
        right = {"v2": self.right["rival"]} if rival else {"v3": self.right[experiment], "v2": self.v2}
        methods = env["METHODS"].split()
        own = "v2" if rival else "v3"
        kept = make_samples(1 + s.seed + 100 * sum(map(ord, arm)), n=self.n, right=right, only=[own])
        kept += [r for r in self.base if r["method"] in set(methods) - {own}]
        if experiment == "3" and self.right.get("copy"):  # the answers of experiment 1, word for word
            first = paths.inference_dir(s, env["RUN_NAME"].replace("exp3", "exp1")) / "samples.jsonl"
            kept = [json.loads(line) for line in first.read_text().splitlines()]
        folder = write_run(paths.inference_dir(s, env["RUN_NAME"]), kept)
        _price(folder / "metrics.json", evaluation=len(kept))


def _price(output: Path, **prompts: int) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    provenance.sidecar(output).write_text(json.dumps({"prompts": prompts}))
