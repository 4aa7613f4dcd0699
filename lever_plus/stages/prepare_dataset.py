"""See that the data set's files are there; a data set whose configuration names a generator is made where missing."""

import importlib
import time

from lever_plus import cli, io, paths
from lever_plus.cli import log
from lever_plus.data import catalog
from lever_plus.settings.shared import SharedSettings


def is_done(settings: SharedSettings) -> bool:
    """Whether both splits are there, and the world that is asked for where a generator makes them."""
    data = paths.dataset(settings)
    if data.found() and data.generator:
        importlib.import_module(data.generator).check(data.root, **data.generator_args)
    return data.found()


def run(settings: SharedSettings, dry_run: bool) -> int:
    """Check the files of both splits, or generate them.

    Raises:
        MissingInputError: files are missing and nothing makes them.
        UsageError: what is there was made with other generator_args.
    """
    data = paths.dataset(settings)
    if not data.found() and data.generator:
        if dry_run:
            log.info(f"dry run: would make {data.key} at {data.root}")
            return 0
        with io.locked(data.root, lambda: log.info(f"{data.key}: another process is making it, waiting")):
            if not data.found():
                started = time.monotonic()
                log.info(f"{data.key}: making it at {data.root}")
                importlib.import_module(data.generator).generate(data.root, **data.generator_args)
                log.info(f"{data.key}: made in {time.monotonic() - started:.0f} s")
    for split in catalog.SPLITS:
        data.files(split)
    if data.generator:
        importlib.import_module(data.generator).check(data.root, **data.generator_args)
    log.info(f"data set {data.key}: {data.root}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(SharedSettings, run, __doc__))
