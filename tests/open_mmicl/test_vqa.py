"""The official VQA accuracy against its plain re-statement and hand-computed values."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from open_mmicl.metrics.vqa import cut_answer, gt_weights, normalize_answer, vqa_accuracy
from tests.reference import official_vqa

WORDS = st.sampled_from(
    [
        *official_vqa.CONTRACTIONS,
        *official_vqa.CONTRACTIONS.values(),
        *official_vqa.NUMBER_WORDS,
        "a",
        "an",
        "the",
        "A",
        "The",
        "dog",
        "Dog",
        "hot-dog",
        "1,000",
        "1.5",
        ".5",
        "5.",
        "u.s.a.",
        "it's",
        "5",
        "eleven",
    ]  # fmt: skip
)
MARKS = st.sampled_from([*official_vqa.PUNCTUATION, ".", "'", " ", "\n", "\t", ":", "%", "é", "²"])
TEXT = (
    st.lists(st.one_of(WORDS, MARKS), max_size=8).map("".join)
    | st.lists(WORDS, max_size=5).map(" ".join)
    | st.text(max_size=20)
)


@settings(max_examples=800, deadline=None)
@given(TEXT)
@example("." * 40)
@example('1,000, people - and "more"')
@example("U.S.A.")
def test_normalisation_is_the_official_one(text):
    assert normalize_answer(text) == official_vqa.normalize(text)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["Dog", "a dog", "cat", "hot dog", "hot-dog", "2", "two", "the", ""]), min_size=10, max_size=10
    ),
    TEXT | st.sampled_from(["dog", "cat", "hot dog", "two"]),
)
def test_accuracy_is_the_official_one(answers, prediction):
    assert vqa_accuracy(prediction, answers) == pytest.approx(official_vqa.accuracy(prediction, answers), abs=1e-12)


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_answers_give_the_known_steps(matches, expected):
    answers = ["dog"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("dog", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"), ("two dogs", "2 dogs"), ("none", "0"), ("dont", "don't"), ("y'allll", "y'all'll"),
        ("black/white", "black white"), ("black / white", "black white"), ("1,000", "1000"), ("3.5", "3.5"),
        ("hot-dog", "hot dog"), ("hot -dog", "hot dog"), ("what?", "what"), ("a", ""), ("somebody'd", "somebodyd"),
        ("she's", "she's"), ("well", "well"), ("Im", "im"),
    ],
)  # fmt: skip
def test_known_normalisations(text, expected):
    assert normalize_answer(text) == expected


def test_every_official_contraction_is_repaired():
    for wrong, right in official_vqa.CONTRACTIONS.items():
        if wrong == wrong.lower():  # the capitals can never be met in lower-cased text
            assert normalize_answer(wrong) == right, wrong


def test_fault_09_empty_or_partly_matching_answers_are_wrong():
    answers = ["hot dog"] * 10
    assert vqa_accuracy("", answers) == 0
    assert vqa_accuracy("hot", answers) == 0
    assert vqa_accuracy("a hot dog stand", answers) == 0
    with pytest.raises(ValueError, match="none"):
        vqa_accuracy("hot dog", [])


def test_both_sides_are_normalised_for_unanimous_answers_too():
    assert vqa_accuracy("The hot-dog.", ["Hot dog"] * 10) == 1


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (" dog\nQuestion: what", "dog"), ("dog, cat", "dog"), ("dog,cat", "dog,cat"), ("dog Short answer", "dog"),
        ("dogAnswer: x, Question", "dog"), ("Question", ""), ("  dog ", "dog"), ("", ""), ("short", "short"),
    ],
)  # fmt: skip
def test_generated_text_is_cut(raw, expected):
    assert cut_answer(raw) == expected


@given(TEXT)
def test_cutting_equals_successive_splits(raw):
    expected = re.split(", ", re.split("Question|Answer|Short", raw, maxsplit=1)[0], maxsplit=1)[0].strip()
    assert cut_answer(raw) == expected


def test_weights_group_spellings_and_cap_at_one():
    answers = ["Dog"] * 2 + ["dog"] * 3 + ["cat"] + ["2"] + ["two"] + ["emu"] * 2
    assert gt_weights(answers) == [
        ("dog", 1.0),
        ("cat", pytest.approx(1 / 3)),
        ("2", pytest.approx(2 / 3)),
        ("emu", pytest.approx(2 / 3)),
    ]


@given(st.lists(st.sampled_from(["dog", "a dog", "cat", "two", "2"]), min_size=10, max_size=10))
def test_weight_bounds_the_accuracy(answers):
    for answer, weight in gt_weights(answers):
        assert vqa_accuracy(answer, answers) <= weight + 1e-12
