"""The benchmark's gates, recomputed from the committed weights on the fixed world."""

from pathlib import Path

import numpy as np
import pytest

from lever_plus import paths
from lever_plus.mini import gates, world
from lever_plus.settings.shared import SharedSettings


@pytest.fixture(scope="module")
def fixed_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates") / "mini_okvqa"
    world.generate(folder)
    return folder


@pytest.fixture(scope="module")
def numbers(fixed_world: Path) -> dict[str, float]:
    return gates.measure(fixed_world, n=200, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("gate", gates.GATES, ids=[gate[0] for gate in gates.GATES])
def test_gate(gate: tuple, numbers: dict[str, float]) -> None:
    name, value, threshold, side = gate
    assert side * value(numbers) >= side * threshold, f"{name}: {value(numbers)} against {threshold}"


@pytest.mark.slow
def test_more_good_demonstrations_never_hurt_much(numbers: dict[str, float]) -> None:
    assert numbers["oracle_2"] >= numbers["oracle_1"] - 3
    assert numbers["pool_oracle_2"] >= numbers["pool_oracle_1"] - 3


def test_oracle_picks_cover_a_compositional_question_best_first() -> None:
    def row(shape: str, color: str, kind: str = "material", compositional: bool = True) -> gates.Row:
        return gates.Row("", "", (), shape, color, kind, compositional, False, "")

    query = row("arrow", "red")
    pool = [row("heart", "red"), row("arrow", "blue"), row("arrow", "red", "place", False), row("heart", "blue")]
    picks = gates.oracle_picks(query, pool, 2, np.random.RandomState(0))
    assert picks == [1, 0]  # the shape's noun first, then the colour's adjective
    assert gates.oracle_picks(query, [*pool, row("arrow", "red")], 1, np.random.RandomState(0)) == [4]


def test_auc_by_hand() -> None:
    assert gates.auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == 0.75
    assert gates.auc(np.array([1.0, 1.0]), np.array([True, False])) == 0.5


@pytest.fixture(scope="module")
def known_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates") / "mini_known"
    given = paths.dataset(SharedSettings(dataset="mini_known")).generator_args
    world.generate(folder, **{**given, "n_train": 3000})  # shares and difficulty do not depend on the number
    return folder


@pytest.fixture(scope="module")
def known_numbers(known_world: Path) -> dict[str, float]:
    return gates.measure(known_world, n=200, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("gate", gates.MISLEADING_GATES, ids=[gate[0] for gate in gates.MISLEADING_GATES])
def test_gate_of_a_world_that_misleads(gate: tuple, known_numbers: dict[str, float]) -> None:
    assert gates.gates_of(known_numbers) is gates.MISLEADING_GATES
    name, value, threshold, side = gate
    assert side * value(known_numbers) >= side * threshold, f"{name}: {value(known_numbers)} against {threshold}"
