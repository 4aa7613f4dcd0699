"""v2: train the selector on the best beams of the anchor queries (README, "The flow").

Reads beam data and the train items' embeddings. Each anchor's beams are imitated with weights
softmax(score / V2_BEAM_TAU); labels are positions in the anchor's own pool. The epoch that is best on the
anchors held out by image is kept. NPROC processes: started by torchrun, or by this stage itself.
"""

import shutil
import time
from pathlib import Path

from lever_plus import cli, io, paths
from lever_plus import run as provenance
from lever_plus.cli import log
from lever_plus.config import as_dict
from lever_plus.data.beam_data import BeamData, load_beam_data
from lever_plus.data.rl_data import RlCandidate, RlData, RlQuery
from lever_plus.rl import launch
from lever_plus.settings.selector import TrainV2Settings
from lever_plus.stages.done import skip_if_done
from open_mmicl.errors import MissingInputError

CONTENT = (
    "num_layers", "hidden_dim", "query_update_gate", "gru_state", "mmr", "scorer", "stop", "attn_bias", "tied",
    "init", "zero_stage", "precision", "weight_decay", "grad_clip", "v2_epochs", "v2_lr", "v2_batch_size",
    "v2_beam_tau", "v2_patience", "v2_dropout", "v2_mode", "seed", "data_seed", "val_fraction",
)  # fmt: skip
LORA_CONTENT = ("lora_rank", "lora_alpha", "lora_pool", "embedding", "clip_path")


def beam_path(settings: TrainV2Settings) -> Path:
    """BEAM_DATA_PATH, or the standard file."""
    return Path(settings.beam_data_path) if settings.beam_data_path else paths.beam_data(settings)


def recipe(settings: TrainV2Settings) -> provenance.Recipe:
    """What the result is made from."""
    from lever_plus.rl import inputs

    files = {"beam_data": beam_path(settings)}
    if settings.v2_mode == "frozen":
        files["embeddings"] = inputs.embeddings_path(settings)
    names = CONTENT + (LORA_CONTENT if settings.v2_mode == "lora" else ())
    return provenance.Recipe(files, {name.upper(): getattr(settings, name) for name in names})


def check_inputs(made_from: provenance.Recipe) -> None:
    """See that every input is there.

    Raises:
        MissingInputError: names the file and the command that makes it.
    """
    make = {"beam_data": "bash scripts/generate_data.sh", "embeddings": "bash scripts/export_embeddings.sh"}
    for role, path in made_from.files.items():
        if not path.is_file():
            raise MissingInputError(f"{role.replace('_', ' ')} not found: {path} (make it with: {make[role]})")


def run(settings: TrainV2Settings, dry_run: bool) -> int:
    """Train, or say that it is done."""
    output = paths.v2_checkpoint(settings)
    if settings.v2_mode == "lora":
        output = output.with_name(output.stem + "_lora.ckpt")
    made_from = recipe(settings)
    if dry_run:
        if not skip_if_done(output, made_from, "v2"):
            check_inputs(made_from)
            log.info(f"would train v2 on {beam_path(settings)}: at most {settings.v2_epochs} epochs -> {output}")
        return 0
    with launch.turn(output, settings):
        if skip_if_done(output, made_from, "v2"):
            shutil.rmtree(work_folder(output), ignore_errors=True)  # of a run that was cut off at its very end
            return 0
        check_inputs(made_from)
        if launch.must_spawn(settings.nproc):
            return launch.spawn(settings.nproc, "lever_plus.stages.train_v2", settings)
        if settings.v2_mode == "lora":
            from lever_plus.stages import train_v2_lora

            return train_v2_lora.train(settings, made_from, load_beam_data(beam_path(settings)))
        return train(settings, output, made_from)


def work_folder(output: Path) -> Path:
    """Where a training lies until its checkpoint is written."""
    return output.with_name(output.name + ".work")


def as_rl_data(beams: BeamData) -> RlData:
    """Beams as scored pointers, in the form that groups are built from."""
    queries = []
    for q in beams.queries:
        scored = zip(q.pointers, q.scores, strict=True)
        queries.append(RlQuery(q.query_idx, q.pool_ids, [RlCandidate(p, "beam", beam_score=s) for p, s in scored]))
    return RlData(queries, "best_last", "beam_data", beams.notes)


def train(settings: TrainV2Settings, output: Path, made_from: provenance.Recipe) -> int:
    """Train in this process (one of those of the process group)."""
    from lever_plus.data.embeddings import load_embeddings
    from lever_plus.rl import engine, inputs
    from lever_plus.rl.groups import build_groups
    from lever_plus.rl.objectives import RceObjective
    from lever_plus.rl.trainer import Options, Phase, Trainer

    started = time.perf_counter()
    work = work_folder(output)
    state = launch.agreed_state(work, made_from, settings)
    processes = engine.start_processes(launch.device_of(settings))
    table = load_embeddings(inputs.embeddings_path(settings), "embeddings")
    beams = load_beam_data(beam_path(settings), len(table))
    source = f"beam data {beam_path(settings)}"
    groups = build_groups(as_rl_data(beams), table, lambda candidate, where: candidate.beam_score, source)
    images, images_from = inputs.image_ids(settings, len(table))
    train_groups, val_groups = inputs.split(groups, images, settings)
    log.info(
        f"{source}: {len(train_groups)} anchors to train on, {len(val_groups)} held out by image "
        f"(image ids: {images_from}); pools of {groups.pool_rows.shape[1]}"
    )
    selector = inputs.new_selector(settings, table.shape[1], settings.v2_dropout)
    tau = settings.v2_beam_tau
    options = Options(
        batch_size=settings.v2_batch_size, zero_stage=settings.zero_stage,
        precision="fp32" if settings.precision == "auto" else settings.precision,
        weight_decay=settings.weight_decay, grad_clip=settings.grad_clip, seed=settings.seed,
        patience=settings.v2_patience, keep_checkpoints=1, dropout=settings.v2_dropout, val_tau=tau,
        metric="val_rce_loss", settings=as_dict(settings), provenance=provenance.provenance(),
    )  # fmt: skip
    if state != "running" and processes.first:
        shutil.rmtree(work, ignore_errors=True)
    launch.prepare_folder(work, made_from, "running" if state == "running" else "new", settings, processes)
    trainer = Trainer(work, processes, options, train_groups, val_groups)
    trainer.run(selector, [Phase("v2", settings.v2_epochs, settings.v2_lr, RceObjective(tau, tau))])
    best = trainer.best()
    if processes.first:
        provenance.begin(output)
        with io.atomic_path(output) as temporary:
            shutil.copyfile(trainer.checkpoint("v2", best["epoch"]), temporary)
        shutil.copyfile(work / "train_log.jsonl", output.with_name(output.stem + "_train_log.jsonl"))
        provenance.stamp(output, made_from, time.perf_counter() - started, {"best": best})
        log.info(f"v2: epoch {best['epoch']} is best on the held-out anchors (loss {-best['metric']:.4f}): {output}")
    processes.barrier()
    if processes.first:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(TrainV2Settings, run, __doc__))
