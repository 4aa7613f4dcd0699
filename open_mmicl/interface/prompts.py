"""What is asked of the model: demonstrations, a query, and the words around them.

Legend: a *demonstration* (ICD) is image + question + answer; a *prompt* is the demonstrations in
the order in which they stand before the query, then the query's image and question.
"""

import hashlib
import json
from dataclasses import dataclass

from open_mmicl.errors import UsageError


@dataclass(frozen=True, slots=True)
class Demo:
    """One in-context demonstration. ``image`` is a file path."""

    image: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Demonstrations in prompt order (the last one stands next to the query), then the query."""

    demos: tuple[Demo, ...]
    image: str
    question: str

    @property
    def images(self) -> tuple[str, ...]:
        """Image paths in prompt order, the query's last."""
        return (*(demo.image for demo in self.demos), self.image)


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The words of the prompt; the model's own chat template stands around them.

    ``user_template`` holds ``<Q>`` once. ``system`` is the system message; empty means that none is
    given (the chat template may then insert its own).
    """

    system: str = ""
    user_template: str = "Question:<Q> Short answer:"

    def __post_init__(self) -> None:
        if self.user_template.count("<Q>") != 1:
            raise UsageError(f"user_template must hold <Q> exactly once, got {self.user_template!r}")

    def messages(self, prompt: Prompt, answer: str | None = None) -> list[dict]:
        """Chat messages in the transformers layout: one user/assistant turn per demonstration, then the
        query's user turn; with ``answer``, a last assistant turn that holds it.
        """
        turns: list[dict] = []
        if self.system:
            turns.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        for demo in prompt.demos:
            turns += [self._user(demo.image, demo.question), self._assistant(demo.answer)]
        turns.append(self._user(prompt.image, prompt.question))
        if answer is not None:
            turns.append(self._assistant(answer))
        return turns

    def fingerprint(self) -> str:
        """Changes whenever a word of the prompt would change; part of every answer-cache key."""
        text = json.dumps([self.system, self.user_template])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _user(self, image: str, question: str) -> dict:
        text = self.user_template.replace("<Q>", question)
        return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}

    @staticmethod
    def _assistant(answer: str) -> dict:
        return {"role": "assistant", "content": [{"type": "text", "text": answer}]}
