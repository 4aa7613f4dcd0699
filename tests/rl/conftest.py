import functools

import pytest
import torch

from lever_plus.rl import deepspeed_engine
from lever_plus.rl.groups import build_groups, split
from lever_plus.rl.objectives import GrpoObjective, KlControl, RceObjective
from lever_plus.rl.planted import Planted, PlantedWorld
from lever_plus.rl.rewards import RewardRule, reward
from lever_plus.rl.trainer import Options, Phase, Trainer
from lever_plus.selectors import PointerSelector, SelectorConfig

SMALL = PlantedWorld(queries=40, heldout=30, items=120, pool=9, pointers=5, dim=20, seed=3)


@functools.lru_cache
def small_world():
    return Planted(SMALL)


@functools.lru_cache
def small_data():
    from lever_plus.data.rl_data import RlData

    world = small_world()
    return RlData([world.rl_query(int(q)) for q in world.train_queries], "best_last")


class Small:
    """A small planted problem with everything that a test may want to vary."""

    def __init__(self, rule=None):
        self.world = small_world()
        table = torch.from_numpy(self.world.embeddings)
        rule = rule or RewardRule()
        self.groups = build_groups(small_data(), table, functools.partial(reward, rule=rule))

        self.train, self.val = split(self.groups, torch.arange(len(table)).numpy(), 0.25, 0)

    @staticmethod
    def selector(seed=0, **options):
        torch.manual_seed(seed)
        return PointerSelector(SelectorConfig(**{"input_dim": 20, "hidden_dim": 16, **options}))

    def trainer(self, folder, train=None, val=None, **options):
        options = Options(**{"batch_size": 8, "seed": 1, **options})
        processes = deepspeed_engine.start_processes("cpu")
        train, val = self.train if train is None else train, self.val if val is None else val
        return Trainer(folder, processes, options, train, val)

    @staticmethod
    def phases(rce=2, grpo=2, lr=1e-3, beta=0.1, mode="clipped", **options):
        return [
            Phase("rce", rce, lr, RceObjective(2.0, 0.5)),
            Phase("grpo", grpo, lr, GrpoObjective(KlControl(beta), mode, **options)),
        ]


@pytest.fixture
def small():
    return Small()
