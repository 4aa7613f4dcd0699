"""Names and values of the original Lever-Plus's settings, and what they are here (docs/migration.md lists them).

A name whose meaning is the same is taken over, one that asks for what this project does anyway passes, any other is
refused with what to use instead. Where a command reads nothing of what a name is about, the name is only told of
(:mod:`lever_plus.settings.names`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from open_mmicl.errors import UsageError

_ON, _OFF = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
Values = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Former:
    """A name of the original.

    ``about``: the settings here that it concerns. ``same``: it has their meaning, and its value is theirs.
    ``values``: what single values are here ({}: what happens anyway). ``instead``: what to use for the others.
    """

    about: tuple[str, ...]
    same: bool = False
    values: Values = field(default_factory=dict)
    instead: str = ""


class Taken(str):
    """A value under our name that the user set under the original's; ``origin``: what was set, for an error line."""

    origin: str

    def __new__(cls, value: str, origin: str) -> "Taken":
        made = super().__new__(cls, value)
        made.origin = origin
        return made


def _renamed(*about: str) -> Former:
    return Former(about, same=True)


def _switch(about: str, on: dict[str, str] | None, off: dict[str, str] | None, instead: str = "") -> Former:
    """A true/false of the original; None: nothing here does that."""
    values = {word: made for words, made in ((_ON, on), (_OFF, off)) if made is not None for word in words}
    return Former((about,), values=values, instead=instead)


_ONE = {"1": {}, "1.0": {}}
_WEIGHTS = (
    "rewards here have no such weights: REWARD_MODE=hard_only, soft_only, hard_plus_soft (equal weights) or separated; "
    "or REWARD_MODE=plan with REWARD_ALPHA and REWARD_BETA"
)
_PATHS = "set OKVQA_PATH, VQAV2_PATH and COCO_PATH to the folders that hold the files"
_VARIANT = "the v4 variants (topics, DPP, slots) are not read; v1, v2, v2_lora and v3 checkpoints are"

FORMER: dict[str, Former] = {
    "RCE_TEMP_START": _renamed("RCE_TAU_START"),
    "RCE_TEMP_END": _renamed("RCE_TAU_END"),
    "CLIP_EPSILON": _renamed("EPS_LOW", "EPS_HIGH"),
    "PPO_CLIP_RATIO": _renamed("EPS_LOW", "EPS_HIGH"),
    "USE_PPO_CLIP_ONLY": _switch("KL_BETA", {"KL_BETA": "0"}, {}),
    "USE_PPO_CLIP": _switch("KL_BETA", {"KL_BETA": "0"}, {}),
    "DISABLE_ADAPTIVE_KL": _switch("KL_ADAPTIVE", {"KL_ADAPTIVE": "0"}, None, "set KL_ADAPTIVE=1 and KL_TARGET"),
    "RCE_USE_RAW_REWARD": _switch("RCE_REWARDS", {"RCE_REWARDS": "raw"}, {"RCE_REWARDS": "zscore"}),
    "RCE_USE_NORMALIZED_REWARD": _switch("RCE_REWARDS", {"RCE_REWARDS": "zscore"}, {"RCE_REWARDS": "raw"}),
    "NORMALIZE_METHOD": Former(
        ("RCE_REWARDS",),
        values={
            "z_score": {"RCE_REWARDS": "zscore"},
            "z_score_clamp": {"RCE_REWARDS": "zscore"},
            "rank_normalize": {"RCE_REWARDS": "rank"},
        },
        instead="set RCE_REWARDS=raw, zscore or rank",
    ),
    "USE_RANK_ADVANTAGE": _switch(
        "ADVANTAGE_SCALE", None, {}, "advantages are not ranked here: set ADVANTAGE_SCALE=group, batch or none (RCE "
        "has RCE_REWARDS=rank)",
    ),
    "HARD_WEIGHT": Former(("REWARD_MODE",), values=_ONE, instead=_WEIGHTS),
    "SOFT_WEIGHT": Former(("REWARD_MODE",), values=_ONE, instead=_WEIGHTS),
    "REL_WEIGHT": Former(
        ("REWARD_MODE",), values={"0": {}, "0.0": {}}, instead="rewards here have no relevance term: unset it"
    ),
    "REWARD_CORRECTNESS_MODE": _renamed("REWARD_CORRECTNESS"),
    "USE_LOGPROB": _switch("REWARD_MODE", None, {}, "REWARD_MODE=plan reads beam_score; set REWARD_ALPHA"),
    "USE_TOP1_ONLY": _switch(
        "RCE_OBJECTIVE", None, {}, "a low RCE_TAU_START and RCE_TAU_END (0.01) weigh the best pointer alone"
    ),
    "FREEZE_BACKBONE_IN_GRPO": _switch(
        "GRPO_EPOCHS", None, {}, "nothing is frozen here: a larger KL_BETA or START_DECAY holds GRPO near its start"
    ),
    "SKIP_FALLBACK_REWARD": _switch(
        "RL_DATA_PATH", {}, None, "pointers that the official metric did not score are always left out: unset it"
    ),
    "REQUIRE_POSITIVE_QUERY": _switch(
        "RL_DATA_PATH", None, {}, "queries are not filtered here (equal rewards give GRPO no signal anyway): unset it, "
        "or name a filtered file with RL_DATA_PATH",
    ),
    "CANDIDATE_SIZE": _renamed("CANDIDATE_NUM"),
    "CAND_NUM": _renamed("CANDIDATE_NUM"),
    "FEW_SHOT_NUM": _renamed("MAX_SHOT"),
    "TEST_SAMPLE_NUM": _renamed("SAMPLE_NUM"),
    "LEVER_LM_CHECKPOINT_VERSION": Former(
        ("METHODS",), values={v: {} for v in ("v1", "v2", "v2_lora", "v3")}, instead=_VARIANT
    ),
    **dict.fromkeys(
        ("LEVER_LM_MODEL_TYPE", "LEVER_LM_DPP_RANK", "LEVER_LM_TOP_M", "LEVER_LM_REFINE_TYPE", "LEVER_LM_NUM_TOPICS",
         "LEVER_LM_NUM_SLOT_LAYERS", "LEVER_LM_ATTENTION_TYPE"),
        Former(("METHODS", "SFT_CKPT"), instead=_VARIANT),
    ),
    "CHECKPOINT_PATH": Former(()),  # OpenFlamingo's weights
    **dict.fromkeys(
        ("OKVQA_TRAIN_PATH", "OKVQA_VAL_PATH", "COCO_TRAIN_ROOT", "COCO_VAL_ROOT", "VQAV2_TRAIN_PATH",
         "VQAV2_VAL_PATH"),
        Former(("COCO_PATH",), instead=_PATHS),
    ),
}  # fmt: skip

VALUES: dict[str, dict[str, str]] = {
    "REWARD_MODE": {"hard_plus_soft_v2": "separated"},
    "BEAM_MODEL": {"qwen2_5_vl_3B": "qwen2.5_vl_3B"},
    "DATASET": {"okvqa": "okvqa_local", "vqav2": "vqav2_local"},
}
"""Values of settings that have the same name here."""
_INSTEAD: dict[str, dict[str, str]] = {
    "REWARD_MODE": {
        "legacy": "REWARD_MODE=plan with REWARD_ALPHA, REWARD_BETA and REWARD_CORRECTNESS=01 or pm1",
        "hybrid": "REWARD_MODE=plan with REWARD_ALPHA and REWARD_BETA",
        "hard01_plus_gtprob": "REWARD_MODE=gt_prob",
        "hard01_plus_gtprob_separated": "REWARD_MODE=gt_prob or separated",
        "hard_plus_gtprob_plus_rel": "REWARD_MODE=gt_prob",
    },
    "BEAM_MODEL": {"flamingo_3B": "BEAM_MODEL=qwen2.5_vl_3B; OpenFlamingo is not supported"},
}


def translate(layer: Mapping[str, object], reads: Collection[str]) -> dict[str, object]:
    """A layer of settings with the original's names and values put into ours.

    Args:
        layer: values by name (an environment, a file, a command line).
        reads: names of the settings that the command reads; what concerns none of them is left alone.

    Raises:
        UsageError: a name or value whose meaning nothing here has, or two names that contradict each other.
    """
    made: dict[str, object] = {}
    for name, value in layer.items():
        text = str(value).strip()
        if name in FORMER and text and not reads.isdisjoint(FORMER[name].about):
            taken = {one: there for one, there in made.items() if isinstance(there, Taken)}
            made |= _of(name, text, {**layer, **taken})
            continue
        made.setdefault(name, value)
        if name in reads and name in VALUES:
            made[name] = VALUES[name].get(text, value)
        if name in reads and text in _INSTEAD.get(name, {}):
            raise UsageError(f"{name}={text} is the original Lever-Plus's; here: {_INSTEAD[name][text]}")
        if name == "GPU_ID":
            made[name] = text.replace("cuda:", "").strip("\"'[]() ") if text.strip("\"' ") else value
    return made


def _of(name: str, text: str, layer: Mapping[str, object]) -> dict[str, str]:
    former, said = FORMER[name], f"{name}={text[:40]}"
    if former.same:
        meant = dict.fromkeys(former.about, text)
    elif text.lower() in former.values:
        meant = former.values[text.lower()]
    else:
        raise UsageError(f"{said} is a setting of the original Lever-Plus: {former.instead or _either(former)}")
    for ours, value in meant.items():
        other = layer.get(ours, "")
        there = str(other).strip()
        if there and not _equal(there, value):
            also = getattr(other, "origin", f"{ours}={there[:40]}")
            raise UsageError(f"{said} means {ours}={value[:40]} here, but {also} is set too: unset one")
    return {ours: Taken(value, said) for ours, value in meant.items()}


def _either(former: Former) -> str:
    return f"it takes {' | '.join(former.values)}"


def _equal(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def meaning(name: str, text: str) -> str:
    """What a name that is taken over is here, for a line on the screen; "" for one that changes nothing."""
    former = FORMER[name]
    meant = dict.fromkeys(former.about, text) if former.same else former.values.get(text.lower(), {})
    return " ".join(f"{ours}={value}" for ours, value in meant.items())
