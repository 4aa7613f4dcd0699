"""The words of the miniature world: shapes, colours, question types and their answers (vocabulary.yaml).

A *type* is a kind of question (where is it kept, who uses it, ...). Plain types are answered by one
word; compositional ones by "adjective noun", the adjective told by the colour and the noun by the shape.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lever_plus.config import read_yaml

_WORDS = read_yaml(Path(__file__).with_suffix(".yaml"))
FAMILIES: dict[str, list[str]] = _WORDS["families"]
"""Eight families of three shapes; a shape's index is ``3 * family + member``."""
SHAPES: tuple[str, ...] = tuple(shape for members in FAMILIES.values() for shape in members)
FAMILY_OF: tuple[int, ...] = tuple(index // 3 for index in range(len(SHAPES)))
COLORS: dict[str, tuple[int, int, int]] = {name: tuple(rgb) for name, rgb in _WORDS["colors"].items()}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)


@dataclass(frozen=True, slots=True)
class QuestionType:
    """One kind of question.

    ``answers`` and ``synonyms`` are 16 words each, position by position. ``adjectives`` is empty for a
    plain type and 16 words for a compositional one (then ``answers`` are its nouns).
    """

    name: str
    questions: tuple[str, str, str]
    answers: tuple[str, ...]
    synonyms: tuple[str, ...]
    adjectives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {len(self.answers), len(set(self.answers)), len(self.synonyms)}
        if sizes != {16} or len(set(self.adjectives)) not in (0, 16) or set(self.answers) & set(self.synonyms):
            raise AssertionError(f"type {self.name} needs 16 distinct words in each list")

    @property
    def compositional(self) -> bool:
        """Whether the answer is "adjective noun"."""
        return bool(self.adjectives)


def _type(entry: dict[str, Any]) -> QuestionType:
    answers, synonyms = zip(*(word.split("/") for word in entry["words"].split()), strict=True)
    adjectives = tuple(entry.get("adjectives", "").split())
    return QuestionType(entry["name"], tuple(entry["questions"]), answers, synonyms, adjectives)


TYPES: tuple[QuestionType, ...] = tuple(map(_type, _WORDS["types"]))
TYPE_NAMES: tuple[str, ...] = tuple(kind.name for kind in TYPES)
