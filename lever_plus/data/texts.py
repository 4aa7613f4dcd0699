"""The texts of a data set, as people have left them: what of them cannot be asked or answered, by question_id."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from open_mmicl.interface.text_rules import TextRules

SHOWN = 5  # question_ids listed of each kind
_LINE_ENDS = re.compile(r"[^\S\r\n\v\f\x1c-\x1e\x85\u2028\u2029]*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def one_line(text: str) -> str:
    """The text with every line end, and the blanks around it, as one blank: in a prompt it would begin a new turn."""
    return _LINE_ENDS.sub(" ", text).strip() if _LINE_ENDS.search(text) else text


@dataclass
class Finding:
    """One kind of fault: how it is told, and the question_ids it was found at (one entry for each text)."""

    words: str
    question_ids: list[int | str] = field(default_factory=list)

    def line(self) -> str:
        """E.g. ``3 answers are blank (they count nothing): question_id 12, 90``."""
        distinct = list(dict.fromkeys(self.question_ids))
        more = f" and {len(distinct) - SHOWN} more" if len(distinct) > SHOWN else ""
        return f"{len(self.question_ids)} {self.words}: question_id {', '.join(map(str, distinct[:SHOWN]))}{more}"


def findings(split: Any, rules: TextRules | None = None, rows: Sequence[int] | None = None) -> list[Finding]:
    """What is to be said about a split's texts; each kind that occurs.

    Args:
        split: a :class:`lever_plus.data.dataset.VqaSplit`.
        rules: those of the model's tokenizer; without them only blanks and line ends are looked for.
        rows: the rows to look at (default: all).
    """
    rows = range(len(split)) if rows is None else rows
    blank = Finding("answers are blank (such an answer counts nothing)")
    ends = Finding("texts hold line ends (each becomes a blank in a prompt)")
    empty = Finding("questions are blank")
    forging = Finding("questions hold a control token of the model (it is asked as plain text)")
    unsaid = Finding("answers cannot be said by the model: a control token or characters that its tokenizer has not (their share of vqa_gt_prob is 0)")  # fmt: skip  # noqa: E501
    words = {answer for row in rows for answer in split.answers(row)}
    unscorable = rules.unscorable(words) if rules else set()
    for row in rows:
        question, question_id = split.raw_question(row), split.question_id(row)
        if not question.strip():
            empty.question_ids.append(question_id)
        if rules and rules.controls(question):
            forging.question_ids.append(question_id)
        if _LINE_ENDS.search(question):
            ends.question_ids.append(question_id)
        for answer in split.answers(row):
            if not answer.strip():
                blank.question_ids.append(question_id)
            elif answer in unscorable:
                unsaid.question_ids.append(question_id)
            if _LINE_ENDS.search(answer.strip()):
                ends.question_ids.append(question_id)
    return [found for found in (blank, ends, empty, forging, unsaid) if found.question_ids]
