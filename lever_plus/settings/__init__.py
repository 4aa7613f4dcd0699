"""One settings dataclass per stage, and how they are loaded."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from lever_plus import config
from lever_plus.settings.shared import SharedSettings

T = TypeVar("T")


def load(cls: type[T], cli: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> T:
    """Resolve ``cls`` in full: dataclass < data set YAML ``settings`` < .env < environment < command line.

    ``dataset`` comes out as a real key (``auto`` is decided here). Where nobody set SAMPLE_NUM it is that of the
    files which the user brought, if any (:func:`lever_plus.paths.found_sample_num`).

    Raises:
        UsageError: a value is wrong or a name unknown.
    """
    from lever_plus.data import catalog

    env = os.environ if env is None else env
    dotenv = config.read_dotenv()
    if env.get("RANK", "0") == "0" and "LEVER_NAMES_CHECKED" not in env:
        config.warn_misspelt(known_names(), env)
    shared = config.resolve(SharedSettings, {k: v for k, v in (cli or {}).items()}, env, None, dotenv)
    key = catalog.pick(shared)
    yaml_values = catalog.load(key, shared).settings
    resolved = config.resolve(cls, {**(cli or {}), "DATASET": key}, env, yaml_values, dotenv)
    has_anchors = any(field.name == "sample_num" for field in dataclasses.fields(cls))
    if has_anchors and not any(layer.get("SAMPLE_NUM") for layer in (cli or {}, env, dotenv)):
        from lever_plus import paths

        found = paths.found_sample_num(resolved)
        return resolved if found is None else dataclasses.replace(resolved, sample_num=found)
    return resolved


def known_names() -> list[str]:
    """Every environment name that any stage reads."""
    from lever_plus.settings.registry import STAGE_SETTINGS

    found = {config.env_name(f.name) for cls in STAGE_SETTINGS.values() for f in dataclasses.fields(cls)}
    return sorted(found | {"CHECKPOINT_PATH", "LEVER_DEBUG"})
