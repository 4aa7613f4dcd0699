"""The experiment record: record.md and record.json in the plan's template, from a finished inference run."""

import functools
import time
from pathlib import Path

from lever_plus import cli, io, paths, provenance
from lever_plus.cli import log
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import recipes
from lever_plus.stages.inference import output_dir
from open_mmicl.lazy import lazy

report = lazy("lever_plus.experiments.report")

RUN_FILES = ("metrics.json", "samples.jsonl", "choice_samples.jsonl")
TRAINING_FILES = ("train_log.jsonl", "best.json", "run.json")


def folder(settings: InferenceSettings) -> Path:
    """Where the record lies."""
    return paths.experiment_dir(settings, settings.exp_name or output_dir(settings).name)


def recipe(settings: InferenceSettings) -> provenance.Recipe:
    """What the record is made from: the run's files, those that its price is read from, and what writes it."""
    run, training = output_dir(settings), paths.v3_dir(settings)
    files = {name: run / name for name in RUN_FILES} | {name: training / name for name in TRAINING_FILES}
    priced = (paths.beam_data(settings), paths.rl_data(settings), files["metrics.json"])
    files |= {f"price of {output.name}": provenance.sidecar(output) for output in priced}
    made_from = recipes.recipe(settings, ("record",), files, {"written by": _writer()})
    made_from.values["lang"] = made_from.values.pop("record_lang")  # as stamps have named it
    return made_from


@functools.cache
def _writer() -> str:
    """Hash of the code and templates that make records."""
    root = Path(__file__).resolve().parent.parent / "experiments"
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return io.sha256_json({str(path.relative_to(root)): io.sha256_file(path) for path in files})


def is_done(settings: InferenceSettings) -> bool:
    """Whether the record is there and made from exactly this. No torch."""
    out = folder(settings)
    there = (out / "record.md").is_file() and (out / "report.html").is_file()
    return there and provenance.status(out / "record.json", recipe(settings)) == "current"


def tell(settings: InferenceSettings) -> None:
    """Print the table of the record that is there, and where it lies."""
    out = folder(settings)
    table = provenance.read_stamp(out / "record.json").get("table", "")
    print(cli.on_screen(_told(table, out)))


def run(settings: InferenceSettings, dry_run: bool) -> int:
    """Write the record and print its table."""
    out = folder(settings)
    if dry_run:
        log.info(f"dry run: would write {out / 'record.md'}")
        return 0

    made_from, started = recipe(settings), time.monotonic()
    with provenance.writing(out / "record.json"):
        table = report.write_record(settings, output_dir(settings), paths.v3_dir(settings), out)
        provenance.stamp(out / "record.json", made_from, time.monotonic() - started, {"table": table})
    log.info(_told(table, out))
    return 0


def _told(table: str, out: Path) -> str:
    return f"{table}\n\nrecord: {out / 'record.md'}\nreport: {out / 'report.html'}"


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(InferenceSettings, run, __doc__))
