"""The texts in Chinese and English: both sides of each say the same names, and what is there is what is said."""

import ast
import re
from pathlib import Path

import pytest

from lever_plus.experiments import words

SOURCES = sorted(Path(words.__file__).parent.glob("*.py"))
NAMES = re.compile(r"{(\w+)")


@pytest.mark.parametrize("file", ["words", "report", "findings", "advice"])
def test_both_sides_of_a_text_are_there_and_fill_in_the_same(file):
    def pairs(part):
        return [part] if isinstance(part, list) else [pair for below in part.values() for pair in pairs(below)]

    texts = {key: part for key, part in words.texts(file).items() if key not in ("metrics", "whys")}
    for chinese, english in pairs(texts):
        names = [{re.sub("_(tight|loose)$", "", name) for name in NAMES.findall(x)} for x in (chinese, english)]
        assert chinese and english and names[0] == names[1]


def test_every_sentence_is_said_somewhere():
    said = {
        node.value for path in SOURCES for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }  # fmt: skip
    made = {f"{start}_{word}" for start in ("verdict",) for word in ("better", "worse", "none")}
    made |= {f"withheld_{reason}" for reason in ("images", "signs", "shots", "seeds", "main")} | {"better", "worse"}
    assert set(words.texts()["say"]) - said - made == set()


def test_no_chinese_sentence_is_in_the_source():
    chinese = re.compile(r"[\u4e00-\u9fff]{2}")
    assert [path.name for path in SOURCES if chinese.search(path.read_text("utf-8"))] == []
