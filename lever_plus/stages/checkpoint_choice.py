"""Which v3 checkpoint inference uses: named by the user, or the best by the validation metric."""

import math
from pathlib import Path
from typing import Any

from lever_plus import io, paths
from lever_plus.settings.inference import InferenceSettings
from open_mmicl.errors import DamagedInputError, MissingInputError

MAKE = "bash scripts/train_v3.sh"


def choose_v3(settings: InferenceSettings) -> dict[str, Any]:
    """{"path", "phase", "epoch", "why"} of the v3 checkpoint.

    ``LEVER_LM_CHECKPOINT_PATH`` names one; else best.json of the experiment's folder decides, for all
    phases (``CHECKPOINT_PHASE=auto``) or one. A folder of the existing project has no best.json; there the lowest
    ``val_loss`` recorded in the checkpoints decides. The newest file is never taken for the best.

    Raises:
        MissingInputError: no such file, no checkpoint of that phase, or a folder without best.json.
    """
    if settings.lever_lm_checkpoint_path:
        path = Path(settings.lever_lm_checkpoint_path)
        if not path.is_file():
            raise MissingInputError(f"LEVER_LM_CHECKPOINT_PATH: no such file: {path} (make one with: {MAKE})")
        return {"path": str(path), **_phase_of(path), "why": "named by LEVER_LM_CHECKPOINT_PATH"}
    folder = paths.v3_dir(settings)
    best_file = folder / "best.json"
    if not best_file.is_file():
        old = _by_val_loss(folder, settings.checkpoint_phase)
        if old is not None:
            return old
        there = sorted(p.name for p in folder.glob("*_epoch*.pt"))
        hint = (
            f"; it holds {', '.join(there[:6])}: name one with LEVER_LM_CHECKPOINT_PATH"
            if there
            else f" (make it with: {MAKE})"
        )
        raise MissingInputError(f"no best.json in {folder}{hint}")
    best = io.read_json(best_file, "best.json", MAKE)
    try:
        entry = best if settings.checkpoint_phase == "auto" else best["per_phase"].get(settings.checkpoint_phase)
        if entry is None:
            raise MissingInputError(
                f"CHECKPOINT_PHASE={settings.checkpoint_phase}: {folder} holds only checkpoints of "
                f"{', '.join(best['per_phase'])}"
            )
        chosen = {"path": str(folder / entry["file"]), "phase": entry["phase"], "epoch": entry["epoch"]}
        where = f"{entry['phase']} epoch {entry['epoch']}"
        why = f"best {best['metric']} on the held-out train queries: {entry['value']:.4f}, {where}"
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedInputError(f"{best_file} is not a best.json ({error!r}); remove it and run {MAKE}") from error
    if not Path(chosen["path"]).is_file():
        raise MissingInputError(f"{chosen['path']}, named by {best_file}, is not there (make it with: {MAKE})")
    return {**chosen, "why": why}


def _by_val_loss(folder: Path, wanted: str) -> dict[str, Any] | None:
    """The checkpoint with the lowest ``metrics["val_loss"]``; None where a file of the phase cannot be read or
    does not record it.
    """
    losses = {}
    for path in sorted(folder.glob("*_epoch*.pt" if wanted == "auto" else f"{wanted}_epoch*.pt")):
        try:
            content = io.load_torch(path, "selector checkpoint", MAKE)
        except DamagedInputError:
            return None
        metrics = content.get("metrics") if isinstance(content, dict) else None
        loss = metrics.get("val_loss") if isinstance(metrics, dict) else None
        if not isinstance(loss, float) or not math.isfinite(loss):
            return None
        losses[path] = loss
    if not losses:
        return None
    path = min(losses, key=losses.__getitem__)
    why = f"lowest val_loss recorded in {len(losses)} checkpoints without best.json: {losses[path]:.4f}"
    return {"path": str(path), **_phase_of(path), "why": why}


def _phase_of(path: Path) -> dict[str, Any]:
    """Phase and epoch from a file name like grpo_epoch3.pt; None where the name does not say."""
    phase, found, epoch = path.stem.partition("_epoch")
    return {"phase": phase if found else None, "epoch": int(epoch) if epoch.isdigit() else None}
