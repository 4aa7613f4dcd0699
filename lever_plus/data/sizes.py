"""How much a data set has of what settings ask for: queries, candidates, validation questions."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lever_plus import paths
from lever_plus.data import catalog
from lever_plus.data.dataset import load_split
from lever_plus.settings.shared import SharedSettings

SETTINGS = ("candidate_num", "sample_num", "rl_query_num", "test_data_num")


@dataclass(frozen=True)
class Room:
    """The most that a data set gives: ``queries`` of the train split, ``candidates`` that every one of them (and every
    validation question) can be given, ``questions`` of the validation split.
    """

    queries: int
    candidates: int
    questions: int

    def room(self) -> dict[str, int]:
        """The most that a setting can be, by its field (CANDIDATE_NUM: 2 at least, whatever there is)."""
        return dict(zip(SETTINGS, (max(2, self.candidates), self.queries, self.queries, self.questions), strict=True))


def room(settings: SharedSettings) -> dict[str, int]:
    """The most that a setting can be, by its field, where the data set is small enough to be asked each time.

    Of official files the validation questions alone are known without reading them as JSON.
    """
    found = paths.dataset(settings)
    if found.is_small():
        return of(found).room()
    of_val = getattr(settings, "eval_split", "val") == "val"
    count = found.question_count("val", catalog.SMALL) if of_val else None
    return {} if count is None else {"test_data_num": count}


def announcement(several: Sequence[Any], usual: Mapping[str, int]) -> str:
    """Which numbers of some stages' settings are lower than usual since a small data set has no more; "" where none.

    Args:
        usual: the command's own defaults, by field, where they are not the settings'.
    """
    lowered: dict[str, int] = {}
    for settings in several:
        most, default = room(settings), {field.name: field.default for field in dataclasses.fields(settings)}
        for name in most.keys() & default.keys():
            if getattr(settings, name) == most[name] < usual.get(name, default[name]):
                lowered[name.upper()] = most[name]
    told = " ".join(f"{name}={lowered[name]}" for name in map(str.upper, SETTINGS) if name in lowered)
    return f"{several[0].dataset} is small: {told} (all that it has)" if lowered else ""


def of(dataset: catalog.DatasetConfig) -> Room:
    """What a data set has.

    Raises:
        MissingInputError, DamagedInputError: of its files.
    """
    train, val = load_split(dataset, "train"), load_split(dataset, "val")
    images, counts = np.unique(train.image_ids, return_counts=True)
    shared = counts[np.isin(images, np.concatenate([train.image_ids[train.query_rows], val.image_ids]))]
    most = int(shared.max()) if len(shared) else 0
    return Room(len(train.query_rows), len(train) - most, len(val))
