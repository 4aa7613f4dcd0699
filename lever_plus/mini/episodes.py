"""Pre-training episodes: sequences of questions about pictures over a table that is redrawn every time.

An episode is what an in-context prompt looks like: items (image, question, answer), some of which repeat a
pair seen before, so that the answer can only be read off the earlier item.
"""

from dataclasses import dataclass

import numpy as np

from lever_plus.mini.table import N_WORDS, Table, answer_text, episode_table
from lever_plus.mini.vocabulary import COLOR_NAMES, SHAPES, TYPES


@dataclass(frozen=True, slots=True)
class EpisodeConfig:
    """How episodes are drawn; probabilities in [0, 1].

    ``keep``: a known fact stays fixed. ``repeat`` / ``repeat_last``: an item (the last item) takes up a pair
    shown before. ``drift``: an item leaves the episode's own shapes and types. ``wrong``: an item shows a wrong
    answer (it then carries no loss). ``wide_start`` to ``wide_end`` over ``wide_steps`` steps: the share of
    episodes over 2-7 shapes and 2-8 types; the others have 1-3 shapes and 1-2 types.
    ``compositional_weight``: how much likelier a compositional type is than a plain one.
    """

    keep: float = 0.8
    repeat: float = 0.45
    repeat_last: float = 0.65
    drift: float = 0.15
    wrong: float = 0.03
    wide_start: float = 0.1
    wide_end: float = 0.8
    wide_steps: int = 1500
    compositional_weight: float = 2.0
    min_items: int = 3
    max_items: int = 7


@dataclass(frozen=True, slots=True)
class Item:
    """One item. ``shown`` says which parts an earlier, right item of the episode has shown: ``(word, adjective)``."""

    shape: int
    color: int
    kind: int
    paraphrase: int
    answer: str
    wrong: bool
    known: bool
    shown: tuple[bool, bool]


def episode(config: EpisodeConfig, step: int, n_items: int, rng: np.random.RandomState) -> list[Item]:
    """Draw one episode of ``n_items`` items as it is at training step ``step``."""
    table = episode_table(rng, config.keep)
    progress = min(1.0, step / config.wide_steps)
    wide = rng.random_sample() < config.wide_start + progress * (config.wide_end - config.wide_start)
    shapes = rng.permutation(len(SHAPES))[: rng.randint(2, 8) if wide else rng.randint(1, 4)]
    weights = np.array([config.compositional_weight if kind.compositional else 1.0 for kind in TYPES])
    n_kinds = rng.randint(2, 9) if wide else rng.randint(1, 3)
    kinds = rng.choice(len(TYPES), n_kinds, replace=False, p=weights / weights.sum())
    colors = rng.permutation(len(COLOR_NAMES))[: rng.randint(2, 9) if wide else rng.randint(1, 4)]
    items: list[Item] = []
    for index in range(n_items):
        again = rng.random_sample() < (config.repeat_last if index == n_items - 1 else config.repeat)
        if items and again:
            shape, color, kind = _repeat(items, colors, rng)
        elif rng.random_sample() < config.drift:
            shape, color, kind = rng.randint(len(SHAPES)), rng.randint(len(COLOR_NAMES)), rng.randint(len(TYPES))
        else:
            shape, color, kind = rng.choice(shapes), rng.choice(colors), rng.choice(kinds)
        items.append(_item(int(shape), int(color), int(kind), table, items, config.wrong, rng))
    return items


def _repeat(items: list[Item], colors: np.ndarray, rng: np.random.RandomState) -> tuple[int, int, int]:
    """A pair seen before. For a compositional type usually one whose adjective was seen, too."""
    first = items[rng.randint(len(items))]
    color = int(rng.choice(colors))
    if TYPES[first.kind].compositional and rng.random_sample() < 0.75:
        same_kind = [item for item in items if item.kind == first.kind]
        color = same_kind[rng.randint(len(same_kind))].color
    return first.shape, color, first.kind


def _item(
    shape: int, color: int, kind: int, table: Table, before: list[Item], wrong: float, rng: np.random.RandomState
) -> Item:
    is_wrong = rng.random_sample() < wrong
    answer = table.answer(shape, color, kind)
    if is_wrong:
        answer = answer_text(kind, rng.randint(N_WORDS), rng.randint(N_WORDS))
    right = [item for item in before if item.kind == kind and not item.wrong]
    shown = (any(item.shape == shape for item in right), any(item.color == color for item in right))
    return Item(shape, color, kind, rng.randint(3), answer, is_wrong, table.known(shape, color, kind), shown)
