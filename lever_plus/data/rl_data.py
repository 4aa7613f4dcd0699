"""RL data: the pointers of each query with their answers and scores (docs/formats.md).

Read are this project's own form and those of the original Lever-Plus:

* ``local``: ``pointer`` holds pool positions of ``candidate_pool_ids`` (or ``candidate_pool_indices``).
* ``global_pos``: ``pointer`` holds global train indices, ``pointer_pos`` their positions in whatever pool was used.
* ``global``: ``pointer`` holds global train indices, nothing more.
* ``beam_data``: plain beam data; no LVLM answers, so ``vqa_correct`` and ``vqa_acc_score`` are None.

The last three need the query's pool from elsewhere where the file has none (beam data or the sampler's cache);
without it they are refused: a pool of only the scored candidates is not the pool that the policy meets.
This module knows no rewards.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import io
from lever_plus.data.beam_data import PoolLookup, check_pool_sizes, load_beam_data, read_pool
from lever_plus.data.fields import MAX_INDEX, Source, as_ids, positions_in, read_queries

MAKE = "bash scripts/generate_rl_data.sh"
PROMPT_ORDERS = ("best_last", "best_first")
OLD_PROMPT_ORDER = "best_first"  # of files that do not record it
_NUMBERS = {
    float: ("beam_score", "logprob_score", "temperature", "vqa_acc_score", "vqa_gt_prob"),
    int: ("beam_rank", "vqa_correct"),
}
FAILED_MODES = ("error", "fallback")  # vqa_eval_mode of answers that the official metric did not score


@dataclass
class RlCandidate:
    """One pointer and how the LVLM did with it.

    Attributes:
        pointer: distinct pool positions in pick order, best first; () is the zero-shot prompt.
        gen_method: ``beam``, ``sample``, ``random``, or a word of the original Lever-Plus.
        beam_rank: 0 is the best beam; None for other methods.
        beam_score: InfoScore of the trajectory, None where it has none.
        logprob_score: log-probability under the policy that proposed it.
        temperature: of the sampling, None where there was none.
        vqa_pred_answer: the LVLM's answer, cut and normalised.
        vqa_correct: 1 where ``vqa_acc_score`` > 0, else 0; None in plain beam data.
        vqa_acc_score: official VQA accuracy in [0, 1]; None in plain beam data.
        vqa_gt_prob: expected accuracy under the LVLM's answer distribution, in [0, 1].
        vqa_eval_mode: how the answer was scored.
    """

    pointer: tuple[int, ...]
    gen_method: str
    beam_rank: int | None = None
    beam_score: float | None = None
    logprob_score: float | None = None
    temperature: float | None = None
    vqa_pred_answer: str | None = None
    vqa_correct: int | None = None
    vqa_acc_score: float | None = None
    vqa_gt_prob: float | None = None
    vqa_eval_mode: str | None = None


@dataclass
class RlQuery:
    """One query: its row in the train split, its pool ([K] int64 global train indices), its pointers."""

    query_idx: int
    pool_ids: np.ndarray
    candidates: list[RlCandidate]


@dataclass
class RlData:
    """All queries in the file's order.

    ``prompt_order`` is how the pointers were laid out in the prompts that were answered; ``form`` is the
    file's form (module docstring); ``notes`` say what was left out or taken from elsewhere. ``max_shot``: the most
    picks of a pointer where the data hold pointers of all lengths, for a policy that may stop; else None.
    """

    queries: list[RlQuery]
    prompt_order: str
    form: str = "local"
    notes: list[str] = field(default_factory=list)
    max_shot: int | None = None


def load_rl_data(path: Path, num_rows: int | None = None, beam_data: Path | None = None) -> RlData:
    """Read RL data of any form, or plain beam data.

    Left out, and counted in ``notes``: pointers whose answer the official metric did not score
    (``eval_failed``, ``vqa_eval_mode`` error or fallback), repeated pointers of a query, queries without any
    pointer left, and those that the original Lever-Plus's repair script marked as failed.

    Args:
        num_rows: items in the train split; indices must lie below it.
        beam_data: beam data or a sampler cache with the pools, for forms without them. Where it lacks a pool
            the sampler's cache beside the file is used.

    Raises:
        MissingInputError, DamagedInputError: names the file, the query and the field.
    """
    path = Path(path)
    source, entries, notes = read_queries(path, "RL data", num_rows, MAKE)
    if all("id_list" in e and "pointer_candidates" not in e for e in entries.values()):
        return _from_beam_data(path, num_rows, beam_data)
    reader = _Reader(source, num_rows, PoolLookup(path, beam_data, num_rows))
    queries = [q for q in (reader.query(query, entry) for query, entry in entries.items()) if q is not None]
    notes += reader.notes()
    if not queries:
        raise source.error(f"no usable pointer in it ({'; '.join(notes) or 'all lists are empty'})")
    check_pool_sizes(source, queries)
    orders = reader.prompt_orders or {OLD_PROMPT_ORDER}
    if len(orders) > 1:
        raise source.error("queries disagree about prompt_order")
    if len(reader.max_shots) > 1:
        raise source.error("queries disagree about max_shot")
    max_shot = next(iter(reader.max_shots))
    return RlData(queries, orders.pop(), "+".join(sorted(reader.forms)), notes, max_shot)


def save_rl_data(path: Path, data: RlData) -> None:
    """Write this project's JSON, atomically; equal data give equal bytes.

    Raises:
        ValueError: a pointer is not a set of pool positions, or a number is not finite.
    """
    content = {}
    for q in data.queries:
        for c in q.candidates:
            if len(set(c.pointer)) < len(c.pointer) or not all(0 <= p < len(q.pool_ids) for p in c.pointer):
                raise ValueError(f"query {q.query_idx}: {c.pointer} is not a set of positions in its pool")
        content[str(q.query_idx)] = {
            "candidate_pool_ids": [int(i) for i in q.pool_ids],
            "prompt_order": data.prompt_order,
            **({} if data.max_shot is None else {"max_shot": data.max_shot}),
            "pointer_candidates": [_to_json(c, q.pool_ids) for c in q.candidates],
        }
    io.write_json(Path(path), content)


def _to_json(c: RlCandidate, pool_ids: Sequence[int]) -> dict[str, Any]:
    values = dict(vars(c))
    for kind, names in _NUMBERS.items():
        values |= {name: kind(values[name]) for name in names if values[name] is not None}
    picks = [int(p) for p in values.pop("pointer")]
    return {"pointer": picks, "pointer_global": [int(pool_ids[p]) for p in picks], **values}


def _from_beam_data(path: Path, num_rows: int | None, pools: Path | None) -> RlData:
    beams = load_beam_data(path, num_rows, pools)
    queries = []
    for q in beams.queries:
        beams_of_query = enumerate(zip(q.pointers, q.scores, strict=True))
        candidates = [RlCandidate(p, "beam", beam_rank=rank, beam_score=score) for rank, (p, score) in beams_of_query]
        queries.append(RlQuery(q.query_idx, q.pool_ids, candidates))
    notes = [*beams.notes, "plain beam data: no LVLM answers, only the quality part of a reward is known"]
    return RlData(queries, beams.prompt_order, "beam_data", notes)


class _Reader:
    """Reads the queries of one file and counts what it leaves out."""

    def __init__(self, source: Source, num_rows: int | None, lookup: PoolLookup) -> None:
        self._source, self._lookup = source, lookup
        self._hi = MAX_INDEX if num_rows is None else num_rows
        self._left_out: Counter[str] = Counter()
        self.forms: set[str] = set()
        self.prompt_orders: set[str] = set()
        self.max_shots: set[int | None] = set()

    def notes(self) -> list[str]:
        """What was left out, with counts, and where pools came from."""
        return [f"{reason}: {count}" for reason, count in sorted(self._left_out.items())] + self._lookup.notes

    def query(self, query: int, entry: dict[str, Any]) -> RlQuery | None:
        """One query; None where nothing of it can be used."""
        source = self._source
        if "pointer_candidates" not in entry:
            raise source.error("pointer_candidates is missing", query)
        raw = source.sequence(entry["pointer_candidates"], query, "pointer_candidates")
        raw = [source.mapping(c, query, "pointer_candidates") for c in raw]
        if "prompt_order" in entry:
            if entry["prompt_order"] not in PROMPT_ORDERS:
                raise source.error(f"{entry['prompt_order']!r} is not best_last or best_first", query, "prompt_order")
            self.prompt_orders.add(entry["prompt_order"])
        max_shot = None
        if "max_shot" in entry:
            max_shot = source.integer(entry["max_shot"], query, "max_shot", 1)
        self.max_shots.add(max_shot)
        usable = [c for c in raw if not (c.get("eval_failed") or c.get("vqa_eval_mode") in FAILED_MODES)]
        self._count("pointers left out, the official metric did not score their answer", len(raw) - len(usable))
        pool = read_pool(source, query, entry, self._hi)
        own_pool = pool is not None
        if pool is None and usable:
            if entry.get("_fix_failed") and self._lookup.get(query) is None:
                self._count("queries left out, marked as failed when their pool was repaired", 1)
                return None
            pool = self._lookup.pool(source, query)
        if not usable or pool is None:
            self._count("queries left out, no pointer of them is usable", 1)
            return None
        candidates, seen = [], set()
        for c in usable:
            pointer = self._pointer(query, c, pool, own_pool, 1 if max_shot is None else 0)
            if pointer in seen:
                self._count("repeated pointers left out", 1)
                continue
            seen.add(pointer)
            if max_shot is not None and len(pointer) > max_shot:
                raise source.error(f"{len(pointer)} picks, more than max_shot {max_shot}", query, "pointer")
            candidates.append(self._candidate(query, c, pointer))
        return RlQuery(query, as_ids(pool), candidates)

    def _pointer(self, query: int, c: dict[str, Any], pool: list[int], own_pool: bool, least: int) -> tuple[int, ...]:
        """Pool positions of a pointer; global indices are looked up in the pool, never guessed."""
        source, place = self._source, positions_in(pool)
        if "pointer" not in c:
            raise source.error("pointer is missing", query, "pointer_candidates")
        # beside pointer_global, pointer_pos is a left-over of the union pool that the repair script replaced
        local = own_pool and ("pointer_global" in c or c.get("pointer_pos", c["pointer"]) == c["pointer"])
        self.forms.add("local" if local else "global_pos" if "pointer_pos" in c else "global")
        values = source.distinct(c["pointer"], query, "pointer", len(pool) if local else self._hi, least)
        if local:
            pointer, picked = tuple(values), [pool[p] for p in values]
            named = source.distinct(c.get("pointer_global", picked), query, "pointer_global", self._hi, least)
            if named != picked:
                raise source.error(
                    f"{named} is not what {values} picks from the pool: {picked}", query, "pointer_global"
                )
        else:
            outside = [index for index in values if index not in place]
            if outside:
                raise source.error(f"{outside[0]} is not in the query's pool", query, "pointer")
            pointer, picked = tuple(place[index] for index in values), values
            stated = source.distinct(c.get("pointer_pos", list(pointer)), query, "pointer_pos", self._hi, least)
            if len(stated) != len(pointer) or (own_pool and tuple(stated) != pointer):
                raise source.error(f"{stated} are not the positions of {values} in the pool", query, "pointer_pos")
        if query in picked:
            raise source.error("picks the query itself", query, "pointer")
        return pointer

    def _candidate(self, query: int, c: dict[str, Any], pointer: tuple[int, ...]) -> RlCandidate:
        def optional(name: str, check: Any, *limits: float) -> Any:
            return None if c.get(name) is None else check(c[name], query, name, *limits)

        source = self._source
        if c.get("vqa_acc_score") is None:
            raise source.error("vqa_acc_score is missing", query, "pointer_candidates")
        score = source.number(c["vqa_acc_score"], query, "vqa_acc_score", 0, 1)
        stated = c.get("vqa_correct", int(score > 0))
        if type(stated) not in (int, float, bool) or stated not in (0, 1):
            raise source.error(f"{stated!r} is not 0 or 1", query, "vqa_correct")
        if stated != (score > 0):
            self._count("pointers whose vqa_correct was not (vqa_acc_score > 0), corrected", 1)
        return RlCandidate(
            pointer=pointer,
            gen_method=optional("gen_method", source.text) or "unknown",
            beam_rank=optional("beam_rank", source.integer),
            beam_score=optional("beam_score", source.number),
            logprob_score=optional("logprob_score", source.number),
            temperature=optional("temperature", source.number, 0),
            vqa_pred_answer=optional("vqa_pred_answer", source.text),
            vqa_correct=int(score > 0),
            vqa_acc_score=score,
            vqa_gt_prob=optional("vqa_gt_prob", source.number, 0, 1),
            vqa_eval_mode=optional("vqa_eval_mode", source.text),
        )

    def _count(self, reason: str, number: int) -> None:
        if number:
            self._left_out[reason] += number
