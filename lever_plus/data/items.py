"""Questions of any form as columns: what a split is made of (lever_plus/data/dataset.py)."""

import ast
import hashlib
import json
import posixpath
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus.data.fields import MAX_INDEX, Source
from lever_plus.data.vqa_json import AnnotationColumns, QuestionColumns, Words
from open_mmicl.errors import DamagedInputError

NAMES = {
    "question": ("question",),
    "answers": ("answers", "answer"),
    "question_id": ("question_id", "questionId", "qid", "id"),
    "image": ("image", "image_path", "file_name"),
    "image_id": ("image_id", "imageId"),
}
"""What a field is called in a file, tried in order, where the YAML's ``fields`` does not say."""
WHAT = "questions file"


@dataclass
class Items:
    """One entry per question, in ascending question_id.

    Attributes:
        question_ids: int64 [N], or object [N] of texts where the file has texts.
        image_ids: int64 [N], equal for equal images in all splits; :func:`key_of` of the file's own id.
        image_texts: {key: the id as the file has it}, of ids that are texts.
        image_names: int32 [N] numbers of ``names``, or None where an image's file is named after its id.
        question: int32 [N] numbers of ``questions``.
        answers: int32 [A] numbers of ``words``, the answers of row r at ``starts[r] : starts[r + 1]``.
    """

    question_ids: np.ndarray
    image_ids: np.ndarray
    image_texts: dict[int, str]
    image_names: np.ndarray | None
    names: list[str]
    question: np.ndarray
    questions: list[str]
    answers: np.ndarray
    starts: np.ndarray
    words: list[str]

    def take(self, rows: np.ndarray) -> "Items":
        """Some of the rows, in the given order."""
        answers, starts = _taken(self.answers, self.starts, rows)
        return Items(
            self.question_ids[rows], self.image_ids[rows], self.image_texts,
            None if self.image_names is None else self.image_names[rows], self.names,
            self.question[rows], self.questions, answers, starts, self.words,
        )  # fmt: skip


def key_of(value: int | str) -> int:
    """A number for an id, the same in every file and run: a whole number is its own; a text's is a hash at or above
    2**62, where no whole number of a file lies.
    """
    if isinstance(value, int):
        return value
    return MAX_INDEX + (int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") >> 2)


def of_official(
    questions: QuestionColumns, annotations: AnnotationColumns, q_rows: np.ndarray, a_rows: np.ndarray
) -> Items:
    """Items of the official files' columns; the rows join the two."""
    answers, starts = _taken(annotations.answers, annotations.starts, a_rows)
    return Items(
        question_ids=questions.question_ids[q_rows].astype(np.int64),
        image_ids=questions.image_ids[q_rows].astype(np.int64),
        image_texts={},
        image_names=None,
        names=[],
        question=questions.question[q_rows],
        questions=questions.words.texts,
        answers=answers,
        starts=starts,
        words=annotations.words.texts,
    )


def _taken(answers: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(answers, starts) of some rows, in the given order."""
    counts = np.diff(starts)[rows]
    new = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return answers[np.repeat(starts[rows] - new[:-1], counts) + np.arange(new[-1])], new


@dataclass
class _Builder:
    """Columns that grow, one record after the other."""

    fields: dict[str, str]
    annotators: int
    ids: list[int | str] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)
    image_of: dict[int | str, int] = field(default_factory=dict)
    written: dict[str, type] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    images: array = field(default_factory=lambda: array("q"))
    image_names: array = field(default_factory=lambda: array("i"))
    question: array = field(default_factory=lambda: array("i"))
    answers: array = field(default_factory=lambda: array("i"))
    counts: array = field(default_factory=lambda: array("i"))
    names: Words = field(default_factory=Words)
    questions: Words = field(default_factory=Words)
    words: Words = field(default_factory=Words)

    def add(self, path: Path, where: str, record: dict[str, Any]) -> None:
        def refused(name: str, problem: str) -> DamagedInputError:
            return Source(path, WHAT).error(f"{where}, field {name!r}: {problem}")

        def value(what: str, needed: bool = True) -> tuple[str, Any]:
            wanted = (self.fields[what],) if what in self.fields else NAMES[what]
            for name in wanted:
                if record.get(name) is not None:
                    return name, record[name]
            if needed or what in self.fields:
                there = ", ".join(map(str, list(record)[:12])) or "nothing"
                raise refused(
                    wanted[0], f"is missing (there is: {there}); name the right one in the YAML: fields: {{{what}: …}}"
                )
            return wanted[0], None

        self._check_new(*value("question_id", False), path, where, refused)
        name, question = value("question")
        self.question.append(self.questions.code(_text(name, question, refused)))
        self._take_image(value("image", False), value("image_id", False), refused)
        name, given = value("answers")
        answers = _answers(name, given, refused)
        if self.annotators and len(answers) != self.annotators:
            raise refused(name, f"{len(answers)} answers, expected {self.annotators} (annotators of the YAML)")
        if not any(answer.strip() for answer in answers):
            raise refused(name, "there is no answer; take the question out, or answer it")
        self.answers.extend(self.words.code(answer) for answer in answers)
        self.counts.append(len(answers))

    def _check_new(self, name: str, given: Any, path: Path, where: str, refused: Callable) -> None:
        own = len(self.ids) + 1 if given is None else _id(name, given, refused)
        key = str(own)  # the number 7 and the text "7" are one id: files keep ids as text
        if key in self.seen:
            raise refused(name, f"{key[:60]!r} is there twice (first at {self.seen[key]})")
        self.seen[key] = where
        self.ids.append(own)

    def _take_image(self, image: tuple[str, Any], image_id: tuple[str, Any], refused: Callable) -> None:
        file = None
        if image[1] is not None:
            file = posixpath.normpath(_text(image[0], image[1], refused).strip())
            if file == ".":
                raise refused(image[0], "is blank; it is the picture's file, relative to the YAML's images")
        own = file if image_id[1] is None else _id(image_id[0], image_id[1], refused)
        if own is None:
            raise refused(
                image[0], "is missing, and so is an image_id; name the picture's field in the YAML: fields: {image: …}"
            )
        if own not in self.image_of:
            key = self.image_of[own] = key_of(own)
            if self.written.setdefault(str(own), type(own)) is not type(own):
                raise refused(image_id[0], f"{own!r} is there as a number and as a text; write it one way")
            if isinstance(own, str) and self.texts.setdefault(key, own) != own:
                raise refused(image_id[0], f"{own!r} and {self.texts[key]!r} have the same hash; rename one of them")
        self.images.append(self.image_of[own])
        if (file is None) != (not self.image_names) and self.ids[1:]:
            raise refused(image[0], "is in some questions and not in others")
        if file is not None:
            self.image_names.append(self.names.code(file))

    def items(self) -> Items:
        numbers = all(isinstance(own, int) for own in self.ids)
        ids = np.array(self.ids, dtype=np.int64 if numbers else object)
        if not numbers:
            ids = np.array([str(own) for own in self.ids], dtype=object)
        whole = Items(
            ids, _column(self.images), self.texts, _column(self.image_names) if self.image_names else None,
            self.names.texts, _column(self.question), self.questions.texts, _column(self.answers),
            np.concatenate([[0], np.cumsum(_column(self.counts))]).astype(np.int64), self.words.texts,
        )  # fmt: skip
        return whole.take(np.argsort(ids, kind="stable"))


def of_records(
    found: Iterator[tuple[Path, str, dict[str, Any]]], files: Sequence[Path], fields: dict[str, str], annotators: int
) -> Items:
    """Items of a reader's records.

    Args:
        fields: what a field is called in the files, where it is none of :data:`NAMES`.
        annotators: answers that each question must have; 0: at least one.

    Raises:
        DamagedInputError: names file, line and field.
    """
    builder, path, where = _Builder(fields, annotators), files[0], "the file"
    try:
        for path, where, record in found:
            builder.add(path, where, record)
    except UnicodeEncodeError as error:
        raise Source(path, WHAT).error(f"{where}: broken text (character {error.start})") from error
    if not builder.ids:
        raise Source(files[0], WHAT).error("holds no question")
    return builder.items()


def _text(name: str, value: Any, refused: Callable) -> str:
    if type(value) is not str:
        raise refused(name, f"{_shown(value)} is no text")
    return value


def _id(name: str, value: Any, refused: Callable) -> int | str:
    if type(value) is int and 0 <= value < MAX_INDEX:
        return value
    if type(value) is str and value.strip() and value.isprintable():
        return value
    raise refused(name, f"{_shown(value)} is neither a text nor a whole number from 0 on")


def _answers(name: str, value: Any, refused: Callable) -> list[str]:
    """One answer, a list of them, or of objects with ``answer``; or a text that is such a list as JSON or Python."""
    if type(value) is str and value.lstrip().startswith("[") and name != "answer":
        try:
            value = json.loads(value)
        except ValueError:
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise refused(name, "begins like a list, but is neither one of JSON nor of Python") from error
    given = value if isinstance(value, list | tuple) else [value]
    return [_answer(name, one, refused) for one in given]


def _answer(name: str, value: Any, refused: Callable) -> str:
    if isinstance(value, dict):
        value = value.get("answer")
    if type(value) in (int, float):
        return str(value)
    if type(value) is not str:
        raise refused(name, f"{_shown(value)} is no answer: a text, a list of texts, or a list of {{answer: …}}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return repr(value)[:60]


def _column(values: array) -> np.ndarray:
    return np.array(values, dtype=np.int64 if values.typecode == "q" else np.int32)
