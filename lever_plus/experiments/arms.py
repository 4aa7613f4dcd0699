"""The plan's experiments as arms: one training recipe each, run with several seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lever_plus import config
from open_mmicl.errors import UsageError

EXPERIMENTS = ("1", "2", "3", "4a", "4b")
AUDIT = "5"
PLAN = "plan"


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

    A setting with several values (``RCE_EPOCHS="15 20"``) makes one arm per value. A setting that the user's
    environment holds wins over the file, for every arm.

    Raises:
        UsageError: no settings file of that experiment.
    """
    path = Path(folder) / f"exp{experiment}.env"
    if not path.is_file():
        raise UsageError(f"no settings of experiment {experiment!r}: {path}; there are: {', '.join(known(folder))}")
    values = config.read_dotenv(path)
    several = [name for name, value in values.items() if len(value.split()) > 1]
    if len(several) > 1:
        raise UsageError(f"{path}: only one setting may have several values, not {' and '.join(several)}")
    if not several or env.get(several[0], "") != "":
        return [_arm(f"exp{experiment}", experiment, values, env)]
    name = several[0]
    return [
        _arm(f"exp{experiment}_{name.lower()}{value}", experiment, {**values, name: value}, env)
        for value in values[name].split()
    ]


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
