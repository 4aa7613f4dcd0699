"""Settings of the doctor."""

from dataclasses import dataclass

from lever_plus.config import TOLD, setting
from lever_plus.settings.experiment import ExperimentSettings


@dataclass(frozen=True)
class DoctorSettings(ExperimentSettings):
    """How much the doctor looks at; what it prices are the experiments' own settings."""

    doctor_prompts: int = setting(
        12, "real prompts on which the fast path is compared with transformers' own", lo=4, affects=TOLD
    )
    doctor_images: int = setting(100, "images of each split that are opened", lo=1, affects=TOLD)
