"""Export the demonstrations that a run picked as a few-shot task for lmms-eval.

    python -m lever_plus.release.lmms_eval RUN[:METHOD] [FOLDER] [--NAME value …] [-n]

RUN: as for the bundle; METHOD: whose picks, v3 where the run has it, else its first. Writes FOLDER (by default
results/<data set>/lmms_eval/<run>_<method>): a task per number of demonstrations, questions.jsonl, fewshot.jsonl keyed
by question_id, prompt.json and utils.py, which reads them.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lever_plus import cli, io, paths
from lever_plus.cli import log
from lever_plus.data.dataset import VqaSplit, load_split
from lever_plus.experiments.record import Run
from lever_plus.experiments.samples import ANY_LENGTH
from lever_plus.release.pack import json_lines, named, needs, settings_of
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import lvlm
from open_mmicl.errors import UsageError

UTILS = Path(__file__).parent / "templates" / "lmms_eval_utils.py"


def method_of(run: Run, asked: str) -> str:
    """The method whose picks are exported.

    Raises:
        UsageError: the run has none of that name, or none with demonstrations that are fixed for each question.
    """
    fit = [
        m
        for m in run.samples.methods
        if m not in ANY_LENGTH and run.samples.seeds(m, run.samples.shots(m)[0]) == [None]
    ]
    method = asked or ("v3" if "v3" in fit else next(iter(fit), ""))
    if method not in fit:
        raise UsageError(f"{run.folder.name} has no method {method!r} to export; it has: {', '.join(fit) or 'none'}")
    return method


def image_name(split: VqaSplit, name: str, row: int, folders: Sequence[Path]) -> str:
    """``<split>/<file below an image folder>`` of an item."""
    path = Path(split.image_path(row))
    below = next((path.relative_to(folder) for folder in folders if path.is_relative_to(folder)), path)
    return f"{name}/{below.as_posix()}"


def export(run: Run, method: str, out: Path, s: InferenceSettings) -> list[str]:
    """Write the folder; returns the tasks' names.

    Raises:
        DamagedInputError: data set or model are not those of the run. UsageError: the folder has tasks of other picks.
    """
    shots = run.samples.shots(method)
    start = f"lever_plus_{paths.dataset_name(s)}_{method}"
    tasks = {f"{start}_{shot}shot": shot for shot in shots}
    others = sorted(path.stem for path in out.glob("lever_plus_*.yaml") if path.stem not in tasks)
    if others:  # they would read these picks
        raise UsageError(f"{out} holds the task {others[0]} of another export; name another folder, or remove this one")
    needs(s, run)
    data, train = paths.dataset(s), load_split(paths.dataset(s), "train")
    name = "train" if s.eval_split == "train_val" else "val"
    queries = train if name == "train" else load_split(paths.dataset(s), "val")
    longest = run.samples.cells[method, shots[-1], None]

    def demo(row: int) -> dict[str, Any]:
        image = image_name(train, "train", row, data.image_dirs["train"])
        words = {"question": train.question(row), "answer": train.answer(row)}
        return {"question_id": train.question_id(row), "image": image, **words}

    rows = {queries.question_id(row): row for row in range(len(queries))}
    words = lvlm.model_config(s).prompt_format
    docs = [
        {"question_id": str(r["question_id"]), "question": r["question"], "answers": r["answers"],
         "image": image_name(queries, name, rows[r["question_id"]], data.image_dirs[name])}
        for r in longest
    ]  # fmt: skip
    picked = [{"question_id": r["question_id"], "demonstrations": [demo(i) for i in r["icd_ids"]]} for r in longest]
    io.write_text(out / "questions.jsonl", json_lines(docs).decode())
    io.write_text(out / "fewshot.jsonl", json_lines(picked).decode())
    io.write_json(out / "images.json", {k: [str(f.resolve()) for f in v] for k, v in data.image_dirs.items()}, indent=1)
    said = {"system": words.system, "user_template": words.user_template, "order": s.prompt_order}
    io.write_json(out / "prompt.json", said, indent=1)
    shutil.copyfile(UTILS, out / "utils.py")
    for task, shot in tasks.items():
        io.write_text(out / f"{task}.yaml", task_yaml(task, shot, out, s.max_new_tokens, s.num_beams))
    return list(tasks)


def task_yaml(task: str, shots: int, folder: Path, max_new_tokens: int, num_beams: int) -> str:
    """A task file; its functions are in utils.py beside it."""
    head = {
        "task": task, "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / "questions.jsonl").resolve())}},
        "test_split": "test", "output_type": "generate_until", "doc_to_target": "{{answers[0]}}",
    }  # fmt: skip
    rest = {
        "generation_kwargs": {
            "until": ["\n"], "max_new_tokens": max_new_tokens, "num_beams": num_beams, "temperature": 0,
            "do_sample": False,
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "lmms_eval_specific_kwargs": {"default": {"shots": shots}},
        "metadata": [{"version": 1.0}],
    }  # fmt: skip
    names = ("doc_to_visual", "doc_to_text", "doc_to_messages", "process_results")
    functions = "".join(f"{name}: !function utils.{name}\n" for name in names)
    whole = {"sort_keys": False, "allow_unicode": True, "width": 4096}
    return yaml.safe_dump(head, **whole) + functions + yaml.safe_dump(rest, **whole)


def command(words: list[str], s: InferenceSettings, dry_run: bool) -> int:
    """``export_lmms_eval RUN[:METHOD] [FOLDER]``. Raises: as :func:`export` and :func:`method_of`."""
    run, asked, out = named(words, s, "RUN[:METHOD] [FOLDER]")
    method, own = method_of(run, asked), settings_of(run)
    out = out or paths.dataset_dir(own) / "lmms_eval" / f"{run.folder.name}_{method}"
    if dry_run:
        log.info(f"dry run: would write {method}'s picks to {out}")
        return 0
    tasks = export(run, method, out, own)
    log.info(f"{len(tasks)} tasks in {out}; run one with: "
             f"python -m lmms_eval --include_path {out} --tasks {tasks[-1]} --model qwen2_5_vl")  # fmt: skip
    return 0


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    return cli.command_main(InferenceSettings, command, __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
