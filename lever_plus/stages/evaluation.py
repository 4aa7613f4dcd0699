"""The work of ICL inference: each query is answered with what every method retrieves, and scored."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from lever_plus import config, io, paths, provenance, shards
from lever_plus.cli import log
from lever_plus.data import methods as methods_table
from lever_plus.experiments import cascade
from lever_plus.experiments.samples import Samples
from lever_plus.experiments.stats import Resampling
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import adaptive, inference_metrics, lvlm, retrieval
from open_mmicl.inferencer import answer_and_score

CHUNK = 16  # queries per unit of work


def evaluate(
    settings: InferenceSettings,
    methods: list[str],
    selectors: dict[str, Path],
    chosen: dict[str, Any],
    output: Path,
    made_from: provenance.Recipe,
) -> int:
    """Retrieve, answer, score, and write the run's files."""
    started = time.monotonic()
    train, queries, rows, pools = retrieval.evaluated(settings)
    parts = [retrieval.Part(queries, rows, pools, settings, methods, selectors, train)]
    cascades = [method for method in methods if method in methods_table.CASCADES]
    if any(methods_table.decides(method) for method in methods):
        parts.append(retrieval.choice_part(settings, methods, selectors, train))
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
        if len(parts) > 1:
            answered = adaptive.with_lengths(answered, wanted, engine, prompts)
        return adaptive.with_certainty(answered, engine, prompts, cascades) if cascades else answered

    parts_of = retrieval.chunks(parts, CHUNK)
    found = shards.sharded_map(
        list(parts_of),
        work,
        output,
        lvlm.parts_key(made_from, engine),
        "inference",
        CHUNK,
        sum(len(part.rows) for part in parts),
    )
    if found is None:
        return 0
    samples, *choice = (
        Samples([r for key, (of, _) in parts_of.items() if of is part for r in found[str(key)]], output.parent / name)
        for part, name in zip(parts, ("samples.jsonl", adaptive.CHOICE_FILE), strict=False)
    )
    more = [row for method in cascades for row in cascade.rows(samples, choice[0], method)]
    samples = Samples([*samples.rows, *more], samples.path)
    checkpoint = {k: chosen.get(k) for k in ("path", "phase", "epoch", "why")} if chosen else None
    metrics = {
        "dataset": paths.dataset_name(settings), "split": settings.eval_split, "n_queries": len(rows),
        "lvlm": {"name": engine.name, "fingerprint": engine.fingerprint}, "checkpoint": checkpoint,
        "v2_checkpoint": str(selectors["v2"]) if "v2" in selectors else None,
        **inference_metrics.summarize(samples, Resampling(settings.bootstrap, settings.data_seed)),
    }  # fmt: skip
    if choice:
        metrics |= adaptive.metrics(settings, samples, choice[0], engine, metrics["comparisons"])
    metrics["run"] = {"settings": config.as_dict(settings), "recipe": made_from.describe(), **provenance.provenance()}
    write(output, metrics, [samples, *choice], made_from, started)
    shards.finish(output)
    to_screen = logging.DEBUG if "LEVER_TABLE_LATER" in os.environ else logging.INFO
    log.log(to_screen, inference_metrics.table(metrics))
    if choice:
        parts_told = {adaptive.METHOD: metrics.get("adaptive"), **metrics.get("cascades", {})}
        for method, part_of in parts_told.items():
            if part_of:
                log.log(to_screen, adaptive.as_text(part_of, method))
    log.info(f"inference: {output} ({time.monotonic() - started:.0f} s)")
    return 0


def write(
    output: Path, metrics: dict[str, Any], samples: list[Samples], made_from: provenance.Recipe, started: float
) -> None:
    """The run's files: the answers, the first of them also in the official evaluation's form, and the metrics."""
    with provenance.writing(output):
        for some in samples:
            io.write_text(some.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some.rows))
        for name, rows_of in inference_metrics.official_results(samples[0]).items():
            io.write_json(output.parent / name, rows_of)
        io.write_json(output, metrics, indent=1)
        # a cascade's line was asked by others; a line with a probability was asked once more for that
        lines = [row for some in samples for row in some.rows if "asked" not in row]
        prompts = len(lines) + sum("answer_prob" in row for row in lines)
        provenance.stamp(output, made_from, time.monotonic() - started, {"prompts": {"evaluation": prompts}})


def sample(queries: Any, train: Any, row: int, job: dict[str, Any], icds: list[int], outcome: Any) -> dict[str, Any]:
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
