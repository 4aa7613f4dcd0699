"""Runs an arm of the plan: trains every seed, evaluates it, writes record, report and exports.

Every step is a process of its own that finds out by itself whether it is done, so an interrupted experiment
resumes where it stopped.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lever_plus import cli, config, io, paths, pipeline
from lever_plus.cli import log
from lever_plus.data.dataset import load_split
from lever_plus.data.rl_data import load_rl_data
from lever_plus.experiments import audit, export, markdown, record, report, stats
from lever_plus.experiments.arms import Arm, seeds_of
from lever_plus.experiments.findings import findings
from lever_plus.experiments.words import pick, say, texts, title
from lever_plus.rl.rewards import RewardRule
from lever_plus.settings.experiment import ExperimentSettings
from lever_plus.settings.loading import load
from lever_plus.settings.selector import TrainV3Settings
from open_mmicl.errors import LeverError, MissingInputError

Call = Callable[[list[str], dict[str, str]], int]
FIRST_SEED_METHODS = "auto"
OTHER_SEEDS_METHODS = "v3 v2"


class StepFailed(LeverError):
    """A step ended with an error, which it has reported itself; carries its exit code."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(f"{what} stopped with exit code {exit_code}; what is done is kept, the same command resumes")
        self.exit_code = exit_code


def call_module(words: list[str], env: dict[str, str]) -> int:
    """Run ``python -m words…``."""
    return cli.call([sys.executable, "-m", *words], env)


def _done(words: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether a step has nothing to do: no process is started to say so."""
    if words[0] == "lever_plus.pipeline":
        return pipeline.all_done(words[1], env)
    return pipeline.is_done(words[0], env)


class Runner:
    """Runs the steps of experiments. ``given`` is the user's environment, ``call`` starts a step (tests replace it)."""

    def __init__(self, settings: ExperimentSettings, given: Mapping[str, str], call: Call = call_module) -> None:
        self.settings = settings
        self.seeds = seeds_of(settings.seeds)
        self.drawn = stats.Resampling(settings.bootstrap, settings.data_seed)
        self.call = call
        self.env = {**given, "DATASET": settings.dataset, "LEVER_NAMES_CHECKED": "1", "PYTHONUNBUFFERED": "1"}

    def step(self, what: str, words: list[str], extra: Mapping[str, str]) -> None:
        """Run one step.

        Raises:
            StepFailed, KeyboardInterrupt.
        """
        env = {**self.env, **extra}
        if self.call is call_module and _done(words, env):
            log.info(f"--- {what}: done before with the same inputs and settings")
            return
        log.info(f"--- {what}")
        code = self.call(words, env)
        if code != 0:
            raise StepFailed(what, code)

    def rl_data(self) -> Path:
        """Build RL data and what it needs where missing; returns its file."""
        path = paths.rl_data(self.settings)
        if self.settings.rl_data_path:
            if not path.is_file():
                raise MissingInputError(f"RL_DATA_PATH: no such file: {path}")
        else:
            self.step("RL data", ["lever_plus.pipeline", "rl_data"], {})
        return path

    def evaluate(self, arm: Arm) -> list[record.Run]:
        """Train and evaluate every seed of an arm; returns the finished runs."""
        if arm.overridden:
            log.warning(f"{arm.name}: your environment replaces the plan's " + ", ".join(
                f"{name}={arm.settings[name]} by {value}" for name, value in arm.overridden.items()))  # fmt: skip
        runs = []
        for number, seed in enumerate(self.seeds):
            env = arm.environment(seed)
            self.step(f"{arm.name}, seed {seed}: training", ["lever_plus.stages.train_v3_online"], env)
            methods = FIRST_SEED_METHODS if number == 0 else OTHER_SEEDS_METHODS
            folder = self._inference(
                f"{arm.name}, seed {seed}: inference", arm.run_name(seed), {**env, "METHODS": methods}
            )
            runs.append(record.load_run(folder, self.v3_dir(arm, seed)))
        return runs

    def evaluate_v2(self, run_name: str, anchors: int) -> Path:
        """Train v2 on ``anchors`` anchors and evaluate it on the same queries; returns the inference folder."""
        env = {"SAMPLE_NUM": str(anchors)}
        self.step(f"v2 on {anchors} anchors", ["lever_plus.pipeline", "v2"], env)
        return self._inference(f"v2 on {anchors} anchors: inference", run_name, {**env, "METHODS": "v2"})

    def experiment(self, arm: Arm) -> dict[str, Any]:
        """Evaluate an arm and write its record, report and exports; returns the record."""
        return self.write(arm.name, self.evaluate(arm))

    def write(self, name: str, runs: list[record.Run]) -> dict[str, Any]:
        """Write record, report and exports of evaluated seeds; returns the record."""
        out, lang = paths.experiment_dir(self.settings, name), self.settings.record_lang
        made = record.build_priced(self.settings, runs, name, self.settings.delta)
        log.info(record.write(made, out, lang))
        export.write(out, {name: (made, runs)})
        report.write(out / "report.html", {name: (made, runs)}, lang=lang)
        log.info(f"{out / 'record.md'}\n{out / 'report.html'}")
        return made

    def audit(self) -> dict[str, Any]:
        """Experiment 5: audit the RL data; writes audit.json, record.md and report.html, returns the audit."""
        path = self.rl_data()
        s = load(TrainV3Settings, {}, self.env)
        rule = RewardRule(s.reward_mode, s.reward_alpha, s.reward_beta, s.reward_correctness, s.reward_shot_cost)
        beams = paths.beam_data(self.settings)
        data = load_rl_data(path, beam_data=beams if beams.is_file() and not self.settings.rl_data_path else None)
        found = audit.audit(data, rule, (s.rce_tau_start, s.rce_tau_end), self._answers())
        found["rl_data"] = str(path)
        out, lang = paths.experiment_dir(self.settings, "exp5"), self.settings.record_lang
        io.write_json(out / "audit.json", found, indent=1)
        io.write_text(out / "record.md", audit_markdown(found, lang))
        report.write(out / "report.html", {}, lang=lang, audit=found)
        log.info(f"{out / 'record.md'}\n{out / 'report.html'}")
        return found

    def v3_dir(self, arm: Arm, seed: int) -> Path:
        """Folder of a seed's checkpoints."""
        return paths.v3_dir(dataclasses.replace(self.settings, exp_name=arm.run_name(seed)))

    def _inference(self, what: str, run_name: str, env: Mapping[str, str]) -> Path:
        extra = {"RUN_NAME": run_name, "TEST_DATA_NUM": str(self.settings.test_data_num)}
        self.step(what, ["lever_plus.pipeline", "inference"], {**env, **extra})
        return paths.inference_dir(self.settings, run_name)

    def _answers(self) -> Callable[[int], str] | None:
        """The annotated answer of a train row; None (and a line in the log) where the data set is not at hand."""
        try:
            return load_split(paths.dataset(self.settings), "train").answer
        except MissingInputError as error:
            log.warning(f"copy rate left out: {error}")
            return None


def audit_markdown(found: dict[str, Any], lang: str) -> str:
    """record.md of the audit: a table of findings, warnings first, and the quantiles of the distributions."""
    made = findings(found, lang)
    t = {key: pick(sides, lang) for key, sides in texts("report").items()}
    warnings = sum(f.warning for f in made)
    summary = say("warnings", lang, warnings=warnings, n=len(made))
    rule = ", ".join(f"{name} {value}" for name, value in found["rule"].items())
    quantiles = {"reward": found["reward"]["quantiles"]} | {k: v["quantiles"] for k, v in found["scores"].items()}
    names = [t["minimum"], "5 %", "25 %", t["median"], "75 %", "95 %", t["maximum"]]
    return "\n".join([
        f"# {title('exp5', lang)}", "",
        f"{markdown.tame(found.get('rl_data', ''))} · {t['rule_of_rewards']}{t['colon']}{rule}", "",
        t["audit_intro"], "", summary, "",
        f"| | {t['finding']} | {t['value']} | {t['meaning']} | {t['threshold']} |", "| --- | --- | --- | --- | --- |",
        *(f"| {'⚠' if f.warning else '✓'} | {f.name} | {f.value} | {f.meaning} | {f.threshold} |"
          for f in sorted(made, key=lambda f: not f.warning)),
        "", f"## {t['distributions']}", "", f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names),
        *(f"| {t[f'axis_{name}']} | {' | '.join(f'{value:.2f}' for value in values)} |"
          for name, values in quantiles.items() if values),
        "",
    ])  # fmt: skip


def repository_path(path: str) -> Path:
    """A path of the settings, relative to the repository's root; installed, to where one works, then to the package."""
    there = config.HOME / path
    return there if Path(path).is_absolute() or there.exists() else config.CONFIG_DIR.parent / path
