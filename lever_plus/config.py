"""Settings: one dataclass per stage, filled from dataclass < YAML < .env < environment < command line.

A field made by :func:`setting` carries its help, unit and range; its environment name is the field's
name in capitals, its option the name with dashes. Nothing here imports torch, so ``--help`` and the
check of what is already done are immediate.
"""

import dataclasses
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lever_plus import dotenv
from open_mmicl.errors import DamagedInputError, UsageError, expand, plain
from open_mmicl.interface.config import read_yaml
from open_mmicl.registry import Registry

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REPO_ROOT = Path(__file__).resolve().parent.parent
CONFIG_DIR = REPO_ROOT / "configs"
HOME = REPO_ROOT
"""Where .env, the data and the results of relative paths are: the copy of the repository, or where one works."""
if not (REPO_ROOT / "pyproject.toml").is_file():  # installed as a package, which then holds the configurations
    CONFIG_DIR, HOME = Path(__file__).resolve().parent / "configs", Path.cwd()
T = TypeVar("T")

_ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WIDTH = re.compile(r"([<>]?0?[0-9]{1,2}[ds]?)?")
_PATHS = re.compile(r".*_(path|dir|ckpt|cache)")
LARGEST_SEED = 2**32 - 1  # numpy's generators take no larger one
LARGEST = 10**9  # of a number whose setting names no bound of its own
LONGEST_NUMBER = 40  # characters
LONGEST_TEXT = 4096  # bytes; no system takes a longer path
DEEPEST_PATH = 200  # folders within folders
LONGEST_NAME = 100  # bytes; a file system takes 255, and result files add to a name
INPUT, PLACE, SPEED, TOLD, PLAN = "input", "place", "speed", "told", "plan"
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def setting(
    default: Any,
    help: str,  # noqa: A002 - the word argparse uses
    *,
    unit: str = "",
    lo: float | None = None,
    hi: float | None = None,
    choices: Sequence[str] = (),
    open_lo: bool = False,
    not_zero: bool = False,
    is_name: bool = False,
    affects: str = "",
    before: Any = None,
    often: bool = False,
) -> Any:
    """A dataclass field with its documentation and range.

    ``lo``/``hi`` are inclusive bounds (a number without them is bounded by ``LARGEST``); ``open_lo`` excludes ``lo``
    itself, ``not_zero`` 0 (where -1 is all). ``choices`` are the allowed words of a text setting, or the registry that
    has them, or the words besides 0 and 1 of a switch (``bool | str``); ``is_name``: it becomes a file's name or part
    of one; ``often``: ``--help`` shows it first.

    ``affects`` says what a change of it makes stale. By default the output of every step whose settings class has it;
    else the names of those steps or parts of steps (:func:`deciding`), or one of ``INPUT`` (it says what is read: the
    content of what is read counts, not these words), ``PLACE`` (where files go or what is kept), ``SPEED``, ``TOLD``
    (what is shown) and ``PLAN`` (which steps are run). ``before``: for a setting that outputs are older than, the value
    with which those were made; outputs with that value are then the same as those without the setting.
    """
    kept = choices if isinstance(choices, Registry) else tuple(choices)
    meta = {"help": help, "unit": unit, "lo": lo, "hi": hi, "choices": kept, "open_lo": open_lo, "not_zero": not_zero}
    meta |= {"is_name": is_name, "affects": affects, "before": before, "often": often}
    return dataclasses.field(default=default, metadata=meta)


def is_assignment(word: str) -> bool:
    """Whether a word of a command line has the form NAME=value of a setting."""
    return bool(_ASSIGNMENT.match(word))


def env_name(field_name: str) -> str:
    """``rce_epochs`` -> ``RCE_EPOCHS``."""
    return field_name.upper()


def allowed(field: dataclasses.Field) -> str:
    """The allowed values of a field in words, e.g. ``whole number >= 0``."""
    meta = field.metadata
    if meta["choices"]:
        words = [word or '""' for word in meta["choices"]]
        return " | ".join([*words, "0", "1"] if _kind(field) == "bool" else words)
    words = {"int": "whole number", "float": "number", "bool": "0 or 1", "str": "text"}[_kind(field)]
    if meta["is_name"]:
        return f"a file name of at most {LONGEST_NAME} bytes, without / or \\, not beginning with a dot"
    if meta["lo"] is not None:
        words += f" {'>' if meta['open_lo'] else '>='} {meta['lo']}"
    if meta["hi"] is not None:
        words += f"{' and' if meta['lo'] is not None else ''} <= {meta['hi']}"
    return words + (", not 0" if meta["not_zero"] else "")


def explained(field: dataclasses.Field) -> str:
    """A setting's help, with what each choice of its registry means."""
    choices, text = field.metadata["choices"], field.metadata["help"]
    return f"{text}. {choices.help_text()}" if isinstance(choices, Registry) else text


def is_name(text: str) -> bool:
    """Whether a text can be a file's name or part of one: it stays in its folder, prints, and is not too long."""
    return (
        text.isprintable()
        and not set(text) & set("/\\")
        and not text.startswith((".", " "))
        and 0 < len(text.encode("utf-8", "surrogateescape")) <= LONGEST_NAME
    )


def check_name(text: str, what: str) -> str:
    """The text, where it can be part of a file's name.

    Raises:
        UsageError: it would leave its folder, does not print or is too long; ``what`` says which name it is.
    """
    if not is_name(text):
        raise UsageError(
            f"{what} {plain(repr(text), 80)} cannot be part of a file name: at most {LONGEST_NAME} bytes, without / "
            "or \\, not beginning with a dot"
        )
    return text


def parse_value(field: dataclasses.Field, value: Any) -> Any:
    """Parse and check one value (text from the environment, or a YAML value).

    Raises:
        UsageError: it does not parse or is out of range; one line with variable, value, what is allowed.
    """
    name, meta, kind = env_name(field.name), field.metadata, _kind(field)
    limits = allowed(field) + (f" ({meta['unit']})" if meta["unit"] else "")

    def refused(why: str = "") -> UsageError:
        origin = getattr(value, "origin", "")  # the original Lever-Plus's name, where the user set that one
        said = f"{name}={plain(value, 80)}" + (f" (from {plain(origin, 80)})" if origin else "")
        return UsageError(f"{said} is not allowed: {why or limits}")

    text = str(value).strip()
    if kind == "str":
        _check_text(text, refused)
        if (meta["choices"] and text not in meta["choices"]) or (meta["is_name"] and text and not is_name(text)):
            raise refused()
        return str(expand(text, name)) if text.startswith("~") and _PATHS.fullmatch(field.name) else text
    if kind == "bool":
        if text.lower() in meta["choices"]:
            return text.lower()
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
        raise refused()
    if not (_WHOLE if kind == "int" else _NUMBER).fullmatch(text) or len(text) > LONGEST_NUMBER:
        raise refused()
    number = int(text) if kind == "int" else float(text)
    low = -LARGEST if meta["lo"] is None else meta["lo"]
    high = LARGEST if meta["hi"] is None else meta["hi"]
    if number < low or number > high or (meta["open_lo"] and number == low) or (meta["not_zero"] and number == 0):
        raise refused("" if meta["hi"] is not None else f"{limits}, at most {LARGEST}")
    return number


def _check_text(text: str, refused: Callable[[str], UsageError]) -> None:
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise refused("text without line breaks and other control characters")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise refused("text in UTF-8") from error
    if size > LONGEST_TEXT:
        raise refused(f"text of at most {LONGEST_TEXT} bytes")
    if text.count("/") > DEEPEST_PATH:
        raise refused(f"a path of at most {DEEPEST_PATH} folders")


def resolve(
    cls: type[T],
    cli: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    yaml_values: Mapping[str, Any] | None = None,
    dotenv: Mapping[str, str] | None = None,
) -> T:
    """Build ``cls`` from its defaults and the four layers above them.

    Keys of every layer are environment names (``RCE_EPOCHS``). An empty text counts as not set.
    ``env``/``dotenv`` default to the process environment and the ``.env`` file in :data:`HOME`.

    Raises:
        UsageError: a value does not parse or is out of range.
    """
    env = os.environ if env is None else env
    dotenv = read_dotenv() if dotenv is None else dotenv
    values = {}
    for field in dataclasses.fields(cls):
        name = env_name(field.name)
        for layer in (cli or {}, env, dotenv, yaml_values or {}):
            if name in layer and str(layer[name]) != "":
                values[field.name] = parse_value(field, layer[name])
                break
    return cls(**values)


def read_dotenv(path: Path | None = None) -> dict[str, str]:
    """What a ``.env`` file sets (lever_plus/dotenv.py reads it, for the scripts as well); {} where there is none.

    Raises:
        DamagedInputError: it cannot be read, or a line is neither a comment nor an assignment.
    """
    path = HOME / ".env" if path is None else path
    if not os.path.lexists(path):
        return {}
    try:
        return dotenv.read(path)
    except dotenv.DotenvError as error:
        raise DamagedInputError(str(error)) from error


def export_dotenv() -> None:
    """Put what ``.env`` says into the environment where it is not set there, as scripts/common.sh does.

    Paths of models, HF_HOME, CUDA_VISIBLE_DEVICES and the like are no settings of ours: libraries read them.
    """
    for name, value in read_dotenv().items():
        os.environ.setdefault(name, value)


def fill_in(pattern: str, **values: Any) -> str:
    """A YAML file's pattern with its ``{name}`` replaced, a width as in ``{image_id:012d}`` allowed.

    Nothing else that ``str.format`` can do: attributes of a value, or a width that fills the memory.

    Raises:
        KeyError: a name that is none of ``values``. ValueError: anything else in braces.
    """
    made = []
    for text, name, spec, conversion in string.Formatter().parse(pattern):
        made.append(text)
        if name is None:
            continue
        if conversion is not None or not _WIDTH.fullmatch(spec or ""):
            raise ValueError(f"{pattern[:80]!r}: only a width may follow the name in braces")
        made.append(format(values[name], spec or ""))
    return "".join(made)


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        UsageError: no such file; names those there are. DamagedInputError: not a YAML mapping.
    """
    if not path.is_file():
        folders = {path.parent, *config_dirs(path.parent.name)}
        there = ", ".join(sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})) or "none"
        raise UsageError(f"unknown {path.parent.name} {path.stem!r}; there are: {there}")
    return read_yaml(path)


def config_dirs(kind: str) -> list[Path]:
    """The folders that hold YAML files of a kind (``dataset``, ``infer_model``): the project's, and ``configs/<kind>``
    of the folder that one works in.
    """
    return list(dict.fromkeys((CONFIG_DIR / kind, Path.cwd() / "configs" / kind)))


def config_file(kind: str, name: str) -> Path:
    """The YAML file of this name, in the first of :func:`config_dirs` that has it; where none has, in the first."""
    files = [folder / f"{name}.yaml" for folder in config_dirs(kind)]
    return next((file for file in files if file.is_file()), files[0])


def as_dict(settings: "DataclassInstance") -> dict[str, Any]:
    """``{RCE_EPOCHS: 10, …}`` of a settings object, for records, checkpoints and fingerprints."""
    return {env_name(f.name): getattr(settings, f.name) for f in dataclasses.fields(settings)}


def deciding(settings: "DataclassInstance", *steps: str, declared: bool = False) -> dict[str, Any]:
    """{name: value} of the settings that decide the result of some steps or parts of steps, as each says of itself.

    ``declared``: only of those that name one of the steps, not of those that affect every step.
    """
    found = {}
    for field in dataclasses.fields(settings):
        words, value = field.metadata["affects"].split(), getattr(settings, field.name)
        counts = not set(words).isdisjoint(steps) if words else not declared
        if counts and (field.metadata["before"] is None or value != field.metadata["before"]):
            found[field.name] = value
    return found


def _kind(field: dataclasses.Field) -> str:
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    if kind == "bool | str":  # a switch with further words: its choices
        return "bool"
    if kind not in ("int", "float", "bool", "str"):
        raise TypeError(f"setting {field.name}: type {kind} is not supported")
    return kind
