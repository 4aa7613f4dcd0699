"""InfoScore beam search: the best demonstrations of each anchor query, by the LVLM's own judgement.

Draws SAMPLE_NUM anchors from the train split, a pool of CANDIDATE_NUM per anchor, and searches the
demonstrations that most raise the probability of the true answer (v2's training data).
Writes results/<data set>/generated_data/vqa-….json.
"""

import time
from typing import Any

import numpy as np

from lever_plus import cli, paths, provenance, shards
from lever_plus.cli import log
from lever_plus.data.beam_data import BeamData, BeamQuery, save_beam_data
from lever_plus.data.dataset import load_split
from lever_plus.devices import select_gpu
from lever_plus.infoscore import beam_search
from lever_plus.settings.data import BeamSettings
from lever_plus.stages import lvlm, recipes, work
from lever_plus.stages.cost import print_plan


def recipe(settings: BeamSettings) -> provenance.Recipe:
    """What the beam data is made from."""
    return recipes.recipe(settings, ("beam_data",), lvlm.feature_files(settings, "train"), lvlm.prompt_inputs(settings))


def is_done(settings: BeamSettings) -> bool:
    """Whether the beam data is there and made from exactly this. No torch."""
    return provenance.status(paths.beam_data(settings), recipe(settings)) == "current"


def run(settings: BeamSettings, dry_run: bool) -> int:
    """Make the beam data, or say that it is there."""
    output = paths.beam_data(settings)
    if dry_run:
        if recipes.dry_run_done(settings, output, lambda: recipe(settings), "beam data"):
            return 0
        return print_plan(settings, work.beam_data(settings), output)
    made_from = recipe(settings)
    if recipes.skip_if_done(output, made_from, "beam data"):
        return 0
    select_gpu(settings.device, settings.gpu_id)
    return search(settings, output, made_from)


def search(settings: BeamSettings, output: Any, made_from: provenance.Recipe) -> int:
    """Search every anchor and write the file."""
    started = time.monotonic()
    train = load_split(paths.dataset(settings), "train")
    anchors = lvlm.first_queries(train, settings, "SAMPLE_NUM")
    pools = lvlm.query_pools(settings, train, anchors, train, "train")  # (Q, K)
    pool_of = dict(zip(anchors.tolist(), pools, strict=True))
    engine = lvlm.load_engine(settings)
    lvlm.check_texts(engine, train, anchors)
    log.info(f"beam data: {len(anchors)} anchors, pools of {pools.shape[1]}, {engine.name} on {engine.device}")

    def beams_of(row: int) -> dict[str, Any]:
        pool, answer = pool_of[row], train.answer(row)

        def score(contexts: Any) -> np.ndarray:  # contexts come in prompt order
            prompts = [lvlm.build_prompt(train, train, row, pool, c, "best_first") for c in contexts]
            scored = [scores[0] for scores in engine.score(prompts, [[answer]] * len(prompts))]
            return np.array([s.log_prob / (s.n_tokens if settings.length_norm else 1) for s in scored])

        beams = beam_search(
            score, len(pool), settings.beam_size, settings.max_shot, settings.construct_order, settings.infoscore
        )
        made = {"pointers": [list(b.pointer) for b in beams], "scores": [b.score for b in beams]}
        return {**made, "totals": [list(b.totals) for b in beams]} if settings.stop else made

    found = shards.sharded_map(
        anchors.tolist(), beams_of, output, lvlm.parts_key(made_from, engine), "InfoScore beam search"
    )
    if found is None:
        return 0
    queries = [
        BeamQuery(
            query_idx=int(row),
            pool_ids=pool_of[row],
            pointers=[tuple(p) for p in found[str(row)]["pointers"]],
            scores=found[str(row)]["scores"],
            totals=found[str(row)].get("totals"),
        )
        for row in anchors.tolist()
    ]
    prompts = len(anchors) * work.beam_data(settings).per_query
    data = BeamData(queries, settings.construct_order)
    extra = {"prompts": {"beam_data": prompts}, "prompt_order": data.prompt_order}
    with provenance.writing(output):
        save_beam_data(output, data)
        provenance.stamp(output, made_from, time.monotonic() - started, extra)
    shards.finish(output)
    log.info(f"beam data: {output} ({time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(BeamSettings, run, __doc__))
