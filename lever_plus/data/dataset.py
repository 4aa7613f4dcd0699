"""VQA data sets of any reader (configs/dataset/*.yaml, docs/datasets.md), columnar and lean.

A row is an item of a split. Rows are sorted by question_id, as the original Lever-Plus sorts them: its beam
data, RL data and embeddings hold such row numbers. Images are only named here, never opened.
"""

import hashlib
import logging
import runpy
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import io
from lever_plus.data import catalog
from lever_plus.data.fields import Source
from lever_plus.data.items import Items, of_official, of_records
from lever_plus.data.pictures import Pictures
from lever_plus.data.readers import function_of, records
from lever_plus.data.texts import SHOWN, one_line
from lever_plus.data.vqa_json import AnnotationColumns, QuestionColumns, read_annotations, read_questions
from open_mmicl.errors import MissingInputError, UsageError, foreign
from open_mmicl.interface.prompts import Demo
from open_mmicl.metrics.vqa import metric_of

log = logging.getLogger("lever_plus")


class VqaSplit:
    """One split; every column has one entry per row.

    Attributes:
        question_ids: int64 [N], or [N] texts where the files have texts.
        image_ids: int64 [N], the file's own or, of texts, a number made of them (lever_plus/data/items.py).
        fingerprint: changes with the content of the JSON files.
        groups: [N] texts, each item's group; None where the data set has none.
        query_rows: int64 [Q], ascending: the rows that may be queries of training and of model selection. All of
            them but those whose group is a candidate only (``candidates_only`` of the data set's YAML).
    """

    def __init__(
        self,
        dataset: catalog.DatasetConfig,
        split: str,
        items: Items,
        fingerprint: str,
        groups: dict[int | str, str] | None = None,
    ) -> None:
        self._dataset, self._split, self._items, self.fingerprint = dataset, split, items, fingerprint
        self.question_ids, self.image_ids = items.question_ids, items.image_ids
        self.groups: np.ndarray | None = None
        may_ask = np.ones(len(self.question_ids), dtype=bool)
        if groups is not None:
            self.groups = np.array([groups[question_id] for question_id in self.question_ids.tolist()], dtype=object)
            may_ask = ~np.isin(self.groups.astype(str), dataset.candidates_only)
        self.query_rows = np.flatnonzero(may_ask)
        for column in (self.question_ids, self.image_ids, self.query_rows):
            column.flags.writeable = False
        self._pictures = Pictures(dataset.image_dirs[split], dataset.image_name[split])
        self._found: dict[str, str] = {}  # name of an image's file -> path, where it was seen

    def __len__(self) -> int:
        return len(self.question_ids)

    def question_id(self, row: int) -> int | str:
        """The question's id as the file has it."""
        found = self.question_ids[row]
        return found if isinstance(found, str) else int(found)

    def image_id(self, row: int) -> int | str:
        """The image's id as the file has it."""
        key = int(self.image_ids[row])
        return self._items.image_texts.get(key, key)

    def question(self, row: int) -> str:
        """The question as it is asked: line ends are blanks."""
        return one_line(self.raw_question(row))

    def raw_question(self, row: int) -> str:
        """The question as it stands in the file."""
        return self._items.questions[self._items.question[row]]

    def answers(self, row: int) -> list[str]:
        """The annotators' answers, as they gave them; at least one."""
        items = self._items
        return [items.words[code] for code in items.answers[items.starts[row] : items.starts[row + 1]]]

    def answer(self, row: int) -> str:
        """The most frequent answer that is not blank, on one line; of equally frequent ones the first given."""
        given = [answer for answer in self.answers(row) if answer.strip()]
        return one_line(max(given, key=given.count))  # max keeps the first of equals

    def image_name(self, row: int) -> str:
        """The image's file, relative to the data set's image folders; its ending may be left to the folder."""
        items = self._items
        if items.image_names is not None:
            return items.names[items.image_names[row]]
        return self._pictures.name(self.image_id(row))

    def image_path(self, row: int) -> str:
        """Path of the item's image, in the first of the data set's image folders that has it.

        Raises:
            MissingInputError: none has it; names the file and the variable to set.
        """
        name = self.image_name(row)
        if name in self._found:
            return self._found[name]
        path = self._pictures.find(name)
        if path is not None:
            return self._found.setdefault(name, str(path))
        where = f"image {name} not found in {' or '.join(map(str, self._pictures.folders))}"
        raise MissingInputError(f"{where}; {find_images(self._dataset)}")

    def demo(self, row: int) -> Demo:
        """The item as a demonstration, with its most frequent answer."""
        return Demo(self.image_path(row), self.question(row), self.answer(row))

    def check_texts(self, file: Path) -> None:
        """Count blank answers in the log.

        Raises:
            DamagedInputError: a question has no other answers; names it and ``file``.
        """
        items = self._items
        blank = np.array([not word.strip() for word in items.words])
        count = np.add.reduceat(blank[items.answers].astype(np.int64), items.starts[:-1])  # (N,)
        given = np.diff(items.starts)
        silent = np.flatnonzero(count == given)
        if len(silent):
            more = f" ({len(silent)} such questions)" if len(silent) > 1 else ""
            problem = f"all {given[silent[0]]} answers are blank{more}; take the question out, or answer it"
            raise Source(file, "annotations file").error(problem, self.question_id(silent[0]), "answers")
        if count.any():
            ids = ", ".join(map(str, self.question_ids[np.flatnonzero(count)[:SHOWN]]))
            log.info(f"{self._split}: {count.sum()} blank answers count nothing (question_id {ids}{', …' if np.count_nonzero(count) > SHOWN else ''})")  # fmt: skip  # noqa: E501

    def answer_counts(self) -> list[int]:
        """How many answers questions have, ascending, each number once."""
        return sorted(set(np.diff(self._items.starts).tolist()))

    def answers_line(self) -> str:
        """What the answers are and how they are scored, in a line."""
        counts = self.answer_counts()
        how_many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{how_many} answer{'s' if counts[-1] > 1 else ''} each; metric: {metric_of(counts)}"

    def missing_images(self) -> tuple[list[str], list[str]]:
        """(names of images that are in none of the folders, names of those whose file is empty)."""
        _, first = np.unique(self.image_ids, return_index=True)
        pictures = Pictures(self._pictures.folders, self._pictures.pattern)  # what lies there now
        return pictures.missing([self.image_name(int(row)) for row in first])


def load_split(dataset: catalog.DatasetConfig, split: str) -> VqaSplit:
    """The split ``train`` or ``val`` of a data set; read once per process.

    Raises:
        MissingInputError: a file is not there. DamagedInputError: one is truncated, questions and annotations do not
        fit together, a question has no answer but blank ones, or not as many as the YAML says (names it).
    """
    files = dataset.files(split)
    read = [*files, *dataset.group_files()]
    stamps = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in read)
    form = repr((dataset.reader, dataset.reader_args, dataset.fields, dataset.annotators, dataset.image_name))
    form += repr((dataset.val_share, dataset.val_seed, dataset.candidates_only))
    key = (dataset.key, split, tuple(map(str, dataset.image_dirs[split])), stamps, form)
    if key not in _SPLITS:
        _SPLITS[key] = _read(dataset, split, files)
    return _SPLITS[key]


_SPLITS: dict[Any, VqaSplit] = {}


def split_by_image(
    query_indices: Sequence[int] | np.ndarray, image_ids: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Part queries into (train, validation) so that no image is on both sides.

    A hash of (seed, image id) decides, so an image's side does not depend on the other queries.

    Args:
        query_indices: [Q] rows of the split.
        image_ids: [N] image id of every row of the split.
        fraction: share of the images that goes to validation, in expectation, 0..1.

    Returns: two int64 arrays, in the order of ``query_indices``.
    """
    rows = np.asarray(query_indices, dtype=np.int64)
    images = np.asarray(image_ids)[rows]
    distinct, inverse = np.unique(images, return_inverse=True)
    held_out = np.array([_unit_hash(seed, int(image)) < fraction for image in distinct], dtype=bool)
    is_val = held_out[inverse] if len(rows) else np.zeros(0, dtype=bool)
    return rows[~is_val], rows[is_val]


def image_variable(dataset: catalog.DatasetConfig) -> str:
    """The variable that says where the images lie: COCO_PATH, or the data set's own where they lie in it ("" where it
    has none).
    """
    folders = {folder for of_split in dataset.image_dirs.values() for folder in of_split} - {dataset.extracted}
    inside = all(folder.is_relative_to(dataset.root) for folder in folders)
    return dataset.path_variable if inside else "COCO_PATH"


def find_images(dataset: catalog.DatasetConfig) -> str:
    """What to do where images are missing."""
    variable = image_variable(dataset)
    return f"set {variable} to the folder above it" if variable else f"remove {dataset.root}: it is generated again"


def _read(dataset: catalog.DatasetConfig, split: str, files: list[Path]) -> VqaSplit:
    content = ""
    for path in files:
        with foreign("VQA file", path):
            content += io.sha256_file(path)
    if dataset.reader == catalog.OFFICIAL:
        items = _read_official(dataset, files)
    else:
        items, form = _read_own(dataset, split, files)
        content += form
    groups = None
    for path in dataset.group_files():
        groups = _read_groups(path, items.question_ids, dataset)
        content += io.sha256_file(path) + "".join(f" {group}" for group in dataset.candidates_only)
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    found = VqaSplit(dataset, split, items, fingerprint, groups)
    found.check_texts(files[-1])
    return found


def _read_official(dataset: catalog.DatasetConfig, files: list[Path]) -> Items:
    annotations, questions = read_annotations(files[-1], len(files) == 1, dataset.annotators)
    questions = questions or read_questions(files[0])
    return of_official(questions, annotations, *_join(files, questions, annotations))


def _read_own(dataset: catalog.DatasetConfig, split: str, files: list[Path]) -> tuple[Items, str]:
    """Items by the YAML's reader, and what decides them besides the files' content."""
    found = records(dataset.reader, files, dataset.reader_args, dataset.extracted)
    items = of_records(found, files, dataset.fields, dataset.annotators)
    _, function = function_of(dataset.reader)
    form = f"{dataset.reader.rpartition('/')[2]} {function} {dataset.reader_args} {dataset.fields}"
    if not dataset.val_share:
        return items, form
    held_out = held_out_images(items.image_ids, dataset.val_share, dataset.val_seed)
    if held_out is None:
        raise Source(files[0], "questions file").error(
            f"all {len(items.image_ids)} questions are about one image; a validation split has to be of other images: "
            "name its files in the YAML (files: {train: …, val: …})"
        )
    rows = np.flatnonzero(np.isin(items.image_ids, held_out) == (split == "val"))
    return items.take(rows), f"{form} {split} {dataset.val_share} {dataset.val_seed}"


def held_out_images(image_ids: np.ndarray, share: float, seed: int) -> np.ndarray | None:
    """The images of a validation split that is made by image: those of the lowest hashes of (seed, image).

    Other hashes than :func:`split_by_image` has, which would else find none of its images among those that are left.

    Args: ``image_ids`` [N]; ``share`` of the distinct images, at least one of them and not all.

    Returns: int64, or None where there is but one image.
    """
    distinct = np.unique(image_ids)
    if len(distinct) < 2:
        return None
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    hashes = np.array([_unit_hash(f"validation {seed}", int(image)) for image in distinct])
    return distinct[np.argsort(hashes, kind="stable")[:count]]


def _read_groups(path: Path, question_ids: np.ndarray, dataset: catalog.DatasetConfig) -> dict[int | str, str]:
    """Group of each of the questions of a split; the file may hold more, those of the other split.

    Raises:
        UsageError: a group of ``candidates_only`` that the file has in neither split. DamagedInputError.
    """
    source, raw = Source(path, "groups file"), io.read_object(path, "groups file")
    there = {group for group in raw.values() if isinstance(group, str)}
    if absent := sorted(set(dataset.candidates_only) - there):
        named = ", ".join(sorted(there)[:20])
        raise UsageError(f"{dataset.key}.yaml: candidates_only: no group {absent[0]!r}; there are: {named}")
    groups = {}
    for question_id in question_ids.tolist():
        group = raw.get(str(question_id))
        if not isinstance(group, str) or not group or not io.is_plain(group):
            raise source.error(f"question {question_id} has no group in it (a text)")
        groups[question_id] = group
    return groups


def _join(
    files: list[Path], questions: QuestionColumns, annotations: AnnotationColumns
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the two files, both in ascending question_id."""
    q_rows = np.argsort(questions.question_ids, kind="stable")
    a_rows = np.argsort(annotations.question_ids, kind="stable")
    for path, ids in ((files[0], questions.question_ids[q_rows]), (files[-1], annotations.question_ids[a_rows])):
        twice = np.flatnonzero(ids[1:] == ids[:-1])
        if len(twice):
            raise Source(path, "VQA file").error(
                f"question_id {ids[twice[0]]} stands there twice ({len(twice)} such ids)"
            )
    q_ids, a_ids = questions.question_ids[q_rows], annotations.question_ids[a_rows]
    if not np.array_equal(q_ids, a_ids):
        alone = np.setxor1d(q_ids, a_ids)
        here = "an annotation, but no question" if alone[0] in a_ids else "a question, but no annotation"
        raise Source(files[-1], "annotations file").error(
            f"question_id {alone[0]} has {here} in {files[0]} ({len(alone)} such ids)"
        )
    apart = np.flatnonzero(questions.image_ids[q_rows] != annotations.image_ids[a_rows])
    if len(apart):
        question_id = int(q_ids[apart[0]])
        problem = f"not the image_id that {files[0].name} gives it"
        raise Source(files[-1], "annotations file").error(problem, question_id, "image_id")
    return q_rows, a_rows


@lru_cache(maxsize=1 << 17)
def _unit_hash(seed: int | str, image_id: int) -> float:
    digest = hashlib.sha256(f"{seed}:{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


if __name__ == "__main__":
    runpy.run_module("lever_plus.data.check", run_name="__main__")  # the command that README names
