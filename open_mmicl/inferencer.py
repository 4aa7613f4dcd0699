"""In-context inference: prompts are answered by the engine, cut, and scored with the official VQA accuracy."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_mmicl.interface.prompts import Prompt
from open_mmicl.metrics.vqa import cut_answer, normalize_answer, vqa_accuracy


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answered prompt: the model's own words, the cut answer (official result file), its normalised
    form, and the official accuracy in [0, 1].
    """

    raw_answer: str
    cut_answer: str
    answer: str
    score: float
    prompt_hash: str


def answer_and_score(
    engine: Any,
    prompts: Sequence[Prompt],
    annotations: Sequence[Sequence[str]],
    generation: Any,
    format_fingerprint: str,
) -> list[Outcome]:
    """Answer every prompt and score it against its annotators' answers.

    Args:
        engine: an :class:`open_mmicl.engine.Engine`. annotations: the annotators' answers of each prompt.
        format_fingerprint: the prompt format's, part of the prompt hash.
    """
    raw = engine.generate(prompts, generation)
    outcomes = []
    for prompt, text, answers in zip(prompts, raw, annotations, strict=True):
        cut = cut_answer(text)
        outcomes.append(
            Outcome(
                text, cut, normalize_answer(cut), vqa_accuracy(cut, answers), prompt_hash(prompt, format_fingerprint)
            )
        )
    return outcomes


def prompt_hash(prompt: Prompt, format_fingerprint: str) -> str:
    """Identifies a prompt across runs and machines: words, file names of the images, order, format."""
    demos = [[Path(d.image).name, d.question, d.answer] for d in prompt.demos]
    text = json.dumps([format_fingerprint, demos, Path(prompt.image).name, prompt.question], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def majority_vote(answers: Sequence[str]) -> str:
    """The most frequent of the demonstrations' answers (normalised), the first picked on a tie."""
    words = [normalize_answer(a) for a in answers]
    return max(dict.fromkeys(words), key=words.count)
