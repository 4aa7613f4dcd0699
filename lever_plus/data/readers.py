"""Readers of questions: each turns a file into records, {field: value}, one after the other (docs/datasets.md).

A reader is a function ``read(path, **reader_args)`` that yields records, or pairs (where in the file, record).
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lever_plus import io
from lever_plus.data.fields import Source
from lever_plus.data.vqa_json import array_elements, elements, keyed_elements, starts_with
from lever_plus.registries import READERS
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError
from open_mmicl.registry import function_in

WHAT = "questions file"
Records = Iterator[tuple[str, dict[str, Any]]]


@READERS.add("json", "a list of objects, such a list under a key (reader_args: {key: …}), or an object by question id")
def read_json(path: Path, key: str = "") -> Records:
    """Objects of a JSON file, read one by one.

    Args:
        key: of the top-level object, under which the list is.
    """
    source = Source(path, WHAT)
    if key:
        yield from _numbered(elements(source, key), f"{key} item")
    elif starts_with(source, "["):
        yield from _numbered(array_elements(source), "item")
    else:
        for name, item in keyed_elements(source):
            if not isinstance(item, dict):
                raise source.error(
                    f"{name[:60]!r} is no question; where the questions are a list under a key, name it: "
                    "reader_args: {key: …}"
                )
            yield f"question {name[:60]!r}", {"question_id": name, **item}


@READERS.add("merged", 'annotations that also hold the question: {"annotations": [{…, "question"}]}')
def read_merged(path: Path) -> Records:
    """The older project's merged file, of any ids and number of answers."""
    return read_json(path, "annotations")


@READERS.add("jsonl", "one JSON object a line")
def read_jsonl(path: Path) -> Records:
    """The objects of a file's lines; blank lines are passed over."""
    source = Source(path, WHAT)

    def refuse(constant: str) -> Any:
        raise ValueError(f"holds {constant}, which is not a number")

    for number, line in _lines(path):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            item = json.loads(
                line,
                object_pairs_hook=lambda pairs, at=number: io.distinct_keys(pairs, f"{WHAT} {path}: line {at}"),
                parse_constant=refuse,
            )
        except (ValueError, RecursionError) as error:
            raise source.error(f"{where} is not JSON ({error}); one object a line is expected") from error
        yield where, item


@READERS.add("csv", "comma-separated values with a line of names (reader_args: {delimiter: …})")
def read_csv(path: Path, delimiter: str = ",") -> Records:
    """The lines of a table, every value a text. A column with the list of answers holds it as JSON."""
    source = Source(path, WHAT)
    if not isinstance(delimiter, str) or len(delimiter) != 1:
        raise UsageError(f"reader_args: delimiter={delimiter!r} is not allowed: one character")
    table = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        names = next(table, [])
        if len(set(names)) < len(names):
            raise source.error("line 1: a column's name is there twice")
        other = next((mark for mark in ";\t|," if mark != delimiter and len(names) == 1 and mark in names[0]), "")
        if other:
            raise source.error(
                f"line 1 is one name, {names[0][:60]!r}; where {other!r} parts the columns, the YAML says "
                f"reader_args: {{delimiter: {other!r}}}"
            )
        for values in table:
            if not values:
                continue
            if len(values) != len(names):
                raise source.error(
                    f"line {table.line_num}: {len(values)} values for {len(names)} columns; quote texts that hold a "
                    f"{delimiter!r}"
                )
            yield f"line {table.line_num}", dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise source.error(f"line {table.line_num}: {error}") from error


@READERS.add("tsv", "tab-separated values with a line of names")
def read_tsv(path: Path) -> Records:
    """As csv, with tabs."""
    return read_csv(path, "\t")


def records(
    reader: str, paths: Iterable[Path], arguments: dict[str, Any], extracted: Path
) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """(file, where in it, record) of all files of a split.

    Args:
        reader: a name of READERS, or ``file.py:function``. arguments: the YAML's ``reader_args``.
        extracted: folder for pictures that the files hold themselves; handed to a reader that asks for it.

    Raises:
        MissingInputError, DamagedInputError: of a file. UsageError: arguments that the reader does not take, or
        what a user's function raises.
    """
    read, _ = function_of(reader)
    for path in paths:
        more = {"extracted": extracted} if reader == "parquet" else {}
        try:
            found = read(path, **arguments, **more)
        except TypeError as error:
            raise UsageError(f"reader {reader}: {error} (reader_args)") from error
        if not isinstance(found, Iterable):
            raise UsageError(f"reader {reader}: gave {type(found).__name__} instead of records, one by one")
        yield from ((path, *pair) for pair in _pairs(reader, path, iter(found)))


def function_of(reader: str) -> tuple[Any, str]:
    """A reader's function, and the SHA-256 of the user's file that it comes from ("" for the package's own)."""
    if reader in READERS:
        file = READERS.file_of(reader)
        return READERS.get(reader), io.sha256_file(file) if file else ""
    file, _, name = reader.rpartition(":")
    return function_in(Path(file), name)


def _pairs(reader: str, path: Path, found: Iterator[Any]) -> Records:
    ours, number = reader in READERS and READERS.file_of(reader) is None, 0
    while True:
        try:
            item = next(found)
        except StopIteration:
            return
        except (DamagedInputError, MissingInputError, UsageError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - a stranger's generator raises what it likes
            if ours:
                raise
            told = f"after item {number} of {path}: {type(error).__name__}: {error}"
            raise UsageError(f"reader {reader}: {told}") from error
        number += 1
        where, record = item if isinstance(item, tuple) and len(item) == 2 else (f"item {number}", item)
        if not isinstance(record, dict):
            raise Source(path, WHAT).error(f"{where}: is a {type(record).__name__}, expected an object with names")
        yield str(where), record


def _numbered(items: Iterable[Any], word: str) -> Records:
    for number, item in enumerate(items, 1):
        yield f"{word} {number}", item


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with io.reading(io.existing(path, WHAT), WHAT), path.open("rb") as handle:
        io.check_encoding(path, WHAT, handle.read(4096))
    number = 0
    with io.reading(path, WHAT), path.open(encoding="utf-8-sig", newline="") as handle:
        try:
            for line in handle:
                number += 1
                yield number, line
        except UnicodeDecodeError as error:
            raise Source(path, WHAT).error(f"line {number + 1} is not UTF-8 text") from error
