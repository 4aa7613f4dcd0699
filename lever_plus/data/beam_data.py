"""InfoScore beam data: the best demonstrations of each anchor query (docs/formats.md).

``{query_idx: {"id_list": [[icd…, query_idx], …best first], "score_list": […], "candidate_pool_ids": [K global]}}``.
``id_list`` holds global train indices in PROMPT order. With construct order left each new pick was put
before those there, so the pick order is the reverse; with right it is the same.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import io
from lever_plus.data.fields import MAX_INDEX, Source, as_ids, positions_in, read_queries
from lever_plus.infoscore import PROMPT_ORDERS, prompt_order

log = logging.getLogger("lever_plus")
MAKE = "bash scripts/generate_data.sh"


@dataclass
class BeamQuery:
    """One anchor query.

    Attributes:
        query_idx: row of the query in the train split.
        pool_ids: [K] int64 global train indices.
        pointers: distinct pool positions in pick order, one tuple per beam, best beam first.
        scores: InfoScore of each beam, higher is better.
        totals: InfoScore of each beam after each of its picks, the last is its score; None where that is not known.
    """

    query_idx: int
    pool_ids: np.ndarray
    pointers: list[tuple[int, ...]]
    scores: list[float]
    totals: list[list[float]] | None = None


@dataclass
class BeamData:
    """All anchor queries, in the file's order."""

    queries: list[BeamQuery]
    construct_order: str = "left"
    notes: list[str] = field(default_factory=list)
    max_shot: int | None = None  # the most picks that the search made, where it is known

    @property
    def prompt_order(self) -> str:
        """``best_last`` or ``best_first``: how the demonstrations stand in the prompts that were scored."""
        return PROMPT_ORDERS[self.construct_order]


def load_beam_data(path: Path, num_rows: int | None = None, pools: Path | None = None) -> BeamData:
    """Read beam data, the original Lever-Plus's included (there the pools are in the sampler's cache file).

    Args:
        num_rows: items in the train split; indices must lie below it.
        pools: file with the pools where the beam data has none: a sampler cache or other beam data.
            Else, and for queries it lacks: looked for beside the file, see :func:`find_sampler_cache`.

    Raises:
        MissingInputError, DamagedInputError: names the file, the query and the field.
    """
    path = Path(path)
    source, entries, notes = read_queries(path, "beam data", num_rows, MAKE)
    order = _construct_order(path, entries, source)
    hi = MAX_INDEX if num_rows is None else num_rows
    lookup = PoolLookup(path, pools, num_rows)
    queries = []
    for query, entry in entries.items():
        pool = read_pool(source, query, entry, hi)
        if pool is None:
            pool = lookup.pool(source, query)
        queries.append(_read_query(source, query, entry, pool, order, hi))
    check_pool_sizes(source, queries)
    notes += lookup.notes
    for note in notes:
        log.info(f"{path.name}: {note}")
    return BeamData(queries, order, notes)


def save_beam_data(path: Path, data: BeamData) -> None:
    """Write this project's JSON, atomically; equal data give equal bytes."""
    content = {}
    for q in data.queries:
        ids = [[int(q.pool_ids[p]) for p in prompt_order(pointer, data.prompt_order)] for pointer in q.pointers]
        content[str(q.query_idx)] = {
            "id_list": [[*icds, q.query_idx] for icds in ids],
            "score_list": [float(score) for score in q.scores],
            "candidate_pool_ids": [int(i) for i in q.pool_ids],
            "beams": [
                {"pointer": [int(position) for position in pointer], "score": float(score), **total}
                for pointer, score, total in zip(q.pointers, q.scores, _totals_json(q), strict=True)
            ],
            "construct_order": data.construct_order,
        }
    io.write_json(Path(path), content)


def _totals_json(query: BeamQuery) -> list[dict[str, list[float]]]:
    if query.totals is None:
        return [{}] * len(query.pointers)
    return [{"totals": [float(total) for total in totals]} for totals in query.totals]


def read_pool(source: Source, query: int, entry: dict[str, Any], hi: int) -> list[int] | None:
    """``candidate_pool_ids`` (or ``candidate_pool_indices``) of a query; None where it has neither."""
    for name in ("candidate_pool_ids", "candidate_pool_indices"):
        if name in entry:
            return source.distinct(entry[name], query, name, hi, minimum=2)
    return None


class PoolLookup:
    """Pools of queries whose own file has none: from the file named, else from the sampler's cache beside the data.

    Both are read when first needed; ``notes`` say which were used.
    """

    def __init__(self, path: Path, pools: Path | None, num_rows: int | None) -> None:
        self._path, self._named, self._num_rows = path, pools, num_rows
        self._sources: list[tuple[Path, dict[int, list[int]]]] | None = None
        self.notes: list[str] = []

    def pool(self, source: Source, query: int) -> list[int]:
        """The query's pool.

        Raises:
            DamagedInputError: there is none; says what would bring it.
        """
        found = self.get(query)
        if found is None:
            where = "".join(f", none in {file}" for file, _ in self._sources or [])
            raise source.error(
                f"no candidate_pool_ids{where}, so the pool cannot be rebuilt; put the sampler's cache file "
                f"({_cache_pattern(self._path)}) into the results folder's cache/, or regenerate the data with: {MAKE}",
                query,
            )
        return found

    def get(self, query: int) -> list[int] | None:
        """The query's pool, or None where there is none."""
        if self._sources is None:
            named = [self._named, find_sampler_cache(self._named)] if self._named is not None else []
            files = dict.fromkeys([*named, find_sampler_cache(self._path)])
            self._sources = [(file, load_pools(file, self._num_rows)) for file in files if file is not None]
        for file, pools in self._sources:
            if query in pools:
                note = f"pools read from {file}"
                if note not in self.notes:
                    self.notes.append(note)
                return pools[query]
        return None


def load_pools(path: Path, num_rows: int | None = None) -> dict[int, list[int]]:
    """Pools by query index, from beam data with ``candidate_pool_ids`` or from the original Lever-Plus's sampler
    cache ``{query_idx: [global indices]}``. Queries without a pool are left out.

    Raises:
        MissingInputError, DamagedInputError.
    """
    source = Source(Path(path), "candidate pools")
    hi = MAX_INDEX if num_rows is None else num_rows
    found = {}
    for key, value in source.mapping(io.read_json(path, source.what)).items():
        if key.startswith("_"):
            continue
        query = source.query_key(key, num_rows)
        if isinstance(value, list):
            pool = source.distinct(value, key, "pool", hi, minimum=2)
        else:
            pool = read_pool(source, query, source.mapping(value, key), hi)
        if pool is not None:
            found[query] = pool
    return found


def find_sampler_cache(path: Path) -> Path | None:
    """The original Lever-Plus's sampler cache that belongs to a file of ``generated_data``.

    It lies in the folder ``cache`` beside ``generated_data`` and is named
    ``<data set>-<Sampler>-anchor_sample_num: <n>:<K>.json``. None where there is none, or where several fit.
    """
    folder = Path(path).resolve().parent.parent / "cache"
    pattern = _cache_pattern(path)
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    return found[0] if len(found) == 1 else None


def check_pool_sizes(source: Source, queries: Sequence[Any]) -> None:
    """All pools of a file have the same number of candidates.

    Raises:
        DamagedInputError: names the first that differs.
    """
    sizes = [len(q.pool_ids) for q in queries]
    for q, size in zip(queries, sizes, strict=True):
        if size != sizes[0]:
            problem = f"{size} candidates, the queries before it have {sizes[0]}"
            raise source.error(problem, q.query_idx, "candidate_pool_ids")


def _cache_pattern(path: Path) -> str:
    def part(pattern: str, otherwise: str) -> str:
        found = re.search(pattern, Path(path).name)
        return found.group(1) if found else otherwise

    sampler = part(r"((?:Rand|TextSim|ImgSim|Mix)Sampler)", "*Sampler")
    samples, size = part(r"-sample_num[=:](\d+)", ""), part(r"candidate_num[=:](\d+)", "*")
    return f"*-{sampler}-anchor_sample_num:*{samples}:{size}*.json".replace("**", "*")


def _construct_order(path: Path, entries: dict[int, dict[str, Any]], source: Source) -> str:
    recorded = set()
    for query, entry in entries.items():
        if "construct_order" in entry:
            if entry["construct_order"] not in tuple(PROMPT_ORDERS):  # a file may hold what cannot be a key
                raise source.error("neither left nor right", query, "construct_order")
            recorded.add(entry["construct_order"])
    if len(recorded) > 1:
        raise source.error("queries disagree about construct_order")
    named = re.search(r"construct_order[=:](left|right)", path.name)
    return recorded.pop() if recorded else named.group(1) if named else "left"


def _read_query(source: Source, query: int, entry: dict[str, Any], pool: list[int], order: str, hi: int) -> BeamQuery:
    for name in ("id_list", "score_list"):
        if name not in entry:
            raise source.error(f"{name} is missing", query)
    id_list = source.sequence(entry["id_list"], query, "id_list")
    scores = [source.number(s, query, "score_list") for s in source.sequence(entry["score_list"], query, "score_list")]
    if not id_list or len(id_list) != len(scores):
        raise source.error(f"{len(id_list)} beams in id_list, {len(scores)} in score_list", query)
    place, pointers = positions_in(pool), []
    for beam in id_list:
        *icds, last = source.distinct(beam, query, "id_list", hi, minimum=2)
        if last != query:
            raise source.error(f"the beam {beam} does not end with the query", query, "id_list")
        outside = [icd for icd in icds if icd not in place]
        if outside:
            raise source.error(f"{outside[0]} is not in the query's pool", query, "id_list")
        pointers.append(tuple(place[icd] for icd in prompt_order(icds, PROMPT_ORDERS[order])))
    if len(set(pointers)) < len(pointers):
        raise source.error("the same beam stands there twice", query, "id_list")
    best_first = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: equal scores keep the file's order
    totals = _read_totals(source, query, entry, pointers, scores)
    return BeamQuery(
        query, as_ids(pool), [pointers[i] for i in best_first], [scores[i] for i in best_first],
        None if totals is None else [totals[i] for i in best_first],
    )  # fmt: skip


def _read_totals(
    source: Source, query: int, entry: dict[str, Any], pointers: list[tuple[int, ...]], scores: list[float]
) -> list[list[float]] | None:
    """The InfoScores after each pick, where the file has them for every beam of the query."""
    beams = entry.get("beams")
    if not isinstance(beams, list) or not all(isinstance(beam, dict) and "totals" in beam for beam in beams):
        return None
    found = [[source.number(t, query, "totals") for t in source.sequence(b["totals"], query, "totals")] for b in beams]
    fits = len(found) == len(pointers) and all(
        len(totals) == len(pointer) and totals[-1] == score
        for totals, pointer, score in zip(found, pointers, scores, strict=True)
    )
    if not fits:
        raise source.error("one number per pick, the last one the beam's score, is expected", query, "totals")
    return found


def end_where_nothing_is_gained(query: BeamQuery) -> BeamQuery:
    """The query's beams as a policy that may stop should pick them: cut before the first demonstration whose own
    InfoScore is 0 or less. Beams that are alike then are one.

    Where only a whole beam's score is known, it is cut to nothing if that is 0 or less.
    """
    kept: dict[tuple[int, ...], float] = {}
    for i, (pointer, score) in enumerate(zip(query.pointers, query.scores, strict=True)):
        totals = [score] if query.totals is None else query.totals[i]
        before = [0.0, *totals[:-1]]
        gaining = next((step for step, (a, b) in enumerate(zip(before, totals, strict=True)) if b <= a), len(totals))
        length = gaining if query.totals is not None else gaining * len(pointer)
        kept[pointer[:length]] = [0.0, *totals][gaining]
    best_first = sorted(kept, key=lambda pointer: -kept[pointer])
    return BeamQuery(query.query_idx, query.pool_ids, best_first, [kept[pointer] for pointer in best_first])
