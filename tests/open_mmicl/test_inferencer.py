"""Answers are cut and scored with the official metric, nothing else."""

from open_mmicl.inferencer import answer_and_score, majority_vote, prompt_hash
from open_mmicl.interface.prompts import Demo, Prompt

TEN = ["red"] * 4 + ["dark red"] * 2 + ["blue"] * 4


class Canned:
    def __init__(self, answers):
        self.answers = answers

    def generate(self, prompts, generation):
        return self.answers


def test_fault_09_empty_and_partly_matching_answers_are_wrong() -> None:
    prompt = Prompt((), "a.jpg", "What color?")
    said = ["", "re", "red", "Red.", "dark red", "red, of course", "redQuestion: next", "the blue"]
    outcomes = answer_and_score(Canned(said), [prompt] * len(said), [TEN] * len(said), None, "f")
    assert [round(o.score, 4) for o in outcomes] == [0.0, 0.0, 1.0, 1.0, 0.6, 1.0, 1.0, 1.0]
    assert [o.raw_answer for o in outcomes] == said
    assert outcomes[3].answer == "red" and outcomes[5].cut_answer == "red"


def test_the_prompt_hash_sees_every_word_and_the_order() -> None:
    a, b = Demo("/x/1.jpg", "q1", "a1"), Demo("/x/2.jpg", "q2", "a2")
    base = Prompt((a, b), "/x/3.jpg", "q")
    others = [
        Prompt((b, a), "/x/3.jpg", "q"),
        Prompt((a,), "/x/3.jpg", "q"),
        Prompt((a, b), "/x/4.jpg", "q"),
        Prompt((a, b), "/x/3.jpg", "Q"),
        Prompt((a, Demo("/x/2.jpg", "q2", "other")), "/x/3.jpg", "q"),
    ]
    assert len({prompt_hash(p, "f") for p in [base, *others]}) == 6
    assert prompt_hash(base, "g") != prompt_hash(base, "f")
    assert prompt_hash(base, "f") == prompt_hash(
        Prompt(tuple(Demo(d.image.replace("/x", "/y"), d.question, d.answer) for d in base.demos), "/y/3.jpg", "q"), "f"
    )


def test_majority_vote_prefers_the_first_pick_on_a_tie() -> None:
    assert majority_vote(["Blue.", "red", "blue"]) == "blue"
    assert majority_vote(["red", "blue"]) == "red"
