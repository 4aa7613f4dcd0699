"""ICL inference: v3, v2 and the baselines answer the same queries with 1 to MAX_EVAL_SHOT demonstrations.

Every method picks from the query's own pool. Writes results/<data set>/icl_inference/<run>/ with
metrics.json, samples.jsonl (one line per answer) and the official result files. The v3 checkpoint is the
best by the validation metric (CHECKPOINT_PHASE, LEVER_LM_CHECKPOINT_PATH).
"""

import functools
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import cli, io, paths, shards
from lever_plus import run as provenance
from lever_plus.cli import log
from lever_plus.data import channel_names
from lever_plus.data.methods import CHANNEL_SIMILARITY
from lever_plus.data.methods import chosen as chosen_methods
from lever_plus.registries import RIVALS
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import adaptive
from open_mmicl.errors import MissingInputError, UsageError

CHUNK = 16  # queries per unit of work


def run_name(settings: InferenceSettings) -> str:
    """Folder of this run under icl_inference."""
    if settings.run_name:
        return settings.run_name
    count = "all" if settings.test_data_num < 0 else str(settings.test_data_num)
    split = "" if settings.eval_split == "val" else f"_{settings.eval_split}"
    exp = f"_{settings.exp_name}" if settings.exp_name else ""
    first = chosen_methods(settings)[0]
    model = paths.model_slug(paths.lvlm_name(settings))
    return f"{first}_{paths.sampler_class(settings.sampler)}_{model}{exp}{split}_{count}"


def output_dir(settings: InferenceSettings) -> Path:
    """Where this run's files go."""
    return paths.inference_dir(settings, run_name(settings))


def run(settings: InferenceSettings, dry_run: bool) -> int:
    """Evaluate, or say that it is done."""
    from lever_plus.devices import select_gpu
    from lever_plus.stages.done import dry_run_done, skip_if_done

    methods, output = chosen_methods(settings), output_dir(settings) / "metrics.json"
    if dry_run:
        from lever_plus.stages import work
        from lever_plus.stages.cost import print_plan

        if dry_run_done(settings, output, lambda: recipe(settings, find_selectors(settings, methods)[0]), "inference"):
            return 0
        print_plan(settings, work.inference(settings, methods), output_dir(settings))
        if adaptive.METHOD in methods:
            log.info(adaptive.price(settings))
        return 0
    selectors, chosen = find_selectors(settings, methods)
    made_from = recipe(settings, selectors)
    if skip_if_done(output, made_from, "inference"):
        return 0
    select_gpu(settings)
    return evaluate(settings, methods, selectors, chosen, output, made_from)


def is_done(settings: InferenceSettings) -> bool:
    """Whether the metrics are there and made from exactly this. No torch."""
    selectors, _ = find_selectors(settings, chosen_methods(settings))
    return provenance.status(output_dir(settings) / "metrics.json", recipe(settings, selectors)) == "current"


def find_selectors(settings: InferenceSettings, methods: list[str]) -> tuple[dict[str, Path], dict[str, Any]]:
    """The checkpoint of each selector among the methods, and how v3's was chosen ({} without v3).

    Raises:
        MissingInputError: a checkpoint is not there; names the command that makes it.
    """
    from lever_plus.stages.checkpoint_choice import choose_v3

    chosen = choose_v3(settings) if "v3" in methods else {}
    if adaptive.METHOD in methods:
        adaptive.check(settings, Path(chosen["path"]))
    selectors = {"v3": Path(chosen["path"])} if chosen else {}
    supervised = {"v2": settings.v2_checkpoint_path or paths.v2_checkpoint(settings),
                  "v1": paths.v2_checkpoint(settings, "v1"), "v2_lora": paths.v2_checkpoint(settings, "v2_lora"),
                  "label": paths.label_checkpoint(settings)}  # fmt: skip
    make = {"v2": "bash scripts/train_lever_lm.sh", "label": "python -m lever_plus.pipeline label"}
    for method, path in supervised.items():
        if method not in methods:
            continue
        selectors[method] = Path(path)
        if not selectors[method].is_file():
            how = make.get(method, f"bash scripts/train_lever_lm.sh … {method}")
            raise MissingInputError(f"{method} checkpoint not found: {path} (make it with: {how})")
    return selectors, chosen


def recipe(settings: InferenceSettings, selectors: dict[str, Path]) -> provenance.Recipe:
    """What the metrics are made from."""
    from lever_plus.stages import lvlm, recipes

    splits = ("train",) if settings.eval_split == "train_val" else ("train", "val")
    files = {
        **selectors,
        **channel_names.train_files(settings),
        **lvlm.feature_files(settings, *splits),
    }
    if settings.eval_split == "val":
        if channel_names.names(settings):
            files |= channel_names.files(settings, "val", candidates=False)
        else:
            files["query_embeddings"] = lvlm.query_embeddings_file(settings)
    steps, inputs = ("inference",), lvlm.prompt_inputs(settings, splits)
    if "v2_lora" in selectors:
        files["lora_embeddings"] = paths.candidate_embeddings(settings, "v2_lora")
    if adaptive.METHOD in chosen_methods(settings):
        steps, inputs = (*steps, "adaptive"), {**inputs, "adaptive": True}
    return recipes.recipe(settings, steps, files, inputs)


def query_rows(settings: InferenceSettings, queries: Any, train: Any) -> np.ndarray:
    """Rows of the evaluated queries: a shuffle by DATA_SEED, so that n = 200 is part of n = 400.

    Raises:
        UsageError: more asked for than there are.
    """
    from lever_plus.data.dataset import split_by_image

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


def evaluate(
    settings: InferenceSettings,
    methods: list[str],
    selectors: dict[str, Path],
    chosen: dict[str, Any],
    output: Path,
    made_from: provenance.Recipe,
) -> int:
    """Retrieve, answer, score, and write the run's files."""
    from lever_plus.data.dataset import load_split
    from lever_plus.experiments.samples import Samples
    from lever_plus.stages import inference_metrics, lvlm
    from open_mmicl.inferencer import answer_and_score

    started = time.monotonic()
    train = load_split(settings, "train")
    queries = train if settings.eval_split == "train_val" else load_split(settings, "val")
    rows = query_rows(settings, queries, train)
    split = "train" if queries is train else "val"
    pools = lvlm.query_pools(settings, queries, rows, train, split)  # (Q, K)
    parts = [adaptive.Part(queries, rows, pools, settings, methods, selectors, train)]
    if adaptive.METHOD in methods:
        parts.append(adaptive.choice_part(settings, selectors, train))
    for part in parts:
        _ = part.jobs  # what cannot be asked is said before the model is loaded
    engine = lvlm.load_engine(settings)
    order = settings.prompt_order
    generation, format_fp = lvlm.generation(settings), lvlm.model_config(settings).prompt_format.fingerprint()
    log.info(f"inference: {len(rows)} queries, {' '.join(methods)}, {engine.name} on {engine.device}")
    for name, path in selectors.items():
        log.info(f"  {name}: {path}" + (f" ({chosen['why']})" if name == "v3" else ""))

    def work(key: int) -> list[dict[str, Any]]:
        part, chunk = parts_of[key]
        queries, rows = part.queries, part.rows
        wanted = [(q, job) for q in chunk for job in part.jobs]
        prompts = [
            lvlm.build_prompt(train, queries, int(rows[q]), job["icds"][q], range(len(job["icds"][q])), order)
            for q, job in wanted
        ]
        outcomes = answer_and_score(
            engine, prompts, [queries.answers(int(rows[q])) for q, _ in wanted], generation, format_fp
        )
        answered = [
            sample(queries, train, int(rows[q]), job, job["icds"][q], o)
            for (q, job), o in zip(wanted, outcomes, strict=True)
        ]
        return adaptive.with_lengths(answered, wanted, engine, prompts) if len(parts) > 1 else answered

    parts_of = adaptive.chunks(parts, CHUNK)
    found = shards.sharded_map(
        list(parts_of), work, output, lvlm.parts_key(made_from, engine), "inference", CHUNK,
        sum(len(part.rows) for part in parts),
    )
    if found is None:
        return 0
    samples, *choice = (
        Samples([r for key, (of, _) in parts_of.items() if of is part for r in found[str(key)]], output.parent / name)
        for part, name in zip(parts, ("samples.jsonl", adaptive.CHOICE_FILE), strict=False)
    )
    checkpoint = {k: chosen.get(k) for k in ("path", "phase", "epoch", "why")} if chosen else None
    head = {
        "dataset": paths.dataset_name(settings), "split": settings.eval_split, "n_queries": len(rows),
        "lvlm": {"name": engine.name, "fingerprint": engine.fingerprint}, "checkpoint": checkpoint,
        "v2_checkpoint": str(selectors["v2"]) if "v2" in selectors else None,
    }  # fmt: skip
    metrics = {**head, **inference_metrics.summarize(samples, settings.bootstrap, settings.data_seed)}
    if choice:
        metrics |= adaptive.metrics(settings, samples, choice[0], engine, metrics["comparisons"])
    metrics["run"] = {"settings": _settings_of(settings), "recipe": made_from.describe(), **provenance.provenance()}
    with provenance.writing(output):
        for some in (samples, *choice):
            io.write_text(some.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some.rows))
        for name, rows_of in inference_metrics.official_results(samples).items():
            io.write_json(output.parent / name, rows_of)
        io.write_json(output, metrics, indent=1)
        prompts = sum(len(some.rows) for some in (samples, *choice))
        provenance.stamp(output, made_from, time.monotonic() - started, {"prompts": {"evaluation": prompts}})
    shards.finish(output)
    to_screen = logging.DEBUG if "LEVER_TABLE_LATER" in os.environ else logging.INFO
    log.log(to_screen, inference_metrics.table(metrics))
    if choice:
        log.log(to_screen, adaptive.as_text(metrics["adaptive"]))
    log.info(f"inference: {output} ({time.monotonic() - started:.0f} s)")
    return 0


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
    from lever_plus.data import rivals
    from lever_plus.data.channels import load_tables
    from lever_plus.selectors import PointerSelector
    from lever_plus.selectors.policy import FixedShots
    from lever_plus.stages import lvlm
    from open_mmicl import retriever

    split, most = "train" if queries is train else "val", settings.max_eval_shot
    tables = load_tables(settings, len(train), split, len(queries))
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
        **{
            name: [(None, retriever.SelectorRetriever(name, FixedShots(policy)))]
            for name, policy in policies.items()
        },
    }
    features = functools.cache(lambda of: lvlm.modality_features(settings, split if of == "queries" else "train"))
    jobs: list[dict[str, Any]] = []
    for method in methods:
        if method == adaptive.METHOD:
            jobs.append(adaptive.job(policies["v3"], blocks(tables, rows, pools), most))
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
    import torch

    for start in range(0, len(rows), 256):
        block = slice(start, start + 256)
        pool_emb = tables.candidates[torch.from_numpy(pools[block])]
        yield tables.queries[torch.from_numpy(rows[block])], pool_emb, rows[block], pools[block]


def _from_pools(picker: Any, tables: Any, rows: np.ndarray, pools: np.ndarray, shots: int) -> list[list[int]]:
    """Train rows [Q][at most shots] that a retriever picks from each query's pool."""
    from lever_plus.selectors.policy import picks

    found: list[list[int]] = []
    for query_emb, pool_emb, of_rows, of_pools in blocks(tables, rows, pools):
        pointers = picks(picker.retrieve(query_emb, pool_emb, of_rows.tolist(), shots))
        found += [pool[pointer].tolist() for pool, pointer in zip(of_pools, pointers, strict=True)]
    return found


def lora_tables(settings: InferenceSettings, split: str, num_train: int, num_queries: int) -> Any:
    """What the v2_lora selector sees (:class:`lever_plus.data.channels.Tables`): its own CLIP's item embeddings."""
    from lever_plus.data.channels import Tables
    from lever_plus.data.embeddings import load_embeddings

    items = load_embeddings(paths.candidate_embeddings(settings, "v2_lora"), "v2_lora candidate embeddings", num_train)
    if split == "train":
        return Tables(items, items, False)
    of_queries = paths.query_embeddings(settings, "v2_lora")
    return Tables(load_embeddings(of_queries, "v2_lora query embeddings", num_queries), items, False)


def sample(
    queries: Any, train: Any, row: int, job: dict[str, Any], icds: list[int], outcome: Any
) -> dict[str, Any]:
    """One line of samples.jsonl."""
    group = {} if queries.groups is None else {"group": queries.groups[row]}
    return {
        "question_id": queries.question_id(row), "query_idx": row, "image_id": queries.image_id(row),
        "image": str(queries.image_path(row)), "question": queries.question(row), "answers": list(queries.answers(row)),
        "method": job["method"], "shot": job["shot"], "seed": job["seed"], "icd_ids": icds,
        "icd_questions": [train.question(i) for i in icds], "icd_answers": [train.answer(i) for i in icds],
        "icd_images": [str(train.image_path(i)) for i in icds], "prompt_hash": outcome.prompt_hash,
        "raw_answer": outcome.raw_answer, "cut_answer": outcome.cut_answer, "answer": outcome.answer,
        "score": outcome.score, **group,
    }  # fmt: skip


def _settings_of(settings: InferenceSettings) -> dict[str, Any]:
    from lever_plus import config

    return config.as_dict(settings)


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(InferenceSettings, run, __doc__))
