"""The experiment record: record.md and record.json in the plan's template, from a finished inference run."""

from lever_plus import cli, paths
from lever_plus.cli import log
from lever_plus.settings.inference import InferenceSettings


def run(settings: InferenceSettings, dry_run: bool) -> int:
    """Write the record and print its table."""
    from lever_plus.stages.inference import output_dir

    experiment = settings.exp_name or output_dir(settings).name
    out = paths.experiment_dir(settings, experiment)
    if dry_run:
        log.info(f"dry run: would write {out / 'record.md'}")
        return 0
    from lever_plus.experiments.record import write_record

    log.info(write_record(settings, output_dir(settings), paths.v3_dir(settings), out))
    log.info(f"\nrecord: {out / 'record.md'}\nreport: {out / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(InferenceSettings, run, __doc__))
