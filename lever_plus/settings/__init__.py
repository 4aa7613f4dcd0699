"""One settings dataclass per stage, and how they are loaded."""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from lever_plus import config
from lever_plus.settings.shared import SharedSettings

T = TypeVar("T")


def load(cls: type[T], cli: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> T:
    """Resolve ``cls`` in full: dataclass < data set YAML ``settings`` < .env < environment < command line.

    ``dataset`` comes out as a real key (``auto`` is decided here).

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
    return config.resolve(cls, {**(cli or {}), "DATASET": key}, env, yaml_values, dotenv)


def known_names() -> list[str]:
    """Every environment name that any stage reads."""
    import dataclasses

    from lever_plus.settings.registry import STAGE_SETTINGS

    found = {config.env_name(f.name) for cls in STAGE_SETTINGS.values() for f in dataclasses.fields(cls)}
    return sorted(found | {"CHECKPOINT_PATH", "LEVER_DEBUG"})
