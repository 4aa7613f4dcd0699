"""Which v3 checkpoint inference uses: named by the user, or the best by the validation metric."""

import math
from numbers import Real
from pathlib import Path
from typing import Any

from lever_plus import io, paths
from lever_plus.best import MAKE, PHASES, UNCOMPARED, read_best
from lever_plus.data import channel_names
from lever_plus.data.dataset import load_split
from lever_plus.data.rl_data import load_rl_data
from lever_plus.settings.inference import InferenceSettings
from open_mmicl.errors import MissingInputError
from open_mmicl.lazy import lazy

channels = lazy("lever_plus.data.channels")
lever_plus_selectors = lazy("lever_plus.selectors")
rl_groups = lazy("lever_plus.rl.groups")
torch = lazy("torch")
trainer = lazy("lever_plus.rl.trainer")
validation = lazy("lever_plus.rl.validation")


def choose_v3(settings: InferenceSettings) -> dict[str, Any]:
    """{"path", "phase", "epoch", "why"} of the v3 checkpoint.

    ``LEVER_LM_CHECKPOINT_PATH`` names one; else best.json of the experiment's folder decides, for all
    phases (``CHECKPOINT_PHASE=auto``) or one. A folder of the original Lever-Plus has no best.json: there the only
    checkpoint, else the lowest ``val_loss`` recorded in them, else the highest validation metric on the RL data
    (:func:`_without_best`).
    The newest file is never taken for the best.

    Raises:
        MissingInputError: no such file, no checkpoint of that phase, or a folder without best.json.
        DamagedInputError: a best.json that names no files of its folder.
    """
    if settings.lever_lm_checkpoint_path:
        path = Path(settings.lever_lm_checkpoint_path)
        if not path.is_file():
            raise MissingInputError(f"LEVER_LM_CHECKPOINT_PATH: no such file: {path} (make one with: {MAKE})")
        return {"path": str(path), **_phase_of(path), "why": "named by LEVER_LM_CHECKPOINT_PATH"}
    folder = paths.v3_dir(settings)
    best_file = folder / "best.json"
    if not best_file.is_file():
        wanted = "*" if settings.checkpoint_phase == "auto" else settings.checkpoint_phase
        old = _without_best(sorted(folder.glob(f"{wanted}_epoch*.pt")), settings)
        if old is not None:
            return old
        there = sorted(p.name for p in folder.glob("*_epoch*.pt"))
        if not there:
            raise no_v3(settings)
        held = f"it holds {', '.join(there[:6])}: name one with LEVER_LM_CHECKPOINT_PATH"
        raise MissingInputError(f"no best.json in {folder}; {held}")
    best = read_best(best_file)
    per_phase = best["per_phase"]
    if settings.checkpoint_phase not in ("auto", *per_phase):
        raise MissingInputError(
            f"CHECKPOINT_PHASE={settings.checkpoint_phase}: {folder} holds only checkpoints of {', '.join(per_phase)}"
        )
    entry = per_phase.get(settings.checkpoint_phase, best)
    phase, epoch, path = entry["phase"], entry["epoch"], folder / entry["file"]
    if best["metric"] == UNCOMPARED:
        why = f"the last epoch, {phase} epoch {epoch}: no train query was held out to compare checkpoints by"
    else:
        why = f"best {best['metric']} on the held-out train queries: {entry['value']:.4f}, {phase} epoch {epoch}"
    if not path.is_file():
        raise MissingInputError(f"{path}, named by {best_file}, is not there (make it with: {MAKE})")
    return {"path": str(path), "phase": phase, "epoch": epoch, "why": why}


def no_v3(settings: InferenceSettings) -> MissingInputError:
    """What to say where the v3 folder has no checkpoint: the command that makes one, and the folders that have."""
    folder = paths.v3_dir(settings)
    name = f"EXP_NAME={settings.exp_name} " if settings.exp_name else ""
    start = folder.name.removesuffix(f"_{settings.exp_name}") if name else folder.name
    have = [f for f in sorted(folder.parent.glob(f"{start}*")) if any(f.glob("*_epoch*.pt"))]
    told = [f"EXP_NAME={f.name.removeprefix(start).removeprefix('_')}" for f in have if f.name != start]
    told += ["none (EXP_NAME unset)"] if folder.with_name(start) in have else []
    there = f"; v3 selectors there are: {', '.join(told)}" if told else ""
    return MissingInputError(f"no v3 checkpoint in {folder}{there}; train this one with: {name}{MAKE}")


def _without_best(files: list[Path], settings: InferenceSettings) -> dict[str, Any] | None:
    """The best of some checkpoints that nobody compared; None where nothing can tell.

    Losses of different phases are no common measure: without RL data the last phase's files are compared, and it is
    said.
    """
    if not files:
        return None
    losses = _val_losses(files) if len(files) > 1 else None
    found = None
    if len(files) > 1 and (losses is None or len({_phase_of(path)["phase"] for path in files}) > 1):
        found = _expected_accuracies(files, settings) if paths.rl_data(settings).is_file() else None
    if found is not None:
        values, queries = found
        path = max(values, key=values.__getitem__)
        why = f"of {len(files)} checkpoints without best.json the one with the highest expected VQA accuracy over the "
        why += f"pointers of {queries}: {100 * values[path]:.1f}"
    elif losses is not None:
        phases = list(dict.fromkeys(_phase_of(path)["phase"] for path in files))
        last = max(phases, key=lambda phase: PHASES.index(phase) if phase in PHASES else -1)
        losses = {path: loss for path, loss in losses.items() if _phase_of(path)["phase"] == last}
        path = min(losses, key=losses.__getitem__)
        of = f"the {len(losses)} {last} checkpoints (the last phase" if len(phases) > 1 else f"{len(files)} checkpoints"
        of += "; losses of two phases cannot be compared)" if len(phases) > 1 else ""
        why = f"lowest val_loss recorded in {of} without best.json: {losses[path]:.4f}"
    elif len(files) == 1:
        path, why = files[0], "the only checkpoint there is"
    else:
        return None
    return {"path": str(path), **_phase_of(path), "why": why}


def _val_losses(files: list[Path]) -> dict[Path, float] | None:
    """``metrics["val_loss"]`` of each file; None where one does not record it."""
    losses = {}
    for path in files:
        content = io.load_torch(path, "selector checkpoint", MAKE)
        metrics = content.get("metrics") if isinstance(content, dict) else None
        loss = metrics.get("val_loss") if isinstance(metrics, dict) else None
        if not isinstance(loss, Real) or not math.isfinite(loss):
            return None
        losses[path] = float(loss)
    return losses


def _expected_accuracies(files: list[Path], settings: InferenceSettings) -> tuple[dict[Path, float], str] | None:
    """What training compares checkpoints by (docs/training.md), computed for files that do not record it.

    None where the RL data has no accuracies; else (accuracy of each file, on which queries in words).
    """
    tables = channels.load_tables(channel_names.table_files(settings), None)
    table = tables.candidates
    source, beams = paths.rl_data(settings), paths.beam_data(settings)
    data = load_rl_data(source, len(table), beams if beams.is_file() else None)
    selectors = {path: lever_plus_selectors.PointerSelector.load(path, tables.widths) for path in files}
    stop = any(selector.config.stop for selector in selectors.values())
    groups = rl_groups.build_groups(
        data, table, lambda candidate, where: 0.0, f"RL data {source}", tables.queries, stop
    )
    images = load_split(paths.dataset(settings), "train").image_ids
    train, held_out = rl_groups.split(groups, images, settings.val_fraction, settings.data_seed)
    compared = held_out if len(held_out) else train
    if not bool(torch.isfinite(compared.accuracy[compared.mask]).all()):
        return None
    values = {}
    with torch.inference_mode():
        for path, selector in selectors.items():
            scored = trainer.score_groups(selector, compared)
            values[path] = validation.expected_value(scored.weighed, compared.accuracy, compared.mask)
    return values, "held-out RL queries" if len(held_out) else "RL queries, none of them held out"


def _phase_of(path: Path) -> dict[str, Any]:
    """Phase and epoch from a file name like grpo_epoch3.pt; None where the name does not say."""
    phase, found, epoch = path.stem.partition("_epoch")
    return {"phase": phase if found else None, "epoch": int(epoch) if epoch.isdigit() else None}
