"""A planted RL problem: RL data whose truth is known, to test training without an LVLM.

``python -m lever_plus.rl.planted --out DIR`` writes ``rl_data.json``, ``embeddings.pt`` and ``heldout.json``;
``python -m lever_plus.rl.planted --out DIR --evaluate CHECKPOINT...`` prints the policy's value on the held-out
queries.

An item is a topic plus what the embedding mostly shows but what does not matter. A pointer answers its query
with a probability that rises with how well its picks' topics agree with the query's. Raw cosine therefore helps,
and a learned metric helps much more. With the defaults a random pointer is right in about 0.35 of the cases, the
most similar candidates in about 0.69, the best in about 0.91.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lever_plus import io
from lever_plus.cli import guard
from lever_plus.data.rl_data import RlCandidate, RlData, RlQuery, save_rl_data
from lever_plus.selectors import PointerSelector
from lever_plus.selectors.policy import picks
from open_mmicl.arguments import Parser


@dataclass(frozen=True)
class PlantedWorld:
    """What is drawn. Rates are probabilities in [0, 1]."""

    queries: int = 800
    heldout: int = 400
    items: int = 3000
    pool: int = 64
    pointers: int = 12
    shots: int = 2
    dim: int = 128
    topic_dim: int = 6
    nuisance: float = 2.4  # length of what does not matter, in units of the topic's
    floor: float = 0.3  # probability of a right answer without any help
    ceiling: float = 0.935
    sharpness: float = 10.0
    threshold: float = 0.45  # cosine of topics at which help is half of what it can be
    beam_score: bool = True
    reward_noise: float = 0.1
    seed: int = 0


class Planted:
    """One drawn world: embeddings, and the true success probability of any pointer."""

    def __init__(self, world: PlantedWorld) -> None:
        self.world = world
        self.rng = np.random.default_rng(world.seed)
        topic = _unit(self.rng.standard_normal((world.items, world.topic_dim)))
        rest_dim = world.dim - world.topic_dim
        rest = _unit(self.rng.standard_normal((world.items, rest_dim))) * world.nuisance
        mixing = np.linalg.qr(self.rng.standard_normal((world.dim, world.dim)))[0]
        self.topic = topic
        self.embeddings = _unit(np.concatenate([topic, rest], 1) @ mixing).astype(np.float32)
        order = self.rng.permutation(world.items)
        self.train_queries = order[: world.queries]
        self.heldout_queries = order[world.queries : world.queries + world.heldout]

    def pool_of(self, query: int) -> np.ndarray:
        """A random pool without the query itself."""
        others = self.rng.choice(self.world.items - 1, self.world.pool, replace=False)
        return others + (others >= query)

    def success(self, query: int, picks: np.ndarray) -> np.ndarray:
        """True probability of a right answer, picks (..., S) global ids -> (...).

        The first pick counts twice as much as the second, and so on down. Without any pick it is the floor.
        """
        w = self.world
        if picks.shape[-1] == 0:
            return np.full(picks.shape[:-1], w.floor)
        cosine = self.topic[picks] @ self.topic[query]  # (..., S)
        weights = 0.5 ** np.arange(cosine.shape[-1])
        fit = (cosine * weights).sum(-1) / weights.sum()
        return w.floor + (w.ceiling - w.floor) / (1 + np.exp(-w.sharpness * (fit - w.threshold)))

    def rl_query(self, query: int) -> RlQuery:
        """Scored pointers: half near the query by cosine, as beams and samples would be, the rest random."""
        w, pool = self.world, self.pool_of(query)
        cosine = self.embeddings[pool] @ self.embeddings[query]
        near, candidates, seen = np.argsort(-cosine)[: max(8, w.shots + 2)], [], set()
        while len(candidates) < w.pointers:
            similar = len(candidates) < w.pointers // 2
            source = near if similar else np.arange(w.pool)
            pointer = tuple(int(p) for p in self.rng.choice(source, w.shots, replace=False))
            if pointer in seen:
                continue
            seen.add(pointer)
            chance = float(self.success(query, pool[list(pointer)]))
            right = bool(self.rng.random() < chance)
            accuracy = float(self.rng.choice([0.3, 0.6, 0.9, 1.0])) if right else 0.0
            score = math.log(chance / w.floor) + w.reward_noise * float(self.rng.standard_normal())
            candidates.append(
                RlCandidate(
                    pointer,
                    "beam" if similar else "random",
                    beam_score=score if w.beam_score and similar else None,
                    vqa_correct=int(right),
                    vqa_acc_score=accuracy,
                    vqa_gt_prob=chance,
                )  # fmt: skip
            )
        return RlQuery(int(query), pool, candidates)

    def write(self, folder: Path) -> None:
        """Write the three files."""
        folder.mkdir(parents=True, exist_ok=True)
        io.save_torch(folder / "embeddings.pt", torch.from_numpy(self.embeddings))
        save_rl_data(folder / "rl_data.json", RlData([self.rl_query(q) for q in self.train_queries], "best_last"))
        heldout = []
        for query in self.heldout_queries:
            pool = self.pool_of(int(query))
            heldout.append({"query_idx": int(query), "pool": pool.tolist()})
        io.write_json(folder / "heldout.json", {"world": vars(self.world), "queries": heldout})


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def policy_value(folder: Path, selector: PointerSelector) -> dict[str, float]:
    """True success probability of the greedy pointers on held-out queries, beside random, cosine and the oracle."""
    heldout = io.read_json(folder / "heldout.json", "held-out truth")
    world = Planted(PlantedWorld(**heldout["world"]))
    queries = np.array([q["query_idx"] for q in heldout["queries"]])
    pools = np.array([q["pool"] for q in heldout["queries"]])
    embeddings = torch.from_numpy(world.embeddings)
    shots = world.world.shots
    chosen_by_policy = picks(selector.select(embeddings[queries], embeddings[pools], shots))
    rng = np.random.default_rng(1)
    values: dict[str, list[float]] = {"policy": [], "random": [], "cosine": [], "oracle": []}
    for i, query in enumerate(queries):
        pool = pools[i]
        nearest = np.argsort(-(world.embeddings[pool] @ world.embeddings[query]))[:shots]
        best = np.argsort(-(world.topic[pool] @ world.topic[query]))[:shots]
        chosen = {"policy": chosen_by_policy[i], "random": rng.choice(len(pool), shots, replace=False),
                  "cosine": nearest, "oracle": best}  # fmt: skip
        for name, positions in chosen.items():
            values[name].append(float(world.success(int(query), pool[np.asarray(positions, dtype=np.int64)])))
    return {name: float(np.mean(v)) for name, v in values.items()}


def main(argv: Sequence[str]) -> int:
    """Command line."""
    parser = Parser(prog="python -m lever_plus.rl.planted", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, nargs="*")
    for name, default in vars(PlantedWorld()).items():
        kind = (lambda text: text not in ("0", "false")) if isinstance(default, bool) else type(default)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default)
    options = vars(parser.parse_args(argv))
    folder, checkpoints = options.pop("out"), options.pop("evaluate")

    def body() -> int:
        if checkpoints is None:
            Planted(PlantedWorld(**options)).write(folder)
            print(f"wrote rl_data.json, embeddings.pt and heldout.json to {folder}")
            return 0
        for path in checkpoints:
            values = policy_value(folder, PointerSelector.load(path))
            print(f"{path.name}: " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
        return 0

    return guard(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
