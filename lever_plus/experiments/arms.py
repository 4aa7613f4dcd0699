"""The plan's experiments as arms: one training recipe each, run with several seeds."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lever_plus import config, pipeline
from lever_plus.settings import former, names
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.settings.selector import TrainV3Settings
from lever_plus.settings.shared import BeamNames, LvlmSettings
from lever_plus.stages import train_v3
from open_mmicl.errors import MissingInputError, UsageError

EXPERIMENTS = ("1", "2", "3", "4a", "4b")
AUDIT = "5"
PLAN = "plan"
SET_BY_RUNNER = {
    "SEED": "SEEDS (in the environment) gives the seeds of every arm",
    "EXP_NAME": "each arm and seed has its own",
    "RUN_NAME": "each arm and seed has its own",
    "OUTPUT_DIR": "each arm and seed has its own",
    "METHODS": "every arm is compared with the same methods",
    "LEVER_LM_CHECKPOINT_PATH": "what an arm has trained is evaluated",
}
_SHARED = names.fields_of([BeamNames, LvlmSettings]) - {"STOP"} | {"TEST_DATA_NUM", "EVAL_SPLIT", "BOOTSTRAP"}
_OF_ARMS = [f for f in dataclasses.fields(TrainV3Settings) if f.name.upper() not in _SHARED]
ARM_SETTINGS = {f.name.upper() for f in _OF_ARMS} - set(SET_BY_RUNNER) | {"CHECKPOINT_PHASE", "MAX_EVAL_SHOT"}
"""What the file of an experiment may set: the training's own settings, and which checkpoint is evaluated."""
SWEPT = {f.name.upper() for f in _OF_ARMS if f.type not in (str, "str") or f.metadata["choices"]} | {"CHECKPOINT_PHASE"}
"""Settings that may have several values, with blanks between (not paths, which may hold blanks)."""


@dataclass(frozen=True)
class Arm:
    """One recipe: its name (``exp1``, ``exp2_rce_epochs20``), its experiment, and the settings that make it."""

    name: str
    experiment: str
    settings: dict[str, str]
    overridden: dict[str, str] = field(default_factory=dict)

    def run_name(self, seed: int) -> str:
        """EXP_NAME and inference folder of one seed."""
        return f"{self.name}_seed{seed}"

    def environment(self, seed: int) -> dict[str, str]:
        """What the stages of one seed get on top of the user's environment."""
        return {**self.settings, **self.overridden, "SEED": str(seed), "EXP_NAME": self.run_name(seed)}


def known(folder: Path) -> list[str]:
    """The names that can be run: the plan's, then every further ``exp<name>.env`` of the folder."""
    own = sorted(path.stem.removeprefix("exp") for path in Path(folder).glob("exp*.env"))
    return [*EXPERIMENTS, AUDIT, PLAN, *(name for name in own if name not in (*EXPERIMENTS, AUDIT, PLAN, ""))]


def arms_of(experiment: str, folder: Path, env: Mapping[str, str]) -> list[Arm]:
    """The arms of an experiment, one of the plan's or any ``exp<experiment>.env`` of the folder.

    A setting with several values (``RCE_EPOCHS="15 20"``) makes one arm per value, several such settings one per
    combination. A setting that the user's environment holds wins over the file, for every arm.

    Raises:
        UsageError: no settings file of that experiment, or a name in it that an arm cannot set.
    """
    path = Path(folder) / f"exp{experiment}.env"
    if not path.is_file():
        raise UsageError(f"no settings of experiment {experiment!r}: {path}; there are: {', '.join(known(folder))}")
    values = config.read_dotenv(path)
    _check_names(values, path)
    values = {name: str(value) for name, value in former.translate(values, ARM_SETTINGS).items()}
    several = {n: v.split() for n, v in values.items() if n in SWEPT and len(v.split()) > 1 and env.get(n, "") == ""}
    if not several:
        return [_arm(f"exp{experiment}", experiment, values, env)]
    arms = []
    for combination in itertools.product(*several.values()):
        chosen = dict(zip(several, combination, strict=True))
        name = "_".join([f"exp{experiment}", *(f"{n.lower()}{v}" for n, v in chosen.items())])
        arms.append(_arm(name, experiment, {**values, **chosen}, env))
    if len({arm.name for arm in arms}) < len(arms):
        raise UsageError(f"{path}: a setting has the same value twice")
    return arms


def check(arms: Iterable[Arm], env: Mapping[str, str]) -> None:
    """See that every value of every arm is allowed, before the first of them is trained.

    Raises:
        UsageError, MissingInputError (a file that one names): says which arm.
    """
    for arm in arms:
        own = {**env, **arm.environment(0)}
        try:
            training = load(TrainV3Settings, {}, own)
            train_v3.check_settings(training, quiet=True)
            pipeline.check_files("v3", training)
            load(InferenceSettings, {}, own)
        except (UsageError, MissingInputError) as error:
            raise type(error)(f"{arm.name}: {error}") from None


def _check_names(values: Mapping[str, str], path: Path) -> None:
    """Raises UsageError for a name that no arm reads or that all arms share."""
    names.check_file(values, path)
    for name in values:
        if name in former.FORMER or name in ARM_SETTINGS:
            continue
        how = SET_BY_RUNNER.get(name, "it belongs to all arms: set it in the environment or in .env")
        raise UsageError(f"{path}: {name} is no setting of an arm; {how}")


def all_arms(folder: Path, env: Mapping[str, str]) -> dict[str, list[Arm]]:
    """The arms of every experiment of the plan.

    Raises:
        UsageError: the environment sets something by which the experiments differ, so that they would be the same.
    """
    arms = {experiment: arms_of(experiment, folder, env) for experiment in EXPERIMENTS}
    flat = [arm for group in arms.values() for arm in group]
    differing = sorted({n for arm in flat for n in arm.settings if len({a.settings.get(n) for a in flat}) > 1})
    clash = [name for name in differing if env.get(name, "") != ""]
    if clash:
        raise UsageError(f"{', '.join(clash)}: the plan's experiments differ in this; unset it, or run one experiment")
    return arms


def seeds_of(text: str) -> list[int]:
    """``"1 2 3"`` -> [1, 2, 3].

    Raises:
        UsageError: not different whole numbers, or too large for a seed.
    """
    words = text.replace(",", " ").split()
    seeds = [int(word) for word in words if word.isascii() and word.isdecimal() and len(word) <= 10]
    if not words or len(set(seeds)) < len(words) or max(seeds) > config.LARGEST_SEED:
        raise UsageError(
            f"SEEDS={text!r} is not allowed: different whole numbers from 0 to {config.LARGEST_SEED}, with "
            "spaces between"
        )
    return seeds


def _arm(name: str, experiment: str, values: dict[str, str], env: Mapping[str, str]) -> Arm:
    overridden = {n: env[n] for n, v in values.items() if env.get(n, "") != "" and env[n] != v}
    return Arm(name, experiment, values, overridden)
