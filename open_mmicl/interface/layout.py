"""From a prompt to token ids, piece by piece.

A chat template is cut into *pieces*: the header, one piece per demonstration (its user and assistant turn) and the
query's turn. Pieces are rendered and tokenised once and concatenated. That this equals rendering and tokenising the
whole prompt is checked on difficult texts when the model is loaded; where it does not hold, prompts are one piece.
"""

import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from open_mmicl.errors import DamagedInputError, UnscorableAnswerError, UsageError
from open_mmicl.interface.prompts import Demo, Prompt, PromptFormat
from open_mmicl.interface.text_rules import TextRules

log = logging.getLogger("lever_plus.engine")
_CACHED_TEXTS = 100_000
_TRIALS = (
    ("what is it?", "fish"),
    (" two  spaces ", "New York"),
    ("café\nnext line", "10:30 a.m."),
    ("", "…"),
    ("Question: is it 'so'?", " x"),
)


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Token ids of a piece with one ``image_token_id`` where each image goes; ``key`` is its text."""

    key: str
    ids: tuple[int, ...]


class PromptLayout:
    """Renders and tokenises prompts for one tokenizer, chat template and prompt format.

    Args:
        tokenizer: a transformers tokenizer (called with ``add_special_tokens=False``).
        render: ``messages, add_generation_prompt -> text`` by the model's chat template.
        image_token_id: the id that stands once for each image in the rendered text.
    """

    def __init__(
        self,
        tokenizer: object,
        render: Callable[[list[dict], bool], str],
        prompt_format: PromptFormat,
        image_token_id: int,
    ):
        self.tokenizer, self.render, self.format, self.image_token_id = tokenizer, render, prompt_format, image_token_id
        self.demo_piece = lru_cache(_CACHED_TEXTS)(self._demo_piece)
        self.query_piece = lru_cache(_CACHED_TEXTS)(self._query_piece)
        self.answer = lru_cache(_CACHED_TEXTS)(self._answer)
        self.rules = TextRules(tokenizer)
        self._told: set[str] = set()
        self._anchor = self.format.messages(Prompt((Demo("", "a question", "an answer"),), "", ""))[:-1]
        self._anchor_text = self.render(self._anchor, False)
        self._special = special_ids(tokenizer)
        self._check_generation_prompt()
        self.header, self.in_pieces = TextPiece("", ()), False
        self._cut()

    def pieces(self, prompt: Prompt) -> list[tuple[TextPiece, tuple[str, ...]]]:
        """The prompt's pieces in order, each with the paths of its images; ends with the generation prompt."""
        if not self.in_pieces:
            return [(self._whole(prompt), prompt.images)]
        parts = [(self.header, ())] if self.header.ids else []
        parts += [(self.demo_piece(demo.question, demo.answer), (demo.image,)) for demo in prompt.demos]
        return [*parts, (self.query_piece(prompt.question), (prompt.image,))]

    def text(self, prompt: Prompt, answer: str | None = None) -> str:
        """The whole prompt as the chat template renders it: with the generation prompt, or with an answer's turn."""
        demos = tuple(Demo(d.image, self.escaped(d.question), self.escaped(d.answer)) for d in prompt.demos)
        escaped = Prompt(demos, prompt.image, self.escaped(prompt.question))
        return self.render(self.format.messages(escaped, answer), answer is None)

    def escaped(self, text: str) -> str:
        """A question or answer as it goes into a prompt: the model's control tokens in it are plain text."""
        plain = self.rules.escaped(text)
        if plain != text and text not in self._told:
            self._told.add(text)
            log.warning(
                "the text %r holds %s, a control token of the model; it is asked as %r",
                text[:80], self.rules.controls(text)[0], plain[:80],
            )  # fmt: skip
        return plain

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The answer's tokens as they occur in the assistant turn (blanks around it do not count).

        Raises:
            UnscorableAnswerError: the answer is empty or does not survive tokenising (its tokens decode to something
                else).
        """
        return self.answer(answer.strip())[0]

    def closing_ids(self, answer: str) -> tuple[int, ...]:
        """The tokens that stand behind the answer; the first of them ends the assistant's turn."""
        return self.answer(answer.strip())[1]

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _whole(self, prompt: Prompt) -> TextPiece:
        text = self.text(prompt)
        return TextPiece(text, self._checked(text, len(prompt.images)))

    def _demo_piece(self, question: str, answer: str) -> TextPiece:
        demo = Demo("", self.escaped(question), self.escaped(answer))
        text = self._after_anchor(self._anchor + self.format.messages(Prompt((demo,), "", ""))[-3:-1], False)
        return TextPiece(text, self._checked(text, 1))

    def _query_piece(self, question: str) -> TextPiece:
        messages = self.format.messages(Prompt((), "", self.escaped(question)))
        text = self._after_anchor(self._anchor + messages[-1:], True)
        return TextPiece(text, self._checked(text, 1))

    def _after_anchor(self, messages: list[dict], generation: bool) -> str:
        text = self.render(messages, generation)
        if not text.startswith(self._anchor_text):
            raise UsageError(
                "the chat template changes earlier turns when later ones are added: prompts have no common prefixes"
            )
        return text[len(self._anchor_text) :]

    def _checked(self, text: str, images: int) -> tuple[int, ...]:
        ids = tuple(self.encode(text))
        if ids.count(self.image_token_id) != images:
            raise UsageError(
                f"a prompt with {images} image(s) has {ids.count(self.image_token_id)} image tokens: a text in it "
                f"holds the model's image token as text, in {text[:80]!r}"
            )
        return ids

    def _check_generation_prompt(self) -> None:
        opened, bare = self.render(self._anchor[:-1], True), self.render(self._anchor[:-1], False)
        if not opened.startswith(bare) or len(opened) == len(bare):
            raise DamagedInputError("the chat template has no generation prompt: answers cannot be placed")

    def _answer(self, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return answer_span(self.tokenizer, self.render, self.format, answer, self._special)

    def _cut(self) -> None:
        """Find the header and decide whether prompts may be composed of pieces."""
        alone = self.render(self.format.messages(Prompt((Demo("", "b", "c"),), "", ""))[:-1], False)
        piece = self._after_anchor_or_none("b", "c")
        if piece is None or not alone.endswith(piece):
            return
        text = alone[: len(alone) - len(piece)]
        self.header = TextPiece(text, tuple(self.encode(text)) if text else ())
        self.in_pieces = True
        self.in_pieces = all(self._composes(prompt) for prompt in _trial_prompts())

    def _after_anchor_or_none(self, question: str, answer: str) -> str | None:
        text = self.render(
            self._anchor + self.format.messages(Prompt((Demo("", question, answer),), "", ""))[-3:-1], False
        )
        return text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else None

    def _composes(self, prompt: Prompt) -> bool:
        composed = [i for piece, _ in self.pieces(prompt) for i in piece.ids]
        return composed == self.encode(self.text(prompt))


def special_ids(tokenizer: object) -> set[int]:
    """Ids of a tokenizer that are no text."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def answer_span(
    tokenizer: object,
    render: Callable[[list[dict], bool], str],
    prompt_format: PromptFormat,
    answer: str,
    special: set[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids of the answer, ids that close the turn behind it), found in the ids of a whole assistant turn.

    Raises:
        UnscorableAnswerError: the answer is empty or does not survive tokenising (its tokens decode to something else).
    """
    user = prompt_format.messages(Prompt((), "", "a question"))
    opened, closed = render(user, True), render([*user, prompt_format._assistant(answer)], False)
    before = tokenizer(opened, add_special_tokens=False)["input_ids"]
    full = tokenizer(closed, add_special_tokens=False)["input_ids"]
    if not answer or not closed.startswith(opened) or full[: len(before)] != before:
        raise UnscorableAnswerError(
            f"the answer {answer!r} cannot be scored: it is empty or merges with the template before it"
        )
    span = full[len(before) :]
    stop = next((i for i, token in enumerate(span) if token in special), len(span))
    span, tail = span[:stop], span[stop:]
    decoded = tokenizer.decode(span, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    same = unicodedata.normalize("NFC", decoded).strip() == unicodedata.normalize("NFC", answer)
    if not tail or not span or not same:
        raise UnscorableAnswerError(f"the answer {answer!r} cannot be scored: its tokens decode to {decoded!r}")
    return tuple(span), tuple(tail)


def _trial_prompts() -> Sequence[Prompt]:
    demos = [Demo("", question, answer) for question, answer in _TRIALS]
    return [
        Prompt(tuple(demos[start:stop]), "", demos[stop % len(demos)].question)
        for start in range(3)
        for stop in range(start, 6)
    ]
