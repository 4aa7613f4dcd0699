"""Embedding files: float tensors [N, d], one row per item (contract, "Files")."""

from pathlib import Path
from typing import Any

import torch

from lever_plus import io
from open_mmicl.errors import DamagedInputError

MAKE = "bash scripts/export_embeddings.sh"
MODALITIES = ("image", "text")


def load_embeddings(path: Path, what: str, num_rows: int | None = None) -> torch.Tensor:
    """Read an embedding file.

    Args:
        what: what it is, for the error message, e.g. "query embeddings".
        num_rows: rows it must have.

    Returns: float32 [N, d] on the CPU.

    Raises:
        MissingInputError: no such file. DamagedInputError: not a tensor file, not a dense float [N, d]
        tensor, another number of rows, or a value that is not finite (names row and column).
    """
    return check_embeddings(io.load_torch(Path(path), what, MAKE), Path(path), what, num_rows)


def load_modalities(path: Path, what: str, num_rows: int | None = None) -> dict[str, torch.Tensor]:
    """Read a file of image and question embeddings apart, ``{"image": [N, d], "text": [N, d]}``.

    Raises:
        MissingInputError, DamagedInputError: as :func:`load_embeddings`.
    """
    value = io.load_torch(Path(path), what, MAKE)
    if not isinstance(value, dict) or set(value) != set(MODALITIES):
        raise DamagedInputError(f"{what} {path}: expected the tensors image and text, got {_describe(value)}")
    return {name: check_embeddings(value[name], Path(path), f"{what} ({name})", num_rows) for name in MODALITIES}


def check_embeddings(value: Any, path: Path, what: str, num_rows: int | None = None) -> torch.Tensor:
    """float32 [N, d] of what a file held.

    Raises:
        DamagedInputError: as :func:`load_embeddings`.
    """
    if not io.is_dense(value) or value.dim() != 2 or 0 in value.shape:
        raise DamagedInputError(f"{what} {path}: expected a float tensor [N, d], got {_describe(value)}")
    if num_rows is not None and value.shape[0] != num_rows:
        raise DamagedInputError(f"{what} {path}: {value.shape[0]} rows for {num_rows} items; it belongs to other data")
    value = value.detach().to(torch.float32)
    bad = ~torch.isfinite(value)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        found = f"row {row}, column {column} is {value[row, column].item()} ({int(bad.sum())} such values)"
        raise DamagedInputError(f"{what} {path}: {found}")
    return value


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
