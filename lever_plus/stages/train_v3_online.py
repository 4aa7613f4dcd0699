"""v3 with the LVLM at hand: GRPO_MODE=online has it answer fresh pointers, CHECKPOINT_METRIC=answers the policy's own.

The same training as lever_plus.stages.train_v3, through the answer cache; what asks nothing is handed on to it.
"""

import dataclasses
from pathlib import Path
from typing import Any

from lever_plus import cli, paths, provenance, shards
from lever_plus.config import deciding
from lever_plus.data.dataset import load_split
from lever_plus.settings.selector import OnlineSettings
from lever_plus.stages import launch, lvlm, train_v3, work
from lever_plus.stages.answering import PointerAnswerer
from lever_plus.stages.cost import print_plan
from open_mmicl.errors import MissingInputError


def recipe(settings: OnlineSettings) -> provenance.Recipe:
    """v3's recipe, and what decides the LVLM's answers."""
    made_from = train_v3.recipe(settings)
    answers = {**lvlm.prompt_inputs(settings), **deciding(settings, "v3.answers", declared=True)}
    return dataclasses.replace(made_from, values={**made_from.values, "answers": answers})


def is_done(settings: OnlineSettings) -> bool:
    """As :func:`.train_v3.is_done`."""
    return train_v3.is_over(settings, recipe(settings) if asks(settings) else train_v3.recipe(settings))


def asks(settings: OnlineSettings) -> bool:
    """Whether training asks the LVLM anything."""
    return settings.is_online or settings.checkpoint_metric == "answers"


def run(settings: OnlineSettings, dry_run: bool) -> int:
    """Train, or say that it is done."""
    if not asks(settings):
        return train_v3.run(settings, dry_run)
    train_v3.check_settings(settings)
    folder = train_v3.output_dir(settings)
    if dry_run:
        if not settings.assume and _finished(settings, folder):
            return 0
        for step in work.training(settings):
            print_plan(settings, step, folder)
        return 0
    made_from = recipe(settings)
    with launch.turn(folder / launch.RUN_FILE, settings):
        state = launch.agreed_state(folder, made_from, settings)
        if train_v3.is_finished(state, folder):
            return 0
        if launch.must_spawn(settings.nproc):
            return launch.spawn(settings.nproc, "lever_plus.stages.train_v3_online", settings)
        launch.device_of(settings)
        return train_v3.train(settings, folder, made_from, state, responder(settings))


def _finished(settings: OnlineSettings, folder: Path) -> bool:
    """For the dry run: whether the run is finished, and said; not where its inputs are not there yet."""
    try:
        return train_v3.told_finished(launch.run_state(folder, recipe(settings)), folder)
    except MissingInputError:
        return False


def responder(settings: OnlineSettings) -> Any:
    """The LVLM behind its answer cache; each process has one and answers its share of the queries."""
    progress = "LVLM answers" if shards.rank() == 0 else None
    return PointerAnswerer(lvlm.load_engine(settings), load_split(paths.dataset(settings), "train"), settings, progress)


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(OnlineSettings, run, __doc__))
