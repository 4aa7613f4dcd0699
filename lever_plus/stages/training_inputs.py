"""What the training stages read and check before they train."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lever_plus import io, paths
from lever_plus.cli import log
from lever_plus.config import as_dict
from lever_plus.data.channels import Tables
from lever_plus.data.dataset import load_split
from lever_plus.rl.trainer import Options
from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.settings.selector import SelectorSettings
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError

SCRATCH = "scratch"
SHAPE = tuple(
    field.name
    for field in dataclasses.fields(SelectorConfig)
    if hasattr(SelectorSettings, field.name) and field.name != "encoder"
)
"""What of the selector's shape is a setting of the same name; ENCODER is for channels."""


def image_ids(settings: SelectorSettings, rows: int) -> tuple[np.ndarray, str]:
    """Image id of every train item, and where they come from.

    From IMAGE_IDS_PATH; else from the data set, where its files are there and the embeddings are its own; else
    each item counts as an image of its own.

    Raises:
        MissingInputError, DamagedInputError: IMAGE_IDS_PATH names no file, or one that does not fit.
    """
    if settings.image_ids_path:
        path = Path(settings.image_ids_path)
        ids = _read_ids(path)
        if ids.shape != (rows,):
            raise DamagedInputError(f"image ids {path}: shape {list(ids.shape)} for {rows} items")
        return ids, str(path)
    if not settings.query_emb_path:
        ids = load_split(paths.dataset(settings), "train").image_ids
        if ids.shape != (rows,):
            raise DamagedInputError(f"embeddings: {rows} rows for {len(ids)} train items; they belong to other data")
        return np.asarray(ids), f"data set {settings.dataset}"
    return np.arange(rows), "none given (IMAGE_IDS_PATH): each query counts as an image of its own"


def _read_ids(path: Path) -> np.ndarray:
    if path.suffix != ".npy":
        value = io.load_torch(path, "image ids")
        if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.dim() != 1:
            raise DamagedInputError(f"image ids {path}: expected an integer tensor [N]")
        return value.numpy().astype(np.int64)
    value = io.load_npy(path, "image ids")
    if value.ndim != 1 or value.dtype.kind not in "iu":
        raise DamagedInputError(f"image ids {path}: expected an integer array [N]")
    return value.astype(np.int64)


def shape_of(settings: SelectorSettings) -> dict[str, Any]:
    """The selector's shape as the settings have it, as keyword arguments of its configuration."""
    return {name: getattr(settings, name) for name in SHAPE}


def options(settings: SelectorSettings, **own: Any) -> Options:
    """How to train: what v2 and v3 have in common, and what is their ``own``."""
    return Options(
        zero_stage=settings.zero_stage,
        precision="fp32" if settings.precision == "auto" else settings.precision,
        weight_decay=settings.weight_decay,
        grad_clip=settings.grad_clip,
        seed=settings.seed,
        settings=as_dict(settings),
        **own,
    )


def new_selector(settings: SelectorSettings, tables: Tables, dropout: float) -> PointerSelector:
    """A selector of the settings' shape with its first weights, the same for the same SEED.

    Channels are read by towers; the shapes of one table of item embeddings (TIED, cross-attention) are not theirs.
    """
    torch.manual_seed(settings.seed)
    shape = shape_of(settings)
    if tables.split:
        shape |= {"encoder": settings.encoder, "query_dim": tables.queries.shape[1], "tied": False}
    config = SelectorConfig(input_dim=tables.candidates.shape[1], dropout=dropout, **shape)
    return PointerSelector(config, settings.init)


def load_start(settings: SelectorSettings, path: Path, tables: Tables) -> PointerSelector:
    """The selector of a file, checked against the embeddings and against what the user asked for.

    Raises:
        MissingInputError: no such file. DamagedInputError: damaged, or of another embedding width.
        UsageError: a shape setting that the user gave is not the file's.
    """
    if not path.is_file():
        raise MissingInputError(
            f"SFT checkpoint not found: {path} (make it with: bash scripts/train_lever_lm.sh, "
            f"or set SFT_CKPT to a file, or SFT_CKPT={SCRATCH} to start from untrained weights)"
        )
    selector = PointerSelector.load(path, tables.widths)
    config = selector.config
    defaults, of_the_file = as_dict(type(settings)()), []
    for name in SHAPE if config.encoder == "shared" else [name for name in SHAPE if name != "tied"]:
        wanted, there = getattr(settings, name), getattr(config, name)
        if wanted == there:
            continue
        if wanted != defaults[name.upper()]:
            raise UsageError(f"{name.upper()}={wanted}, but {path} has {there}: unset it, or retrain v2")
        of_the_file.append(f"{name.upper()}={there}")
    if config.encoder != "shared" and settings.encoder not in (config.encoder, defaults["ENCODER"]):
        raise UsageError(f"ENCODER={settings.encoder}, but {path} has {config.encoder}: unset it, or retrain v2")
    if of_the_file:
        log.info(f"the selector's shape is that of {path}: {', '.join(of_the_file)}")
    return selector
