"""samples.jsonl of one inference run: read with checks, and the arrays that record and report are made from."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import io
from lever_plus.data import methods
from lever_plus.data.fields import MAX_INDEX
from open_mmicl.errors import DamagedInputError, MissingInputError
from open_mmicl.inferencer import majority_vote
from open_mmicl.metrics.vqa import metric_of, normalize_answer, vqa_accuracy

FIELDS: dict[str, type | tuple[type, ...]] = {
    "question_id": (int, str), "image_id": (int, str), "question": str, "answers": list, "method": str, "shot": int,
    "seed": (int, type(None)), "icd_ids": list, "icd_answers": list, "prompt_hash": str, "raw_answer": str,
    "answer": str, "score": (int, float),
}  # fmt: skip
TEXTS = ("answers", "icd_answers", "icd_images", "icd_questions")
PICTURES = {"image": str, "icd_images": list, "icd_questions": list}  # only the report's gallery reads them
OPTIONAL = {**PICTURES, "group": str}
PER_DEMONSTRATION = ("icd_ids", "icd_answers", "icd_images", "icd_questions")
VOTING_METHODS = ("v3", "v2", "similarity")
"""Methods whose demonstrations' majority vote is shown beside their answers."""
ANY_LENGTH = (methods.ADAPTIVE, *methods.CASCADES)
"""Methods that choose how many demonstrations a query gets: their shot is the most that they may take."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """The lines of a run. ``table`` and the methods below order queries by first appearance.

    Scores are in [0, 1]; a method with several seeds (random) has one line per query, shot and seed.
    """

    rows: list[Row]
    path: Path = field(default=Path("samples.jsonl"))

    @cached_property
    def question_ids(self) -> list[int | str]:
        """The queries, in order of appearance, (n,)."""
        return list(dict.fromkeys(row["question_id"] for row in self.rows))

    @cached_property
    def metric(self) -> str:
        """What the scores are, in words (:func:`open_mmicl.metrics.vqa.metric_of`)."""
        return metric_of({len(row["answers"]) for row in self.rows})

    @cached_property
    def images(self) -> np.ndarray:
        """Image of each query, (n,)."""
        image_of = {row["question_id"]: row["image_id"] for row in self.rows}
        return np.array([image_of[q] for q in self.question_ids])

    @cached_property
    def cells(self) -> dict[tuple[str, int, int | None], list[Row]]:
        """The lines of each (method, shot, seed), one per query, in the order of ``question_ids``."""
        found: dict[tuple[str, int, int | None], dict[int, Row]] = {}
        for row in self.rows:
            key = (row["method"], row["shot"], row["seed"])
            if row["question_id"] in found.setdefault(key, {}):
                raise DamagedInputError(f"{self.path}: question {row['question_id']} occurs twice for {_name(key)}")
            found[key][row["question_id"]] = row
        for key, by_query in found.items():
            if len(by_query) != len(self.question_ids):
                raise DamagedInputError(
                    f"{self.path}: {_name(key)} has {len(by_query)} of the run's {len(self.question_ids)} queries"
                )
        return {key: [by_query[q] for q in self.question_ids] for key, by_query in found.items()}

    @property
    def methods(self) -> list[str]:
        """Methods in order of appearance."""
        return list(dict.fromkeys(method for method, _, _ in self.cells))

    def shots(self, method: str) -> list[int]:
        """Shots a method was evaluated at, ascending."""
        return sorted({shot for name, shot, _ in self.cells if name == method})

    def seeds(self, method: str, shot: int) -> list[int | None]:
        """Seeds of a method's lines; [None] where it has no randomness."""
        return [seed for name, k, seed in self.cells if (name, k) == (method, shot)]

    @cached_property
    def groups(self) -> list[str]:
        """The groups that the queries are in, sorted; [] where they have none.

        Raises:
            DamagedInputError: a query has no group where others have, or two.
        """
        of_query: dict[int | str, set[str | None]] = {}
        for row in self.rows:
            of_query.setdefault(row["question_id"], set()).add(row.get("group"))
        found = set().union(*of_query.values())
        if found == {None}:
            return []
        for question_id, groups in of_query.items():
            if len(groups) > 1 or None in groups:
                raise DamagedInputError(f"{self.path}: question {question_id} is not in one group in all of its lines")
        return sorted(group for group in found if group is not None)

    def of_group(self, name: str) -> "Samples":
        """The lines of one group's queries."""
        return Samples([row for row in self.rows if row["group"] == name], self.path)

    def by_seed(self, method: str, shot: int) -> np.ndarray:
        """Scores, (seeds, n)."""
        return np.array([[r["score"] for r in self.cells[method, shot, s]] for s in self.seeds(method, shot)])

    def scores(self, method: str, shot: int) -> np.ndarray:
        """Score of each query, mean over seeds, (n,)."""
        return self.by_seed(method, shot).mean(axis=0)

    def majority(self, method: str, shot: int) -> np.ndarray:
        """Score of the most frequent answer among the demonstrations, without the model, (n,)."""
        return np.mean(
            [[vqa_accuracy(majority_vote(r["icd_answers"]), r["answers"]) for r in self.cells[method, shot, seed]]
             for seed in self.seeds(method, shot)], axis=0,
        )  # fmt: skip

    def oracle(self, shot: int) -> np.ndarray:
        """Best score that any demonstrations tried at this shot gave, all methods and seeds, (n,).

        Without the methods whose number of demonstrations differs between queries.
        """
        cells = [rows for (m, k, _), rows in self.cells.items() if k == shot and m not in ANY_LENGTH]
        return np.max([[r["score"] for r in rows] for rows in cells], axis=0)

    def share(self, method: str, shot: int, test: Callable[[Row], bool]) -> float:
        """Share of a method's lines for which ``test`` holds, in points."""
        lines = [r for seed in self.seeds(method, shot) for r in self.cells[method, shot, seed]]
        return 100.0 * sum(test(r) for r in lines) / len(lines)


def copied(row: Row) -> bool:
    """Whether the answer is one of the demonstrations' answers (both normalised)."""
    return row["answer"] in {normalize_answer(answer) for answer in row["icd_answers"]}


def holds_answer(row: Row) -> bool:
    """Whether a demonstration carries an answer that would score above 0 for the query."""
    return any(vqa_accuracy(answer, row["answers"]) > 0 for answer in row["icd_answers"])


def read_samples(path: Path) -> Samples:
    """Read and check samples.jsonl.

    Raises:
        MissingInputError: no such file. DamagedInputError: a line is not JSON, a field is missing or of the
        wrong type, a question has no answers or not the same number in all of its lines, a score lies outside [0, 1],
        or a method lacks queries or has one twice (says where).
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(
            f"per-sample answers not found: {path} (make them with: bash scripts/inference_v3_best.sh)"
        )
    with io.reading(path, "per-sample answers"), path.open("rb") as handle:
        io.check_encoding(path, "per-sample answers", handle.read(4096))
    rows: list[Row] = []
    texts: dict[str, str] = {}
    first: dict[int | str, tuple[int, int]] = {}  # of each question: line, number of answers
    with path.open(encoding="utf-8-sig", newline="\n") as handle:
        try:
            for number, line in enumerate(handle, 1):
                row = _read_line(line, f"{path}: line {number}")
                at, count = first.setdefault(row["question_id"], (number, len(row["answers"])))
                if len(row["answers"]) != count:
                    raise DamagedInputError(
                        f"{path}: line {number}: question {row['question_id']} has {len(row['answers'])} answers here "
                        f"and {count} in line {at}"
                    )
                rows.append(_shared(row, texts))
        except UnicodeDecodeError as error:
            raise DamagedInputError(f"{path}: is not UTF-8 text") from error
    if not rows:
        raise DamagedInputError(f"{path} is empty")
    samples = Samples(rows, path)
    _ = samples.cells  # the check that every method answered every query once
    _ = samples.groups
    return samples


def _read_line(line: str, where: str) -> Row:
    try:
        row = json.loads(line, object_pairs_hook=lambda items: io.distinct_keys(items, where))
    except (ValueError, RecursionError) as error:
        raise DamagedInputError(f"{where} is not JSON: truncated or damaged") from error
    if not isinstance(row, dict):
        raise DamagedInputError(f"{where} is no object")
    for name, kind in (FIELDS | {name: kind for name, kind in OPTIONAL.items() if name in row}).items():
        if not _fits(row, name, kind):
            raise DamagedInputError(f"{where}: field {name!r} is missing or of the wrong type")
    if not row["answers"]:
        raise DamagedInputError(f"{where}: 0 answers")
    if len({len(row[name]) for name in PER_DEMONSTRATION if name in row}) > 1:
        raise DamagedInputError(f"{where}: {', '.join(n for n in PER_DEMONSTRATION if n in row)} differ in length")
    if not 0 <= row["score"] <= 1:
        raise DamagedInputError(f"{where}: score {row['score']} is outside [0, 1]")
    return row


def _shared(row: Row, texts: dict[str, str]) -> Row:
    """The row with equal texts, and the names of its fields, kept once in ``texts``: a query's question, answers and
    images are in every line of the query, and a plan holds millions of texts at once.
    """

    def once(value: Any) -> Any:
        return texts.setdefault(value, value) if isinstance(value, str) else value

    return {once(k): [once(item) for item in v] if isinstance(v, list) else once(v) for k, v in row.items()}


def _fits(row: Row, name: str, kind: type | tuple[type, ...]) -> bool:
    value = row.get(name, row)
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    if type(value) is int and name != "score" and not 0 <= value < MAX_INDEX:
        return False
    if name == "icd_ids":
        return all(type(item) is int and 0 <= item < MAX_INDEX for item in value)
    if name == "method" and not (value and value.isprintable()):
        return False
    texts = [value] if isinstance(value, str) else value if name in TEXTS else []
    return all(isinstance(text, str) and io.is_plain(text) for text in texts)


def _name(key: tuple[str, int, int | None]) -> str:
    method, shot, seed = key
    return f"{method}, shot {shot}" + ("" if seed is None else f", seed {seed}")
