"""The plan's experiments: 1, 2, 3, 4a, 4b (training and evaluation over SEEDS), 5 (data audit), plan (all of it),
and your own: any NAME with a file exp<NAME>.env in EXPERIMENT_DIR.

python -m lever_plus.experiments.run EXPERIMENT [--NAME value …]
"""

import os
import sys
from collections.abc import Mapping, Sequence

from lever_plus import cli, config
from lever_plus.experiments.arms import AUDIT, PLAN, all_arms, arms_of, check, known
from lever_plus.settings import loading
from lever_plus.settings.experiment import ExperimentSettings
from lever_plus.settings.registry import STAGE_SETTINGS
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

forecast = lazy("lever_plus.experiments.forecast")
experiments_runner = lazy("lever_plus.experiments.runner")
sweep = lazy("lever_plus.experiments.sweep")
walk = lazy("lever_plus.experiments.walk")


def run(s: ExperimentSettings, experiment: str, dry_run: bool, given: Mapping[str, str]) -> int:
    """Run an experiment, or say what it would do and cost. ``given``: the user's settings by environment name."""
    folder = experiments_runner.repository_path(s.experiment_dir)
    names = {name.lower(): name for name in known(folder)}
    if experiment.lower() not in names:
        raise UsageError(f"which experiment? {experiment!r} is none of: {', '.join(names.values())}")
    experiment = names[experiment.lower()]
    runner = experiments_runner.Runner(s, given)
    if experiment == PLAN:
        if s.val_fraction == 0:
            raise UsageError("VAL_FRACTION=0: the plan chooses its best recipe on held-out train queries; leave some")
        arms = all_arms(folder, runner.env)
        check([arm for group in arms.values() for arm in group], runner.env)
        if dry_run:
            return forecast.print_tree(runner, arms)
        walk.walk(runner, arms)
        return 0
    chosen = {} if experiment == AUDIT else {experiment: arms_of(experiment, folder, runner.env)}
    check(chosen.get(experiment, []), runner.env)
    if dry_run:
        return forecast.print_arms(runner, chosen)
    if experiment == AUDIT:
        runner.audit()
        return 0
    runner.rl_data()
    made = {arm.name: runner.experiment(arm) for arm in chosen[experiment]}
    if len(made) > 1:
        sweep.write(runner, experiment, chosen[experiment], made)
    return 0


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    words = list(argv)
    experiment = words.pop(0) if words and not words[0].startswith("-") and "=" not in words[0] else ""
    given = {**config.read_dotenv(), **os.environ}

    def load(options: dict[str, str]) -> ExperimentSettings:
        given.update(options)  # the steps are processes of their own and get the options as environment
        return loading.load(ExperimentSettings, options)

    def body(loaded: ExperimentSettings, dry_run: bool) -> int:
        return run(loaded, experiment, dry_run, given)

    steps = [STAGE_SETTINGS[name] for name in ("train_v3", "train_v2", "export_embeddings")]
    return cli.stage_main(ExperimentSettings, body, __doc__, words, load, steps, "run_experiment")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
