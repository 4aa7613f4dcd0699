"""A stage that finds its output made from the same inputs and settings skips itself."""

from collections.abc import Callable
from pathlib import Path

from lever_plus import paths
from lever_plus import run as provenance
from lever_plus.cli import log
from lever_plus.settings.shared import LvlmSettings
from open_mmicl.errors import MissingInputError


def skip_if_done(output: Path, recipe: provenance.Recipe, what: str) -> bool:
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


def dry_run_done(settings: LvlmSettings, output: Path, recipe: Callable[[], provenance.Recipe], what: str) -> bool:
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
