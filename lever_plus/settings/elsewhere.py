"""Names of settings that are none here (elsewhere.yaml): those of other projects, of libraries, those that look like
ours.
"""

import functools
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from lever_plus import config

_WORDS = config.read_yaml(Path(__file__).with_suffix(".yaml"))


def _by_name(names_of: dict[str, list[str]]) -> dict[str, str]:
    return {name: told for told, names in names_of.items() for name in names}


ELSEWHERE = _by_name(_WORDS["elsewhere"])
"""What other projects call a setting that has another name here; their values are not taken over."""
NOTHING = _by_name(_WORDS["nothing"])
"""What other projects have a setting for and this one does not, and what it does."""
RELIED_ON = tuple(_WORDS["relied_on"])
"""Names of libraries on which a run depends: one misspelt would change what is run, and where."""
_OF_LIBRARIES, _SECRET = tuple(_WORDS["libraries"]), tuple(_WORDS["secret"])
_EXACT, _OF_THE_FIELD, _OF_TRAINING = (frozenset(_WORDS[key]) for key in ("exact", "of_the_field", "of_training"))


def of_a_library(name: str) -> bool:
    """Whether a library or program reads a variable of this name: a ``.env`` may hold it."""
    upper = name.upper()
    if upper in _EXACT or upper.startswith(_OF_LIBRARIES):
        return True
    return upper.endswith(_SECRET) and not words_of(upper) & _OF_THE_FIELD


def words_of(name: str) -> frozenset[str]:
    """The words of a name, in capitals, without numbers behind them: V2_LR -> {V, LR}."""
    return frozenset(word.rstrip("0123456789") or "0" for word in name.upper().split("_") if word)


def looks_like_a_setting(name: str, ours: Collection[str]) -> bool:
    """Whether a name, of no library, was probably meant for a training such as ours: it holds a word of the field, or
    several words that all are words of settings. ``ours``: the names of our settings.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or of_a_library(name):
        return False
    words = words_of(name)
    return bool(words & _OF_THE_FIELD) or ("_" in name.strip("_") and words <= _vocabulary(frozenset(ours)))


def same_words(name: str, ours: Iterable[str]) -> str | None:
    """Our setting whose words a name has in another order, or with other words of settings around them; of several,
    the one with most. None where there is none of two words or more.
    """
    names = sorted(ours)
    words = words_of(name)
    if not (words & _OF_THE_FIELD or words <= _vocabulary(frozenset(names))):
        return None
    found = [one for one in names if len(words_of(one)) > 1 and words_of(one) <= words]
    return max(found, key=lambda one: len(words_of(one)), default=None)


@functools.cache
def _vocabulary(ours: frozenset[str]) -> frozenset[str]:
    """The words that names of settings are made of."""
    return frozenset().union(_OF_TRAINING, _OF_THE_FIELD, *map(words_of, ours))
