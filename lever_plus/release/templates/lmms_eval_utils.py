"""Reads fewshot.jsonl (demonstrations that Lever-Plus picked, by question_id) for the tasks of this folder.

Images are looked for in the folders of LEVER_IMAGES (":" between them), else in those that images.json names. After
the folder was moved: ``python utils.py`` writes its new place into the tasks.
"""

import functools
import json
import os
import re
import sys
from pathlib import Path

from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
CUT_WORDS = ("Question", "Answer", "Short", ", ")


@functools.cache
def picks():
    """{question_id: its demonstrations, best first}."""
    with (HERE / "fewshot.jsonl").open(encoding="utf-8") as handle:
        lines = [json.loads(line) for line in handle]
    return {str(line["question_id"]): line["demonstrations"] for line in lines}


@functools.cache
def prompt():
    """The words of the prompt: ``system``, ``user_template`` with <Q>, ``order``."""
    return json.loads((HERE / "prompt.json").read_text(encoding="utf-8"))


def demonstrations(doc, kwargs):
    """Those of a question in the order of the prompt. ``kwargs``: lmms_eval_specific_kwargs, whose ``shots`` counts."""
    shots = int((kwargs or {}).get("shots", 0))
    best = picks().get(doc["question_id"], [])[:shots]
    return best[::-1] if prompt()["order"] == "best_last" else best


def load(name):
    """An image, upright, transparent pixels white. ``name``: split/file."""
    split, _, file = name.partition("/")
    roots = json.loads((HERE / "images.json").read_text(encoding="utf-8")).get(split, [])
    roots = [root for root in os.environ.get("LEVER_IMAGES", "").split(os.pathsep) if root] or roots
    path = next((path for root in roots if (path := Path(root) / file).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{file} is in none of {', '.join(roots) or 'no folder'}: set LEVER_IMAGES")
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if "A" in image.getbands() or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def doc_to_visual(doc, lmms_eval_specific_kwargs=None):
    """The demonstrations' images, then the question's."""
    return [load(demo["image"]) for demo in demonstrations(doc, lmms_eval_specific_kwargs)] + [load(doc["image"])]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """The prompt for models without chat messages: demonstrations and question, a line each."""
    template = prompt()["user_template"]
    shown = demonstrations(doc, lmms_eval_specific_kwargs)
    lines = [f"{template.replace('<Q>', demo['question'])} {demo['answer']}" for demo in shown]
    return "\n".join([*lines, template.replace("<Q>", doc["question"])])


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    """Chat messages as Lever-Plus asks: a user and an assistant turn for each demonstration, then the question."""

    def turn(role, text, image=None):
        shown = [] if image is None else [{"type": "image", "url": load(image)}]
        return {"role": role, "content": [*shown, {"type": "text", "text": text}]}

    words = prompt()
    turns = [turn("system", words["system"])] if words["system"] else []
    for demo in demonstrations(doc, lmms_eval_specific_kwargs):
        turns.append(turn("user", words["user_template"].replace("<Q>", demo["question"]), demo["image"]))
        turns.append(turn("assistant", demo["answer"]))
    return [*turns, turn("user", words["user_template"].replace("<Q>", doc["question"]), doc["image"])]


def process_results(doc, results):
    """The official VQA accuracy of one answer, as lmms-eval's processor normalises it."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    normalise = EvalAIAnswerProcessor()
    ends = [at for word in CUT_WORDS if (at := results[0].find(word)) >= 0]
    answer = normalise(results[0][: min(ends, default=len(results[0]))].strip())
    truths = [normalise(text) for text in doc["answers"]]
    same = [truth == answer for truth in truths]
    if len(same) != 10:
        return {"exact_match": min(1.0, sum(same) / min(3, len(same)))}
    return {"exact_match": sum(min(1.0, (sum(same) - one) / 3) for one in same) / 10}


def move(folder=HERE):
    """Write this folder into its tasks."""
    line = f"    test: {json.dumps(str(folder / 'questions.jsonl'), ensure_ascii=False)}"
    for file in folder.glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(r"(?m)^    test: .*$", lambda _: line, text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(move())
