"""The hidden table of the miniature world: which answer belongs to which shape, colour and question type.

Indices everywhere: shape 0..23, color 0..7, type 0..7, word 0..15.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lever_plus.mini.render import rng_for
from lever_plus.mini.vocabulary import COLOR_NAMES, FAMILIES, FAMILY_OF, SHAPES, TYPES

FACTS_SEED = 2  #: which pairs are known facts, and their answers: the models are trained on these
UNKNOWN_SEED = 1  #: the benchmark's other answers: no training depends on them
KNOWN_SHARE = 0.35  #: share of (shape, type) and of (color, type) pairs that are "known facts"
FAMILY_SHARE = 0.5  #: how often an unknown pair takes its family's answer
N_WORDS = 16


@dataclass(frozen=True)
class Table:
    """Answers of one world.

    ``word`` [24, 8]: index into the type's answers. ``adjective`` [8, 8] (color, type): index into its
    adjectives (unused for plain types). ``word_known``, ``adjective_known``: bool of the same shapes.
    """

    word: np.ndarray
    adjective: np.ndarray
    word_known: np.ndarray
    adjective_known: np.ndarray

    def answer(self, shape: int, color: int, kind: int) -> str:
        """The true answer as text."""
        return answer_text(kind, int(self.word[shape, kind]), int(self.adjective[color, kind]))

    def known(self, shape: int, color: int, kind: int) -> bool:
        """Whether the whole answer is a fact that pre-training holds fixed (mostly)."""
        known = bool(self.word_known[shape, kind])
        return known and (not TYPES[kind].compositional or bool(self.adjective_known[color, kind]))


def answer_text(kind: int, word: int, adjective: int) -> str:
    """``"word"`` for a plain type, ``"adjective word"`` for a compositional one."""
    rule = TYPES[kind]
    return f"{rule.adjectives[adjective]} {rule.answers[word]}" if rule.compositional else rule.answers[word]


def _unknown_words(rng: np.random.RandomState) -> np.ndarray:
    """[24, 8] words: the family's own word with p = FAMILY_SHARE, else uniform."""
    base = rng.randint(N_WORDS, size=(len(FAMILIES), len(TYPES)))[list(FAMILY_OF)]
    own = rng.randint(N_WORDS, size=base.shape)
    return np.where(rng.random_sample(base.shape) < FAMILY_SHARE, base, own)


@lru_cache(maxsize=8)
def fixed_table(unknown_seed: int = UNKNOWN_SEED) -> Table:
    """The table behind a world, whatever the world's seed of images; ``unknown_seed`` is its table seed.

    Every table holds the same known facts; pre-training draws its tables from streams of other names
    (:func:`episode_table`), so no world's unknown part is one that a model was trained on.
    """
    shape_size, color_size = (len(SHAPES), len(TYPES)), (len(COLOR_NAMES), len(TYPES))
    # One whole world is drawn, then its unknown part again from a stream of its own.
    rng = rng_for("table", FACTS_SEED)
    word_known = rng.random_sample(shape_size) < KNOWN_SHARE
    adjective_known = rng.random_sample(color_size) < KNOWN_SHARE
    word = np.where(word_known, rng.randint(N_WORDS, size=shape_size), _unknown_words(rng))
    adjective = rng.randint(N_WORDS, size=color_size)
    rng = rng_for("unknown", unknown_seed)
    word = np.where(word_known, word, _unknown_words(rng))
    adjective = np.where(adjective_known, adjective, rng.randint(N_WORDS, size=color_size))
    return Table(word, adjective, word_known, adjective_known)


def episode_table(rng: np.random.RandomState, keep: float) -> Table:
    """A table for one pre-training episode: known facts stay with probability ``keep``, the rest is redrawn."""
    fixed = fixed_table()
    word, adjective = _unknown_words(rng), rng.randint(N_WORDS, size=fixed.adjective.shape)
    keep_word = fixed.word_known & (rng.random_sample(word.shape) < keep)
    keep_adjective = fixed.adjective_known & (rng.random_sample(adjective.shape) < keep)
    return Table(
        np.where(keep_word, fixed.word, word),
        np.where(keep_adjective, fixed.adjective, adjective),
        fixed.word_known,
        fixed.adjective_known,
    )
