"""Every name that a user sets is read by the command's steps, told of, or refused: none is passed over in silence."""

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from lever_plus import config
from lever_plus.settings import elsewhere, former
from lever_plus.settings.registry import STAGE_SETTINGS
from open_mmicl.errors import DamagedInputError, UsageError, plain

USUAL = "LEVER_USUAL"
"""Names a setting whose value is the command's own default: a small data set may lower it, as if nobody had set it."""
OURS_BESIDES = ("LEVER_DEBUG", "LEVER_TABLE_LATER", USUAL)
"""Names that are read but are no settings of a stage."""
_OWN = frozenset(("LEVER_UTF8", "LEVER_CHILD", "LEVER_NAMES_CHECKED", "LEVER_IMAGES", *OURS_BESIDES))
"""Names that our commands hand to each other, and those above."""
_NEAR = 0.86
_SHORT = 5  # letters


def fields_of(classes: Iterable[type]) -> set[str]:
    """The environment names of some settings classes."""
    return {config.env_name(field.name) for cls in classes for field in dataclasses.fields(cls)}


def known() -> set[str]:
    """Every environment name that any stage reads."""
    return fields_of(STAGE_SETTINGS.values()) | dataset_paths() | set(OURS_BESIDES)


def nearest(name: str, ours: Collection[str]) -> str | None:
    """The setting that a name was probably meant to be; None where it is near none."""
    upper = name.upper()
    squeezed = {one.replace("_", ""): one for one in ours}
    exact = squeezed.get(upper.replace("_", ""))
    if exact or upper.removeprefix("V3_") in ours:
        return exact or upper.removeprefix("V3_")
    if len(upper) > _SHORT:
        near = difflib.get_close_matches(upper, ours, n=1, cutoff=_NEAR)
    else:  # a letter too few, too many, another or swapped; the first is right
        near = [one for one in sorted(ours) if len(upper) > 2 and one[0] == upper[0] and _one_slip(upper, one)]
    return near[0] if near else elsewhere.same_words(upper, ours)


def lines(reads: Collection[str], env: Mapping[str, str], dotenv: Mapping[str, str]) -> list[str]:
    """What to tell about names of the environment and of ``.env`` that the command does not read.

    A name of ``.env`` that is neither a setting nor a library's is told. The environment is everybody's: there a name
    is told that is near a setting, that another project has for one, or that looks like one; those last in one line.

    Args:
        reads: names of the settings that the command's steps read.
    """
    models, told, idle, unknown = model_variables() | dataset_paths(), [], [], []
    ours = known() | models
    for name, value in {**dotenv, **env}.items():
        in_file = name in dotenv and dotenv[name] == value
        where = ".env: " if in_file else ""
        if str(value) == "" or name in _OWN:
            continue
        if name in former.FORMER:
            if reads.isdisjoint(former.FORMER[name].about):
                idle.append(name)
            elif meant := former.meaning(name, str(value).strip()):
                told.append(f"note: {where}{name}={value} (the original Lever-Plus's name) is read as {meant}")
        elif name in ours:
            idle += [] if name in reads or name in models else [name]
        elif hint := _meant(name, ours):
            told.append(f"warning: {where}{name} is not a setting; {hint}")
        elif in_file and not elsewhere.of_a_library(name):
            told.append(f"warning: .env: {name} is not a setting (--help lists them) and is not read here")
        elif not in_file and elsewhere.looks_like_a_setting(name, ours):
            unknown.append(name)
    if unknown:
        told.append(
            f"warning: set in the environment, but no setting here and not read: {', '.join(sorted(unknown))} "
            "(--help lists the settings)"
        )
    if idle:
        told.append(f"note: set, but read by no step of this command: {', '.join(sorted(idle))}")
    return told


def _meant(name: str, ours: Collection[str]) -> str:
    """What to say of a name that other projects have, or near one of ours or of the original's; "" of others."""
    upper = name.upper()
    if slip := [one for one in elsewhere.RELIED_ON if _one_slip(upper, one)]:
        return f"did you mean {slip[0]}?"
    if elsewhere.of_a_library(name):
        return ""
    if upper in elsewhere.ELSEWHERE:
        return f"did you mean {elsewhere.ELSEWHERE[upper]}?"
    if upper in elsewhere.NOTHING:
        return f"it is not read: {elsewhere.NOTHING[upper]}"
    near = nearest(name, [*ours, *former.FORMER])
    return f"did you mean {near}?" if near else ""


def _one_slip(one: str, other: str) -> bool:
    """Whether one letter too many, too few, another, or two swapped part two words."""
    if abs(len(one) - len(other)) > 1 or one == other:
        return False
    start = len(os.path.commonprefix([one, other]))
    a, b = one[start:], other[start:]
    return a[1:] == b[1:] or a == b[1:] or a[1:] == b or (a[:2] == b[:2][::-1] and a[2:] == b[2:])


def tell(classes: Iterable[type], env: Mapping[str, str] | None = None) -> list[str]:
    """Print :func:`lines` for a command whose steps have these settings; returns them."""
    env = os.environ if env is None else env
    if env.get("RANK", "0") != "0" or "LEVER_NAMES_CHECKED" in env:
        return []
    told = lines(fields_of(classes), env, config.read_dotenv())
    for line in told:
        print(plain(line), file=sys.stderr)
    return told


def check_file(values: Mapping[str, object], where: str | Path) -> None:
    """Refuse names in a file of settings that are none.

    Raises:
        UsageError: names the file, the name and the nearest setting.
    """
    ours = known()
    for name in values:
        if name not in ours and name not in former.FORMER:
            hint = _meant(str(name), ours) or "--help of the scripts lists them"
            raise UsageError(f"{where}: {str(name)[:60]} is not a setting; {hint}")


def model_variables() -> set[str]:
    """The variables that configurations of LVLMs name: a model's local folder, a server's addresses and its key."""
    files = [file for folder in config.config_dirs("infer_model") for file in sorted(folder.glob("*.yaml"))]
    return set().union(*(_of_model(file, file.stat().st_mtime_ns) for file in files))


@functools.cache
def _of_model(file: Path, stamp: int) -> frozenset[str]:
    """The variables of a model's YAML; none where it is damaged (which is told when it is used)."""
    try:
        model = config.load_yaml(file)
    except DamagedInputError:
        return frozenset()
    server = model.get("server") if isinstance(model.get("server"), dict) else {}
    found = (model.get("path_variable"), server.get("url_variable"), server.get("api_key_variable"))
    return frozenset(str(name) for name in found if name)


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
