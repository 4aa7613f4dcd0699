"""What a tokenizer makes of texts that are not the project's own: control tokens in them, and what it cannot say."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_BATCH = 4096


class TextRules:
    """The control tokens of one tokenizer: its special tokens, and added ones that are written as markup.

    A question or answer that holds one would open or close a turn, or claim an image. Such a text is *escaped*: a
    blank behind the token's first character, after which it is plain text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        controls = {i: text for i, text in added.items() if i in special or _MARKUP.fullmatch(text)}
        controls |= {i: tokenizer.convert_ids_to_tokens(i) for i in special}
        self.control_ids = frozenset(controls)
        words = sorted({text for text in controls.values() if text and text.strip()}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, words))) if words else re.compile(r"(?!)")

    def controls(self, text: str) -> list[str]:
        """The control tokens that a text holds, in order."""
        return self._pattern.findall(text)

    def escaped(self, text: str) -> str:
        """The text with every control token in it written as plain text."""
        while self._pattern.search(text):
            text = self._pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    def unscorable(self, texts: Iterable[str]) -> set[str]:
        """Those of the texts that are blank, hold a control token, or do not survive tokenising."""
        distinct = sorted(set(texts))
        found = {text for text in distinct if not text.strip() or self._pattern.search(text)}
        rest = [text for text in distinct if text not in found]
        for start in range(0, len(rest), _BATCH):
            found.update(self._changed(rest[start : start + _BATCH]))
        return found

    def _changed(self, texts: Sequence[str]) -> list[str]:
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        back = self.tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [text for text, again in zip(texts, back, strict=True) if _plain(text) != _plain(again)]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()
