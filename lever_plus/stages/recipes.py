"""Recipes: what a step's output is made from, derived from what each setting says that it affects. No torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lever_plus import config
from lever_plus.run import Recipe
from lever_plus.settings import names
from lever_plus.settings.registry import STAGE_SETTINGS
from lever_plus.settings.shared import SharedSettings


def recipe(
    settings: SharedSettings,
    steps: tuple[str, ...],
    files: Mapping[str, Path],
    inputs: Mapping[str, Any],
    capitals: bool = False,
) -> Recipe:
    """The recipe of a step's output.

    Args:
        steps: the step and the parts of it that are at work (``v2``, ``v2.beams``), as ``affects`` of the settings
            names them.
        files: the input files by role.
        inputs: what decides the result and is no setting of its own (hashes of data and models, …).
        capitals: the settings are named in capitals, as stamps of trained selectors have them.
    """
    chosen = {config.env_name(n) if capitals else n: v for n, v in config.deciding(settings, *steps).items()}
    return Recipe(dict(files), {**inputs, **chosen}, frozenset(names.known()), before())


def before() -> dict[str, Any]:
    """{NAME: value} of the settings that outputs may be older than."""
    fields = [field for cls in STAGE_SETTINGS.values() for field in dataclasses.fields(cls)]
    given = [field for field in fields if field.metadata["before"] is not None]
    return {config.env_name(field.name): field.metadata["before"] for field in given}
