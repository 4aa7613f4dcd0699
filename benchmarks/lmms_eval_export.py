"""Check an export of scripts/export_lmms_eval.sh against lmms-eval's own task class.

    python benchmarks/lmms_eval_export.py EXPORT SAMPLES

EXPORT: the exported folder. SAMPLES: samples.jsonl of the run. Runs in an environment that has lmms-eval (it needs
nothing of Lever-Plus). Every task is built by lmms-eval from its YAML; then of every question the chat messages must be
the prompt that the run asked (its prompt_hash, from the words and the names of the images that lmms-eval gives), and
the score of the run's own answer must be the run's score.
"""

import hashlib
import json
import sys
from pathlib import Path

from lmms_eval import utils
from lmms_eval.api.task import ConfigurableMessagesTask


def prompt_hash(turns, images, words):
    """The run's hash of a prompt, from chat messages and the names of the images that they show."""
    before, after = words["user_template"].split("<Q>")
    system = [t for t in turns if t["role"] == "system"]
    said = system[0]["content"][0]["text"] if system else ""
    form = hashlib.sha256(json.dumps([said, words["user_template"]]).encode()).hexdigest()[:16]
    users = [t["content"][-1]["text"] for t in turns if t["role"] == "user"]
    questions = [text.removeprefix(before).removesuffix(after) for text in users]
    answers = [t["content"][0]["text"] for t in turns if t["role"] == "assistant"]
    demos = [[*three] for three in zip(images, questions, answers, strict=False)]
    text = json.dumps([form, demos, images[-1], questions[-1]], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(file: Path, rows: list[dict]) -> tuple[int, int, int]:
    """(questions, prompts that differ, scores that differ) of one task."""
    config = utils.load_yaml_config(str(file))
    shots = config["lmms_eval_specific_kwargs"]["default"]["shots"]
    task = ConfigurableMessagesTask(config=config, model_name="default")
    names: list[str] = []
    load = task.config.doc_to_messages.__globals__["load"]
    task.config.doc_to_messages.__globals__["load"] = lambda name: (names.append(Path(name).name), load(name))[1]
    wanted = {str(r["question_id"]): r for r in rows if r["shot"] == shots}
    words = json.loads((file.parent / "prompt.json").read_text(encoding="utf-8"))
    prompts = scores = 0
    for doc in task.test_docs():
        names.clear()
        row = wanted.pop(doc["question_id"])
        turns = task.doc_to_messages(doc)
        prompts += prompt_hash(turns, list(names), words) != row["prompt_hash"]
        shown = [part["url"] for turn in turns for part in turn["content"] if part["type"] == "image"]
        assert len(shown) == len(row["icd_ids"]) + 1 and all(image.mode == "RGB" for image in shown)
        scores += abs(task.process_results(doc, [row["raw_answer"]])["exact_match"] - row["score"]) > 1e-9
    assert not wanted, f"{len(wanted)} questions of the run are not in the task"
    return len(task.test_docs()), prompts, scores


def main() -> int:
    """Print a line for each task; 0 where nothing differs."""
    folder, samples = Path(sys.argv[1]), Path(sys.argv[2])
    bad = 0
    for file in sorted(folder.glob("*.yaml")):
        method = file.stem.rpartition("_")[0]
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        count, prompts, scores = check(file, [r for r in rows if method.endswith(f"_{r['method']}")])
        print(f"{file.stem}: {count} questions, {prompts} prompts differ, {scores} scores differ")
        bad += prompts + scores
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
