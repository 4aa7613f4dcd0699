"""RL data: pointers of the v2 selector (beams and temperature samples) and random ones, answered by the LVLM.

For RL_QUERY_NUM train queries (the beam search's anchors and more) each distinct pointer is answered and
scored with the official VQA accuracy (README, "The flow"). Writes results/<data set>/generated_data/rl_data_….json.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import cli, meeting, paths, provenance, shards
from lever_plus.cli import log
from lever_plus.data import channel_names
from lever_plus.data.dataset import VqaSplit, load_split
from lever_plus.data.rl_data import RlCandidate, RlData, RlQuery, save_rl_data
from lever_plus.devices import select_gpu
from lever_plus.settings.data import RlDataSettings
from lever_plus.stages import lvlm, recipes, work
from lever_plus.stages.answering import PointerAnswerer
from lever_plus.stages.cost import print_plan
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

channels = lazy("lever_plus.data.channels")
policy = lazy("lever_plus.selectors.policy")
rl_queries = lazy("lever_plus.stages.rl_queries")
selectors = lazy("lever_plus.selectors")
torch = lazy("torch")

CHUNK = 16  # queries per unit of work


def selector_path(settings: RlDataSettings) -> Path:
    """The selector that proposes the pointers."""
    return (
        Path(settings.lever_lm_checkpoint_path) if settings.lever_lm_checkpoint_path else paths.v2_checkpoint(settings)
    )


def recipe(settings: RlDataSettings) -> provenance.Recipe:
    """What the RL data is made from."""
    files = {"selector": selector_path(settings), **channel_names.train_files(settings)}
    files |= lvlm.feature_files(settings, "train")
    return recipes.recipe(settings, ("rl_data",), files, lvlm.prompt_inputs(settings))


def is_done(settings: RlDataSettings) -> bool:
    """Whether the RL data is there and made from exactly this. No torch."""
    return provenance.status(paths.rl_data(settings), recipe(settings)) == "current"


def run(settings: RlDataSettings, dry_run: bool) -> int:
    """Make the RL data, or say that it is there."""
    output = paths.rl_data(settings)
    per_query = settings.rl_beams + settings.rl_samples_low + settings.rl_samples_high + settings.rl_random
    if per_query == 0:
        raise UsageError("RL_BEAMS, RL_SAMPLES_LOW, RL_SAMPLES_HIGH and RL_RANDOM are all 0: no pointers to answer")
    if dry_run:
        if recipes.dry_run_done(settings, output, lambda: recipe(settings), "RL data"):
            return 0
        return print_plan(settings, work.rl_data(settings), output)
    made_from = recipe(settings)
    if recipes.skip_if_done(output, made_from, "RL data"):
        return 0
    select_gpu(settings.device, settings.gpu_id)
    return generate(settings, output, made_from)


def generate(settings: RlDataSettings, output: Path, made_from: provenance.Recipe) -> int:
    """Propose and answer the pointers of every query, and write the file."""
    started = time.monotonic()
    train = load_split(paths.dataset(settings), "train")
    rows, pools, tables = queries_of(settings, train)
    selector = selectors.PointerSelector.load(selector_path(settings), tables.widths)
    engine = lvlm.load_engine(settings)
    lvlm.check_texts(engine, train, rows)
    answerer = PointerAnswerer(engine, train, settings)
    log.info(
        f"RL data: {len(rows)} queries, pointers by {selector_path(settings).name}, {engine.name} on {engine.device}"
    )

    def proposals(start: int) -> list[list[dict[str, Any]]]:
        return [
            propose(selector, tables, int(row), pool, settings)
            for row, pool in zip(rows[start : start + CHUNK], pools[start : start + CHUNK], strict=True)
        ]

    def of_all(work: Callable[[int], list[Any]], parts: Path, what: str) -> list[Any] | None:
        """``work`` of every chunk, by all processes: what it returns for each query; None but on rank 0."""
        starts, key = range(0, len(rows), CHUNK), lvlm.parts_key(made_from, engine)
        found = shards.sharded_map(starts, work, parts, key, what, CHUNK, len(rows))
        return None if found is None else [query for start in starts for query in found[str(start)]]

    dropped: list[list[float]] = []
    if settings.rl_balance > 1:

        def probe(start: int) -> list[list[float]]:
            """The accuracies of each query's first picks."""
            chunk = slice(start, start + CHUNK)
            firsts = [first_picks(c["pointer"] for c in group) for group in proposals(start)]
            answers = answerer.answer(rows[chunk].tolist(), pools[chunk], firsts)
            return [[answer["vqa_acc_score"] for answer in group] for group in answers]

        accuracies = of_all(probe, probes_of(output), "RL data, probes") or []
        kept = meeting.from_first(rl_queries.balanced(accuracies, settings.rl_query_num))
        dropped = [accuracies[i] for i in sorted(set(range(len(accuracies))).difference(kept))]
        rows, pools = rows[kept], pools[kept]
        log.info(f"RL_BALANCE: {len(rows)} of {len(rows) + len(dropped)} probed queries kept")

    def work(start: int) -> list[list[dict[str, Any]]]:
        chunk, chunk_pools = rows[start : start + CHUNK], pools[start : start + CHUNK]
        proposed = proposals(start)
        answers = answerer.answer(chunk.tolist(), chunk_pools, [[c["pointer"] for c in group] for group in proposed])
        return [
            [{**c, **a} for c, a in zip(group, got, strict=True)] for group, got in zip(proposed, answers, strict=True)
        ]

    groups = of_all(work, output, "RL data")
    if groups is None:
        return 0
    queries = [
        RlQuery(int(row), pool, [RlCandidate(**{**c, "pointer": tuple(c["pointer"])}) for c in group])
        for row, pool, group in zip(rows, pools, groups, strict=True)
    ]
    max_shot = settings.rl_shot if all_lengths(selector, settings) else None
    extra = {"prompts": {"rl_data": prompts_asked(queries, dropped)}}
    with provenance.writing(output):
        save_rl_data(output, RlData(queries, settings.prompt_order, form="pool", notes=[], max_shot=max_shot))
        provenance.stamp(output, made_from, time.monotonic() - started, extra)
    shards.finish(output)
    shards.finish(probes_of(output))
    correct = [candidate.vqa_correct for query in queries for candidate in query.candidates]
    log.info(
        f"RL data: {len(correct)} pointers of {len(rows)} queries, {100 * np.mean(correct):.1f} % correct: {output} "
        f"({time.monotonic() - started:.0f} s)"
    )
    return 0


def queries_of(settings: RlDataSettings, train: VqaSplit) -> tuple[np.ndarray, np.ndarray, Any]:
    """(train rows [Q] of the queries, their pools (Q, K) of train rows, the embeddings).

    RL_BALANCE times as many queries as will be kept; with POSITIVE_MINING each pool has a right demonstration.

    Raises:
        UsageError: RL_QUERY_NUM is more than there are.
    """
    rows = lvlm.first_queries(train, settings, "RL_QUERY_NUM", settings.rl_balance)
    pools = lvlm.query_pools(settings, train, rows, train, "train")
    tables = channels.load_tables(channel_names.table_files(settings), len(train))
    if settings.positive_mining:
        pools, mined, without = rl_queries.mined_pools(train, rows, pools, tables, settings.seed)
        log.info(
            f"POSITIVE_MINING: {mined} of {len(rows)} pools had no right demonstration and got one; for {without} more "
            "the train split has none"
        )
    return rows, pools, tables


def prompts_asked(queries: Sequence[RlQuery], dropped: Sequence[Sequence[float]]) -> int:
    """Distinct prompts behind the data: all pointers, the empty one (zero-shot), and RL_BALANCE's probes.

    ``dropped``: the probes' accuracies of each query that was not kept.
    """
    prompts = sum(len(query) + 1 for query in dropped)
    for query in queries:
        pointers = [c.pointer for c in query.candidates]
        prompts += len({*pointers, *(first_picks(pointers) if dropped else ()), ()})
    return prompts


def probes_of(output: Path) -> Path:
    """The name under which the parts of RL_BALANCE's probes lie until the data are whole."""
    return output.with_name(f"{output.stem}_probes.json")


def first_picks(pointers: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    """The distinct pointers of one pick with which some pointers begin, in order."""
    return list(dict.fromkeys(tuple(pointer[:1]) for pointer in pointers if pointer))


def all_lengths(selector: Any, settings: RlDataSettings) -> bool:
    """Whether the data are for a policy that may stop: then they hold pointers of 0 to RL_SHOT picks."""
    return settings.stop or selector.config.stop


def propose(selector: Any, tables: Any, row: int, pool: np.ndarray, settings: RlDataSettings) -> list[dict[str, Any]]:
    """Distinct pointers for one query: beams, samples at two temperatures, random; the first source keeps a duplicate.

    For a policy that may stop (:func:`all_lengths`) their prefixes follow, the empty one last. Proposed are pointers of
    RL_SHOT picks all the same: where the policy stops today, only they can tell that going on would have been better.
    Every random choice comes from (SEED, row), so a query's pointers do not depend on the others.
    """
    query = tables.queries[torch.tensor([row])]  # (1, d_q)
    candidates = tables.candidates[torch.from_numpy(pool)][None]  # (1, K, d)
    shots, found = settings.rl_shot, []
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([settings.seed, row]).generate_state(1)[0]))
    with selector.fixed_shots():
        if settings.rl_beams:
            pointers, _ = selector.beam(query, candidates, shots, settings.rl_beams)
            found += [
                {"pointer": p, "gen_method": "beam", "beam_rank": i, "temperature": None}
                for i, p in enumerate(policy.picks(pointers[0]))
            ]
        for count, temperature in (
            (settings.rl_samples_low, settings.rl_temp_low),
            (settings.rl_samples_high, settings.rl_temp_high),
        ):
            if count:
                pointers, _ = selector.sample(query, candidates, shots, count, temperature, generator)
                found += [
                    {"pointer": p, "gen_method": "sample", "beam_rank": None, "temperature": temperature}
                    for p in policy.picks(pointers[0])
                ]
    for _ in range(settings.rl_random):
        pointer = torch.randperm(len(pool), generator=generator)[:shots].tolist()
        found.append({"pointer": pointer, "gen_method": "random", "beam_rank": None, "temperature": None})
    if all_lengths(selector, settings):
        lengths = range(shots - 1, -1, -1)
        proposed = [c["pointer"] for c in found]
        found += [
            {"pointer": p[:length], "gen_method": "prefix", "beam_rank": None, "temperature": None}
            for length in lengths
            for p in proposed
            if len(p) >= length
        ]
    elif settings.rl_prefixes:
        found += [{**c, "pointer": c["pointer"][:length]} for c in found for length in range(1, len(c["pointer"]))]
    seen: set[tuple[int, ...]] = set()
    distinct = [c for c in found if not (tuple(c["pointer"]) in seen or seen.add(tuple(c["pointer"])))]
    with torch.inference_mode():
        padded = [[*c["pointer"], *[policy.PAD] * (shots - len(c["pointer"]))] for c in distinct]
        log_probs = selector.log_prob(query, candidates, torch.tensor([padded]))  # (1, M)
    return [{**c, "logprob_score": float(lp)} for c, lp in zip(distinct, log_probs[0], strict=True)]


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(RlDataSettings, run, __doc__))
