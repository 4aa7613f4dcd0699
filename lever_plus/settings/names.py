"""Every name that a user sets is read by the command's steps, told of, or refused: none is passed over in silence."""

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from lever_plus import config
from lever_plus.settings import former
from lever_plus.settings.registry import STAGE_SETTINGS
from open_mmicl.errors import DamagedInputError, UsageError, plain

USUAL = "LEVER_USUAL"
"""Names a setting whose value is the command's own default: a small data set may lower it, as if nobody had set it."""
OURS_BESIDES = ("LEVER_DEBUG", "LEVER_TABLE_LATER", USUAL)
"""Names that are read but are no settings of a stage."""
_LIBRARIES = (
    "HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "CUDA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "PYTHON", "OMP_",
    "MKL_", "DS_", "DEEPSPEED_", "WANDB_", "TRACKIO_", "TENSORBOARD_", "LD_", "LC_", "LANG", "PATH", "HOME", "TMP",
    "TEMP", "XDG_", "SLURM_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "TRITON_", "XLA_", "NVIDIA_",
    "CONDA_", "VIRTUAL_ENV", "PIP_", "UV_", "SSL_", "REQUESTS_", "CURL_", "NO_COLOR", "FORCE_COLOR", "TERM", "EDITOR",
)  # fmt: skip
"""How names begin that libraries and programs read: a .env may hold them."""
_NEAR = 0.86
ELSEWHERE = {
    "LR": "RCE_LR, GRPO_LR or V2_LR", "LEARNING_RATE": "RCE_LR, GRPO_LR or V2_LR",
    "EPOCHS": "RCE_EPOCHS, GRPO_EPOCHS or V2_EPOCHS", "NUM_EPOCHS": "RCE_EPOCHS, GRPO_EPOCHS or V2_EPOCHS",
    "MAX_GRAD_NORM": "GRAD_CLIP", "WARMUP_RATIO": "WARMUP_STEPS", "VAL_RATIO": "VAL_FRACTION",
    "SHOTS": "MAX_EVAL_SHOT", "NUM_SHOTS": "MAX_EVAL_SHOT", "ICD_NUM": "MAX_EVAL_SHOT",
    "KL_TARGET_MIN": "KL_TARGET", "KL_TARGET_MAX": "KL_TARGET",
}  # fmt: skip
"""What other projects call a setting that has another name here; their values are not taken over."""


def fields_of(classes: Iterable[type]) -> set[str]:
    """The environment names of some settings classes."""
    return {config.env_name(field.name) for cls in classes for field in dataclasses.fields(cls)}


def known() -> set[str]:
    """Every environment name that any stage reads."""
    return fields_of(STAGE_SETTINGS.values()) | dataset_paths() | set(OURS_BESIDES)


def nearest(name: str, ours: Collection[str]) -> str | None:
    """The setting that a name was probably meant to be; None where it is near none."""
    squeezed = {one.replace("_", ""): one for one in ours}
    exact = squeezed.get(name.upper().replace("_", ""))
    if exact:
        return exact
    near = difflib.get_close_matches(name.upper(), ours, n=1, cutoff=_NEAR) if len(name) > 5 else []
    return near[0] if near else None


def lines(
    reads: Collection[str], env: Mapping[str, str], dotenv: Mapping[str, str], quiet: Collection[str] = ()
) -> list[str]:
    """What to tell about names of the environment and of ``.env`` that the command does not read.

    Args:
        reads: names of the settings that the command's steps read. quiet: names that nobody but us has set.
    """
    models, told, idle = model_paths(config.CONFIG_DIR) | dataset_paths(), [], []
    ours = known() | models
    for name, value in {**dotenv, **env}.items():
        in_file = name in dotenv and dotenv[name] == value
        where = ".env: " if in_file else ""
        if str(value) == "" or name in quiet or name in OURS_BESIDES:
            continue
        if name in former.FORMER:
            if reads.isdisjoint(former.FORMER[name].about):
                idle.append(name)
            elif meant := former.meaning(name, str(value).strip()):
                told.append(f"note: {where}{name}={value} (the original Lever-Plus's name) is read as {meant}")
        elif name in ours:
            idle += [] if name in reads or name in models else [name]
        elif name in ELSEWHERE:
            told.append(f"warning: {where}{name} is not a setting; did you mean {ELSEWHERE[name]}?")
        elif near := nearest(name, ours):
            told.append(f"warning: {where}{name} is not a setting; did you mean {near}?")
        elif in_file and not _of_a_library(name):
            told.append(f"warning: .env: {name} is not a setting (--help lists them) and is not read here")
    if idle:
        told.append(f"note: set, but read by no step of this command: {', '.join(sorted(idle))}")
    return told


def tell(classes: Iterable[type], env: Mapping[str, str] | None = None, quiet: Collection[str] = ()) -> list[str]:
    """Print :func:`lines` for a command whose steps have these settings; returns them."""
    env = os.environ if env is None else env
    if env.get("RANK", "0") != "0" or "LEVER_NAMES_CHECKED" in env:
        return []
    told = lines(fields_of(classes), env, config.read_dotenv(), quiet)
    for line in told:
        print(plain(line), file=sys.stderr)
    return told


def check_file(values: Mapping[str, object], where: str | Path, ours: Collection[str] | None = None) -> None:
    """Refuse names in a file of settings that are none.

    Raises:
        UsageError: names the file, the name and the nearest setting.
    """
    ours = known() if ours is None else ours
    for name in values:
        if name not in ours and name not in former.FORMER:
            near = nearest(str(name), ours)
            hint = f"did you mean {near}?" if near else "--help of the scripts lists them"
            raise UsageError(f"{where}: {str(name)[:60]} is not a setting; {hint}")


@functools.cache
def model_paths(folder: Path) -> set[str]:
    """The variables that name a local folder of an LVLM (``path_variable`` of configs/infer_model)."""
    files = sorted((folder / "infer_model").glob("*.yaml"))
    return {str(config.load_yaml(file).get("path_variable", "")) for file in files} - {""}


def dataset_paths() -> set[str]:
    """The variables that name a data set's folder (``path_variable`` of configs/dataset)."""
    files = [file for folder in config.config_dirs("dataset") for file in sorted(folder.glob("*.yaml"))]
    return {name for file in files if (name := _declared(file, file.stat().st_mtime_ns))}


@functools.cache
def _declared(file: Path, stamp: int) -> str:
    """The ``path_variable`` of a YAML; "" where it has none, or is damaged (which is told when it is used)."""
    try:
        return str(config.load_yaml(file).get("path_variable") or "")
    except DamagedInputError:
        return ""


def _of_a_library(name: str) -> bool:
    return name.upper().startswith(_LIBRARIES) or name.upper().endswith(("_PROXY", "_TOKEN", "_KEY"))
