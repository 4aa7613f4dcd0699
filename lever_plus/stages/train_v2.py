"""v2: train the selector, supervised, on beams or on labels (README, "The flow").

V2_MODE=frozen reads beam data: each anchor's beams are imitated with weights softmax(score / V2_BEAM_TAU).
V2_MODE=labels (the label retriever) needs no LVLM: the candidates whose own answer would be right for a train query, by
the annotations, are imitated in proportion to that accuracy. Pointers are positions in the query's own pool. The epoch
that is best on the queries held out by image is kept. NPROC processes: started by torchrun, or by this stage itself.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import cli, io, paths, provenance
from lever_plus.cli import log
from lever_plus.config import deciding
from lever_plus.data import channel_names
from lever_plus.data.beam_data import BeamData, end_where_nothing_is_gained, load_beam_data
from lever_plus.data.dataset import load_split, split_by_image
from lever_plus.data.labels import label_data, label_reward
from lever_plus.data.rl_data import RlCandidate, RlData, RlQuery
from lever_plus.settings.selector import TrainV2Settings
from lever_plus.stages import export_embeddings, launch, lvlm, recipes
from open_mmicl.errors import MissingInputError, UsageError
from open_mmicl.lazy import lazy

channels = lazy("lever_plus.data.channels")
deepspeed_engine = lazy("lever_plus.rl.deepspeed_engine")
objectives = lazy("lever_plus.rl.objectives")
rl_groups = lazy("lever_plus.rl.groups")
rl_trainer = lazy("lever_plus.rl.trainer")
training_inputs = lazy("lever_plus.stages.training_inputs")
train_v2_lora = lazy("lever_plus.stages.train_v2_lora")

VERSIONS = {"frozen": "v2", "labels": "v2", "lora": "v2_lora", "v1": "v1"}


def beam_path(settings: TrainV2Settings) -> Path:
    """BEAM_DATA_PATH, or the standard file."""
    return Path(settings.beam_data_path) if settings.beam_data_path else paths.beam_data(settings)


def recipe(settings: TrainV2Settings) -> provenance.Recipe:
    """What the result is made from."""
    steps, inputs = ("v2",), {}
    if settings.v2_mode == "lora":  # it reads the items themselves
        files, inputs = export_embeddings.clip_inputs(settings)
        word = channel_names.item_word(settings.embedding)
        inputs |= {"dataset": load_split(paths.dataset(settings), "train").fingerprint, "embedding": word}
        steps += ("v2.lora",)
    else:
        files = channel_names.train_files(settings)
    if settings.v2_mode == "labels":
        files |= lvlm.feature_files(settings, "train")
    else:
        files["beam_data"] = beam_path(settings)
        steps += ("v2.beams",)
    if settings.v2_mode == "labels" or selects_by_labels(settings):
        inputs |= _label_inputs(settings)
    if settings.image_ids_path:
        files["image_ids"] = Path(settings.image_ids_path)
    return recipes.recipe(settings, steps, files, inputs, capitals=True)


def _label_inputs(settings: TrainV2Settings) -> dict[str, object]:
    """What decides labels and their pools."""
    train = load_split(paths.dataset(settings), "train").fingerprint
    sampler = paths.sampler_class(settings.sampler)
    return {"dataset": train, "sampler": sampler, **deciding(settings, "v2.pools", declared=True)}


def selects_by_labels(settings: TrainV2Settings) -> bool:
    """Whether epochs are compared by the labels of all held-out train queries, not by the loss on the held-out anchors.

    Many more queries, no prompt; but it takes the data set's annotations, which single steps on own files lack, and
    it says nothing of when to stop.
    """
    if settings.v2_select != "auto":
        return settings.v2_select == "labels"
    return settings.v2_mode in ("frozen", "v1") and not settings.query_emb_path and not settings.stop


def check_inputs(made_from: provenance.Recipe) -> None:
    """See that every input is there.

    Raises:
        MissingInputError: names the file and the command that makes it.
    """
    for role, path in made_from.files.items():
        if not path.is_file() and not (role == "clip" and path.is_dir()):
            make = "bash scripts/generate_data.sh" if role == "beam_data" else "bash scripts/export_embeddings.sh"
            how = "set IMAGE_IDS_PATH to a file" if role == "image_ids" else f"make it with: {make}"
            raise MissingInputError(f"{role.replace('_', ' ')} not found: {path} ({how})")


def is_done(settings: TrainV2Settings) -> bool:
    """Whether the checkpoint is there and made from exactly this, and nothing is left of its training. No torch."""
    output, settings = _output(settings)
    return provenance.status(output, recipe(settings)) == "current" and not work_folder(output).exists()


def _output(settings: TrainV2Settings) -> tuple[Path, TrainV2Settings]:
    """The checkpoint, and the settings as the version takes them."""
    output = paths.v2_checkpoint(settings, VERSIONS[settings.v2_mode])
    return output, dataclasses.replace(settings, num_layers=0) if settings.v2_mode == "v1" else settings


def run(settings: TrainV2Settings, dry_run: bool) -> int:
    """Train, or say that it is done."""
    output, settings = _output(settings)
    made_from = recipe(settings)
    if dry_run:
        if not recipes.skip_if_done(output, made_from, "v2"):
            check_inputs(made_from)
            source = "the annotations" if settings.v2_mode == "labels" else beam_path(settings)
            log.info(f"would train v2 on {source}: at most {settings.v2_epochs} epochs -> {output}")
        return 0
    with launch.turn(output, settings):
        if recipes.skip_if_done(output, made_from, "v2"):
            shutil.rmtree(work_folder(output), ignore_errors=True)  # of a run that was cut off at its very end
            return 0
        check_inputs(made_from)
        if launch.must_spawn(settings.nproc):
            return launch.spawn(settings.nproc, "lever_plus.stages.train_v2", settings)
        if settings.v2_mode == "lora":
            return train_v2_lora.train(settings, made_from, read_beams(settings))
        return train(settings, output, made_from)


def work_folder(output: Path) -> Path:
    """Where a training lies until its checkpoint is written."""
    return output.with_name(output.name + ".work")


def read_beams(settings: TrainV2Settings, num_rows: int | None = None) -> BeamData:
    """The beams to imitate; with STOP they end where a next demonstration gains nothing."""
    beams = load_beam_data(beam_path(settings), num_rows)
    if settings.stop:
        beams.max_shot = max(len(p) for q in beams.queries for p in q.pointers)
        if any(q.totals is None for q in beams.queries):
            log.warning(
                "the beam data have no InfoScore of each step: a beam ends at once where its whole score is 0 or less, "
                "else never (make them with STOP=1 bash scripts/generate_data.sh)"
            )
        beams.queries = [end_where_nothing_is_gained(q) for q in beams.queries]
    return beams


def as_rl_data(beams: BeamData, credit: str = "all", tau: float = 0.5, min_score: float | None = None) -> RlData:
    """Beams as scored pointers, in the form that groups are built from.

    Args:
        credit: ``all`` picks of a beam, or the ``first`` only: beams that begin alike are one pointer, whose score
            gives it the sum of their weights softmax(score / tau).
        min_score: anchors whose best beam has no higher InfoScore are left out: nothing is to be learned there.
    """
    queries = []
    for q in beams.queries:
        if min_score is not None and max(q.scores) <= min_score:
            continue
        scored = dict(zip(q.pointers, q.scores, strict=True))
        if credit == "first":
            firsts: dict[tuple[int, ...], list[float]] = {}
            for pointer, score in scored.items():
                firsts.setdefault(pointer[:1], []).append(score / tau)
            scored = {pointer: tau * float(np.logaddexp.reduce(some)) for pointer, some in firsts.items()}
        candidates = [RlCandidate(pointer, "beam", beam_score=score) for pointer, score in scored.items()]
        queries.append(RlQuery(q.query_idx, q.pool_ids, candidates))
    if not queries:
        raise UsageError(f"V2_MIN_SCORE={min_score} leaves no anchor: no beam has a higher InfoScore")
    return RlData(queries, "best_last", "beam_data", beams.notes, beams.max_shot)


def read_groups(settings: TrainV2Settings, tables: Any) -> tuple[Any, Any, str]:
    """(:class:`Groups` to train on, held-out ones by which epochs are compared, what was read); ``tables``: the
    embeddings (:class:`lever_plus.data.channels.Tables`).

    Raises:
        UsageError: nothing to learn from.
    """
    rows = len(tables.candidates)
    images, images_from = training_inputs.image_ids(settings, rows)

    def split(groups: Any) -> tuple[Any, Any]:
        return rl_groups.split(groups, images, settings.val_fraction, settings.data_seed)

    labels = None
    if settings.v2_mode == "labels" or selects_by_labels(settings):
        train = load_split(paths.dataset(settings), "train")
        asking = train.query_rows
        if settings.v2_mode != "labels":
            _, asking = split_by_image(asking, images, settings.val_fraction, settings.data_seed)
        pools = lvlm.query_pools(settings, train, asking, train, "train")
        found = label_data(train, asking, pools)
        if found.queries:
            labels = rl_groups.build_groups(found, tables.candidates, label_reward, "labels", tables.queries)
    if settings.v2_mode == "labels":
        if labels is None:
            raise UsageError("V2_MODE=labels: no candidate's answer is right for any query; there is nothing to learn")
        return *split(labels), f"labels of {len(labels)} queries (image ids: {images_from})"
    beams = read_beams(settings, rows)
    # The first pick alone says nothing of a pointer's end, and anchors that nothing helps are where to stop at once.
    credit, min_score = ("all", None) if settings.stop else (settings.v2_credit, settings.v2_min_score)
    data = as_rl_data(beams, credit, settings.v2_beam_tau, min_score)
    source = f"beam data {beam_path(settings)}"
    groups = rl_groups.build_groups(
        data, tables.candidates, lambda candidate, where: candidate.beam_score, source, tables.queries, settings.stop
    )
    train_groups, val_groups = split(groups)
    what = f"{source}: {len(train_groups)} anchors to train on (image ids: {images_from})"
    return train_groups, val_groups if labels is None else labels, what


def train(settings: TrainV2Settings, output: Path, made_from: provenance.Recipe) -> int:
    """Train in this process (one of those of the process group)."""
    started = time.perf_counter()
    work = work_folder(output)
    state = launch.agreed_state(work, made_from, settings)
    processes = deepspeed_engine.start_processes(launch.device_of(settings))
    tables = channels.load_tables(channel_names.table_files(settings), None)
    train_groups, val_groups, source = read_groups(settings, tables)
    by_labels = len(val_groups) > 0 and (settings.v2_mode == "labels" or selects_by_labels(settings))
    log.info(f"{source}; {len(val_groups)} queries held out by image; pools of {train_groups.pool_rows.shape[1]}")
    selector = training_inputs.new_selector(settings, tables, settings.v2_dropout)
    if settings.v2_mode != "labels":  # labels are of first picks: they say nothing of when to stop
        selector.trained_to_stop(train_groups.pointers.shape[2])
    tau = 1.0 if settings.v2_mode == "labels" else settings.v2_beam_tau
    options = training_inputs.options(
        settings, batch_size=settings.v2_batch_size, start_decay=settings.v2_start_decay,
        patience=settings.v2_patience, keep_checkpoints=1, dropout=settings.v2_dropout, val_tau=tau,
        metric="val_label_accuracy" if by_labels else "val_rce_loss", provenance=provenance.provenance(),
    )  # fmt: skip
    launch.prepare_work(work, made_from, state, settings, processes)
    trainer = rl_trainer.Trainer(work, processes, options, train_groups, val_groups)
    trainer.run(
        selector, [rl_trainer.Phase("v2", settings.v2_epochs, settings.v2_lr, objectives.RceObjective(tau, tau))]
    )
    best = trainer.best()
    if processes.first:
        provenance.begin(output)
        with io.atomic_path(output) as temporary:
            shutil.copyfile(trainer.checkpoint("v2", best["epoch"]), temporary)
        shutil.copyfile(work / "train_log.jsonl", output.with_name(output.stem + "_train_log.jsonl"))
        launch.keep_curves(work, output)
        provenance.stamp(output, made_from, time.perf_counter() - started, {"best": best})
        why = (f"is best on held-out queries ({trainer.metric_name(best)} {best['metric']:.4f})"
               if len(val_groups) else "is the last one")  # fmt: skip
        log.info(f"v2: epoch {best['epoch']} {why}: {output}")
    launch.remove_work(work, processes)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(TrainV2Settings, run, __doc__))
