"""Speed of RCE and GRPO training against the naive per-pointer loop, both in one run on the same cores.

    python -m lever_plus.benchmark_rl [--queries 800] [--naive-queries 16] [--dim 768] [--threads 1] [--memory] …

The naive side (tests/reference/naive_rl.py) encodes the pool again for every pointer, one query at a time, in a process
of its own, so that nothing our side sets (how freed memory is kept) is set for it. Our side is a whole epoch of the
trainer: DeepSpeed, pi_old, validation, checkpoint and logs included. The sides alternate; a rate is the median of the
rounds, per CPU second (on a GPU per second). Prints a table and writes a JSON. ``--memory`` only trains on 5,000
queries x 16 pointers x 64 candidates and reports the peak.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lever_plus import config, io, provenance
from lever_plus.benchmark_arch import need_gpu
from lever_plus.best import PHASES
from lever_plus.cli import guard
from lever_plus.data.rl_data import RlData
from lever_plus.rl import deepspeed_engine
from lever_plus.rl.groups import Groups, build_groups
from lever_plus.rl.objectives import GrpoObjective, KlControl, RceObjective
from lever_plus.rl.planted import Planted, PlantedWorld
from lever_plus.rl.rewards import RewardRule, reward
from lever_plus.rl.trainer import Options, Phase, Trainer
from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.settings import names
from open_mmicl.arguments import Parser, whole
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

naive_rl = lazy("tests.reference.naive_rl")


@functools.cache
def planted_groups(world: PlantedWorld) -> Groups:
    """Groups of a planted problem."""
    planted = Planted(world)
    data = RlData([planted.rl_query(int(q)) for q in planted.train_queries], "best_last")
    return build_groups(data, torch.from_numpy(planted.embeddings), functools.partial(reward, rule=RewardRule()))


def naive_rate(world: PlantedWorld, phase: str, queries: int, batch: int, threads: int) -> float:
    """Queries per CPU second of the per-pointer loop over the first ``queries`` groups."""
    torch.set_num_threads(threads)
    groups = planted_groups(world)
    if str(config.REPO_ROOT) not in sys.path:
        sys.path.insert(0, str(config.REPO_ROOT))

    part = groups.take(slice(0, queries))
    embeddings, pools = part.queries, part.table[part.pool_rows]  # (n, d), (n, K, d)
    as_lists = list(zip(embeddings, pools, part.pointers.tolist(), part.rewards.tolist(), strict=True))
    selector = naive_rl.NaiveSelector(groups.table.shape[1])
    optimiser = torch.optim.AdamW(selector.parameters(), lr=1e-4)
    naive_rl.naive_epoch(phase, selector, optimiser, as_lists[:2], batch=batch)  # first calls cost extra
    started = time.process_time()
    naive_rl.naive_epoch(phase, selector, optimiser, as_lists, batch=batch)
    return queries / (time.process_time() - started)


def our_rate(groups: Groups, phase: str, options: argparse.Namespace) -> float:
    """Queries per CPU second (on a GPU per second) of whole epochs, the median of ``options.epochs``."""
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    started: list[float] = []

    def note_start(*_: Any) -> None:
        started.append(clock())

    torch.manual_seed(0)
    selector = PointerSelector(SelectorConfig(input_dim=groups.table.shape[1]))
    objective = RceObjective(2.0, 0.5) if phase == "rce" else GrpoObjective(KlControl(0.05))
    val = groups.take(slice(0, max(1, len(groups) // 10)))
    with tempfile.TemporaryDirectory() as folder:
        settings = Options(batch_size=options.batch, zero_stage=options.zero_stage)
        trainer = Trainer(Path(folder), deepspeed_engine.start_processes(options.device), settings, groups, val)
        # An epoch lasts from its start to that of the next: one more is trained than is counted.
        trainer.run(selector, [Phase(phase, options.epochs + 1, 1e-4, objective, refresh=note_start)])
    return len(groups) / statistics.median(b - a for a, b in itertools.pairwise(started))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one run."""
    torch.set_num_threads(options.threads)
    world = PlantedWorld(
        queries=options.queries, heldout=1, items=max(3000, options.queries + 65), pool=options.pool,
        pointers=options.pointers, dim=options.dim,
    )  # fmt: skip
    groups = planted_groups(world)
    found: dict[str, Any] = {"settings": vars(options) | {"out": str(options.out)}, "phases": {}}
    queries = min(options.naive_queries, options.queries)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        sides = {phase: [
            (other.submit(naive_rate, world, phase, queries, options.batch, options.threads).result(),
             our_rate(groups, phase, options))
            for _ in range(options.rounds)
        ] for phase in PHASES}  # fmt: skip
    for phase, rounds in sides.items():
        naive, ours = (statistics.median(side) for side in zip(*rounds, strict=True))
        found["phases"][phase] = {
            "naive_queries_per_s": round(naive, 2), "ours_queries_per_s": round(ours, 1),
            "speedup": round(statistics.median(b / a for a, b in rounds), 1),
            "speedup_of_rounds": [round(b / a, 1) for a, b in rounds],
        }  # fmt: skip
    found["peak_memory_mib"] = peak_mib()
    return found


def peak_mib() -> int:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 if sys.platform == "linux" else 1 << 20)


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory and time per epoch of the large problem."""
    torch.set_num_threads(options.threads)
    groups = planted_groups(PlantedWorld(queries=5000, heldout=1, items=9000, pool=64, pointers=16, dim=768))
    rates = {phase: round(our_rate(groups, phase, options), 1) for phase in PHASES}
    return {"queries": 5000, "pointers": 16, "queries_per_s": rates, "peak_memory_mib": peak_mib()}


def main(argv: Sequence[str]) -> int:
    """Command line."""
    parser = Parser(prog="python -m lever_plus.benchmark_rl", description=__doc__.split("\n")[0])
    whole_numbers = {
        "queries": (800, whole(10, 1_000_000), "queries of our side's epochs"),
        "naive-queries": (16, whole(1), "queries of the naive side's epoch"),
        "pointers": (12, whole(2, 256), "scored pointers per query"),
        "pool": (64, whole(8, 2048), "candidates per query"),
        "dim": (768, whole(16, 4096), "width of an embedding"),
        "batch": (32, whole(1), "queries per optimiser step"),
        "epochs": (2, whole(1), "epochs of each phase and round that are counted"),
        "rounds": (3, whole(1), "rounds in which the sides alternate"),
        "threads": (1, whole(1, 1024), "threads of both sides"),
        "zero-stage": (0, whole(0, 3), "DeepSpeed's ZeRO stage"),
    }
    for name, (default, kind, what) in whole_numbers.items():
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{what} (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of our side (%(default)s)")
    parser.add_argument("--memory", action="store_true", help="only the large problem: its peak memory")
    out = config.HOME / "results" / "benchmark" / "rl.json"
    parser.add_argument("--out", type=Path, default=out, help="the JSON that is written (results/benchmark/rl.json)")
    options = parser.parse_args(argv)

    def body() -> int:
        names.tell([])
        if options.pointers > options.pool * (options.pool - 1) // 2:  # drawn until so many are distinct
            raise UsageError(f"--pointers={options.pointers} are too many for a pool of {options.pool}: enlarge --pool")
        if options.device == "cuda":
            need_gpu()
        found = measure_memory(options) if options.memory else measure(options)
        found |= {"threads": options.threads, "provenance": provenance.provenance()}
        out = options.out.with_name(options.out.stem + "_memory.json") if options.memory else options.out
        io.write_json(out, found, indent=1)
        if options.memory:
            print(json.dumps({k: v for k, v in found.items() if k != "provenance"}))
        else:
            print(f"{'phase':<6}{'naive queries/s':>17}{'ours queries/s':>16}{'times':>8}")
            for phase, row in found["phases"].items():
                print(
                    f"{phase:<6}{row['naive_queries_per_s']:>17.2f}{row['ours_queries_per_s']:>16.1f}{row['speedup']:>8.1f}"
                )
        print(f"written to {out}")
        return 0

    return guard(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
