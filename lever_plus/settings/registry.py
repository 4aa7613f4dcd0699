"""The settings class of each stage, by the stage's name."""

from lever_plus.settings.data import BeamSettings, ChannelSettings, EmbeddingSettings, RlDataSettings
from lever_plus.settings.experiment import DoctorSettings, ExperimentSettings
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.selector import TrainV2Settings, TrainV3Settings

STAGE_SETTINGS = {
    "generate_data": BeamSettings,
    "export_embeddings": EmbeddingSettings,
    "export_channels": ChannelSettings,
    "train_v2": TrainV2Settings,
    "generate_rl_data": RlDataSettings,
    "train_v3": TrainV3Settings,
    "inference": InferenceSettings,
    "experiment": ExperimentSettings,
    "doctor": DoctorSettings,
}
