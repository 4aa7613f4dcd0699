"""What every method of an evaluation picks for each query, and which queries those are."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lever_plus import paths
from lever_plus.data import channel_names, rivals
from lever_plus.data.channels import Tables, load_tables
from lever_plus.data.dataset import VqaSplit, load_split, split_by_image
from lever_plus.data.methods import CHANNEL_SIMILARITY, answered, decides, fixed_of
from lever_plus.registries import RIVALS
from lever_plus.selectors import PointerSelector
from lever_plus.selectors.policy import FixedShots, picks
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import adaptive, lvlm
from open_mmicl import retriever
from open_mmicl.errors import UsageError


class Evaluated(NamedTuple):
    """What an evaluation asks about: the rows (Q,) of ``queries`` and each one's pool (Q, K) of train rows."""

    train: VqaSplit
    queries: VqaSplit
    rows: np.ndarray
    pools: np.ndarray

    @property
    def split(self) -> str:
        """The queries' split."""
        return "train" if self.queries is self.train else "val"


def evaluated(settings: InferenceSettings) -> Evaluated:
    """The queries of an evaluation and their pools. Raises: as :func:`query_rows` and the readers of the data set."""
    train = load_split(paths.dataset(settings), "train")
    queries = train if settings.eval_split == "train_val" else load_split(paths.dataset(settings), "val")
    rows = query_rows(settings, queries, train)
    pools = lvlm.query_pools(settings, queries, rows, train, "train" if queries is train else "val")
    return Evaluated(train, queries, rows, pools)


def query_rows(settings: InferenceSettings, queries: Any, train: Any) -> np.ndarray:
    """Rows of the evaluated queries: a shuffle by DATA_SEED, so that n = 200 is part of n = 400.

    Raises:
        UsageError: more asked for than there are.
    """
    if settings.eval_split == "train_val":
        _, rows = split_by_image(train.query_rows, train.image_ids, settings.val_fraction, settings.data_seed)
        rows = np.asarray(rows, dtype=np.int64)
    else:
        rows = np.arange(len(queries), dtype=np.int64)
    rows = np.random.default_rng([settings.data_seed, 1]).permutation(rows)
    count = len(rows) if settings.test_data_num < 0 else settings.test_data_num
    if count > len(rows) or count == 0:
        raise UsageError(
            f"TEST_DATA_NUM={settings.test_data_num} is not allowed: -1, or 1 to {len(rows)} "
            f"(the queries of {settings.eval_split})"
        )
    return rows[:count]


def plan_jobs(
    settings: InferenceSettings,
    methods: list[str],
    selectors: dict[str, Path],
    rows: np.ndarray,
    pools: np.ndarray,
    queries: Any,
    train: Any,
) -> list[dict[str, Any]]:
    """What every query is asked: [{"method", "shot", "seed", "icds": [Q][at most shot] train rows, best first}]."""
    split, most = "train" if queries is train else "val", settings.max_eval_shot
    tables = load_tables(channel_names.table_files(settings, split), len(train), len(queries))
    own = {"v2_lora": lora_tables(settings, split, len(train), len(queries))} if "v2_lora" in selectors else {}
    policies = {name: PointerSelector.load(path, own.get(name, tables).widths) for name, path in selectors.items()}
    pickers: dict[str, list[tuple[int | None, Any]]] = {
        "random": [(seed, retriever.RandomRetriever(seed)) for seed in range(settings.random_seeds)],
        "similarity": [(None, retriever.SimilarityRetriever())],
        "zero_shot": [(None, retriever.ZeroRetriever())],
        **{
            name: [(None, retriever.SimilarityRetriever(tables.dimensions(channel)))]
            for name, channel in CHANNEL_SIMILARITY.items()
            if name in methods
        },
        **{name: [(None, retriever.SelectorRetriever(name, FixedShots(policy)))] for name, policy in policies.items()},
    }
    features = functools.cache(lambda of: lvlm.modality_features(settings, split if of == "queries" else "train"))
    jobs: list[dict[str, Any]] = []
    for method in answered(methods):
        if method == adaptive.METHOD:
            jobs.append(adaptive_job(policies["v3"], blocks(tables, rows, pools), most))
            continue
        if method in RIVALS:
            picked = [(None, rivals.picks(method, rivals.Asking(queries, rows, train, most, features)).tolist())]
        else:
            seen = own.get(method, tables)
            picked = [(seed, _from_pools(picker, seen, rows, pools, most)) for seed, picker in pickers[method]]
        shots = [0] if method == "zero_shot" else range(1, most + 1)
        jobs += [
            {"method": method, "shot": k, "seed": seed, "icds": [row[:k] for row in icds]}
            for seed, icds in picked
            for k in shots
        ]
    return jobs


def blocks(tables: Any, rows: np.ndarray, pools: np.ndarray) -> Iterator[tuple[Any, Any, np.ndarray, np.ndarray]]:
    """Blocks of (query embeddings (B, d_q), pool embeddings (B, K, d_c), query rows (B,), pools (B, K))."""
    for start in range(0, len(rows), 256):
        block = slice(start, start + 256)
        pool_emb = tables.candidates[torch.from_numpy(pools[block])]
        yield tables.queries[torch.from_numpy(rows[block])], pool_emb, rows[block], pools[block]


def _from_pools(picker: Any, tables: Any, rows: np.ndarray, pools: np.ndarray, shots: int) -> list[list[int]]:
    """Train rows [Q][at most shots] that a retriever picks from each query's pool."""
    found: list[list[int]] = []
    for query_emb, pool_emb, of_rows, of_pools in blocks(tables, rows, pools):
        pointers = picks(picker.retrieve(query_emb, pool_emb, of_rows.tolist(), shots))
        found += [pool[pointer].tolist() for pool, pointer in zip(of_pools, pointers, strict=True)]
    return found


def lora_tables(settings: InferenceSettings, split: str, num_train: int, num_queries: int) -> Tables:
    """What the v2_lora selector sees: its own CLIP's item embeddings."""
    candidates = {"embeddings": paths.candidate_embeddings(settings, "v2_lora")}
    queries = {"embeddings": paths.query_embeddings(settings, "v2_lora")}
    return load_tables(channel_names.TableFiles(split, (), queries, candidates), num_train, num_queries)


def adaptive_job(policy: Any, blocks: Iterable[tuple[Any, Any, Any, Any]], max_eval_shot: int) -> dict[str, Any]:
    """v3_adaptive's entry among the jobs of :func:`plan_jobs`; ``blocks`` are those of :func:`blocks`.

    At most as many demonstrations are picked as STOP was trained with, whatever MAX_EVAL_SHOT allows.
    """
    shots = min(max_eval_shot, policy.config.stop_shots)
    icds: list[list[int]] = []
    probabilities: list[list[float]] = []
    for query, candidates, _, pools in blocks:
        pointers = picks(policy.select(query, candidates, shots))
        icds += [pool[pointer].tolist() for pool, pointer in zip(pools, pointers, strict=True)]
        probabilities += policy.stop_probabilities(query, candidates, shots).tolist()
    return {"method": adaptive.METHOD, "shot": shots, "seed": None, "icds": icds, "stop_probs": probabilities}


@dataclass
class Part:
    """Queries that are answered, and what each is asked."""

    queries: Any
    rows: np.ndarray  # (Q,)
    pools: np.ndarray  # (Q, K)
    settings: InferenceSettings
    methods: list[str]
    selectors: dict[str, Path]
    train: Any

    @cached_property
    def jobs(self) -> list[dict[str, Any]]:
        """What every query is asked."""
        return plan_jobs(self.settings, self.methods, self.selectors, self.rows, self.pools, self.queries, self.train)


def choice_part(settings: InferenceSettings, methods: list[str], selectors: dict[str, Path], train: Any) -> Part:
    """The held-out train queries on which the best fixed shot, and a cascade's rule, is chosen: with zero-shot and each
    shot of those among ``methods`` that decide how many.

    They are the first CHOICE_QUERIES of those that EVAL_SPLIT=train_val evaluates.
    """
    held_out = dataclasses.replace(settings, eval_split="train_val", test_data_num=-1)
    rows = query_rows(held_out, train, train)
    rows = rows if settings.choice_queries < 0 else rows[: settings.choice_queries]
    pools = lvlm.query_pools(settings, train, rows, train, "train")
    fixed = list(dict.fromkeys(fixed_of(method) for method in methods if decides(method)))
    own = {name: path for name, path in selectors.items() if name in fixed}
    return Part(train, rows, pools, settings, [*fixed, "zero_shot"], own, train)


def chunks(parts: Sequence[Part], size: int) -> dict[int, tuple[Part, range]]:
    """The units of work by number: the first part's are those that it has alone."""
    units, offset = {}, 0
    for part in parts:
        for start in range(0, len(part.rows), size):
            units[offset + start] = part, range(start, min(start + size, len(part.rows)))
        offset += size * -(-len(part.rows) // size)
    return units
