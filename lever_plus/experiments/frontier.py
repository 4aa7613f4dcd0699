"""Accuracy against prompts: what training each arm and rival of the plan cost on the LVLM, and what it reached."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lever_plus import paths
from lever_plus.data import channel_names, methods
from lever_plus.experiments import prices, stats
from lever_plus.experiments.evidence import DERIVED, Table
from lever_plus.settings.experiment import ExperimentSettings

SELECTORS = ("v2", "v1", "v2_lora", "label")
BY_CHANNELS = ("similarity", "sim_lvlm")
Row = dict[str, Any]


def rows(
    settings: ExperimentSettings,
    arms: Mapping[str, dict[str, Any]],
    table: Table,
    rival: Row | None,
    scores: Table | None,
) -> list[Row]:
    """One row for each method, the cheapest first: ``name``, ``prompts``, ``mean`` and ``ci95`` over all its shots.

    ``prompts``: distinct prompts put to the LVLM before the first evaluated query, None where a file does not say
    (brought by the user). Reading the hidden states of the train items is one zero-shot prompt each, and counts.

    Args:
        arms: the records of the arms by name. table: scores of the arms and of the first arm's other methods.
        rival: v2 at v3's price, as the plan's record has it; scores: its table. None where it was not run.
    """
    states = _hidden_states(settings)
    found = {name: _spent(settings, name, arms, states) for name, _ in table.scores if _is_shown(name)}
    cells = {name: _over_shots(table, name) for name in found}
    if rival is not None and scores is not None:
        (name,) = {name for name, _ in scores.scores}
        found[name], cells[name] = prices.total(rival["prompts"], states), _over_shots(scores, name)
    intervals = stats.accuracy_intervals(
        np.stack(list(cells.values()), axis=1), table.images, resamples=settings.bootstrap, seed=settings.data_seed
    )
    made = [
        {"name": name, "prompts": prompts, "mean": mean, "ci95": [low, high]}
        for (name, prompts), (mean, low, high) in zip(found.items(), intervals, strict=True)
    ]
    return sorted(made, key=lambda row: (row["prompts"] is None, row["prompts"] or 0, -row["mean"]))


def _is_shown(name: str) -> bool:
    return not name.startswith(DERIVED) and not methods.decides(name)


def _over_shots(table: Table, name: str) -> np.ndarray:
    """(n,) scores of a method, mean over its shots and runs."""
    return np.clip(np.mean([table.scores[name, shot].mean(axis=0) for shot in table.shots(name)], axis=0), 0, 1)


def _spent(
    settings: ExperimentSettings, name: str, arms: Mapping[str, dict[str, Any]], states: int | None
) -> int | None:
    """The prompts behind a method; ``states``: those of the hidden states."""
    by_labels = settings.v2_mode == "labels"
    if name in arms:
        of_arm = arms[name]["price"]
        return prices.total(states, 0 if by_labels else of_arm["beam_data"], of_arm["rl_data"], of_arm["training"])
    if name in SELECTORS:
        beams = 0 if name == "label" or by_labels else prices.prompts_of(paths.beam_data(settings))
        return prices.total(states, beams)
    return states if name in BY_CHANNELS else 0


def _hidden_states(settings: ExperimentSettings) -> int | None:
    return prices.prompts_of(paths.lvlm_states(settings, "train")) if "lvlm" in channel_names.names(settings) else 0


def reached(made: Sequence[Row]) -> list[str]:
    """The names that no other row beats in both: as few prompts and a higher accuracy."""
    known = [row for row in made if row["prompts"] is not None]
    return [
        row["name"]
        for row in known
        if not any(other["prompts"] <= row["prompts"] and other["mean"] > row["mean"] for other in known)
    ]
