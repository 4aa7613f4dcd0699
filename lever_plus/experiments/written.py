"""The files of a record: record.md, record.json, report.html, tables."""

from pathlib import Path

from lever_plus.experiments import export, record, report
from lever_plus.settings.inference import InferenceSettings


def write_record(settings: InferenceSettings, inference_dir: Path, v3_dir: Path, out_dir: Path) -> str:
    """Write the record of one inference run: record.md, record.json, report.html and the CSV files.

    Args:
        settings: the inference's settings. inference_dir: holds metrics.json and samples.jsonl.
        v3_dir: holds train_log.jsonl, best.json, run.json of the checkpoint that was evaluated.

    Returns: the table to print. Raises: MissingInputError, DamagedInputError.
    """
    out_dir, run = Path(out_dir), record.load_run(Path(inference_dir), Path(v3_dir))
    made = record.build_priced(settings, [run], out_dir.name)
    shown = {out_dir.name: (made, [run])}
    export.write_tables(out_dir, shown)
    report.write(out_dir / "report.html", shown, settings.record_lang)
    return record.write(made, out_dir, settings.record_lang)
