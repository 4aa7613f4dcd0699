"""Recipes: what a step's output is made from, derived from what each setting says that it affects; a stage that finds
its output made from the same inputs and settings skips itself. No torch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lever_plus import config, paths, provenance
from lever_plus.cli import log
from lever_plus.provenance import Recipe
from lever_plus.settings import names
from lever_plus.settings.registry import STAGE_SETTINGS
from lever_plus.settings.shared import LvlmSettings, SharedSettings
from open_mmicl.errors import MissingInputError


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


def skip_if_done(output: Path, recipe: Recipe, what: str) -> bool:
    """True where the output is there and is to be used: made from exactly this recipe, or brought by the user.

    A stale output is named with what changed, and made again.
    """
    state = provenance.status(output, recipe)
    if state == "current":
        log.info(f"{what}: done before with the same inputs and settings, using {output}")
        return True
    if state == "foreign":
        log.info(f"{what}: using the file found at {output} (not made by this run; remove it to have it regenerated)")
        return True
    if state == "stale":
        differs = ", ".join(provenance.changed(output, recipe))
        log.info(f"{what}: {output.name} was made from other inputs or settings ({differs}); regenerating it")
    if state == "missing":
        for number, other in paths.brought_sample_nums(output).items():
            log.info(f"{what}: {output.name} is not there, but {other} is: SAMPLE_NUM={number} would use it")
    return False


def dry_run_done(settings: LvlmSettings, output: Path, recipe: Callable[[], Recipe], what: str) -> bool:
    """In a dry run: True, and said, where the output is there and is to be used; else the stage says its price.

    With ASSUME the sizes are another data set's, so what is there does not count. Where an input of the recipe is not
    there yet the stage has work to do.
    """
    if settings.assume or not output.is_file():
        return False
    try:
        return skip_if_done(output, recipe(), what)
    except MissingInputError:
        return False
