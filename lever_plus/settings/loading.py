"""How the settings of a stage are resolved, once, at its entry."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lever_plus import config, paths
from lever_plus.data import catalog, sizes
from lever_plus.registries import load_plugins
from lever_plus.settings import former, names
from lever_plus.settings.shared import SharedSettings

T = TypeVar("T")


def load(cls: type[T], cli: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> T:
    """Resolve ``cls`` in full: dataclass < data set YAML ``settings`` < .env < environment < command line.

    ``dataset`` comes out as a real key, ``record_lang`` as a language (``auto`` is decided here). Where nobody set
    SAMPLE_NUM it is that of the files which the user brought, if any (:func:`lever_plus.paths.found_sample_num`).

    Raises:
        UsageError: a value is wrong, a name of the data set's YAML is no setting, or a name of the original Lever-Plus
        has no meaning here (:mod:`lever_plus.settings.former`).
    """
    reads = names.fields_of([cls])
    given = (cli or {}, os.environ if env is None else env, config.read_dotenv())
    cli, env, dotenv = (former.translate(layer, reads) for layer in given)
    load_plugins(next((str(layer["LEVER_PLUGINS"]) for layer in (cli, env, dotenv) if layer.get("LEVER_PLUGINS")), ""))
    shared = config.resolve(SharedSettings, cli, env, None, dotenv)
    found = catalog.pick(shared.dataset, paths.folders(shared))
    key = found.key
    cli = {**cli, **_own_folder(found, (cli, env, dotenv))}
    in_file = found.settings
    names.check_file(in_file, f"configs/dataset/{key}.yaml, settings")
    yaml_values = former.translate(in_file, reads)
    resolved = config.resolve(cls, {**cli, "DATASET": key}, env, yaml_values, dotenv)
    usual = "" if cli.get(env.get(names.USUAL)) else env.get(names.USUAL)
    given = {**yaml_values, **dotenv, **env, **cli}
    resolved = fitted(resolved, {name: value for name, value in given.items() if name != usual})
    if resolved.record_lang == "auto":
        resolved = dataclasses.replace(resolved, record_lang=language(env))
    has_anchors = any(field.name == "sample_num" for field in dataclasses.fields(cls))
    if has_anchors and not any(layer.get("SAMPLE_NUM") for layer in (cli, env, dotenv)):
        found = paths.found_sample_num(resolved)
        return resolved if found is None else dataclasses.replace(resolved, sample_num=found)
    return resolved


def _own_folder(dataset: Any, layers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """DATASET_PATH from the variable that the data set's YAML declares, where that is none of the settings."""
    variable = dataset.path_variable
    if not variable or variable.lower() in {field.name for field in dataclasses.fields(SharedSettings)}:
        return {}
    value = next((str(layer[variable]) for layer in layers if str(layer.get(variable, "")) != ""), "")
    if not value:
        return {}
    return {"DATASET_PATH": config.parse_value(_path_field(variable), value)}


def _path_field(variable: str) -> Any:
    """A field that checks and expands what a path variable of a YAML says."""
    made = dataclasses.make_dataclass("Path", [(variable.lower(), "str", config.setting("", ""))])
    return dataclasses.fields(made)[0]


def fitted(settings: T, given: Mapping[str, Any]) -> T:
    """The settings with numbers that nobody gave lowered to what a small data set has.

    Args:
        given: what a layer says, by environment name; those values stay (and are refused where there are too many).
    """
    there = {field.name for field in dataclasses.fields(settings)}
    if there.isdisjoint(sizes.SETTINGS):
        return settings
    room = sizes.room(settings)
    less = {
        name: room[name]
        for name in room
        if name in there and str(given.get(config.env_name(name), "")) == "" and getattr(settings, name) > room[name]
    }
    return dataclasses.replace(settings, **less) if less else settings


def language(env: Mapping[str, Any]) -> str:
    """The language of an environment, zh or en: the first of LC_ALL, LC_MESSAGES and LANG that says one."""
    said = next((str(env[name]) for name in ("LC_ALL", "LC_MESSAGES", "LANG") if env.get(name)), "")
    return "zh" if said.lower().startswith("zh") else "en"


def known_names() -> list[str]:
    """Every environment name that any stage reads."""
    return sorted(names.known() | {"CHECKPOINT_PATH"})
