"""Reading VQA question and annotation files as columns, without ever holding a file's objects at once.

VQAv2's annotations are 370 MB of JSON and would be several gigabytes of Python objects. The top-level
array is read element by element from a sliding window of text; each element becomes a few numbers.
"""

import contextlib
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import io
from lever_plus.data.fields import Source
from open_mmicl.errors import DamagedInputError

ANSWERS = 10  # annotators per question, as the official metric expects
_CHUNK = 1 << 24  # characters read at a time
_BLANK = " \t\n\r"
_SEPARATOR = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")


@dataclass
class Words:
    """Texts kept once each; columns hold their numbers."""

    texts: list[str] = field(default_factory=list)
    codes: dict[str, int] = field(default_factory=dict)

    def code(self, text: str) -> int:
        """The number of ``text``; a new one where it was not seen before."""
        found = self.codes.get(text)
        if found is None:
            text.encode()  # a lone surrogate could never be written out again
            found = self.codes[text] = len(self.texts)
            self.texts.append(text)
        return found


@dataclass
class QuestionColumns:
    """Questions in the file's order: ids and images int64 [N], ``question`` [N] numbers of ``words``."""

    question_ids: np.ndarray
    image_ids: np.ndarray
    question: np.ndarray
    words: Words


@dataclass
class AnnotationColumns:
    """Annotations in the file's order: ids and images int64 [N], ``answers`` [A] numbers of ``words``, those of row r
    at ``starts[r] : starts[r + 1]``.
    """

    question_ids: np.ndarray
    image_ids: np.ndarray
    answers: np.ndarray
    starts: np.ndarray
    words: Words


def read_questions(path: Path) -> QuestionColumns:
    """Read the ``question_id``, ``image_id`` and ``question`` of every question.

    Raises:
        MissingInputError, DamagedInputError: names the element and the field.
    """
    source = Source(path, "questions file")
    ids, images, texts, words = array("q"), array("q"), array("i"), Words()
    for number, item in enumerate(elements(source, "questions")):
        try:
            ids.append(_whole(item["question_id"]))
            images.append(_whole(item["image_id"]))
            texts.append(words.code(_text(item["question"])))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise _broken(source, "questions", number, item, error) from error
    return QuestionColumns(_column(ids), _column(images), _column(texts), words)


def read_annotations(
    path: Path, merged: bool = False, annotators: int = ANSWERS
) -> tuple[AnnotationColumns, QuestionColumns | None]:
    """Read the ids and the answers of every annotation.

    Args:
        merged: each annotation also holds its ``question`` (the original Lever-Plus's merged file); the
            questions are then returned beside the annotations.
        annotators: answers that each question must have; 0: at least one.

    Raises:
        MissingInputError, DamagedInputError: names the element and the field; an answer list of another length
        names the question.
    """
    source = Source(path, "annotations file")
    ids, images, answers, asked, counts = array("q"), array("q"), array("i"), array("i"), array("i")
    words, texts = Words(), Words()
    known, code = words.codes, words.code
    for number, item in enumerate(elements(source, "annotations")):
        try:
            question_id, given = _whole(item["question_id"]), item["answers"]
            if type(given) is not list or not given or (annotators and len(given) != annotators):
                found = f"{len(given)} entries" if isinstance(given, list) else f"a {type(given).__name__}"
                raise source.error(f"{found}, expected {annotators or 'some'} answers", question_id, "answers")
            counts.append(len(given))
            words_given = [answer["answer"] for answer in given]
            answers.extend([known[t] if t in known else code(_text(t)) for t in words_given])
            ids.append(question_id)
            images.append(_whole(item["image_id"]))
            if merged:
                asked.append(texts.code(_text(item["question"])))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise _broken(source, "annotations", number, item, error) from error
    starts = np.concatenate([[0], np.cumsum(_column(counts))]).astype(np.int64)
    columns = AnnotationColumns(_column(ids), _column(images), _column(answers), starts, words)
    return columns, QuestionColumns(columns.question_ids, columns.image_ids, _column(asked), texts) if merged else None


def elements(source: Source, key: str) -> Iterator[Any]:
    """The elements of the array ``key`` of a file's top-level object, one by one.

    Raises:
        MissingInputError: no such file. DamagedInputError: not such a file, truncated, no such array in it,
        an empty one, or two of them, or an object with a key twice.
    """
    with _opened(source) as window:
        yield from _elements(source, key, window)


def starts_with(source: Source, sign: str) -> bool:
    """Whether a file's JSON begins with this character (blanks left out)."""
    with _opened(source) as window:
        return window.peek() == sign


def array_elements(source: Source) -> Iterator[Any]:
    """The elements of a file that is one array, one by one.

    Raises:
        MissingInputError, DamagedInputError: see :func:`elements`.
    """
    with _opened(source) as window:
        if window.peek() != "[":
            raise source.error("expected a JSON array")
        yield from window.array()
        if window.peek() != "":
            raise window.broken()


def keyed_elements(source: Source) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of a file's top-level object, one by one.

    Raises:
        MissingInputError, DamagedInputError: see :func:`elements`.
    """
    with _opened(source) as window:
        if window.peek() != "{":
            raise source.error("expected a JSON object or array")
        window.take()
        if window.peek() != "}":  # an empty object has no pairs
            for name in _names(source, window):
                yield name, window.value()


@contextlib.contextmanager
def _opened(source: Source) -> Iterator["_Window"]:
    path = io.existing(source.path, source.what)
    with io.reading(path, source.what), path.open("rb") as handle:
        head = handle.read(4096)
    io.check_encoding(path, source.what, head)
    with path.open(encoding="utf-8-sig", newline="") as handle:
        yield _Window(handle, source)


def _elements(source: Source, key: str, window: "_Window") -> Iterator[Any]:
    if window.peek() != "{":
        raise source.error("expected a JSON object")
    window.take()
    found = 0
    for name in _names(source, window):
        if name != key:
            window.value()
        elif window.peek() != "[":
            raise source.error(f"{key!r} is not a list")
        else:
            for item in window.array():
                yield item
                found += 1
    if not found:
        raise source.error(f"has no {key!r} in it")


def _names(source: Source, window: "_Window") -> Iterator[str]:
    """The names of the object that the window is in, to the file's end; whoever asks reads the value behind each."""
    names: set[str] = set()
    while True:
        name = window.value()
        if type(name) is not str or window.take() != ":":
            raise window.broken()
        if name in names:
            raise source.error(f"key {name[:60]!r} occurs twice in one object")
        names.add(name)
        yield name
        end = window.take()
        if end == "}":
            break
        if end != ",":
            raise window.broken()
    if window.peek() != "":
        raise window.broken()


class _Window:
    """JSON text read in pieces: only the piece at hand is kept."""

    def __init__(self, handle: Any, source: Source) -> None:
        self._handle, self._source = handle, source
        self._text, self._at, self._before, self._ended = "", 0, 0, False
        self._decoder = json.JSONDecoder(parse_constant=self._refuse)
        self._strict = json.JSONDecoder(parse_constant=self._refuse, object_pairs_hook=self._pairs)

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self) -> str:
        """As :meth:`peek`, and go past it."""
        found = self.peek()
        self._at += len(found)
        return found

    def value(self) -> Any:
        """The next JSON value."""
        if self._at == len(self._text) or self._text[self._at] in _BLANK:
            self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self.broken() from error
                continue
            except (RecursionError, ValueError) as error:
                raise self._source.error("is not valid JSON: nested too deeply, or a number too long") from error
            if end == len(self._text) and self._more():
                continue  # a number may continue in the next piece
            # Each key brings a colon: as many colons as keys means that none occurs twice. More: decoded once again,
            # slowly. (Always slowly would be two more seconds of every start at VQAv2's size.)
            if self._text.count(":", self._at, end) != _keys(value):
                self._strict.raw_decode(self._text, self._at)
            self._at = end
            return value

    def array(self) -> Iterator[Any]:
        """The elements of the array that begins here."""
        self.take()
        if self.peek() == "]":
            self.take()
            return
        while True:
            value = self.value()
            after = _SEPARATOR.match(self._text, self._at)
            if after and after.end() < len(self._text):  # the usual case, within the piece at hand
                self._at, sign = after.end(), after.group(1)
            else:
                sign = self.take()
            if sign not in (",", "]"):
                raise self.broken()
            yield value
            if sign == "]":
                return

    def broken(self) -> DamagedInputError:
        """The error for what stands here."""
        where = "ends too early" if self._ended and self._at >= len(self._text) else "truncated or damaged"
        return self._source.error(f"is not valid JSON (character {self._before + self._at}): {where}")

    def _more(self) -> bool:
        if self._ended:
            return False
        try:
            piece = self._handle.read(max(_CHUNK, len(self._text) - self._at))
        except UnicodeDecodeError as error:
            raise self._source.error("is not UTF-8 text") from error
        except OSError as error:
            raise self._source.error(f"cannot be read ({error.strerror})") from error
        self._ended = not piece
        self._before += self._at
        self._text, self._at = self._text[self._at :] + piece, 0
        return not self._ended

    def _pairs(self, items: list[tuple[str, Any]]) -> dict[str, Any]:
        return io.distinct_keys(items, f"{self._source.what} {self._source.path}")

    def _refuse(self, constant: str) -> None:
        raise self._source.error(f"holds {constant}, which is not a number")


def _keys(value: Any) -> int:
    """Keys in an object and in the objects of its lists (an annotation's answers); those deeper are not counted."""
    if type(value) is not dict:
        return 0
    lists = [item for item in value.values() if type(item) is list]
    return len(value) + sum(len(item) for items in lists for item in items if type(item) is dict)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("not a whole number")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("not text")
    return value


def _broken(source: Source, key: str, number: int, item: Any, error: Exception) -> DamagedInputError:
    if not isinstance(item, dict):
        return source.error(f"is a {type(item).__name__}, expected an object", field=f"{key}[{number}]")
    if isinstance(error, KeyError):
        return source.error(f"{error} is missing", field=f"{key}[{number}]")
    return source.error(f"a field of the wrong type or range ({str(error)[:80]})", field=f"{key}[{number}]")


def _column(values: array) -> np.ndarray:
    return np.frombuffer(values, dtype=np.int64 if values.typecode == "q" else np.int32)
