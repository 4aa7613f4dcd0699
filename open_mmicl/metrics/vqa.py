"""The official VQA accuracy (GT-Vision-Lab/VQA ``vqaEval.py``, also OK-VQA's), answer by answer.

Prediction and annotations are both normalised always, as the copies in open_flamingo and ICLTestbed do;
the original skips that for a question whose ten answers are spelt alike. Everything else, the original's
quirks included, is kept, and ``tests/reference/official_vqa.py`` states it a second time.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import lru_cache

ANNOTATORS = 10  # of the official data
CUT_WORDS = ("Question", "Answer", "Short", ", ")
MATCHES_FOR_FULL_SCORE = 3

_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_DIGITS = {
    word: str(digit)
    for digit, words in enumerate(
        [("none", "zero"), *((w,) for w in "one two three four five six seven eight nine ten".split())]
    )
    for word in words
}
_ARTICLES = frozenset(("a", "an", "the"))
_FULL_STOP = re.compile(r"\.(?!\d)")
# The original hands re.UNICODE to ``sub`` where its count stands: no more than 32 full stops go.
_FULL_STOPS_REMOVED = int(re.UNICODE)
_THOUSANDS_COMMA = re.compile(r"\d,\d")
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _misspellings(word: str) -> list[str]:
    """``word`` with each one of its apostrophes left out: the spellings that the official table repairs."""
    return [word[:i] + word[i + 1 :] for i, char in enumerate(word) if char == "'"]


# The last entry runs the other way in the original; a prediction and its annotations both pass through it.
_CONTRACTIONS = {wrong: word for word in _CONTRACTED for wrong in _misspellings(word)} | {"somebody'd": "somebodyd"}


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """The official normalisation: punctuation, lower case, number words, articles, contractions.

    Args:
        text: an answer as generated or annotated.

    Returns: the form in which answers are compared; may be empty (an answer that is only an article).
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = _THOUSANDS_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        # The question is put to the text as it came in, not to what is left of it.
        touches_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if touches_space or has_thousands else " ")
    out = _FULL_STOP.sub("", out, count=_FULL_STOPS_REMOVED)
    words = (_DIGITS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The official accuracy of ten annotators' answers, and what stands for it where there are more or fewer.

    Ten: the mean over the leave-one-out subsets of min(1, matches / 3). One: 1 where prediction and answer are equal
    after normalisation (exact match). Otherwise: min(1, matches / 3), with two answers matches / 2.

    Args:
        prediction: the answer, already cut (:func:`cut_answer`).
        answers: the annotators' answers.

    Returns: accuracy in [0, 1]; with ten answers one of 0, 0.3, 0.6, 0.9, 1.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("vqa_accuracy needs the annotators' answers; got none")
    predicted = normalize_answer(prediction)
    matches = [normalize_answer(answer) == predicted for answer in answers]
    total = sum(matches)
    if len(answers) != ANNOTATORS:
        return min(1.0, total / _full_score(len(answers)))
    return sum(min(1.0, (total - match) / MATCHES_FOR_FULL_SCORE) for match in matches) / len(matches)


def metric_of(counts: Collection[int]) -> str:
    """What :func:`vqa_accuracy` is for questions of these numbers of answers, in words."""
    kinds = {
        "official VQA accuracy (10 answers, leave one out)": [n for n in counts if n == ANNOTATORS],
        "exact match after the official normalisation (1 answer)": [n for n in counts if n == 1],
        "min(1, matches / 2) (2 answers)": [n for n in counts if n == 2],
        "min(1, matches / 3) ({} answers)": [n for n in counts if n > 2 and n != ANNOTATORS],
    }
    found = {text: sorted(of) for text, of in kinds.items() if of}
    said = [text.format(f"{of[0]} to {of[-1]}" if len(of) > 1 else of[0]) for text, of in found.items()]
    return "; ".join(said)


def _full_score(annotators: int) -> int:
    """Matching answers that give a full score."""
    return min(MATCHES_FOR_FULL_SCORE, annotators)


def cut_answer(raw_text: str) -> str:
    """Generated text up to the first "Question", "Answer", "Short" or ", ", without outer white space."""
    ends = [at for word in CUT_WORDS if (at := raw_text.find(word)) >= 0]
    return raw_text[: min(ends, default=len(raw_text))].strip()


def gt_weights(answers: Sequence[str]) -> list[tuple[str, float]]:
    """The distinct annotated answers, each with what saying it is worth: min(1, count / 3), of fewer than three
    annotators min(1, count / annotators).

    Answers that compare equal after normalisation are one; its text is the most frequent spelling (the
    first of equals). Order of first appearance. Weights in (0, 1]. (For the reward ``gt_prob``.)
    """
    spellings: dict[str, Counter[str]] = {}
    for answer in answers:
        spellings.setdefault(normalize_answer(answer), Counter())[answer.strip()] += 1
    return [
        (counts.most_common(1)[0][0], min(1.0, counts.total() / _full_score(len(answers))))
        for counts in spellings.values()
    ]
