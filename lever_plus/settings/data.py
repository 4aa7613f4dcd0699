"""Settings of the stages that make data: beam search, embeddings, RL data."""

from dataclasses import dataclass

from lever_plus.config import INPUT, PLACE, SPEED, setting
from lever_plus.settings.shared import BeamNames, LvlmSettings, SharedSettings


@dataclass(frozen=True)
class BeamSettings(LvlmSettings, BeamNames):
    """InfoScore beam search (lever_plus/infoscore.py)."""

    infoscore: str = setting(
        "logprob",
        "difference of log-probabilities, or of probabilities",
        choices=("logprob", "prob"),
        affects="beam_data rl_data v3.answers",
    )
    length_norm: bool = setting(
        False, "divide the answer's log-probability by its number of tokens", affects="beam_data rl_data v3.answers"
    )


@dataclass(frozen=True)
class EmbeddingSettings(SharedSettings):
    """CLIP embeddings of every train and validation item."""

    embeddings_of: str = setting(
        "",
        "selector whose own CLIP makes them (with CLIP_PATH), in files of their own",
        choices=("", "v2_lora"),
        affects=PLACE,
    )
    clip_batch: int = setting(64, "images or texts per CLIP forward", lo=1, hi=65_536, affects=SPEED)

    @property
    def own_clip(self) -> str:
        """EMBEDDINGS_OF."""
        return self.embeddings_of


@dataclass(frozen=True)
class ChannelSettings(LvlmSettings):
    """The channels that the LVLM gives: hidden states of items, embeddings of answers."""

    clip_batch: int = setting(64, "texts per CLIP forward (channel answer_clip)", lo=1, affects=SPEED)


@dataclass(frozen=True)
class RlDataSettings(BeamSettings):
    """RL data: beams, temperature samples and random pointers, each answered by the LVLM (docs/formats.md)."""

    rl_query_num: int = setting(
        2000,
        "train queries with RL data, the beam search's anchors and more; configs/dataset/*.yaml sets it per data set",
        lo=1,
        affects="rl_data",
        often=True,
    )
    rl_beams: int = setting(5, "pointers per query from the selector's beam search", lo=0, hi=64, affects="rl_data")
    rl_samples_low: int = setting(2, "samples per query at RL_TEMP_LOW", lo=0, hi=1024, affects="rl_data")
    rl_temp_low: float = setting(1.0, "lower sampling temperature", lo=0, open_lo=True, affects="rl_data")
    rl_samples_high: int = setting(2, "samples per query at RL_TEMP_HIGH", lo=0, hi=1024, affects="rl_data")
    rl_temp_high: float = setting(1.3, "higher sampling temperature", lo=0, open_lo=True, affects="rl_data")
    rl_random: int = setting(1, "random pointers per query", lo=0, hi=1024, affects="rl_data")
    rl_shot: int = setting(2, "demonstrations in an RL pointer", lo=1, hi=8, affects="rl_data")
    rl_prefixes: bool = setting(
        False,
        "also answer the beginnings of each pointer, so that fewer shots than RL_SHOT are trained too",
        affects="rl_data",
    )
    rl_balance: int = setting(
        1,
        "train queries probed for each one kept: each pointer's first pick is answered, and those queries are kept "
        "whose share of right answers is nearest to one half; 1: no probe",
        lo=1,
        hi=100,
        affects="rl_data",
        before=1,
    )
    positive_mining: bool = setting(
        False,
        "RL data: a pool without a right demonstration, by the annotations, gets one from the whole train split",
        affects="rl_data",
        before=False,
    )
    rl_data_path: str = setting("", "RL data file; empty: the standard name", affects=INPUT)
    lever_lm_checkpoint_path: str = setting(
        "", "selector that proposes the pointers; empty: the v2 checkpoint", affects=INPUT, often=True
    )
