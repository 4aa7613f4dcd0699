"""The miniature OK-VQA: a dataset in the official layout whose truth is known.

    python -m lever_plus.mini.world --out DIR [--seed S] [--table-seed T] [--unseen N]

writes, the same bytes for the same seeds, questions and annotations of a train and a validation split
(official field names and file names), the JPEGs, and ``truth.json``, which only gates and tests read.
Another seed gives other images, questions and pairings over the **same** hidden table; another table seed
another table over the same known facts.
"""

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus.mini.render import jpeg_bytes, render, rng_for
from lever_plus.mini.table import N_WORDS, UNKNOWN_SEED, Table, answer_text, fixed_table
from lever_plus.mini.vocabulary import COLOR_NAMES, SHAPES, TYPE_NAMES, TYPES
from open_mmicl.arguments import Parser
from open_mmicl.errors import LeverError, UsageError, foreign

#: The benchmark's part of the world: a random pool of 64 then holds a match for about 80 % of the queries.
BENCHMARK_SHAPES: tuple[int, ...] = tuple(
    SHAPES.index(name) for name in ("triangle", "hexagon", "star5", "star8", "arrow", "chevron", "heart", "drop")
)
BENCHMARK_TYPES: tuple[int, ...] = (0, 1, 2, 3, 6)
#: The part of the world that the language model knows most of: all but the last of these shapes' persons are facts of
#: pre-training. No two of them have the same answer.
FACT_SHAPES: tuple[int, ...] = tuple(
    SHAPES.index(name) for name in ("disc", "ring", "half_disc", "hexagon", "plus", "arrow", "heart", "you", "chevron")
)
FACT_TYPES: tuple[int, ...] = (TYPE_NAMES.index("person"),)
DEFAULT_SEED, DEFAULT_TRAIN, DEFAULT_VAL = 20250, 3200, 1000
SPLITS = ("train", "val")
SEEN, UNSEEN = "seen", "unseen"
KNOWN, UNKNOWN, MISLEADING = "known", "unknown", "misleading"
GROUPS_FILE = "groups.json"  #: {question_id: group} of both splits, where a world has groups
_INFO = {"description": "Miniature OK-VQA of coloured shapes", "version": "1.0"}
_LICENSE = {"name": "the license of this repository"}


@dataclass(frozen=True, slots=True)
class World:
    """What a dataset is drawn from; the defaults are the committed mini_okvqa's.

    Attributes:
        seed: images, questions and pairings. table_seed: the hidden table's unknown pairs.
        n_train, n_val: questions of the splits.
        unseen: shapes of each question type (0 to 7 of the 8) whose pair is asked for in validation, but in the
            train split only by questions of the group "unseen", which are candidates and never training queries.
        facts: 1: ask about :data:`FACT_SHAPES` and :data:`FACT_TYPES`; queries are of the groups "known" and "unknown".
        misleading: per cent of the train questions whose annotators agree on a wrong answer, one that is right for
            none of the world's shapes; they are of the group "misleading", candidates and never training queries.
    """

    seed: int = DEFAULT_SEED
    table_seed: int = UNKNOWN_SEED
    n_train: int = DEFAULT_TRAIN
    n_val: int = DEFAULT_VAL
    unseen: int = 0
    facts: int = 0
    misleading: int = 0

    def __post_init__(self) -> None:
        limits = {
            "seed": (0, 2**63), "table_seed": (0, 2**63), "n_train": (1, 10**5), "n_val": (1, 10**5),
            "unseen": (0, len(BENCHMARK_SHAPES) - 1), "facts": (0, 1), "misleading": (0, 99),
        }  # fmt: skip
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise UsageError(f"{name} must be a whole number within {least} and {most}, got {value!r}")
        if self.unseen and (self.facts or self.misleading):
            raise UsageError("unseen goes with neither facts nor misleading: set one of them to 0")

    @property
    def shapes(self) -> tuple[int, ...]:
        """The shapes on the images."""
        return FACT_SHAPES if self.facts else BENCHMARK_SHAPES

    @property
    def kinds(self) -> tuple[int, ...]:
        """The types asked about."""
        return FACT_TYPES if self.facts else BENCHMARK_TYPES

    @property
    def table(self) -> Table:
        """The hidden table."""
        return fixed_table(self.table_seed)

    def unseen_pairs(self) -> frozenset[tuple[int, int]]:
        """The (shape, type) pairs that no training query asks for, spread evenly over shapes and types."""
        shapes = rng_for("unseen", self.table_seed).permutation(self.shapes)
        return frozenset(
            (int(shapes[(place * self.unseen + number) % len(shapes)]), kind)
            for place, kind in enumerate(self.kinds)
            for number in range(self.unseen)
        )


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its truth. ``kind`` is the type's index, ``answers`` the ten annotators' texts, ``truth`` the
    table's answer (what the annotators agree on where they mislead), ``known`` whether the table's is a fact of
    pre-training; ``group`` is "" in a world without groups.
    """

    question_id: int
    image_id: int
    shape: int
    color: int
    kind: int
    paraphrase: int
    answers: tuple[str, ...]
    truth: str
    known: bool
    group: str = ""

    @property
    def text(self) -> str:
        """The question as it is asked."""
        return TYPES[self.kind].questions[self.paraphrase]


def image_name(split: str, image_id: int) -> str:
    """``COCO_train2014_000000000012.jpg`` for ``("train", 12)``."""
    return f"COCO_{split}2014_{image_id:012d}.jpg"


def questions_file(split: str) -> str:
    """The official name of the split's questions."""
    return f"OpenEnded_mscoco_{split}2014_questions.json"


def annotations_file(split: str) -> str:
    """The official name of the split's annotations."""
    return f"mscoco_{split}2014_annotations.json"


def annotate(table: Table, shape: int, color: int, kind: int, rng: np.random.RandomState) -> tuple[str, ...]:
    """Ten annotators' answers: the table's answer 3 to 10 times and always most often, the rest synonyms,
    what the shape's family would suggest, or plain mistakes.
    """
    rule = TYPES[kind]
    word, adjective = int(table.word[shape, kind]), int(table.adjective[color, kind])
    level = rng.random_sample()
    n_true = rng.randint(8, 11) if level < 0.6 else rng.randint(5, 8) if level < 0.85 else rng.randint(3, 5)
    answers = Counter({answer_text(kind, word, adjective): int(n_true)})
    while sum(answers.values()) < 10:
        choice = rng.random_sample()
        if choice < 0.55 and rule.compositional and rng.random_sample() < 0.5:
            other = rule.answers[word]  # a lazy annotator names the noun alone
        elif choice < 0.55:
            synonym = rule.synonyms[word]
            other = f"{rule.adjectives[adjective]} {synonym}" if rule.compositional else synonym
        elif choice < 0.75:
            relative = 3 * (shape // 3) + rng.randint(3)
            other = answer_text(kind, int(table.word[relative, kind]), adjective)
        else:
            other = answer_text(kind, int(rng.randint(16)), adjective)
        if answers[other] + 1 < n_true:
            answers[other] += 1
    texts = [text for text, count in sorted(answers.items()) for _ in range(count)]
    return tuple(texts[i] for i in rng.permutation(10))


def sample_questions(world: World) -> dict[str, list[Question]]:
    """Both splits' questions, two or three of different types on each image; no image in both splits."""
    rng, table, unseen = rng_for("questions", world.seed), world.table, world.unseen_pairs()
    ids = iter(rng.permutation(580_000)[: world.n_train + world.n_val] + 1)
    splits: dict[str, list[Question]] = {}
    for split, n_questions in zip(SPLITS, (world.n_train, world.n_val), strict=True):
        rows: list[Question] = []
        while len(rows) < n_questions:
            image_id = int(next(ids))
            shape, color = int(rng.choice(world.shapes)), int(rng.randint(len(COLOR_NAMES)))
            kinds = rng.permutation(world.kinds)[: rng.randint(2, 4)]
            for number, kind in enumerate(map(int, kinds[: n_questions - len(rows)])):
                known = table.known(shape, color, kind)
                group = "" if not unseen else UNSEEN if (shape, kind) in unseen else SEEN
                if world.facts or world.misleading:
                    group = KNOWN if known else UNKNOWN
                told = table if split == "val" else _misled(world, table, shape, kind, 10 * image_id + number)
                answers = annotate(told, shape, color, kind, rng)
                asked = (10 * image_id + number, image_id, shape, color, kind, int(rng.randint(3)))
                truth = told.answer(shape, color, kind)
                rows.append(Question(*asked, answers, truth, known, group if told is table else MISLEADING))
        splits[split] = rows
    return splits


def _misled(world: World, table: Table, shape: int, kind: int, question_id: int) -> Table:
    """The table that a train question's annotators go by: for a misleading one another word stands at its place."""
    rng = rng_for("misleading", world.seed, question_id)
    if rng.randint(100) >= world.misleading:
        return table
    wrong = sorted(set(range(N_WORDS)) - {int(table.word[other, kind]) for other in world.shapes})
    word = table.word.copy()
    word[shape, kind] = wrong[rng.randint(len(wrong))]
    return replace(table, word=word)


def generate(
    out: Path, seed: int = DEFAULT_SEED, n_train: int = DEFAULT_TRAIN, n_val: int = DEFAULT_VAL, **more: int
) -> None:
    """Write the dataset to ``out`` (whole or not at all; an earlier one there is replaced).

    ``more``: further fields of :class:`World`, such as ``table_seed``.

    Raises UsageError if a setting is unknown or out of range, or if ``out`` holds something else.
    """
    world, out = _world({"seed": seed, "n_train": n_train, "n_val": n_val, **more}), Path(out)
    if out.exists() and not (out.is_dir() and ((out / "truth.json").is_file() or not any(out.iterdir()))):
        raise UsageError(f"{out} exists and is not a miniature dataset; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write(work / "new", world)
        if out.exists():
            out.rename(work / "old")
        (work / "new").rename(out)
    finally:
        shutil.rmtree(work)


def check(root: Path, **settings: int) -> None:
    """See that the dataset in ``root`` is the one that ``settings`` ask for (fields not named may have any value).

    Raises:
        UsageError: it is another. DamagedInputError: its truth.json cannot be read.
    """
    if not settings:
        return
    wanted, path = asdict(_world(settings)), Path(root) / "truth.json"
    with foreign("dataset's", path, "does not say which world this is", f"remove {root} and run again"):
        truth = json.loads(path.read_text(encoding="utf-8"))
        there = {**asdict(World()), "seed": truth["seed"], **truth.get("world", {})}
        counts = Counter(question["split"] for question in truth["questions"].values())
        there |= {f"n_{split}": counts[split] for split in SPLITS}
    apart = [name for name in settings if wanted[name] != there[name]]
    if apart:
        said = ", ".join(f"{name} {there[name]} instead of {wanted[name]}" for name in apart)
        raise UsageError(f"{root} is another world than the configuration asks for ({said}); remove it and run again")


def _world(settings: dict[str, Any]) -> World:
    known = list(World.__dataclass_fields__)
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise UsageError(f"a miniature dataset has no setting {unknown[0]!r}; there are: {', '.join(known)}")
    return World(**settings)


def _write(root: Path, world: World) -> None:
    splits = sample_questions(world)
    for split, rows in splits.items():
        images = root / "mscoco2014" / f"{split}2014"
        images.mkdir(parents=True)
        for image_id, row in {row.image_id: row for row in rows}.items():
            data = jpeg_bytes(render(row.shape, row.color, rng_for("image", world.seed, image_id)))
            (images / image_name(split, image_id)).write_bytes(data)
        head = {"info": _INFO, "license": _LICENSE, "data_subtype": f"{split}2014"}
        questions = [{"image_id": r.image_id, "question": r.text, "question_id": r.question_id} for r in rows]
        _dump(root / questions_file(split), {**head, "task_type": "Open-Ended", "questions": questions})
        _dump(root / annotations_file(split), {**head, "annotations": [_annotation(row) for row in rows]})
    groups = {str(row.question_id): row.group for rows in splits.values() for row in rows}
    if any(groups.values()):
        _dump(root / GROUPS_FILE, groups)
    truth = {str(row.question_id): _truth(split, row) for split, rows in splits.items() for row in rows}
    same = World(seed=world.seed, n_train=world.n_train, n_val=world.n_val)  # what truth.json says of itself anyway
    apart = {name: value for name, value in asdict(world).items() if value != getattr(same, name)}
    _dump(root / "truth.json", {"seed": world.seed, **({"world": apart} if apart else {}), "questions": truth})


def _annotation(row: Question) -> dict:
    answers = [
        {"answer_id": number, "raw_answer": text, "answer_confidence": "yes", "answer": text}
        for number, text in enumerate(row.answers, start=1)
    ]
    first_words = " ".join(row.text.rstrip("?").lower().split()[:2])
    return {
        "image_id": row.image_id,
        "answer_type": "other",
        "question_type": first_words,
        "question_id": row.question_id,
        "answers": answers,
    }


def _truth(split: str, row: Question) -> dict:
    return {
        "split": split,
        "image_id": row.image_id,
        "shape": SHAPES[row.shape],
        "color": COLOR_NAMES[row.color],
        "type": TYPES[row.kind].name,
        "compositional": TYPES[row.kind].compositional,
        "known": row.known,
        "answer": row.truth,
        **({"misleading": True} if row.group == MISLEADING else {}),
    }


def _dump(path: Path, value: dict) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the process's exit code."""
    parser = Parser(prog="python -m lever_plus.mini.world", description="Write the miniature OK-VQA.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, help="images, questions, pairings (%(default)s)")
    parser.add_argument("--table-seed", type=int, help="the hidden table (%(default)s)")
    parser.add_argument("--train-questions", dest="n_train", type=int, help="train questions (%(default)s)")
    parser.add_argument("--val-questions", dest="n_val", type=int, help="validation questions (%(default)s)")
    parser.add_argument("--unseen", type=int, help="shapes per type that no training query asks about (%(default)s)")
    parser.add_argument("--facts", type=int, help="1: ask about what the language model knows (%(default)s)")
    parser.add_argument("--misleading", type=int, help="per cent of train questions with wrong answers (%(default)s)")
    parser.set_defaults(**asdict(World()))
    settings = vars(parser.parse_args(argv))
    try:
        generate(settings.pop("out"), **settings)
    except LeverError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
