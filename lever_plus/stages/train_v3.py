"""v3: train the selector on scored pointers, RCE first, then GRPO (docs/training.md).

Reads RL data, the train items' embeddings and the selector to start from; writes rce_epoch<n>.pt,
grpo_epoch<n>.pt, best.json, train_log.jsonl and run.json. Needs no LVLM and, with RL_DATA_PATH, QUERY_EMB_PATH,
SFT_CKPT and OUTPUT_DIR set, no data set. NPROC processes: started by torchrun, or by this stage itself.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lever_plus import cli, io, paths, provenance
from lever_plus.best import best_checkpoint
from lever_plus.cli import log
from lever_plus.data import channel_names
from lever_plus.rl.rewards import RewardRule
from lever_plus.settings.selector import TrainV3Settings
from lever_plus.stages import launch, recipes
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

checkpoint = lazy("lever_plus.selectors.checkpoint")
deepspeed_engine = lazy("lever_plus.rl.deepspeed_engine")
own_picks = lazy("lever_plus.rl.own_picks")
rl_trainer = lazy("lever_plus.rl.trainer")
selectors = lazy("lever_plus.selectors")
training_inputs = lazy("lever_plus.stages.training_inputs")
v3_phases = lazy("lever_plus.stages.v3_phases")

FAR = 100.0
"""KL to the reference beyond which the scored pointers no longer say what a policy picks."""
STATES = {
    "new": "nothing there yet",
    "running": "going on with what is there",
    "stale": "what is there was made from other inputs or settings and would be moved aside",
    "foreign": "the checkpoints there are of another origin and would be moved aside",
}


def output_dir(settings: TrainV3Settings) -> Path:
    """OUTPUT_DIR, or the standard folder."""
    return Path(settings.output_dir) if settings.output_dir else paths.v3_dir(settings)


def start_path(settings: TrainV3Settings) -> Path | None:
    """The file to start from; None: from scratch."""
    if settings.sft_ckpt == "scratch":
        return None
    return Path(settings.sft_ckpt) if settings.sft_ckpt else paths.v2_checkpoint(settings)


def recipe(settings: TrainV3Settings) -> provenance.Recipe:
    """What the result is made from.

    Raises:
        MissingInputError: a file is not there; names the command that makes it.
    """
    embeddings = channel_names.train_files(settings)
    files = {"rl_data": paths.rl_data(settings), **embeddings}
    make = {"rl_data": "bash scripts/generate_rl_data.sh"} | dict.fromkeys(
        embeddings, "bash scripts/export_embeddings.sh"
    )
    start = start_path(settings)
    if start is not None:
        files["sft"], make["sft"] = start, "bash scripts/train_lever_lm.sh, or set SFT_CKPT=scratch"
    if settings.image_ids_path:
        files["image_ids"], make["image_ids"] = Path(settings.image_ids_path), ""
    for role, path in files.items():
        io.existing(path, role.replace("_", " "), make[role])
    return recipes.recipe(settings, ("v3",), files, {}, capitals=True)


def check_settings(settings: TrainV3Settings, quiet: bool = False) -> None:
    """Refuse what cannot work, and (unless ``quiet``) say which settings the chosen modes do not read.

    Raises:
        UsageError: no epochs at all, or a mode that needs the LVLM without one.
    """
    if settings.rce_epochs + settings.grpo_epochs == 0:
        raise UsageError("RCE_EPOCHS=0 and GRPO_EPOCHS=0: nothing to train; set one of them above 0")
    if quiet:
        return
    defaults = TrainV3Settings()
    idle = list(RewardRule(settings.reward_mode).unused())
    if settings.grpo_mode == "exact":
        idle += ["EPS_LOW", "EPS_HIGH"]
    else:
        idle += ["EXACT_KL"]
    if not settings.kl_adaptive:
        idle += ["KL_TARGET"]
    for name in idle:
        if getattr(settings, name.lower()) != getattr(defaults, name.lower()):
            modes = f"REWARD_MODE={settings.reward_mode} GRPO_MODE={settings.grpo_mode}"
            modes += f" KL_ADAPTIVE={int(settings.kl_adaptive)}"
            log.warning(f"warning: {name} is set, but {modes} does not read it")


def told_finished(state: str, folder: Path) -> bool:
    """Whether the run in ``folder`` is finished; says so."""
    if state == "finished":
        log.info(f"v3: done before with the same inputs and settings; best is {best_checkpoint(folder)}")
    return state == "finished"


def is_finished(state: str, folder: Path) -> bool:
    """:func:`told_finished`; also removes what a run that was cut off at its very end has left."""
    if told_finished(state, folder):
        shutil.rmtree(folder / "state", ignore_errors=True)
    return state == "finished"


def is_done(settings: TrainV3Settings) -> bool:
    """Whether a run of exactly this is finished, and nothing is left of its training. No torch."""
    return is_over(settings, recipe(settings))


def is_over(settings: TrainV3Settings, made_from: provenance.Recipe) -> bool:
    """:func:`is_done` for a given recipe."""
    folder = output_dir(settings)
    return launch.run_state(folder, made_from) == "finished" and not (folder / "state").exists()


def run(settings: TrainV3Settings, dry_run: bool) -> int:
    """Train, or say that it is done."""
    check_settings(settings)
    made_from = recipe(settings)
    folder = output_dir(settings)
    if dry_run:
        state = launch.run_state(folder, made_from)
        if not told_finished(state, folder):
            epochs = f"RCE {settings.rce_epochs}, GRPO {settings.grpo_epochs} epochs"
            log.info(f"dry run: would train v3 in {folder} ({STATES[state]}): {epochs}")
        return 0
    with launch.turn(folder / launch.RUN_FILE, settings):
        state = launch.agreed_state(folder, made_from, settings)
        if is_finished(state, folder):
            return 0
        if launch.must_spawn(settings.nproc):
            return launch.spawn(settings.nproc, __spec__.name if __spec__ else "lever_plus.stages.train_v3", settings)
        return train(settings, folder, made_from, state)


def train(
    settings: TrainV3Settings, folder: Path, made_from: provenance.Recipe, state: str, responder: Any = None
) -> int:
    """Train in this process (one of those of the process group). ``responder`` answers fresh pointers (online)."""
    processes = deepspeed_engine.start_processes(launch.device_of(settings))
    data, groups, images_from, tables = v3_phases.read_groups(settings, may_stop(settings))
    train_groups, val_groups = groups
    log.info(
        f"RL data {paths.rl_data(settings)} (form {data.form}, prompt order {data.prompt_order}): {len(train_groups)} "
        f"queries to train on, {len(val_groups)} held out by image; image ids: {images_from}"
    )
    for note in data.notes:
        log.info(f"  {note}")
    start = start_path(settings)
    if start is None:
        selector = training_inputs.new_selector(settings, tables, 0.0)
        log.info(f"starting from scratch (INIT={settings.init}, TIED={int(settings.tied)})")
    else:
        selector = training_inputs.load_start(settings, start, tables)
        log.info(f"starting from {start}")
    note_lengths(selector, data, train_groups.pointers.shape[2], settings)
    log.info(f"pull towards each phase's first weights: START_DECAY={v3_phases.start_decay(settings):g}")
    launch.prepare_folder(folder, made_from, state, settings, processes)  # every input is read: nothing was touched yet
    options = v3_phases.options(settings, data)
    if settings.checkpoint_metric == "answers":
        options.own_picks = own_picks.OwnPicks(val_groups, needed(responder), processes, selector.config.stop)
        options.metric = own_picks.ACCURACY
    trainer = rl_trainer.Trainer(folder, processes, options, train_groups, val_groups)
    built = v3_phases.build(settings, selector, trainer, responder)
    trainer.run(selector, built)
    asked = {f"online {phase.name}": phase.refresh.prompts() for phase in built if phase.refresh}
    if settings.checkpoint_metric == "answers":
        asked["held-out picks"] = sum(int(record.get(own_picks.PROMPTS, 0)) for record in trainer.history)
    best = trainer.best()
    if processes.first:
        launch.finish(folder, made_from, asked)
        where = f"{best['phase']} epoch {best['epoch']}", trainer.checkpoint(best["phase"], best["epoch"])
        if len(val_groups):
            by = f"best by {trainer.metric_name(best)} on held-out queries"
            log.info(f"{by}: {where[0]} ({best['metric']:.4f}), {where[1]}")
            if settings.checkpoint_metric == "scored" and (told := drift(best, trainer.metric_name(best))):
                log.warning(told)
        else:
            log.info(f"nothing was held out to compare checkpoints by, the last one is taken: {where[0]}, {where[1]}")
    processes.barrier()
    trainer.discard_state()
    return 0


def needed(responder: Any) -> Any:
    """What answers pointers, where it is there.

    Raises:
        UsageError: it is not.
    """
    if responder is None:
        raise UsageError("CHECKPOINT_METRIC=answers asks the LVLM: run it through bash scripts/train_v3.sh")
    return responder


def may_stop(settings: TrainV3Settings) -> bool:
    """Whether the policy that training starts from has a STOP."""
    start = start_path(settings)
    if start is None or not start.is_file():  # the missing file is told by load_start
        return settings.stop
    return bool(checkpoint.load_selector(start, selectors.PointerSelector).config.get("stop"))


def drift(best: Mapping[str, Any], metric: str) -> str | None:
    """What to say of a chosen epoch whose policy prefers pointers that nobody scored; None where its KL is small."""
    if not best.get("kl", 0.0) > FAR:
        return None
    return (
        f"the KL to the reference is {best['kl']:.3g}: probability has left the scored pointers, which {metric} does "
        "not see; CHECKPOINT_METRIC=answers compares epochs by the policy's own picks, a higher KL_BETA holds it"
    )


def note_lengths(selector: Any, data: Any, picks: int, settings: TrainV3Settings) -> None:
    """Note that the policy's STOP is trained with pointers of at most ``picks``, and warn where it cannot be."""
    selector.trained_to_stop(picks)
    if selector.config.stop and data.max_shot is None:
        log.warning(
            "warning: STOP=1, but the RL data hold no pointers of all lengths: nothing in them says when to stop "
            "(make them with STOP=1 bash scripts/generate_rl_data.sh)"
        )
    if settings.reward_shot_cost and not selector.config.stop:
        log.warning("warning: REWARD_SHOT_COST is set, but without STOP=1 the policy cannot pick fewer demonstrations")
    if data.max_shot is not None and not selector.config.stop:
        log.info("the policy cannot stop: it compares pointers of the same length only")


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(TrainV3Settings, run, __doc__))
