"""Settings of the plan's experiments (how often, on how many queries, what counts) and of the doctor."""

from dataclasses import dataclass

from lever_plus.config import INPUT, PLAN, TOLD, setting
from lever_plus.settings.inference import InferenceSettings


@dataclass(frozen=True)
class ExperimentSettings(InferenceSettings):
    """One experiment of the plan, or the whole plan. Training settings come from configs/experiments/*.env."""

    seeds: str = setting(
        "1 2 3", "training seeds, separated by spaces; v2 and the RL data stay those of SEED", affects=PLAN, often=True
    )
    delta: float = setting(1.0, "smallest difference of interest", unit="points", lo=0, open_lo=True, affects=PLAN)
    rival: str = setting("prompts", "v3's fair rival in the plan: v2 trained on as many LVLM prompts, or on as many queries, as v3; or none", choices=("prompts", "queries", "none"), affects=PLAN)  # fmt: skip  # noqa: E501
    experiment_dir: str = setting(
        "configs/experiments", "folder of the experiments' settings, exp<name>.env", affects=INPUT, often=True
    )
    test_data_num: int = setting(
        1000, "queries to evaluate; -1: all", lo=-1, not_zero=True, affects="inference", often=True
    )


@dataclass(frozen=True)
class DoctorSettings(ExperimentSettings):
    """How much the doctor looks at; what it prices are the experiments' own settings."""

    doctor_prompts: int = setting(
        12, "real prompts on which the fast path is compared with transformers' own", lo=4, affects=TOLD
    )
    doctor_images: int = setting(100, "images of each split that are opened", lo=1, affects=TOLD)
