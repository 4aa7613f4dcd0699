"""Pack a finished run into a release bundle, from which one command reproduces its rows to the digit.

    python -m lever_plus.release.pack RUN [FILE] [--NAME value …] [-n]

RUN: its EXP_NAME, a folder under results/<data set>/icl_inference, or a path. FILE: where the bundle goes, by default
results/<data set>/bundles/<run>.zip.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lever_plus import cli, io, paths
from lever_plus.cli import log
from lever_plus.config import PLACE, SPEED, TOLD, as_dict, env_name
from lever_plus.data.dataset import VqaSplit
from lever_plus.data.methods import decides, fixed_of
from lever_plus.experiments import compare
from lever_plus.experiments.record import Run, load_run
from lever_plus.registries import RIVALS, plugins_of
from lever_plus.release import bundle
from lever_plus.settings import loading, word_lists
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import lvlm
from lever_plus.stages.export_embeddings import clip_path
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError
from open_mmicl.interface.fingerprint import folder_fingerprint
from open_mmicl.lazy import lazy

checkpoints = lazy("lever_plus.selectors.checkpoint")
selectors_module = lazy("lever_plus.selectors")
retrieval = lazy("lever_plus.stages.retrieval")

LEFT_OUT = {"LEVER_PLUGINS", "CHECKPOINT_PHASE"}
"""Settings that say what is read, of which the bundle holds the content or its hash; paths besides."""
_PATH = re.compile(r".*_(PATH|DIR|CKPT|CACHE)")


def kept_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Of a run's settings those that decide what comes out, and none that names a place."""
    fields = dataclasses.fields(InferenceSettings)
    ours = {env_name(field.name) for field in fields if field.metadata["affects"] not in (PLACE, SPEED, TOLD, "record")}
    return {name: value for name, value in values.items() if name in ours - LEFT_OUT and not _PATH.fullmatch(name)}


def settings_of(run: Run) -> InferenceSettings:
    """The settings of a finished run, its places from the environment; EMBEDDING says what ``auto`` meant."""
    values = kept_settings(run.settings)
    if values.get("EMBEDDING") in (None, "auto"):
        whole = {"embeddings", "candidate_embeddings"} & set(run.metrics["run"]["recipe"]["files"])
        values["EMBEDDING"] = "mean" if whole else word_lists.DEFAULT
    values["METHODS"] = " ".join(methods_of(run)[0])
    folder = run.folder.resolve()
    if folder.parent.name == "icl_inference":
        values["RESULT_DIR"] = str(folder.parents[2])
    return loading.load(InferenceSettings, {name: str(value) for name, value in values.items()})


def methods_of(run: Run) -> tuple[list[str], list[str]]:
    """(methods that go into the bundle, those left out) of a run."""
    there = [m for m in str(run.settings.get("METHODS") or "auto").split() if m in run.samples.methods]
    found = there or run.samples.methods
    out = [method for method in found if method == "v2_lora"]  # its CLIP is a model of its own
    return [method for method in found if method not in out], out


def selector_files(run: Run, s: InferenceSettings, methods: Sequence[str]) -> dict[str, Path]:
    """The checkpoint of each selector, seen to be the one that was evaluated.

    Raises:
        MissingInputError: it is gone. DamagedInputError: it has changed since.
    """
    checkpoint = Path((run.metrics.get("checkpoint") or {}).get("path") or "")
    if checkpoint.name and not checkpoint.is_file():
        checkpoint = paths.v3_dir(dataclasses.replace(s, exp_name=run.settings.get("EXP_NAME", ""))) / checkpoint.name
    v2 = Path(run.metrics.get("v2_checkpoint") or "")
    usual = {"v3": checkpoint, "v2": v2 if v2.is_file() else paths.v2_checkpoint(s),
             "v1": paths.v2_checkpoint(s, "v1"), "label": paths.label_checkpoint(s)}  # fmt: skip
    hashes, found = run.metrics["run"]["recipe"]["files"], {}
    asked = [*methods, *(fixed_of(method) for method in methods if decides(method))]
    for method in dict.fromkeys(m for m in asked if m in usual):
        path = usual[method]
        if not path.is_file():
            raise MissingInputError(f"the {method} selector of {run.folder.name} is not there any more: {path}")
        if io.sha256_file(path) != hashes.get(method):
            raise DamagedInputError(
                f"{path} is not what {run.folder.name} evaluated (changed since); run the inference again"
            )
        found[method] = path
    return found


def needs(s: InferenceSettings, run: Run) -> dict[str, Any]:
    """What the bundle does not hold and a machine must have: hashes of data and models.

    Raises:
        DamagedInputError: the data set is not the one that was evaluated.
    """
    here = lvlm.prompt_inputs(s, ("train", "val"))
    then = run.metrics["run"]["recipe"]["values"]
    for name in ("dataset", "model", "prompt_format"):
        before, now = then.get(name), here[name]
        if isinstance(before, dict):
            now = {key: now.get(key) for key in before}
        if before != now:
            raise DamagedInputError(f"the {name} here is not that of {run.folder.name}; run the inference again")
    clip = Path(clip_path(s))
    return {
        **{name: here[name] for name in ("dataset", "model", "prompt_format")}, "lvlm": run.metrics["lvlm"]["name"],
        "clip": {"name": clip.name if clip.is_absolute() else clip_path(s), "files": clip_fingerprint(s)},
        "plugins": plugins_of(as_dict(s)),
    }  # fmt: skip


def clip_fingerprint(s: InferenceSettings) -> str:
    """Hash of CLIP's folder; "" where it is fetched by name."""
    folder = Path(clip_path(s))
    return folder_fingerprint(folder) if folder.is_dir() else ""


def contents(s: InferenceSettings, run: Run, methods: Sequence[str]) -> dict[str, bytes]:
    """Anchors, pools, picks and hashes of the images, by file name; items by question_id.

    Raises:
        DamagedInputError: the pools here are not those that the run's selectors picked from.
    """
    asked = retrieval.evaluated(s)
    train, queries, rows, pools = asked
    by_question = {queries.question_id(int(row)): set(pool.tolist()) for row, pool in zip(rows, pools, strict=True)}
    samples = [row for row in run.samples.rows if row["method"] in methods]
    for row in samples:
        outside = row["method"] not in RIVALS and not by_question.get(row["question_id"], set()) >= set(row["icd_ids"])
        if outside or row["question_id"] not in by_question:
            raise DamagedInputError(
                f"{run.folder.name}: the pools here are not those of the run (question {row['question_id']}, "
                f"{row['method']}); data set, sampler or embeddings have changed since"
            )
    pool_lines = (
        {"question_id": queries.question_id(int(row)), "pool": [train.question_id(int(i)) for i in pool]}
        for row, pool in zip(rows, pools, strict=True)
    )
    pick_lines = (
        {"question_id": r["question_id"], "method": r["method"], "shot": r["shot"], "seed": r["seed"],
         "picks": [train.question_id(i) for i in r["icd_ids"]], "prompt_hash": r["prompt_hash"],
         "raw_answer": r["raw_answer"], "score": r["score"]}
        for r in samples
    )  # fmt: skip
    images = {f"{asked.split}/{queries.image_name(int(row))}": queries.image_path(int(row)) for row in rows}
    images |= {f"train/{train.image_name(i)}": train.image_path(i) for i in {i for r in samples for i in r["icd_ids"]}}
    return {
        bundle.ANCHORS: _json(anchors(s, train)),
        bundle.POOLS: json_lines(pool_lines),
        bundle.PICKS: json_lines(pick_lines),
        bundle.IMAGES: _json({name: io.sha256_file(Path(path))[:16] for name, path in sorted(images.items())}),
    }


def anchors(s: InferenceSettings, train: VqaSplit) -> dict[str, list[Any]]:
    """question_ids of the beam search's anchors and of the RL queries, in the order of their files, where those are."""
    found = {}
    for name, path in (("beam_data", paths.beam_data(s)), ("rl_data", paths.rl_data(s))):
        if path.is_file():
            keys = [int(key) for key in io.read_object(path, name) if key.isdecimal()]
            found[name] = [train.question_id(row) for row in keys if row < len(train)]
    return found


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=0, allow_nan=False) + "\n").encode()


def json_lines(values: Iterable[dict[str, Any]]) -> bytes:
    """Objects as the bytes of a .jsonl file."""
    return "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values).encode()


def records(run: Run, s: InferenceSettings) -> dict[str, bytes]:
    """The run's record without folders of this machine; {} where there is none."""
    folder = paths.experiment_dir(s, run.settings.get("EXP_NAME") or run.folder.name)
    found = {}
    for name in bundle.RECORDS:
        if (folder / name).is_file():
            text = io.read_text(folder / name, "record")
            value = bundle.parse(text, str(folder / name)) if name.endswith(".json") else text
            clean = bundle.without_paths(value)
            found[name] = _json(clean) if name.endswith(".json") else clean.encode()
    return found


def pack(run: Run, out: Path | None = None, dry_run: bool = False) -> Path:
    """Write the bundle of a run; returns where it is.

    Raises:
        MissingInputError, DamagedInputError: what the run was made of has gone or changed.
    """
    if not isinstance(run.metrics.get("run", {}).get("recipe", {}).get("files"), dict):
        raise DamagedInputError(f"{run.folder}: metrics.json does not say what the run was made from; run it again")
    s = settings_of(run)
    methods, left_out = methods_of(run)
    if left_out:
        log.info(f"left out: {', '.join(left_out)} (a CLIP of its own)")
    selectors, required = selector_files(run, s, methods), needs(s, run)
    out = out or paths.dataset_dir(s) / "bundles" / f"{run.folder.name}.zip"
    if dry_run:
        log.info(f"dry run: would write {out} ({', '.join(methods)}; selectors {', '.join(selectors) or 'none'})")
        return out
    files = contents(s, run, methods) | records(run, s)
    for method, path in selectors.items():
        files[f"selectors/{method}.safetensors"] = checkpoints.as_safetensors(path, selectors_module.PointerSelector)
    checkpoint = run.metrics.get("checkpoint") or {}
    head = {
        "dataset": run.metrics["dataset"], "split": run.metrics["split"], "n_queries": run.metrics["n_queries"],
        "methods": methods, "settings": kept_settings(as_dict(s)), "needs": required,
        "checkpoint": {name: checkpoint.get(name) for name in ("phase", "epoch", "why")} if checkpoint else None,
        "accuracy": {m: run.metrics["accuracy"][m] for m in methods},
        "ci95": {m: run.metrics["ci95"][m] for m in methods},
        "made_by": {name: run.metrics["run"].get(name) for name in ("git", "git_dirty", "versions", "python")},
    }  # fmt: skip
    name = bundle.write(out, bundle.without_paths(head), files)
    size = out.stat().st_size
    log.info(
        f"bundle: {out} ({size / 1e6:.1f} MB, digest {name[:12]}); reproduce it with: bash scripts/reproduce.sh {out}"
    )
    return out


def named(words: Sequence[str], s: InferenceSettings, usage: str) -> tuple[Run, str, Path | None]:
    """(the run that a command's words name, the method after its colon, the output named) of ``RUN[:METHOD] [OUTPUT]``.

    Raises:
        UsageError: other words; tells which runs there are. MissingInputError, DamagedInputError: of the run's files.
    """
    if not 1 <= len(words) <= 2:
        raise UsageError(f"which run? {usage}; there are: {compare.there(s)}")
    folder, method = compare.find(words[0], s)
    return load_run(folder, paths.v3_dir(s)), method, Path(words[1]) if len(words) > 1 else None


def command(words: list[str], s: InferenceSettings, dry_run: bool) -> int:
    """``bundle RUN [FILE]``. Raises: as :func:`pack`."""
    run, method, out = named(words, s, "bundle RUN [FILE]")
    if method:
        raise UsageError(f"{words[0]}: a bundle holds all methods of a run; name the run alone")
    pack(run, out, dry_run)
    return 0


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    return cli.command_main(InferenceSettings, command, __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
