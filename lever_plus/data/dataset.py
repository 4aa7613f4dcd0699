"""VQA data sets in the official layout (or the existing project's merged JSON), columnar and lean.

    python -m lever_plus.data.dataset check okvqa_local

lists what is missing of a data set, with counts and the first names; exit code 3 where something is.

A row is an item of a split. Rows are sorted by question_id, as the existing project sorts them: its beam
data, RL data and embeddings hold such row numbers. Images are only named here, never opened.
"""

import hashlib
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from os import scandir
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import io
from lever_plus.data import catalog
from lever_plus.data.fields import Source
from lever_plus.data.texts import SHOWN, findings, one_line
from lever_plus.data.vqa_json import AnnotationColumns, QuestionColumns, read_annotations, read_questions
from open_mmicl.errors import MissingInputError, UsageError
from open_mmicl.interface.prompts import Demo
from open_mmicl.interface.text_rules import TextRules

log = logging.getLogger("lever_plus")


class VqaSplit:
    """One split; every column has one entry per row.

    Attributes:
        question_ids, image_ids: int64 [N].
        fingerprint: changes with the content of the JSON files.
        groups: [N] texts, each item's group; None where the data set has none.
        query_rows: int64 [Q], ascending: the rows that may be queries of training and of model selection. All of
            them but those whose group is a candidate only (``candidates_only`` of the data set's YAML).
    """

    def __init__(
        self,
        dataset: catalog.DatasetConfig,
        split: str,
        questions: QuestionColumns,
        annotations: AnnotationColumns,
        fingerprint: str,
        groups: dict[int, str] | None = None,
    ) -> None:
        self._dataset, self._split, self.fingerprint = dataset, split, fingerprint
        q_rows, a_rows = _join(dataset.files(split), questions, annotations)
        self.question_ids = questions.question_ids[q_rows].astype(np.int64)
        self.image_ids = questions.image_ids[q_rows].astype(np.int64)
        self._question, self._texts = questions.question[q_rows], questions.words.texts
        self._answers, self._words = annotations.answers[a_rows], annotations.words.texts
        self._types = annotations.types.texts
        self._question_type, self._answer_type = annotations.question_type[a_rows], annotations.answer_type[a_rows]
        self.groups: np.ndarray | None = None
        may_ask = np.ones(len(self.question_ids), dtype=bool)
        if groups is not None:
            self.groups = np.array([groups[question_id] for question_id in self.question_ids.tolist()], dtype=object)
            may_ask = ~np.isin(self.groups.astype(str), dataset.candidates_only)
        self.query_rows = np.flatnonzero(may_ask)
        for column in (self.question_ids, self.image_ids, self.query_rows):
            column.flags.writeable = False
        self._found: dict[int, str] = {}  # image id -> path, where it was seen

    def __len__(self) -> int:
        return len(self.question_ids)

    def question(self, row: int) -> str:
        """The question as it is asked: line ends are blanks."""
        return one_line(self._texts[self._question[row]])

    def raw_question(self, row: int) -> str:
        """The question as it stands in the file."""
        return self._texts[self._question[row]]

    def answers(self, row: int) -> list[str]:
        """The ten annotators' answers, as they gave them."""
        return [self._words[code] for code in self._answers[row]]

    def answer(self, row: int) -> str:
        """The most frequent answer that is not blank, on one line; of equally frequent ones the first given."""
        given = [answer for answer in self.answers(row) if answer.strip()]
        return one_line(max(given, key=given.count))  # max keeps the first of equals

    def image_path(self, row: int) -> str:
        """Path of the item's image, in the first of the data set's image folders that has it.

        Raises:
            MissingInputError: none has it; names the file and the variable to set.
        """
        image = int(self.image_ids[row])
        if image in self._found:
            return self._found[image]
        name = self._dataset.image_name[self._split].format(image_id=image)
        folders = self._dataset.image_dirs[self._split]
        for folder in folders:
            if (folder / name).is_file():
                return self._found.setdefault(image, str(folder / name))
        where = f"image {name} not found in {' or '.join(map(str, folders))}"
        raise MissingInputError(f"{where}; {_find_images(self._dataset)}")

    def demo(self, row: int) -> Demo:
        """The item as a demonstration, with its most frequent answer."""
        return Demo(self.image_path(row), self.question(row), self.answer(row))

    def check_texts(self, file: Path) -> None:
        """Count blank answers in the log.

        Raises:
            DamagedInputError: a question has no other answers; names it and ``file``.
        """
        blank = np.array([not word.strip() for word in self._words])
        count = blank[self._answers].sum(axis=1)  # (N,)
        silent = np.flatnonzero(count == self._answers.shape[1])
        if len(silent):
            more = f" ({len(silent)} such questions)" if len(silent) > 1 else ""
            problem = f"all {self._answers.shape[1]} answers are blank{more}; take the question out, or answer it"
            raise Source(file, "annotations file").error(problem, int(self.question_ids[silent[0]]), "answers")
        if count.any():
            ids = ", ".join(map(str, self.question_ids[np.flatnonzero(count)[:SHOWN]]))
            log.info(f"{self._split}: {count.sum()} blank answers count nothing (question_id {ids}{', …' if np.count_nonzero(count) > SHOWN else ''})")  # fmt: skip  # noqa: E501

    @property
    def question_types(self) -> np.ndarray:
        """[N] texts, "" where the file gives none."""
        return np.array(self._types, dtype=object)[self._question_type]

    @property
    def answer_types(self) -> np.ndarray:
        """[N] texts, "" where the file gives none."""
        return np.array(self._types, dtype=object)[self._answer_type]


def load_split(settings: Any, split: str) -> VqaSplit:
    """The split ``train`` or ``val`` of the settings' data set; read once per process.

    Raises:
        MissingInputError: a JSON file is not there. DamagedInputError: one is truncated, questions and
        annotations do not fit together, or a question has not ten answers, or nothing but blank ones (names it).
    """
    dataset = catalog.load(settings.dataset, settings)
    files = dataset.files(split)
    read = [*files, *dataset.group_files()]
    stamps = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in read)
    key = (dataset.key, split, tuple(map(str, dataset.image_dirs[split])), stamps, dataset.candidates_only)
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
    inside = all(folder.is_relative_to(dataset.root) for folders in dataset.image_dirs.values() for folder in folders)
    return dataset.path_variable if inside else "COCO_PATH"


def _find_images(dataset: catalog.DatasetConfig) -> str:
    variable = image_variable(dataset)
    return f"set {variable} to the folder above it" if variable else f"remove {dataset.root}: it is generated again"


def check(settings: Any) -> tuple[list[str], bool]:
    """What is there and what is missing of the settings' data set.

    Returns: (lines to print, whether nothing is missing).

    Raises:
        DamagedInputError: a JSON file is damaged.
    """
    dataset = catalog.load(settings.dataset, settings)
    rules, which = _text_rules(settings)
    lines, complete = [f"texts: {which}"], True
    for split in catalog.SPLITS:
        try:
            dataset.files(split)
        except MissingInputError:
            official = [dataset.questions[split], dataset.annotations[split]]
            lines += [f"{split}: missing {path}" for path in official if not path.is_file()]
            if split in dataset.merged:
                lines.append(f"{split}: or the merged file {dataset.merged[split]}")
            if dataset.path_variable:
                lines.append(f"{split}: set {dataset.path_variable} (now {dataset.root})")
            complete = False
            continue
        found = load_split(settings, split)
        images = np.unique(found.image_ids)
        lines.append(f"{split}: {len(found)} questions, {len(images)} images, fingerprint {found.fingerprint[:12]}")
        if found.groups is not None:
            counts = ", ".join(f"{name} {number}" for name, number in sorted(Counter(found.groups.tolist()).items()))
            asked = f"; {len(found.query_rows)} may be queries of training" if split == "train" else ""
            lines.append(f"{split}: groups: {counts}{asked}")
        lines += [f"{split}: {found_text.line()}" for found_text in findings(found, rules)]
        missing, empty = _missing_images(dataset, split, images)
        for names, problem in ((missing, "missing"), (empty, "empty files")):
            if names:
                complete = False
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(
                    f"{split}: {len(names)} of {len(images)} images {problem}: {', '.join(names[:SHOWN])}{more}"
                )
        if missing:
            folders = " or ".join(str(folder) for folder in dataset.image_dirs[split])
            lines.append(f"{split}: looked in {folders}; {_find_images(dataset)}")
    lines.append("complete" if complete else "something is missing")
    return lines, complete


def _text_rules(settings: Any) -> tuple[TextRules | None, str]:
    """(what the model's tokenizer makes of texts, how that is told); None where the model is not on this machine."""
    from lever_plus import paths
    from open_mmicl.interface.config import InferModelConfig

    try:
        config = InferModelConfig.load(paths.infer_model_yaml(settings))
        folder = config.local_dir()
    except MissingInputError as error:
        return None, f"control tokens not looked for, {error}"
    if folder is None:
        return None, f"control tokens not looked for: {config.name} is no folder on this machine"
    from open_mmicl.interface.loading import load_tokenizer

    return TextRules(load_tokenizer(folder)), f"checked with the tokenizer of {config.name}"


def _read(dataset: catalog.DatasetConfig, split: str, files: list[Path]) -> VqaSplit:
    annotations, questions = read_annotations(files[-1], merged=len(files) == 1)
    questions = questions or read_questions(files[0])
    content, groups = "".join(io.sha256_file(path) for path in files), None
    for path in dataset.group_files():
        groups = _read_groups(path, questions.question_ids)
        content += io.sha256_file(path) + "".join(f" {group}" for group in dataset.candidates_only)
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    found = VqaSplit(dataset, split, questions, annotations, fingerprint, groups)
    found.check_texts(files[-1])
    return found


def _read_groups(path: Path, question_ids: np.ndarray) -> dict[int, str]:
    """Group of each of the questions; the file may hold more."""
    source, raw = Source(path, "groups file"), io.read_object(path, "groups file")
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


def _missing_images(dataset: catalog.DatasetConfig, split: str, images: np.ndarray) -> tuple[list[str], list[str]]:
    sizes: dict[str, int] = {}
    for folder in reversed(dataset.image_dirs[split]):
        if folder.is_dir():
            with scandir(folder) as entries:
                sizes.update((entry.name, entry.stat().st_size) for entry in entries if entry.is_file())
    names = [dataset.image_name[split].format(image_id=int(image)) for image in images]
    return [name for name in names if name not in sizes], [name for name in names if sizes.get(name) == 0]


@lru_cache(maxsize=1 << 17)
def _unit_hash(seed: int, image_id: int) -> float:
    digest = hashlib.sha256(f"{seed}:{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def main(argv: list[str] | None = None) -> int:
    """``check [DATASET] [NAME=value …]``."""
    from lever_plus import cli
    from lever_plus import settings as settings_package
    from lever_plus.settings.shared import SharedSettings

    words = sys.argv[1:] if argv is None else argv

    def body() -> int:
        if not words or words[0] in ("-h", "--help"):
            print(
                f"{__doc__.strip()}\n\nusage: python -m lever_plus.data.dataset check [{' | '.join(catalog.names())}]"
            )
            return 0
        if words[0] != "check":
            raise UsageError(f"unknown command {words[0]!r}; there is: check")
        rest = words[1:]
        named = {"DATASET": rest.pop(0)} if rest and "=" not in rest[0] and not rest[0].startswith("-") else {}
        values, _, _ = cli.parse_options(SharedSettings, rest)
        lines, complete = check(settings_package.load(SharedSettings, {**values, **named}))
        print("\n".join(lines))
        return 0 if complete else MissingInputError.exit_code

    return cli.guard(body)


if __name__ == "__main__":
    raise SystemExit(main())
